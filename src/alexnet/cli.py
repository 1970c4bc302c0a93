"""From a command line to one function of one configuration, and the one place where a mistake becomes one line.

A script hands its schema over: `@command("train", Train)` reads conf/train.yaml as a Train. Every group of `conf/` maps
to one dataclass beside its owner (model -> ModelConfig, ...). Because the schema lists every key, a misspelt one is
found, and its closest match is named. This module knows no schema and imports no other room.
"""

import difflib
import errno
import logging
import os
import re
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
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

from alexnet.errors import UserError

PACKAGE = Path(__file__).resolve().parent
# conf/ and scripts/ stand at the top of the repository; a wheel brings them inside the package.
HOME = PACKAGE if (PACKAGE / "conf").is_dir() else PACKAGE.parents[1]
CONF, SCRIPTS = HOME / "conf", HOME / "scripts"


def register(name: str, schema: type[Any]) -> None:
    """Enters a schema where conf/<name>.yaml finds it, as <name>_schema."""
    ConfigStore.instance().store(name=f"{name}_schema", node=schema)


def command(
    name: str, schema: type[Any], config_dir: Path = CONF
) -> Callable[[Callable[[Any], Any]], Callable[[], None]]:
    """Makes a script of a function of one configuration: conf/<name>.yaml and the command line, as a `schema`.

    What the user can put right ends as one line on stderr and exit code 2; HYDRA_FULL_ERROR=1 shows the traceback.
    """

    def decorate(main: Callable[[Any], Any]) -> Callable[[], None]:
        def run(config: DictConfig) -> Any:
            return main(load(config))

        def entry() -> None:
            _quiet()
            register(name, schema)
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


def compose(name: str, schema: type[Any], overrides: Sequence[str], config_dir: Path = CONF) -> Any:
    """conf/<name>.yaml with these overrides, as a `schema`; also inside a script, whose own composition is over.

    Raises UserError, one line, for what the user can put right.
    """
    register(name, schema)
    GlobalHydra.instance().clear()
    try:
        with hydra.initialize_config_dir(str(config_dir), version_base="1.3"):
            return load(hydra.compose(name, list(overrides)))
    except Exception as error:
        line = one_line(error, name, config_dir)
        if line is None:
            raise
        raise UserError(line) from error


def compose_group(group: str, choice: str, schema: type[Any], changes: Mapping[str, Any]) -> Any:
    """conf/<group>/<choice>.yaml as a `schema`, with these values changed. Raises UserError, one line, as `compose`."""
    choices = sorted(path.stem for path in (CONF / group).glob("*.yaml"))
    if choice not in choices:
        raise UserError(f"{group}={choice} must be one of {', '.join(choices)}")
    GlobalHydra.instance().clear()
    try:
        with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
            values = hydra.compose(f"{group}/{choice}")[group]
        return OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(schema), values, dict(changes)))
    except OmegaConfBaseException as error:
        raise UserError(f"{group}={choice}: {str(error).splitlines()[0]}") from error


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
