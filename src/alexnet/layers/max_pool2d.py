"""Overlapping max pooling (section 3.4: windows 3 wide, 2 apart, after conv1, conv2 and conv5).

Forward, for every image and channel alone. Window (p,q) starts at row u p - pad and column v q - pad; W(p,q) is
the set of its pixels that lie inside the image:

    y[p,q] = max_{(i,j) in W(p,q)} x[i,j]

Backward. Near an x without ties, y[p,q] *is* one of the pixels, the winner, so

    ∂y[p,q]/∂x[i,j] = 1 if (i,j) is the winner of window (p,q), else 0

and a pixel, given dy = ∂L/∂y of the loss L, collects from every window it won (windows overlap, so one pixel can win up
to four of them; at 3 wide and 2 apart, that is the rule rather than the exception for a large response):

    dx[i,j] = sum_{(p,q) : (i,j) in W(p,q)} dy[p,q] [(i,j) wins (p,q)]

Read as a sum over the place (r,s) that pixel (i,j) takes inside the window, i = u p + r - pad, j = v q + s - pad,
this is R S steps. In step (r,s) every window has exactly one candidate and every pixel at most one window: a
(P,Q) plane added to a strided plane of dx. So nothing is written twice in one step, no atomics are needed, and
the sum has the same order every time: a *gather*. Steps overlap, hence `+=`, not `=`.

Ties. If m pixels share the maximum, y has no derivative there, and a rule has to choose:

    ties="first"   the first in row-major order wins alone: torch, Caffe (pooling_layer.cpp:178)
    ties="all"     each of the m wins and receives all of dy: 2012 (conv_util.cu:1559 of the public successor:
                   every pixel *equal* to the maximum takes the window's gradient), so m times dy flows on

On a constant image, 3x3 windows send on 9 dy under `all` and 1 dy under `first`. In the network it hardly
matters: zeros after a ReLU tie often, but the ReLU's own gradient is zero there.

What must be kept: under `first` the winner's place r S + s inside its window, one byte per output (torch keeps
eight); under `all` input and output, to be compared again in the backward.

Size. Rounded down, only whole windows count; rounded up (`ceil_mode`, the 2012 rule) a last window may reach over
the edge, provided it starts inside the image or its left padding (torch's rule; without padding, 2012's too):

    P = floor or ceil of (H + 2 pad - R) / u, plus 1;   one less if (P - 1) u >= H + pad

Padding is never chosen: it is -inf here, and the first pixel inside the image wins until one is larger. A NaN counts as
larger than every number, as in torch, and equals nothing:

    in the window               y       dy goes to, ties="first"            ties="all"
    a NaN                       NaN     the last NaN; compiled: the first   no pixel
    +inf                        +inf    the first +inf                      every +inf; native: no pixel
    -inf in every pixel         -inf    the first pixel                     every pixel; native: no pixel

Shapes: x (N, C, H, W), y (N, C, P, Q), RxS window, stride (u, v).
"""

from collections.abc import Iterator
from types import EllipsisType
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from alexnet.errors import UserError
from alexnet.layers.arguments import Two, check_choice, check_real, no_longer, two
from alexnet.layers.backend import Backend, checked, pair_for
from alexnet.layers.pair import PAIRS, Pair, apply_pair, memory_format, wide

Size = tuple[int, ...]  # the last two of a shape
Sides = tuple[int, int, int, int]  # (left, right, top, bottom), the order of F.pad
Index = tuple[EllipsisType, slice, slice]
TIES = ("first", "all")
MOST_PLACES = 128  # places of a window that an int8 can name: up to 11x11


class Pool(NamedTuple):
    """The windows, in the order of the functions below."""

    kernel: Two
    stride: Two
    padding: Two
    ceil_mode: bool
    ties: str


def max_pool2d_forward(
    x: Tensor, kernel: Two, stride: Two, padding: Two, ceil_mode: bool, ties: str
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """x (N, C, H, W) -> y (N, C, P, Q); keeps (place, -, -) for ties="first", (-, x, y) for ties="all"."""
    P, Q = output_size(x.shape[-2:], kernel, stride, padding, ceil_mode)
    x_padded = F.pad(x, _sides(x.shape[-2:], (P, Q), kernel, stride, padding), value=float("-inf"))
    y = torch.full_like(x_padded[..., :P, :Q], float("-inf"))
    place = torch.zeros_like(y, dtype=torch.int8) + first_inside(P, Q, kernel, stride, padding, x.device)
    for k, window in enumerate(_windows((P, Q), kernel, stride)):
        candidate = x_padded[window]
        if ties == "first":
            place.masked_fill_((candidate > y) | candidate.isnan(), k)
        y = torch.maximum(y, candidate)
    return (y, place, None, None) if ties == "first" else (y, None, x, y)


def max_pool2d_backward(
    dy: Tensor,
    place: Tensor | None,
    x: Tensor | None,
    y: Tensor | None,
    size: Size,
    kernel: Two,
    stride: Two,
    padding: Two,
    ceil_mode: bool,
    ties: str,
) -> Tensor:
    """dy (N, C, P, Q) and what the forward kept -> dx (N, C, H, W); `size` is (H, W)."""
    (H, W), windows = size, list(_windows(dy.shape[-2:], kernel, stride))
    left, right, top, bottom = sides = _sides(size, dy.shape[-2:], kernel, stride, padding)
    shape = (*dy.shape[:-2], top + H + bottom, left + W + right)
    layout = memory_format(next(kept for kept in (place, y) if kept is not None))
    dx = torch.empty(shape, dtype=wide(dy.dtype), device=dy.device, memory_format=layout).zero_()
    for window, won in zip(windows, _winners(place, x, y, windows, sides), strict=True):
        dx[window] += torch.where(won, dy, 0)
    return dx[..., top : top + H, left : left + W].to(dy.dtype)


def _winners(
    place: Tensor | None, x: Tensor | None, y: Tensor | None, windows: list[Index], sides: Sides
) -> Iterator[Tensor]:
    """For each place (r,s): does the window's winner, or one of them, stand there? (N, C, P, Q) bool."""
    if place is not None:
        return (place.eq(k) for k in range(len(windows)))
    assert x is not None
    assert y is not None
    x_padded = F.pad(x, sides, value=float("-inf"))
    return (x_padded[window].eq(y) for window in windows)


def output_size(size: Size, kernel: Two, stride: Two, padding: Two, ceil_mode: bool) -> Two:
    """(H, W) -> (P, Q); rounded up, a window that would start beyond the image is dropped."""
    P, Q = (_windows_along(*along, ceil_mode) for along in zip(size, kernel, stride, padding, strict=True))
    return P, Q


def _windows_along(size: int, kernel: int, stride: int, padding: int, ceil_mode: bool) -> int:
    count = (size + 2 * padding - kernel + (stride - 1 if ceil_mode else 0)) // stride + 1
    return count - 1 if ceil_mode and (count - 1) * stride >= size + padding else count


def _windows(windows: Size, kernel: Two, stride: Two) -> Iterator[Index]:
    """For each place (r,s), row-major: the index of the (P,Q) pixels of the padded image that stand there."""
    P, Q = windows
    for r in range(kernel[0]):
        for s in range(kernel[1]):
            yield ..., slice(r, r + stride[0] * P, stride[0]), slice(s, s + stride[1] * Q, stride[1])


def _sides(size: Size, windows: Size, kernel: Two, stride: Two, padding: Two) -> Sides:
    """(left, right, top, bottom): right and bottom as far as the last window reaches."""
    (top, left), (bottom, right) = (
        padding,
        (max(0, (windows[a] - 1) * stride[a] + kernel[a] - size[a] - padding[a]) for a in (0, 1)),
    )
    return left, right, top, bottom


def first_inside(P: int, Q: int, kernel: Two, stride: Two, padding: Two, device: torch.device) -> Tensor:
    """(P, Q) int8: the place of each window's first pixel that is not padding."""
    r = (padding[0] - stride[0] * torch.arange(P, device=device)).clamp(min=0)
    s = (padding[1] - stride[1] * torch.arange(Q, device=device)).clamp(min=0)
    return (r[:, None] * kernel[1] + s).to(torch.int8)


PAIRS["max_pool2d", "reference"] = Pair(max_pool2d_forward, max_pool2d_backward)


def max_pool2d(
    input: Tensor,
    kernel_size: int | Two,
    stride: int | Two | None = None,
    padding: int | Two = 0,
    dilation: int | Two = 1,
    ceil_mode: bool = False,
    *,
    ties: str = "first",
    backend: str = Backend.reference,
) -> Tensor:
    """`torch.nn.functional.max_pool2d` with the gradients above. input (N, C, H, W) or (C, H, W) -> (..., P, Q).

    ties: "first" (torch) or "all" (2012), see above. Raises UserError for dilation other than 1, windows of more
    than 128 places, padding over half a window and images without a whole window.
    """
    kernel, stride, padding, dilation = _windows_of(kernel_size, stride, padding, dilation)
    check_pool(input, kernel, stride, padding, dilation, ceil_mode, ties)
    stride = no_longer(stride, (input.shape[-2] + 2 * padding[0], input.shape[-1] + 2 * padding[1]))
    pair = pair_for("max_pool2d", backend)
    if pair is None:
        return _native(input, kernel, stride, padding, ceil_mode, ties)
    pool = Pool(kernel, stride, padding, ceil_mode, ties)
    return apply_pair(pair, (input,), pool, of_backward=(input.shape[-2:], *pool))


def _native(x: Tensor, kernel: Two, stride: Two, padding: Two, ceil_mode: bool, ties: str) -> Tensor:
    y = F.max_pool2d(x, kernel, stride, padding, 1, ceil_mode)
    if ties == "first":
        return y
    # Torch has no such rule. The value is y; the sum of all winners is added for its gradient, at value zero.
    y = y.detach()
    x_padded = F.pad(x, _sides(x.shape[-2:], y.shape[-2:], kernel, stride, padding), value=float("-inf"))
    windows = [x_padded[window] for window in _windows(y.shape[-2:], kernel, stride)]
    winners = torch.stack([torch.where(window == y, window, 0) for window in windows]).sum(0)
    # inf - inf is NaN: an infinite maximum keeps its value, and here no pixel receives its gradient.
    return torch.where(y.isfinite(), y + (winners - winners.detach()), y)


def _windows_of(kernel_size: Any, stride: Any, padding: Any, dilation: Any) -> tuple[Two, Two, Two, Two]:
    kernel = two(kernel_size, "kernel_size")
    stride = kernel if stride is None else two(stride, "stride")
    return kernel, stride, two(padding, "padding"), two(dilation, "dilation")


def check_pool(
    x: Tensor, kernel: Two, stride: Two, padding: Two, dilation: Two, ceil_mode: bool, ties: str
) -> None:
    """Raises UserError for what no pair pools."""
    check_window(kernel, stride, padding, dilation, ties)
    check_real("max_pool2d", x)
    if x.dim() not in (3, 4) or min(output_size(x.shape[-2:], kernel, stride, padding, ceil_mode)) < 1:
        raise UserError(
            f"max_pool2d: input {tuple(x.shape)} holds no window of {kernel[0]}x{kernel[1]}: give (N, C, H, W) "
            "with a larger image, or a smaller kernel_size"
        )


def check_window(kernel: Two, stride: Two, padding: Two, dilation: Two, ties: str) -> None:
    """Raises UserError for windows that no pair has, whatever the input."""
    check_choice("max_pool2d: ties", ties, TIES)
    if dilation != (1, 1):
        raise UserError(
            f"max_pool2d: dilation={dilation} must be 1: use torch.nn.functional.max_pool2d for others"
        )
    if min(kernel) < 1 or min(stride) < 1 or kernel[0] * kernel[1] > MOST_PLACES:
        raise UserError(
            f"max_pool2d: kernel_size={kernel} and stride={stride} must be at least 1, and a window must have at "
            f"most {MOST_PLACES} places: give a smaller kernel_size"
        )
    if any(not 0 <= pad <= size // 2 for pad, size in zip(padding, kernel, strict=True)):
        raise UserError(f"max_pool2d: padding={padding} must be from 0 to half of kernel_size={kernel}")


class MaxPool2d(nn.MaxPool2d):
    """`torch.nn.MaxPool2d` with a choice of tie rule ("first" as torch, "all" as 2012) and backend.

    Raises UserError for return_indices: the winners are kept as places inside their windows, not as indices.
    """

    def __init__(
        self,
        kernel_size: int | Two,
        stride: int | Two | None = None,
        padding: int | Two = 0,
        dilation: int | Two = 1,
        return_indices: bool = False,
        ceil_mode: bool = False,
        *,
        ties: str = "first",
        backend: str = Backend.reference,
    ) -> None:
        check_window(*_windows_of(kernel_size, stride, padding, dilation), ties)
        super().__init__(kernel_size, stride, padding, dilation, return_indices, ceil_mode)
        self.ties = ties
        self._check()
        self.backend = checked("max_pool2d", backend)

    def _check(self) -> None:
        if self.return_indices:
            raise UserError(
                "MaxPool2d: return_indices=True must be False: use torch.nn.MaxPool2d for indices"
            )

    def forward(self, input: Tensor) -> Tensor:
        self._check()
        windows = self.kernel_size, self.stride, self.padding, self.dilation, self.ceil_mode
        return max_pool2d(input, *windows, ties=self.ties, backend=self.backend)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, ties={self.ties}, backend={self.backend}"
