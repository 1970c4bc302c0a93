"""The schema of each script's configuration, and the one place where a mistake in it becomes one line.

Every group of `conf/` maps to one dataclass beside its owner (model -> ModelConfig, data -> DataConfig, ...); this
file only puts them together. Because the schema lists every key, a misspelt one is found, and its closest match
named.
"""

import difflib
import errno
import logging
import os
import re
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from functools import cache
from pathlib import Path
from typing import Any

import hydra
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import (
    HydraException,
    InstantiationException,
    MissingConfigException,
    OverrideParseException,
)
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from alexnet.bench import Benchmark
from alexnet.claims import Reproduce
from alexnet.data.augment import AugmentConfig
from alexnet.data.module import DataConfig
from alexnet.data.prepare import PrepareConfig
from alexnet.errors import UserError
from alexnet.gradcheck import CheckGradients
from alexnet.layers import Backends
from alexnet.model import ModelConfig
from alexnet.optim import OptimConfig

CONF = Path(__file__).resolve().parents[2] / "conf"


class Watch(StrEnum):
    stop = "stop"
    warn = "warn"
    off = "off"


@dataclass
class Train:
    """scripts/train.py."""

    model: ModelConfig = field(default_factory=ModelConfig)
    backend: Backends = field(default_factory=Backends)
    data: DataConfig = field(default_factory=DataConfig)
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    trainer: dict[str, Any] = field(default_factory=dict)  # arguments of lightning.Trainer
    callbacks: dict[str, Any] = field(default_factory=dict)  # {name: {_target_: ...}}, beside our own
    logger: dict[str, Any] = field(default_factory=dict)  # {name: {_target_: ...}}, beside metrics.csv
    seed: int = 0
    # Names the run's directory; None: the experiment, else <model>-<data>.
    name: str | None = None
    output_dir: str = "outputs"
    data_dir: str = "data"
    # Only run the initialisation probe: will this network leave the plateau at ln(classes)?
    probe: bool = False
    # What happens when the loss still stands at ln(classes) after `watchdog_steps` steps, or is no number.
    watchdog: Watch = Watch.stop
    watchdog_steps: int = 2000
    # Steps between two rows of metrics.csv and between two checkpoints (one is written every epoch in any case).
    log_every: int = 50
    checkpoint_every: int = 200
    # Evaluate val once when training ends.
    evaluate: bool = True
    # Delete what lies in the run's directory and start anew.
    overwrite: bool = False

    def __post_init__(self) -> None:
        if self.log_every < 1 or self.checkpoint_every < 0 or self.watchdog_steps < 1:
            raise UserError(
                f"log_every={self.log_every}, checkpoint_every={self.checkpoint_every} and "
                f"watchdog_steps={self.watchdog_steps} are counts of steps: use positive numbers"
            )


@dataclass
class Evaluate:
    """scripts/evaluate.py."""

    # A checkpoint file or a run directory; several are averaged as the paper's ensembles are.
    checkpoint: Any = None
    views: int = 1
    split: str = "val"
    # The store to evaluate on; None: <data_dir>/<the checkpoint's data set>.
    store: str | None = None
    backend: Backends = field(default_factory=Backends)
    batch_size: int = 256
    device: str = "auto"
    data_dir: str = "data"
    output_dir: str = "outputs"
    # Besides the run's directory, where the JSON goes.
    json: str | None = None

    def __post_init__(self) -> None:
        if not self.checkpoint:
            raise UserError("checkpoint is not given: use checkpoint=<file or run directory>")
        if self.batch_size < 1:
            raise UserError(f"batch_size={self.batch_size} is no count of images: give 1 or more")
        if self.views not in (1, 10):
            raise UserError(f"views={self.views}: choose 1 (centre) or 10 (corners, centre and mirrors)")
        if self.device not in ("auto", "cpu", "cuda", "gpu"):
            raise UserError(f"device={self.device}: choose auto, cpu or gpu")
        if self.split not in ("train", "holdout", "val"):
            raise UserError(f"split={self.split}: choose holdout or val (or train, to measure the gap)")

    @property
    def checkpoints(self) -> list[str]:
        several = isinstance(self.checkpoint, list)
        return [str(c) for c in self.checkpoint] if several else [str(self.checkpoint)]


@dataclass
class PrepareData(PrepareConfig):
    """scripts/prepare_data.py: the fields of PrepareConfig, and the data set whose name they take."""

    data: DataConfig = field(default_factory=DataConfig)
    data_dir: str = "data"


SCHEMAS: dict[str, type[Any]] = {
    "train": Train,
    "evaluate": Evaluate,
    "prepare_data": PrepareData,
    "check_gradients": CheckGradients,
    "reproduce": Reproduce,
    "benchmark": Benchmark,
}


@cache
def register() -> None:
    """Enters the schemas where the YAML files of `conf/` find them."""
    store = ConfigStore.instance()
    for name, schema in SCHEMAS.items():
        store.store(name=f"{name}_schema", node=schema)


def command(name: str, config_dir: Path = CONF) -> Callable[[Callable[[Any], Any]], Callable[[], None]]:
    """Makes a script of a function of one configuration: conf/<name>.yaml and the command line, as a dataclass.

    What the user can put right ends as one line on stderr and exit code 2; HYDRA_FULL_ERROR=1 shows the traceback.
    """

    def decorate(main: Callable[[Any], Any]) -> Callable[[], None]:
        def run(config: DictConfig) -> Any:
            return main(load(config))

        def entry() -> None:
            _quiet()
            register()
            if name == "train":
                sys.argv[1:] = as_chosen(sys.argv[1:])
            app = hydra.main(version_base="1.3", config_path=str(config_dir), config_name=name)
            if os.environ.get("HYDRA_FULL_ERROR") == "1":
                app(run)()
                return
            # Hydra prints several lines and exits with 1 unless it is told to let errors through.
            os.environ["HYDRA_FULL_ERROR"] = "1"
            try:
                app(_in_one_line(run, name, config_dir))()
            except Exception as error:
                _leave(error, name, config_dir)

        return entry

    return decorate


def as_chosen(arguments: Sequence[str]) -> list[str]:
    """The arguments of train.py, with `experiment=none` where a model or a data set is chosen and no recipe.

    The quickstart is what nobody chose: it would halve the width of model=paper, and train on ImageNet for five epochs.
    """
    # data=synthetic is the quickstart's own.
    chosen = [i for i, a in enumerate(arguments) if re.match(r"model=|data=(?!synthetic$)", a)]
    if not chosen or any(re.match(r"\+{0,2}experiment=", a) for a in arguments):
        return list(arguments)
    at = chosen[0]  # beside it: Hydra takes no second group of overrides behind an option
    return [*arguments[:at], "experiment=none", *arguments[at:]]


def _in_one_line(
    run: Callable[[DictConfig], Any], name: str, config_dir: Path
) -> Callable[[DictConfig], Any]:
    """Errors end here, before Hydra adds lines of its own. The mark is taken back meanwhile: processes that the
    script starts must not inherit it."""

    def guarded(config: DictConfig) -> Any:
        del os.environ["HYDRA_FULL_ERROR"]
        try:
            return run(config)
        except Exception as error:
            _leave(error, name, config_dir)
        finally:
            os.environ["HYDRA_FULL_ERROR"] = "1"

    return guarded


def _leave(error: Exception, name: str, config_dir: Path) -> None:
    line = one_line(error, name, config_dir)
    if line is None:
        raise error
    print(f"error: {line}", file=sys.stderr)
    raise SystemExit(2) from None


def load(config: DictConfig) -> Any:
    """The composed configuration as its dataclass; `__post_init__` of every part has run."""
    if HydraConfig.initialized() and config.get("name", "") is None:
        choices = HydraConfig.get().runtime.choices
        experiment = choices.get("experiment")
        named = experiment not in (None, "none")
        config.name = experiment if named else f"{choices['model']}-{choices['data']}"
        if choices.get("trainer") == "debug":  # a few batches must not lie where the real run will
            config.name += "-debug"
    return OmegaConf.to_object(config)


def compose(name: str, overrides: Sequence[str], config_dir: Path = CONF) -> Any:
    """conf/<name>.yaml with these overrides, as its dataclass; also inside a script, whose own composition is over.

    Raises UserError, one line, for what the user can put right.
    """
    register()
    GlobalHydra.instance().clear()
    try:
        with hydra.initialize_config_dir(str(config_dir), version_base="1.3"):
            return load(hydra.compose(name, list(overrides)))
    except Exception as error:
        line = one_line(error, name, config_dir)
        if line is None:
            raise
        raise UserError(line) from error


def one_line(error: Exception, name: str, config_dir: Path = CONF) -> str | None:
    """What, which value, which key and what to do, in one line; None if the error is ours to debug."""
    if isinstance(error, UserError):
        return str(error)
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        file = error.filename2 or error.filename  # of a copy, its target; a write names none
        where = f"for {file}" if file else "on the disk"
        return f"no space left {where}: free some, or set output_dir=... or data_dir=... elsewhere"
    if isinstance(error, OSError) and error.filename:
        return f"{error.filename}: {error.strerror}. Check the path, or set output_dir=... or data_dir=... elsewhere"
    if isinstance(error, InstantiationException) and error.__cause__ is not None:
        return f"{str(error).splitlines()[0]} {str(error.__cause__).splitlines()[0]}"
    if isinstance(error, (HydraException, OmegaConfBaseException)):
        return _explain(error, name, config_dir)
    return None


def _explain(error: Exception, name: str, config_dir: Path) -> str:
    cause: BaseException = error.__cause__ if isinstance(error.__cause__, OmegaConfBaseException) else error
    if isinstance(cause.__cause__, UserError):
        return str(cause.__cause__)
    lines = [line.strip() for line in f"{error}\n{cause}".splitlines() if line.strip()]
    text = str(cause).splitlines()[0] if lines[0].startswith("Error merging override") else lines[0]
    if isinstance(error, OverrideParseException):
        return f"{error.override} cannot be read ({text}): quote it as a whole, 'key=[a,b]'"
    if isinstance(error, MissingConfigException) and error.options:
        wanted = str(error.missing_cfg_file).split("/")[-1]
        return f"{text.rstrip('.')}: {_closest(wanted, list(error.options))}"
    unknown = re.search(r"Could not override '([^']+)'|Key '([^']+)' (?:is )?not in", "\n".join(lines))
    wrong_type = next((line for line in lines if line.startswith(("Value '", "Invalid value"))), None)
    key = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("full_key")), None)
    if wrong_type:
        return f"{key}: {wrong_type}"
    if unknown:
        full = key or unknown.group(1) or unknown.group(2)
        return f"{full} is no key of conf/{name}.yaml: {_closest(full, _known_keys(name, config_dir))}"
    return text if key is None else f"{key}: {text}"


def _known_keys(name: str, config_dir: Path) -> list[str]:
    with hydra.initialize_config_dir(str(config_dir), version_base="1.3"):
        return list(_flat(OmegaConf.to_container(hydra.compose(name), resolve=False)))


def _flat(tree: Any, prefix: str = "") -> list[str]:
    if not isinstance(tree, dict):
        return [prefix]
    below = [_flat(value, f"{prefix}.{key}" if prefix else str(key)) for key, value in tree.items()]
    return [prefix] * bool(prefix) + [key for keys in below for key in keys]


def _closest(wanted: str, known: list[str]) -> str:
    """The key whose last word is the same or much alike, else the most alike; else some of those there are."""
    group, _, word = wanted.rpartition(".")
    last = {key.split(".")[-1]: key for key in known if key.startswith(f"{group}.") or not group}
    alike = difflib.get_close_matches(word, last, n=1, cutoff=0.7)
    if alike:
        return f"did you mean {last[alike[0]]}?"
    if group == "trainer":
        return f"an argument of lightning.Trainer is added with +{wanted}=..."
    close = difflib.get_close_matches(wanted, known, n=1, cutoff=0.7)
    return f"did you mean {close[0]}?" if close else f"choose one of {', '.join(sorted(last or known)[:20])}"


def _quiet() -> None:
    """Silences advice at every start that does not apply: on our loaders, and on a CUDA that nothing here asks for."""
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", message=r".*does not have many workers.*")
    warnings.filterwarnings(
        "ignore", message=r".*sync_dist=True.*"
    )  # our metrics are summed over the devices
    warnings.filterwarnings("ignore", message=r".*LeafSpec.*|.*pynvml.*|.*treespec.*")
