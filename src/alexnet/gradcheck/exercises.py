"""The exercises: each operation's backward, the update rule and the initialisation, to be written by the reader.

    python scripts/check_gradients.py exercise=list                what there is, what it teaches, what is done
    python scripts/check_gradients.py exercise=relu                writes exercises/relu.py
    python scripts/check_gradients.py exercise=relu hint=1         the first of three hints
    python scripts/check_gradients.py mine=exercises/relu.py       proves what the reader wrote: reader.py

A file is made from the layer's own source: its equations up to the derivation, its forward, and the head of its
backward. So an exercise cannot disagree with the code that it is about.
"""

import ast
import inspect
import json
import re
from collections.abc import Callable
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
from alexnet.layers.from_file import file_hash
from alexnet.layers.pair import PAIRS

DIRECTORY = Path("exercises")


def small(*shape: int) -> Draw:
    """Halves between -2 and 2: numbers to calculate with on paper."""
    return lambda g: torch.randint(-4, 5, shape, generator=g).double() / 2


def distinct(*shape: int) -> Draw:
    """Whole numbers that are all different: every window has one winner."""

    def draw(g: torch.Generator) -> Tensor:
        numbers = torch.arange(1, int(torch.tensor(shape).prod()) + 1).double()
        return numbers[torch.randperm(len(numbers), generator=g)].reshape(shape)

    return draw


def labels(*targets: int) -> Draw:
    return lambda g: torch.tensor(targets)


def example(name: str, *draws: Draw, **options: Any) -> Case:
    return case(name, "ordinary", *draws, **options)


@dataclass(frozen=True)
class Exercise:
    """What the reader is to write, three hints, and examples small enough for paper, the smallest first."""

    name: str
    teaches: str
    hints: tuple[str, str, str]
    examples: tuple[Case, ...] = ()
    # Paragraphs after the derivation that the forward needs, by their first words.
    also: tuple[str, ...] = ()
    # What is asked for, where the docstring of the module would give it away.
    task: str = ""

    @property
    def module(self) -> ModuleType:
        return {"update_rule": optim, "initialisation": model}.get(self.name) or import_module(
            f"alexnet.layers.{self.name}"
        )

    @property
    def is_operation(self) -> bool:
        return self.name not in ("update_rule", "initialisation")

    @property
    def functions(self) -> tuple[str, ...]:
        """What the file defines; the last one is the reader's to write."""
        rules = {"update_rule": ("krizhevsky_update",), "initialisation": ("initial_std",)}
        return rules.get(self.name, (f"{self.name}_forward", f"{self.name}_backward"))


_NORM: Options = {"size": 3, "alpha": 3.0, "beta": 0.75, "k": 1.0}
EXERCISES = (
    Exercise(
        "linear",
        "the chain rule as a sum over paths; a sum of outer products",
        (
            "x[n,i] enters y[n,o] for every o. w[o,i] enters y[n,o] for every n. b[o] enters y[n,o] for every n.",
            "dy[n,o] times the factor of each path: w[o,i] for x, x[n,i] for w, 1 for b. Then add over the index that "
            "the result does not have.",
            "Shapes decide: dx (N, I) from dy (N, O) and w (O, I); dw (O, I) from dy (N, O) and x (N, I); db (O).",
        ),
        (
            example("one image, 2 inputs, 2 outputs", small(1, 2), small(2, 2), small(2)),
            example("2 images, 3 inputs, 2 outputs", small(2, 3), small(2, 3), small(2)),
            example("2 x 2 images, 2 inputs, 2 outputs", small(2, 2, 2), small(2, 2), small(2)),
        ),
    ),
    Exercise(
        "relu",
        "a slope of 0 or 1; reading it from the output instead of the input",
        (
            "An element of x reaches the loss through its own y only.",
            "The slope of max(x, 0) is 1 for x > 0 and 0 for x < 0; at 0 the choice is 0.",
            "dx is dy where y > 0, and 0 elsewhere. The sign of y says the same as the sign of x.",
        ),
        (example("4 numbers", lambda g: torch.tensor([[-1.0, 0.0, 0.5, 2.0]], dtype=torch.float64)),),
    ),
    Exercise(
        "tanh",
        "a derivative that the output knows already",
        (
            "An element of x reaches the loss through its own y only.",
            "y = sinh / cosh. Use the quotient rule, and cosh^2 - sinh^2 = 1.",
            "dx = dy times a polynomial of degree 2 in y.",
        ),
        (example("3 numbers", small(1, 3)),),
    ),
    Exercise(
        "dropout",
        "a random factor that is drawn once and used twice",
        (
            "An element of x reaches the loss through its own y only, and only if it was kept.",
            "The slope is scale where the unit was kept, and 0 where it was dropped: it does not depend on x.",
            "dx looks like y, with dy in the place of x. `keep` is what the forward saved.",
        ),
        (
            example("2 images, 3 units", small(2, 3), p=0.5, key=7),
            example("3 images, 4 units, a quarter dropped", small(3, 4), p=0.25, key=7, first_row=2),
        ),
    ),
    Exercise(
        "cross_entropy",
        "maximum likelihood; softmax minus truth",
        (
            "x[n,k] reaches the loss of image n through lse[n], and through its own term q[n,k] x[n,k].",
            "The derivative of log sum exp is the softmax p. The derivative of -q x by x is -q. The mean divides by N.",
            "dx = dloss (p - q) / N for the mean; without / N for the sum. q is the smoothed one-hot target.",
        ),
        (
            example("one image, 3 classes", small(1, 3), labels(1)),
            example("2 images, 3 classes", small(2, 3), labels(2, 0)),
            example("2 images, 3 classes, smoothed", small(2, 3), labels(2, 0), label_smoothing=0.3),
        ),
    ),
    Exercise(
        "max_pool2d",
        "a gradient that is routed; windows that overlap",
        (
            "A pixel reaches the loss through every window that it won: up to four of them.",
            "Where a pixel won, the slope is 1. `place` says which of the R S pixels of a window won; for ties='all' "
            "compare x with y again.",
            "Go over the R S places of a window. Each step adds dy, where that place won, to a strided plane of dx: "
            "adds, because the next step may meet the same pixel. Cut off the padding at the end.",
        ),
        (
            example("one map of 3 x 5, 2 windows", distinct(1, 1, 3, 5), kernel_size=3, stride=2),
            example("one map of 4 x 4, padded", distinct(1, 1, 4, 4), kernel_size=3, stride=2, padding=1),
            example("zeros and ones, all ties win", lambda g: torch.randint(2, (1, 1, 3, 5), generator=g).double(),
                    kernel_size=3, stride=2, ties="all"),
            example("rectangular windows", distinct(1, 1, 4, 3), kernel_size=(3, 2), stride=(1, 1)),
        ),
        also=("Ties", "What must be kept", "Size"),
    ),
    Exercise(
        "local_response_norm",
        "a quotient whose denominator many outputs share; the reflected window",
        (
            "x[c] is the numerator of its own y[c], and it stands inside s[i] of every map i whose window holds c.",
            "dy[c]/dx[c] with s held fixed; dy[i]/ds[i]; ds[i]/dx[c]. Multiply along each path and add the paths.",
            "dx = gain - competition. The gain is dy s^-beta. The competition is a constant times x[c] times a window "
            "sum; its window is W reflected, which matters when n is even.",
        ),
        (
            example("one image, 3 maps", small(1, 3), **_NORM),
            example("one image, 4 maps, even window", small(1, 4), **{**_NORM, "size": 2}),
            example("one image, 4 maps, 2 towers", small(1, 4), **_NORM, groups=2),
        ),
    ),
    Exercise(
        "same_map_norm",
        "the same derivation over pixels: a symmetric window",
        (
            "x[p] is the numerator of its own y[p], and it stands inside s[q] of every pixel q whose square holds p.",
            "As in local_response_norm, with n^2 for n. The square is symmetric: its reflection is itself.",
            "dx = t - constant x (square sum of t x / s), with t = dy s^-beta.",
        ),
        (example("one map of 3 x 3", small(1, 1, 3, 3), **{**_NORM, "alpha": 9.0}),),
    ),
    Exercise(
        "relu_lrn_pool",
        "composition: the gradient passes the same functions in reverse order",
        (
            "If y = h(g(f(x))), then dx = f'(g'(h'(dy))), each with what its own forward saved.",
            "You may import the three backward functions (alexnet.layers.relu, local_response_norm, max_pool2d). What "
            "is handed on: relu_y, norm_x, norm_s, place, pool_x, pool_y; then the constants norm, pool, order.",
            "Two orders, two chains: pool, norm, ReLU for the paper's; ReLU, pool, norm for that of the 2012 code.",
        ),
        (
            example("one image, 2 maps of 3 x 3", small(1, 2, 3, 3), **_NORM, order="relu_lrn_pool"),
            example("the same, order of the 2012 code", small(1, 2, 3, 3), **_NORM, order="lrn_pool_relu"),
        ),
    ),
    Exercise(
        "update_rule",
        "momentum, weight decay, and where the learning rate stands",
        (
            "v collects the gradients; w moves by v. Both change in place: use the methods that end in _.",
            "The new v has three terms: the old v, the decay of w, and the gradient g.",
            "v <- momentum v - decay lr w - lr g, and then w <- w + v, for each tensor of the three lists.",
        ),
        task="The update rule of section 5, with the learning rate inside the velocity. w, g, v: lists of tensors "
        "(weights, gradients, velocities); w and v are changed in place.",
    ),
    Exercise(
        "initialisation",
        "variance: how large a sum of many small random terms is",
        (
            "A unit adds fan_in terms w x. The variance of a sum of independent terms is the sum of their variances.",
            "normal: as configured. he: a ReLU halves the mean square of what passes it, so fan_in var(w) must be 2. "
            "fan_in: the variance of the sum must be that of the unit of 2012, whose fan-in is PAPER_FAN_IN[i].",
            "A standard deviation is the square root of a variance: each scheme is a root of (something / fan_in).",
        ),
        task="The standard deviation of the initial weights of layer i (conv1 to conv5, fc6 to fc8) with fan_in inputs "
        "a unit, for config.init: Init.normal (as config.init_std[i] says), Init.fan_in (scaled so that a sum is as "
        "large as in the network of 2012) and Init.he (the mean square stays the same through layers with a ReLU).",
    ),
    Exercise(
        "conv2d",
        "weight sharing; im2col and its adjoint; a convolution as one matrix product",
        (
            "A weight enters every window of every image. A pixel enters every window that covers it.",
            "With the columns X of the forward: dW = dY' X and dX = dY W as in `linear`. What is left is the adjoint "
            "of unfold: each pixel adds up the gradients of its copies.",
            "dw: one product per piece of the batch, added up. dx: go over the R S taps, and add a plane of dX to a "
            "strided plane of dx; then cut off the padding. db: a sum over images, rows and columns.",
        ),
        (
            example("one map of 3 x 3, 2 x 2 kernel", small(1, 1, 3, 3), small(1, 1, 2, 2), small(1)),
            example("2 images, stride 2, padding 1", small(2, 1, 3, 3), small(1, 1, 2, 2), small(1), stride=2,
                    padding=1),
            example("two towers", small(1, 2, 2, 3), small(2, 1, 2, 2), small(2), groups=2),
            example("zeros on the left only", small(1, 1, 2, 3), small(1, 1, 2, 2), small(1), padding=(1, 0, 0, 0)),
        ),
        also=("Groups",),
    ),
)  # fmt: skip
NAMES = tuple(exercise.name for exercise in EXERCISES)


def exercise_named(name: str) -> Exercise:
    """Raises UserError for a name that is none."""
    if name not in NAMES:
        raise UserError(f"exercise={name} must be one of list, {', '.join(NAMES)}")
    return EXERCISES[NAMES.index(name)]


# ---- the list, the hints --------------------------------------------------------------------------------------


def listing(output_dir: str) -> str:
    """The exercises in the recommended order, what each teaches, and which are done."""
    lines = []
    for number, exercise in enumerate(EXERCISES, start=1):
        done = state(exercise.name, output_dir)
        lines.append(f"{number:2}  {exercise.name:20} {done:8} {exercise.teaches}")
    return "\n".join([*lines, "", "python scripts/check_gradients.py exercise=linear writes the first one"])


def state(name: str, output_dir: str) -> str:
    """proven: the file is the one that passed; begun: there is a file; empty otherwise."""
    path, record = DIRECTORY / f"{name}.py", record_path(name, output_dir)
    if not path.exists():
        return ""
    if record.exists():
        content = json.loads(record.read_text())
        if content["passed"] and content["sha256"] == file_hash(str(path)):
            return "proven"
    return "begun"


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
    module = exercise.module
    *given, wanted = (getattr(module, name) for name in exercise.functions)
    sources = [inspect.getsource(function).rstrip() for function in given]
    sources.append(f'{_head(wanted)}\n    raise NotImplementedError("write {wanted.__name__}")')
    parts = [f"{_task(exercise, path)}\n\n{imports(sources, module)}", *sources]
    if exercise.is_operation:
        parts.append(_worked_example(exercise))
    return "\n\n\n".join(parts) + "\n"


def _task(exercise: Exercise, path: Path | str) -> str:
    wanted, path = exercise.functions[-1], path or DIRECTORY / f"{exercise.name}.py"
    subject = title(exercise.module) if exercise.is_operation else exercise.name.replace("_", " ") + "."
    train = f"    python scripts/train.py backend.{exercise.name}={path}\n" if exercise.is_operation else ""
    return (
        f'"""Exercise {NAMES.index(exercise.name) + 1} of {len(EXERCISES)}: {subject}\n\n'
        f"{fill(f'Write {wanted}. It teaches: {exercise.teaches}.', 115)}\n\n"
        f"Three hints, the proof{', and a training run with your gradient' if train else ''}:\n\n"
        f"    python scripts/check_gradients.py exercise={exercise.name} hint=1\n"
        f"    python scripts/check_gradients.py mine={path}\n"
        f'{train}\n{fill(exercise.task, 115) or _equations(exercise)}\n"""'
    )


def _equations(exercise: Exercise) -> str:
    """The docstring of the layer without its derivation, which is what the reader is to find."""
    blocks = re.split(r"\n\n(?! )", inspect.cleandoc(exercise.module.__doc__ or ""))[1:]
    first = next(i for i, block in enumerate(blocks) if block.startswith(("How ", "Backward")))
    shown = [block for block in blocks[first:] if block.startswith(("Shapes", *exercise.also))]
    return "\n\n".join(blocks[:first] + shown)


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
    defined, used = set(), set()
    for source in sources:
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.FunctionDef):
                defined.add(node.name)
            elif isinstance(node, ast.Name):
                used.add(node.id)
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
    case = exercise.examples[0]
    arguments = forward_arguments(exercise.name, case)
    y = PAIRS[exercise.name, "reference"].forward(*arguments)[0]
    lines = "".join(f"        {literal(argument)},\n" for argument in arguments)
    return (
        f'if __name__ == "__main__":  # a number to check the forward by: {case.name}\n'
        f"    arguments = (\n{lines}    )\n    y, *saved = {exercise.functions[0]}(*arguments)\n"
        f"    print(y)  # {' '.join(str(y).split())}"
    )


def forward_arguments(name: str, case: Case) -> tuple[Any, ...]:
    """The tensors and constants that the forward of a pair gets for a case."""
    seen: list[tuple[Any, ...]] = []
    reference = PAIRS[name, "reference"]

    def forward(*arguments: Any) -> Any:
        seen.append(arguments)
        return reference.forward(*arguments)

    operation = by_name(name)
    with mock.patch.dict(PAIRS, {(name, "reference"): reference._replace(forward=forward)}):
        operation.function(*case.inputs(), **case.options, backend="reference")
    return seen[0]


def literal(argument: Any) -> str:
    """A tensor or a constant as Python source."""
    if not isinstance(argument, Tensor):
        return repr(tuple(argument)) if isinstance(argument, tuple) else repr(argument)
    dtype = "" if argument.dtype in (torch.int64, torch.bool) else ", dtype=torch.float64"
    return f"torch.tensor({argument.tolist()}{dtype})"
