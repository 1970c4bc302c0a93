"""From a command line to one function of one configuration; where errors become one line, and rows become tables.

A script hands its schema over: `@command("train", Train)` reads conf/train.yaml as a Train. Every group of `conf/` maps
to one dataclass beside its owner (model -> ModelConfig, ...). Because the schema lists every key, a misspelt one is
found, and its closest match is named. This module knows no schema and imports no other room.
"""

import ast
import atexit
import errno
import logging
import math
import os
import re
import runpy
import select
import signal
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, NoReturn

import hydra
import yaml
from hydra._internal.utils import get_args_parser
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import (
    HydraException,
    InstantiationException,
    MissingConfigException,
    OverrideParseException,
)
from hydra.types import RunMode
from omegaconf import DictConfig, ListConfig, OmegaConf, open_dict
from omegaconf.errors import ConfigKeyError, OmegaConfBaseException

from alexnet.errors import UserError, closest, did_you_mean

PACKAGE = Path(__file__).resolve().parent
# conf/ and scripts/ stand at the top of the repository; a wheel brings them inside the package.
HOME = PACKAGE if (PACKAGE / "conf").is_dir() else PACKAGE.parents[1]
CONF, SCRIPTS = HOME / "conf", HOME / "scripts"


# From a command line to a function ------------------------------------------------------------------------


def main() -> None:
    """`alexnet <verb> ...` of an installed package: runs scripts/<verb>.py."""
    verbs = {path.stem: path for path in sorted(SCRIPTS.glob("*.py"))}
    verb = sys.argv[1] if len(sys.argv) > 1 else "--help"
    if verb in ("-h", "--help"):
        print("alexnet <verb> [key=value ...]; alexnet <verb> --help lists its keys\n")
        for name, path in verbs.items():
            text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
            print(f"  {name:16s} {re.split('[:?]', text)[0]}")
        return
    if verb not in verbs:
        print(f"error: {verb} must be one of {', '.join(verbs)}", file=sys.stderr)
        raise SystemExit(2)
    sys.argv = [str(verbs[verb]), *sys.argv[2:]]  # processes that a run starts are started by the script
    runpy.run_path(sys.argv[0], run_name="__main__")


def register(name: str, schema: type[Any]) -> None:
    """Enters a schema where conf/<name>.yaml finds it, as <name>_schema."""
    ConfigStore.instance().store(name=f"{name}_schema", node=schema)


def command(
    name: str, schema: type[Any], after_sweep: Callable[[list[Any]], None] | None = None
) -> Callable[[Callable[[Any], Any]], Callable[[], None]]:
    """Makes a script of a function of one configuration: conf/<name>.yaml and the command line, as a `schema`.

    `after_sweep` gets the configurations of a multirun (-m) when all of them are done.
    What the user can put right ends as one line on stderr and exit code 2; HYDRA_FULL_ERROR=1 shows the traceback.
    """

    def decorate(main: Callable[[Any], Any]) -> Callable[[], None]:
        swept: list[Any] = []

        def run(config: DictConfig) -> Any:
            hydra_config = HydraConfig.get()
            loaded = load(config, hydra_config.runtime.choices)
            if hydra_config.mode == RunMode.MULTIRUN:
                swept.append(loaded)
            return main(loaded)

        def run_or_one_line(config: DictConfig) -> Any:
            """Errors end here, before Hydra adds lines of its own."""
            del os.environ["HYDRA_FULL_ERROR"]  # processes that the script starts must not inherit it
            try:
                with _in_one_line(name):
                    return run(config)
            finally:
                os.environ["HYDRA_FULL_ERROR"] = "1"

        @_one_of_several()
        def entry() -> None:
            _quiet()
            register(name, schema)
            sys.argv[1:] = arguments(name, sys.argv[1:])
            app = hydra.main(version_base="1.3", config_path=str(CONF), config_name=name)
            if os.environ.get("HYDRA_FULL_ERROR") == "1":
                app(run)()
                return
            # Hydra prints several lines and exits with 1 unless it is told to let errors through.
            os.environ["HYDRA_FULL_ERROR"] = "1"
            try:
                with _in_one_line(name):
                    _refuse_options(sys.argv[1:])
                    app(run_or_one_line)()
                    if after_sweep and swept:
                        after_sweep(swept)
            finally:
                _nobody_reads()

        return entry

    return decorate


def arguments(name: str, typed: Sequence[str]) -> list[str]:
    """What Hydra gets of a command line. ~ and = are signs of its grammar: a home directory is written out, and a value
    that holds a = is quoted (checkpoint=ck/epoch=1-step=8.ckpt)."""
    at_home = [re.sub(r"(?<==)~(?=/|$)", os.path.expanduser("~"), argument, count=1) for argument in typed]
    # Not what begins with a sign of the grammar, nor the several values of a sweep.
    quoted = [re.sub(r"^([\w.@/+~]+=)([^'\"\[{,(]*=[^,']*)$", r"\1'\2'", argument) for argument in at_home]
    return as_chosen(quoted) if name == "train" else quoted


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


def _refuse_options(typed: Sequence[str]) -> None:
    """Raises UserError for an option that Hydra does not have; argparse would print its usage."""
    parser = get_args_parser()

    def refuse(message: str) -> NoReturn:
        raise UserError(f"{message}: keys are given as key=value, without dashes, and --help lists them")

    parser.error = refuse  # type: ignore[method-assign]
    parser.parse_args(typed)


def _nobody_reads() -> bool:
    """Whether standard output is a pipe whose reader is gone (| head). What is left for it then goes nowhere."""
    with suppress(OSError, ValueError):  # it is no file of the system
        output = select.poll()
        output.register(sys.stdout, 0)
        if output.poll(0):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return True
    return False


@contextmanager
def _one_of_several() -> Iterator[None]:
    """Ends a process of a distributed job without the interpreter's finalization.

    A thread of gloo that then still holds the last reduction aborts the process, in about one of 20 jobs on a busy
    machine, and torchrun ends the others for it (torch 2.14; destroy_process_group does not end the thread).
    """
    left: SystemExit | None = None
    try:
        yield
    except SystemExit as error:
        left = error
    code = (left.code or 0) if left else 0  # SystemExit() is a success too
    distributed = sys.modules.get("torch.distributed")
    if distributed is not None and distributed.is_available() and distributed.is_initialized():
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code if isinstance(code, int) else 1)
    if left:
        raise left


@contextmanager
def _in_one_line(name: str) -> Iterator[None]:
    """An error that the user can put right is printed, and the process ends."""
    try:
        yield
    except Exception as error:
        if isinstance(error, BrokenPipeError) and _nobody_reads():
            raise SystemExit(128 + signal.SIGPIPE) from None  # as the shell says it
        line = one_line(error, name)
        if line is None:
            raise
        line = line.replace("\n", "\\n")  # a file may have a line break in its name
        print(f"error: {line}", file=sys.stderr)
        raise SystemExit(2) from None


def _quiet() -> None:
    """Silences advice at every start that does not apply: on our loaders, and on a CUDA that nothing here asks for."""
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", message=r".*does not have many workers.*")
    # Our metrics are summed over the devices.
    warnings.filterwarnings("ignore", message=r".*sync_dist=True.*")
    warnings.filterwarnings("ignore", message=r".*LeafSpec.*|.*pynvml.*|.*treespec.*")


# From plain data to a dataclass ---------------------------------------------------------------------------


def load(config: DictConfig, choices: Mapping[str, Any] | None = None) -> Any:
    """The composed configuration as its dataclass; `__post_init__` of every part has run.

    `choices` are those of the groups of conf/: a run without a name is named by them.
    """
    if choices and config.get("name", "") is None:
        experiment = choices.get("experiment")
        named = experiment not in (None, "none")
        config.name = experiment if named else f"{choices['model']}-{choices['data']}"
        if choices.get("trainer") == "debug":  # a few batches must not lie where the real run will
            config.name += "-debug"
    _settle(config)
    return OmegaConf.to_object(config)


def compose(name: str, schema: type[Any], overrides: Sequence[str]) -> Any:
    """conf/<name>.yaml with these overrides, as a `schema`: what the script `name` makes of the same command line.

    Also inside a script, whose own composition is over. Raises UserError, one line, for what the user can put right.
    """
    register(name, schema)
    try:
        with _hydra():
            config = hydra.compose(name, arguments(name, overrides), return_hydra_config=True)
        with open_dict(config):
            choices = config.pop("hydra").runtime.choices
        return load(config, choices)
    except Exception as error:
        line = one_line(error, name)
        if line is None:
            raise
        raise UserError(line) from error


def compose_group(group: str, choice: str, schema: type[Any], changes: Mapping[str, Any]) -> Any:
    """conf/<group>/<choice>.yaml as a `schema`, with these values changed. Raises UserError, one line, as `compose`."""
    choices = [path.stem for path in (CONF / group).glob("*.yaml")]
    if choice not in choices:
        raise UserError(f"{group}={choice} is unknown: {did_you_mean(choice, choices)}")
    with _hydra():
        values: Any = OmegaConf.to_container(hydra.compose(f"{group}/{choice}")[group])
    return typed(schema, {**values, **changes}, f"{group}={choice}: ")


def typed(schema: type[Any], values: Mapping[str, Any], where: str = "") -> Any:
    """Plain data as a configuration dataclass, as strictly as a command line; `where` begins what is said of a mistake.

    Raises UserError for an unknown or missing key, or a value of another type.
    """
    try:
        config = OmegaConf.merge(OmegaConf.structured(schema), values)
        _settle(config)
        return OmegaConf.to_object(config)
    except OmegaConfBaseException as error:
        raise UserError(where + _of_a_key(error)) from error


def plain(config: Any) -> dict[str, Any]:
    """A configuration dataclass as plain data, enums by name: what a checkpoint may hold."""
    container = OmegaConf.to_container(OmegaConf.structured(config), resolve=True, enum_to_str=True)
    assert isinstance(container, dict)
    return {str(key): value for key, value in container.items()}


def _settle(node: Any) -> None:
    """Writes out the home directory ~. Raises UserError for nan and infinity, and for a key that was added (+key=...)
    to those of a dataclass."""
    kind = OmegaConf.get_type(node)
    known = [entry.name for entry in fields(kind)] if is_dataclass(kind) else None
    for key in range(len(node)) if isinstance(node, ListConfig) else list(node):
        if known is not None and key not in known:
            raise UserError(f"unknown key {node._get_full_key(key)}: {did_you_mean(str(key), known)}")
        if OmegaConf.is_interpolation(node, key) or OmegaConf.is_missing(node, key):
            continue
        value = node[key]
        if isinstance(value, DictConfig | ListConfig):
            _settle(value)
        elif isinstance(value, str) and (value == "~" or value.startswith("~/")):
            node[key] = os.path.expanduser(value)
        elif isinstance(value, float) and not math.isfinite(value):
            raise UserError(f"{node._get_full_key(key)}={value} must be a finite number")


@contextmanager
def _hydra() -> Iterator[None]:
    """Hydra as for a composition of its own; a script that is composed already stays so."""
    outer = GlobalHydra.instance().hydra
    GlobalHydra.instance().clear()
    try:
        with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
            yield
    finally:
        GlobalHydra.instance().hydra = outer


# From an error to one line --------------------------------------------------------------------------------

ELSEWHERE = "set output_dir=... or data_dir=... elsewhere"
REMEDIES = {  # of Hydra's messages, which stop short of one in their first line
    "Ambiguous value": "write key=[a,b] for a list, or add -m for a run of each",
    "Could not append": "leave out the +",
}
OUT_OF_MEMORY = re.compile(r"out of memory|can't allocate memory|not enough memory", re.IGNORECASE)


def one_line(error: BaseException, name: str) -> str | None:
    """What, which value, which key and what to do, in one line; None if the error is ours to debug."""
    if isinstance(error, UserError):
        return " ".join(str(error).split("\n"))
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        file = error.filename2 or error.filename  # of a copy, its target; a write names none
        return f"no space left {f'for {file}' if file else 'on the disk'}: free some, or {ELSEWHERE}"
    if isinstance(error, OSError) and error.filename:
        return f"{error.filename}: {error.strerror}. Check the path, or {ELSEWHERE}"
    if isinstance(error, MemoryError) or OUT_OF_MEMORY.search(str(error)):
        return f"out of memory ({_said(error)}): lower data.batch_size, model.width or the number of threads"
    if isinstance(error, InstantiationException):
        target = re.search(r"call to target '[\w.]*?(\w+)'", str(error))
        refused = f"{target.group(1)} refuses its arguments: " if target else ""
        return refused + _said(error.__cause__ or error)
    if isinstance(error, HydraException | OmegaConfBaseException):
        return _of_the_configuration(error, name)
    if isinstance(error, yaml.YAMLError):
        return f"not YAML: {' '.join(str(error).split())}"
    # Of torch, Lightning or Python, with the line of ours that led there; or a mistake of our own.
    frames = traceback.extract_tb(error.__traceback__)
    ours = [frame for frame in frames if Path(frame.filename).is_relative_to(PACKAGE)]
    if frames and {"hydra", "omegaconf"} & set(Path(frames[-1].filename).parts):
        return (
            f"the overrides cannot be read ({_said(error)}): write key=value, and group=<choice> for a group"
        )
    if not ours:
        return None
    if ours[-1] is frames[-1]:  # ours, or of compiled code that it called, which leaves no frame
        compiled = isinstance(error, RuntimeError | ValueError | OverflowError)
        if not compiled or (ours[-1].line or "").startswith("raise"):
            return None
    place = f"{Path(ours[-1].filename).relative_to(PACKAGE)}:{ours[-1].lineno}"
    return f"{type(error).__name__} at {place}: {_said(error)} (HYDRA_FULL_ERROR=1 shows the traceback)"


def _of_the_configuration(error: Exception, name: str) -> str:
    cause: BaseException = error.__cause__ if isinstance(error.__cause__, OmegaConfBaseException) else error
    if isinstance(cause.__cause__, UserError):
        return str(cause.__cause__)
    text = _said(error)
    if isinstance(error, OverrideParseException):
        # Hydra's grammar knows signs of its own; a value with them is quoted once for it and once for the shell.
        key, _, value = error.override.partition("=")
        whole = re.fullmatch(r"[\w.+/@-]+", key) and value
        remedy = f"quote the value, {key}='\"{value}\"'" if whole else "write key=value"
        if value.startswith(("[", "{")):
            remedy = f"close every bracket, and quote the whole for the shell, '{key}=[a,b]'"
        return f"{error.override} cannot be read ({text}): {remedy}"
    for start, remedy in REMEDIES.items():
        if text.startswith(start):
            return f"{text.rstrip('.')}: {remedy}"
    if isinstance(error, MissingConfigException) and error.options:
        wanted = str(error.missing_cfg_file).split("/")[-1]
        return f"{text.rstrip('.')}: {did_you_mean(wanted, error.options)}"
    could_not = re.search(r"Could not override '([^']+)'", text)
    is_unknown = could_not or re.search(r"Key '([^']+)'", str(cause))
    if is_unknown and not re.search("Value '|Invalid value", str(cause)):
        key = could_not.group(1) if could_not else _full_key(cause)
        with _hydra():
            known = OmegaConf.to_container(hydra.compose(name), resolve=False)
        return f"unknown key {key}: {_meant(key, _flat(known))}"
    return _of_a_key(cause) if isinstance(cause, OmegaConfBaseException) else text


def _of_a_key(error: BaseException) -> str:
    """OmegaConf's first line behind the key it is about."""
    key = _full_key(error)
    kind = getattr(error, "object_type", None)
    if isinstance(error, ConfigKeyError) and is_dataclass(kind):
        return f"unknown key {key}: {did_you_mean(key.split('.')[-1], [f.name for f in fields(kind)])}"
    return f"{key}: {_said(error)}" if key else _said(error)


def _said(error: BaseException) -> str:
    """The first line of its message that is not empty, else its name."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def _full_key(error: BaseException) -> str:
    return str(getattr(error, "full_key", None) or getattr(error, "key", None) or "")


def _flat(tree: Any, prefix: str = "") -> list[str]:
    """Every key of nested dicts: optim, optim.lr, ..."""
    if not isinstance(tree, dict):
        return [prefix]
    below = [_flat(value, f"{prefix}.{key}" if prefix else str(key)) for key, value in tree.items()]
    return [prefix] * bool(prefix) + [key for keys in below for key in keys]


def _meant(wanted: str, known: list[str]) -> str:
    """The key whose last word is the same or much alike, else the most alike; else those there are."""
    group, _, word = wanted.rpartition(".")
    last = {key.split(".")[-1]: key for key in known if key.startswith(f"{group}.") or not group}
    near = closest(word, last)
    if near:
        return f"did you mean {last[near]}?"
    if group == "trainer":
        return f"an argument of lightning.Trainer is added with +{wanted}=..."
    return did_you_mean(wanted, known if closest(wanted, known) else last or known)


# From rows to a table -------------------------------------------------------------------------------------

WIDTH = 100  # columns of a terminal


def table(rows: Sequence[Sequence[str]], right: Sequence[int] = ()) -> str:
    """Rows of cells, the first of them the head, as lines of at most WIDTH columns; `right`: columns of numbers.

    Where a line would be too long, the first column loses the front of its cells, down to 20 columns.
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    widths[0] = min(widths[0], max(20, WIDTH - sum(widths[1:]) - 2 * (len(widths) - 1)))
    cut = [[c if len(c) <= widths[0] else f"…{c[1 - widths[0] :]}" for c in row[:1]] for row in rows]
    signed = [-w if i in right else w for i, w in enumerate(widths)]
    return "\n".join(columns([*first, *row[1:]], signed) for first, row in zip(cut, rows, strict=True))


def columns(cells: Sequence[str], widths: Sequence[int], gap: str = "  ") -> str:
    """One line: every cell in its width, on the right of it where the width is negative."""
    placed = [c.rjust(-w) if w < 0 else c.ljust(w) for c, w in zip(cells, widths, strict=True)]
    return gap.join(placed).rstrip()


def markdown(rows: Sequence[Sequence[str]]) -> str:
    """Rows of cells, the first of them the head, as a table of Markdown."""
    head, *body = rows
    lines = [head, ["---"] * len(head), *body]
    return "\n".join("| " + " | ".join(c.replace("|", "\\|") for c in line) + " |" for line in lines)
