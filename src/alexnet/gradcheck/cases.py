"""What an operation is checked on: how inputs are drawn, and how large its rounding errors can be.

Points are chosen so that a mistake shows: constants are large enough for every term to count (with alpha = 1e-4
and inputs of size 1 the response norm's whole second term is lost in float32), no two sizes of a shape are equal
where a transposition could hide, and cotangents are random and not contiguous (`ones` hides permutations).

Where a function has kinks (ReLU at 0, pooling at a tie), points keep away from them, or the case says
`smooth=False` and is not differenced: at a kink there is no derivative, only a rule, and the native operation
says which.

The rounding bound. In floating point fl(a op b) = (a op b)(1 + e) with |e| <= u, u half the type's epsilon. A sum
of products whose every term passes at most n such roundings is, in any order of summation,

    |computed - exact|  <=  g(n) * (the same sum over absolute values),      g(n) = n u / (1 - n u)

(Higham, Accuracy and Stability of Numerical Algorithms, lemma 3.1). So each operation states, for its output and
each gradient: the *magnitude* (the formula with absolute values and plus signs), the number of *roundings* n (the
reduction length and a few more), and how many times a result is *stored* in the input's type. Half types are
computed in float32 and rounded when stored, so their bound is (g_float32(n) + stores * u_half) * magnitude. A
library function (exp, log, tanh, a power) counts as FUNCTION roundings: 4 units in the last place.
"""

import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from alexnet import layers

FUNCTION = 8
Options = dict[str, Any]
Tensors = list[Tensor]
Draw = Callable[[torch.Generator], Tensor]


class Rounding(NamedTuple):
    """How far one computed tensor may lie from the exact one, see above."""

    magnitude: Tensor
    roundings: int
    stores: int

    def bound(self, dtype: torch.dtype) -> Tensor:
        half = torch.finfo(dtype).bits == 16
        u = torch.finfo(torch.float32 if half else dtype).eps / 2
        relative = self.roundings * u / (1 - self.roundings * u)
        stored = self.stores * torch.finfo(dtype).eps / 2 if half else 0.0
        # What is too small for the type is flushed to zero; where nothing is rounded, nothing is flushed.
        flushed = torch.finfo(dtype).tiny * (self.magnitude > 0)
        return (relative + stored) * self.magnitude + flushed


class Identity(NamedTuple):
    """An equation the gradients satisfy, whatever the input: left = right up to rounding of size `scale`."""

    name: str
    left: Tensor
    right: Tensor
    scale: Tensor


@dataclass(frozen=True)
class Evaluation:
    """An operation at one point: its output, and the gradient of <dy, output> in every floating input."""

    options: Options
    inputs: Tensors
    dy: Tensor
    y: Tensor
    gradients: Tensors

    @classmethod
    def of(
        cls,
        function: Callable[..., Tensor],
        options: Options,
        inputs: Sequence[Tensor],
        dy: Tensor | None = None,
        backend: str = "reference",
    ) -> "Evaluation":
        """Runs forward and backward; dy=None is `cotangent`."""
        leaves = [x.detach().requires_grad_(x.is_floating_point()) for x in inputs]
        y = function(*leaves, **options, backend=backend)
        dy = cotangent(y) if dy is None else dy
        y.backward(dy)
        gradients = [leaf.grad for leaf in leaves if leaf.grad is not None]
        return cls(options, [x.detach() for x in leaves], dy, y.detach(), gradients)

    @property
    def x(self) -> Tensor:
        return self.inputs[0]

    @property
    def dx(self) -> Tensor:
        return self.gradients[0]


@dataclass(frozen=True)
class Case:
    """One input of one operation. `draws` make the float64 arguments, `options` are the keywords."""

    name: str
    kind: str  # ordinary, awkward, paper; large: paper-sized, and left to full=true
    draws: tuple[Draw, ...]
    options: Options = field(default_factory=dict)
    layout: str = "contiguous"  # gapped, channels_last: how the first argument lies in memory
    smooth: bool = True  # False: the point lies on a kink or a tie

    def inputs(self) -> Tensors:
        """The same numbers every time, drawn from the case's name."""
        generator = torch.Generator().manual_seed(zlib.crc32(self.name.encode()))
        return [draw(generator) for draw in self.draws]


def case(
    name: str, kind: str, *draws: Draw, layout: str = "contiguous", smooth: bool = True, **options: Any
) -> Case:
    return Case(name, kind, draws, options, layout, smooth)


@dataclass(frozen=True)
class Operation:
    """One operation with its cases, its rounding bounds and its identities.

    `rounding` gives a Rounding for the output and each differentiable input of an exact evaluation; `identities` the
    equations that an evaluation must satisfy.
    """

    name: str
    curved: bool
    cases: list[Case]
    rounding: Callable[[Evaluation], list[Rounding]]
    identities: Callable[[Evaluation], list[Identity]]
    # What must not change along a difference: the open units, the winners of the windows.
    pattern: Callable[[Options, Tensors], Tensors] | None = None

    @property
    def function(self) -> Callable[..., Tensor]:
        return getattr(layers, self.name)

    @property
    def small_cases(self) -> list[Case]:
        return [case for case in self.cases if case.kind in ("ordinary", "awkward")]


def cotangent(y: Tensor) -> Tensor:
    """Random, and neither contiguous nor dense; the same numbers on every device for a shape and type."""
    generator = torch.Generator().manual_seed(y.numel())
    dy = torch.randn(y.shape, generator=generator, dtype=torch.float64).to(y.device, y.dtype)
    return gapped(dy) if y.dim() else dy


def gapped(x: Tensor) -> Tensor:
    """The same values as every second element of a larger tensor: neither contiguous nor dense."""
    pairs = x.new_full((*x.shape, 2), float("nan"))
    pairs[..., 0] = x
    return pairs[..., 0]


def normals(*shape: int, times: float = 1.0) -> Draw:
    return lambda g: times * torch.randn(shape, generator=g, dtype=torch.float64)


def off_zero(*shape: int) -> Draw:
    """Normals, moved away from 0 by 0.05: no ReLU changes its mind along a small step."""

    def draw(g: torch.Generator) -> Tensor:
        x = torch.randn(shape, generator=g, dtype=torch.float64)
        return x + 0.05 * x.sign()

    return draw


def separated(*shape: int, window: int = 3, sign: float | None = None) -> Draw:
    """Numbers (N, C, H, W) up to 2 whose sizes differ by a quarter inside any window, so that its winner is beyond
    doubt in every type: pixels that share a window differ in (row, column) modulo its size, and each such class has
    a level of its own. `sign` gives them all that sign, None a random one.
    """

    def draw(g: torch.Generator) -> Tensor:
        n, _, h, w = shape
        level = torch.stack([torch.randperm(window * window, generator=g) for _ in range(n)])
        place = (torch.arange(h)[:, None] % window) * window + torch.arange(w) % window
        size = 2.0 / 1.25 ** level.double()[:, place][:, None].expand(shape)
        jitter = 1 + 0.01 * torch.rand(shape, generator=g, dtype=torch.float64)
        random = torch.randint(0, 2, shape, generator=g) * 2.0 - 1.0
        return size * jitter * (random if sign is None else sign)

    return draw


def few_integers(*shape: int) -> Draw:
    """-1, 0 or 1: zeros and ties everywhere."""
    return lambda g: torch.randint(-1, 2, shape, generator=g).double()
