"""The exercises: each operation's backward, the update rule and the initialisation, to be written by the reader.

    python scripts/check_gradients.py exercise=list                what there is, what it teaches, what is done
    python scripts/check_gradients.py exercise=relu                writes exercises/relu.py
    python scripts/check_gradients.py exercise=relu hint=1         the first of three hints
    python scripts/check_gradients.py mine=exercises/relu.py       proves what the reader wrote: reader.py

Their order and words stand in exercises.md. A file is made from the layer's own source: its equations up to the
derivation, its forward, and the head of its backward. So an exercise cannot disagree with the code that it is about.
"""

import ast
import inspect
import json
import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from textwrap import dedent, fill
from types import ModuleType
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from alexnet import model, optim
from alexnet.errors import UserError
from alexnet.gradcheck.cases import Case, Draw, Options, case
from alexnet.gradcheck.derivation import title
from alexnet.gradcheck.operations import by_name
from alexnet.gradcheck.rules import START, UPDATE
from alexnet.layers.from_file import file_hash
from alexnet.layers.pair import PAIRS

DIRECTORY = Path("exercises")
RULES: dict[str, tuple[ModuleType, tuple[str, ...], str]] = {  # the exercises that are about no operation
    "update_rule": (optim, ("krizhevsky_update",), UPDATE),
    "initialisation": (model, ("initial_std",), START),
}

# ---- examples small enough for paper, the smallest first --------------------------------------------------------


def small(*shape: int) -> Draw:
    """Halves between -2 and 2: numbers to calculate with on paper."""
    return lambda g: torch.randint(-4, 5, shape, generator=g).double() / 2


def distinct(*shape: int) -> Draw:
    """Whole numbers that are all different: every window has one winner."""
    return lambda g: (1 + torch.randperm(math.prod(shape), generator=g)).double().reshape(shape)


def labels(*targets: int) -> Draw:
    return lambda g: torch.tensor(targets)


def example(name: str, *draws: Draw, **options: Any) -> Case:
    return case(name, "ordinary", *draws, **options)


_NORM: Options = {"size": 3, "alpha": 3.0, "beta": 0.75, "k": 1.0}
EXAMPLES: dict[str, tuple[Case, ...]] = {
    "linear": (
        example("one image, 2 inputs, 2 outputs", small(1, 2), small(2, 2), small(2)),
        example("2 images, 3 inputs, 2 outputs", small(2, 3), small(2, 3), small(2)),
        example("2 x 2 images, 2 inputs, 2 outputs", small(2, 2, 2), small(2, 2), small(2)),
    ),
    "relu": (example("4 numbers", lambda g: torch.tensor([[-1.0, 0.0, 0.5, 2.0]], dtype=torch.float64)),),
    "tanh": (example("3 numbers", small(1, 3)),),
    "dropout": (
        example("2 images, 3 units", small(2, 3), p=0.5, key=7),
        example("3 images, 4 units, a quarter dropped", small(3, 4), p=0.25, key=7, first_row=2),
    ),
    "cross_entropy": (
        example("one image, 3 classes", small(1, 3), labels(1)),
        example("2 images, 3 classes", small(2, 3), labels(2, 0)),
        example("2 images, 3 classes, smoothed", small(2, 3), labels(2, 0), label_smoothing=0.3),
    ),
    "max_pool2d": (
        example("one map of 3 x 5, 2 windows", distinct(1, 1, 3, 5), kernel_size=3, stride=2),
        example("one map of 4 x 4, padded", distinct(1, 1, 4, 4), kernel_size=3, stride=2, padding=1),
        example("zeros and ones, all ties win", lambda g: torch.randint(2, (1, 1, 3, 5), generator=g).double(),
                kernel_size=3, stride=2, ties="all"),
        example("rectangular windows", distinct(1, 1, 4, 3), kernel_size=(3, 2), stride=(1, 1)),
    ),
    "local_response_norm": (
        example("one image, 3 maps", small(1, 3), **_NORM),
        example("one image, 4 maps, even window", small(1, 4), **{**_NORM, "size": 2}),
        example("one image, 4 maps, 2 towers", small(1, 4), **_NORM, groups=2),
    ),
    "same_map_norm": (example("one map of 3 x 3", small(1, 1, 3, 3), **{**_NORM, "alpha": 9.0}),),
    "relu_lrn_pool": (
        example("one image, 2 maps of 3 x 3", small(1, 2, 3, 3), **_NORM, order="relu_lrn_pool"),
        example("the same, order of the 2012 code", small(1, 2, 3, 3), **_NORM, order="lrn_pool_relu"),
    ),
    "conv2d": (
        example("one map of 3 x 3, 2 x 2 kernel", small(1, 1, 3, 3), small(1, 1, 2, 2), small(1)),
        example("2 images, stride 2, padding 1", small(2, 1, 3, 3), small(1, 1, 2, 2), small(1), stride=2,
                padding=1),
        example("two towers", small(1, 2, 2, 3), small(2, 1, 2, 2), small(2), groups=2),
        example("zeros on the left only", small(1, 1, 2, 3), small(1, 1, 2, 2), small(1), padding=(1, 0, 0, 0)),
    ),
}  # fmt: skip
# Paragraphs after the derivation that the forward needs, by their first words.
NEEDED = {"max_pool2d": ("Ties", "What must be kept", "Size"), "conv2d": ("Groups",)}


@dataclass(frozen=True)
class Exercise:
    """What the reader is to write: a section of exercises.md, and what belongs to it."""

    name: str
    teaches: str
    task: str  # empty where the docstring of the module says it
    hints: list[str]
    module: ModuleType
    functions: tuple[str, ...]  # what the file defines; the last one is the reader's to write
    where: str  # the operation, or the rule of rules.py, that it is about
    examples: tuple[Case, ...]

    @property
    def is_operation(self) -> bool:
        return self.name not in RULES


def _sections() -> Iterator[Exercise]:
    text = (Path(__file__).parent / "exercises.md").read_text(encoding="utf-8")
    for section in text.split("\n## ")[1:]:
        name, teaches, *task, hints = section.strip().split("\n\n")
        asked = " ".join("".join(task).removeprefix("Task: ").split())
        words = [" ".join(hint.split()) for hint in re.split(r"^\d\. ", hints, flags=re.MULTILINE)[1:]]
        if name in RULES:
            module, functions, where = RULES[name]
        else:
            module, where = import_module(f"alexnet.layers.{name}"), name
            functions = (f"{name}_forward", f"{name}_backward")
        yield Exercise(name, teaches, asked, words, module, functions, where, EXAMPLES.get(name, ()))


EXERCISES = tuple(_sections())
NAMES = [exercise.name for exercise in EXERCISES]


def exercise_named(name: str) -> Exercise:
    """Raises UserError for a name that is none."""
    if name not in NAMES:
        raise UserError(f"exercise={name} must be one of list, {', '.join(NAMES)}")
    return EXERCISES[NAMES.index(name)]


# ---- the list, the hints --------------------------------------------------------------------------------------


def listing(output_dir: str) -> str:
    """The exercises in the recommended order, what each teaches, and which are done.

    proven: the file is the one that passed; begun: there is a file.
    """
    lines = []
    for number, exercise in enumerate(EXERCISES, start=1):
        path, record = DIRECTORY / f"{exercise.name}.py", record_path(exercise.name, output_dir)
        state = "begun" if path.exists() else ""
        if state and record.exists():
            content = json.loads(record.read_text())
            if content["passed"] and content["sha256"] == file_hash(str(path)):
                state = "proven"
        lines.append(f"{number:2}  {exercise.name:20} {state:8} {exercise.teaches}")
    return "\n".join([*lines, "", "python scripts/check_gradients.py exercise=linear writes the first one"])


def record_path(name: str, output_dir: str) -> Path:
    """Where the last proof of the reader's file is written."""
    return Path(output_dir) / "check_gradients" / "mine" / f"{name}.json"


def hint(name: str, number: int) -> str:
    """Raises UserError for a number other than 1, 2, 3."""
    if number not in (1, 2, 3):
        raise UserError(f"hint={number} must be 1, 2 or 3")
    following = f"\n\nNot enough? hint={number + 1}" if number < 3 else ""
    return f"{fill(f'Hint {number} of 3. {exercise_named(name).hints[number - 1]}', 100)}{following}"


# ---- the file -------------------------------------------------------------------------------------------------


def write_skeleton(name: str, into: str | None) -> Path:
    """Writes the exercise's file and returns its path. Raises UserError where one lies already."""
    path = Path(into) if into else DIRECTORY / f"{name}.py"
    if path.exists():
        raise UserError(f"{path} exists and is not overwritten: give another path, into=<path>")
    text = skeleton(exercise_named(name), path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


def skeleton(exercise: Exercise, path: Path | str = "") -> str:
    """The text of the file: the task, the equations, the forward, the head of what is to be written."""
    *given, wanted = (getattr(exercise.module, name) for name in exercise.functions)
    sources = [inspect.getsource(function).rstrip() for function in given]
    sources.append(f'{_head(wanted)}\n    raise NotImplementedError("write {wanted.__name__}")')
    if exercise.is_operation:
        subject, task = title(exercise.module), _equations(exercise)
    else:
        subject, task = exercise.name.replace("_", " ") + ".", fill(exercise.task, 115)
    path = path or DIRECTORY / f"{exercise.name}.py"
    train = (
        f"    python scripts/train.py backend.{exercise.name}={path} name=mine\n"
        if exercise.is_operation
        else ""
    )
    docstring = (
        f'"""Exercise {NAMES.index(exercise.name) + 1} of {len(EXERCISES)}: {subject}\n\n'
        f"{fill(f'Write {wanted.__name__}. It teaches: {exercise.teaches}.', 115)}\n\n"
        f"Three hints, the proof{', and a training run with your gradient' if train else ''}:\n\n"
        f"    python scripts/check_gradients.py exercise={exercise.name} hint=1\n"
        f"    python scripts/check_gradients.py mine={path}\n"
        f'{train}\n{task}\n"""'
    )
    parts = [f"{docstring}\n\n{imports(sources, exercise.module)}", *sources]
    if exercise.is_operation:
        parts.append(_worked_example(exercise))
    return "\n\n\n".join(parts) + "\n"


def _equations(exercise: Exercise) -> str:
    """The docstring of the layer without its derivation, which is what the reader is to find."""
    blocks = re.split(r"\n\n(?! )", inspect.cleandoc(exercise.module.__doc__ or ""))[1:]
    first = next(i for i, block in enumerate(blocks) if block.startswith(("How ", "Backward")))
    needed = ("Shapes", *NEEDED.get(exercise.name, ()))
    return "\n\n".join([*blocks[:first], *(block for block in blocks[first:] if block.startswith(needed))])


def _head(function: Callable[..., Any]) -> str:
    """The source of a function up to its body; its docstring too, if that names shapes."""
    source = dedent(inspect.getsource(function))
    definition = ast.parse(source).body[0]
    assert isinstance(definition, ast.FunctionDef)
    first = definition.body[0]
    names_shapes = "->" in (ast.get_docstring(definition) or "")
    return "\n".join(source.splitlines()[: first.end_lineno if names_shapes else first.lineno - 1])


def imports(sources: list[str], module: ModuleType) -> str:
    """The import lines for every name that the sources take from their module."""
    nodes = [node for source in sources for node in ast.walk(ast.parse(source))]
    defined = {node.name for node in nodes if isinstance(node, ast.FunctionDef)}
    used = {node.id for node in nodes if isinstance(node, ast.Name)}
    lines, ours = ["import torch", "from torch import Tensor"], []
    for name in sorted((used - defined - {"torch", "Tensor"}) & set(vars(module))):
        value = getattr(module, name)
        if isinstance(value, ModuleType):
            alias = "" if value.__name__ == name else f" as {name}"
            lines.append(f"import {value.__name__}{alias}")
        elif name == "Any":
            lines.append("from typing import Any")
        else:
            ours.append(name)
    text = "\n".join(sorted(lines, key=lambda line: (line.startswith("from"), line)))
    return text + (f"\n\nfrom {module.__name__} import {', '.join(ours)}" if ours else "")


def _worked_example(exercise: Exercise) -> str:
    """Code that runs the forward on the smallest example, with the output that it must print."""
    smallest, reference = exercise.examples[0], PAIRS[exercise.name, "reference"]
    # The tensors and constants that the forward of the pair gets.
    forward = mock.Mock(wraps=reference.forward)
    with mock.patch.dict(PAIRS, {(exercise.name, "reference"): reference._replace(forward=forward)}):
        by_name(exercise.name).function(*smallest.inputs(), **smallest.options, backend="reference")
    arguments = forward.call_args.args
    lines = "".join(f"        {_literal(argument)},\n" for argument in arguments)
    y = reference.forward(*arguments)[0]
    return (
        f'if __name__ == "__main__":  # a number to check the forward by: {smallest.name}\n'
        f"    arguments = (\n{lines}    )\n    y, *saved = {exercise.functions[0]}(*arguments)\n"
        f"    print(y)  # {' '.join(str(y).split())}"
    )


def _literal(argument: Any) -> str:
    """A tensor or a constant as Python source."""
    if not isinstance(argument, Tensor):
        return repr(tuple(argument)) if isinstance(argument, tuple) else repr(argument)
    dtype = "" if argument.dtype in (torch.int64, torch.bool) else ", dtype=torch.float64"
    return f"torch.tensor({argument.tolist()}{dtype})"
