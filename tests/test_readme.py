"""The README keeps its word: every command composes, every path and every choice it names exists."""

import re
import shlex
from pathlib import Path

import hydra
import pytest

from alexnet.cli import CONF, as_chosen, load
from alexnet.training.config import Train, compose_train
from tests.conftest import SCHEMAS

ROOT = CONF.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```bash\n(.*?)```", README, re.S)
COMMANDS = [
    line.split("  #")[0].strip() for block in BLOCKS for line in block.splitlines() if line and line[0] != "#"
]
SCRIPTS = [c for c in COMMANDS if c.startswith("python scripts/")]
EXAMPLES = [  # of each script's --help: what stands before a gap of two spaces
    f"python scripts/{path.stem}.py {re.split('  +', line.strip())[0]}".replace("$\\$", "$")
    for path in sorted(CONF.glob("*.yaml"))
    for block in re.findall(r"Examples:\n(.*?)\n\n", path.read_text(encoding="utf-8"), re.S)
    for line in block.splitlines()
]


@pytest.mark.parametrize("command", [*SCRIPTS, *EXAMPLES])
def test_every_command_of_the_readme_and_of_help_composes(command: str) -> None:
    _, script, *overrides = shlex.split(command)
    assert (ROOT / script).is_file()
    name = Path(script).stem
    sweep = "-m" in overrides
    if name == "reproduce":  # the script does the same, and says why
        overrides = [re.sub(r"^claim=(.*)", r"claims=[\1]", o) for o in overrides]
    if name == "train":
        overrides = as_chosen(overrides)
    plain = [re.sub(r"=([^\[,]*),.*", r"=\1", o) if sweep else o for o in overrides if o != "-m"]
    with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
        config = load(hydra.compose(name, plain))
    assert isinstance(config, SCHEMAS[name])
    if isinstance(config, Train) and config.data.name == "synthetic":
        assert config.augment.crop_px <= 64  # the side of its images


def test_shell_scripts_of_the_readme_exist_and_are_executable() -> None:
    shell = [c for c in COMMANDS if c.startswith("./")]
    assert len(shell) >= 2
    assert all((ROOT / c).stat().st_mode & 0o100 for c in shell)


def test_every_path_the_readme_shows_exists() -> None:
    links = re.findall(r"\]\((?!http)([^)#]+)\)", README)
    assert [link for link in links if not (ROOT / link).exists()] == []
    layers = re.findall(r"`(\w+\.py)`", README.split("## Reading order")[1].split("##")[0])
    found = {p.name for p in (ROOT / "src").rglob("*.py")}
    assert [name for name in layers if name not in found] == []


@pytest.mark.parametrize("group", ["model", "data", "augment", "optim", "trainer", "logger", "experiment"])
def test_the_table_of_choices_is_complete(group: str) -> None:
    row = next(line for line in README.splitlines() if line.startswith(f"| `{group}` |"))
    named = set(re.findall(r"`(\w+)`", row)) - {group}
    hidden = {"claims_smoke", "claims_cpu", "claims_gpu"}  # recipes of scripts/reproduce.py, not of a reader
    assert named == {p.stem for p in (CONF / group).glob("*.yaml")} - hidden


def test_no_placeholder_is_left() -> None:
    assert re.findall(r"@[A-Z]+@", README) == []


def test_the_commands_for_several_nodes_are_of_keys_that_exist() -> None:
    """They begin with torchrun and srun, so the commands above are without them."""
    torchrun = README.split("torchrun --nnodes=2")[1].split("`")[0]
    sbatch = (ROOT / ".github/examples/train.sbatch").read_text().replace("\\\n", " ")
    for text in (torchrun, sbatch):
        config = compose_train(text.split("scripts/train.py")[1].split())
        assert (config.trainer["num_nodes"], config.trainer["devices"]) == (2, 4)
