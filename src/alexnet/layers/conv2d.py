"""The convolution (sections 3.2 and 3.5; conv1 to conv5).

Forward. Output (p, q) is the inner product of a kernel with the window of the input that starts at row
u p - top and column v q - left; a tap that falls outside the image reads zero:

    y[n,o,p,q] = b[o] + sum_{c,r,s} w[o,c,r,s] x[n, c, u p + r - top, v q + s - left]

with stride (u, v) and `left`, `top` columns and rows of zeros (a correlation: the kernel is not flipped, as in the 2012
code, Caffe and torch; all letters at the end).

Give every window a row of its own. The *columns* of x are the matrix with one row per output position (n,p,q)
and one column per weight (r,s,c):

    X[(n,p,q), (r,s,c)] = x[n, c, u p + r - top, v q + s - left]                (unfold: copies, no arithmetic)
    Y = X W' + b,       with W[o, (r,s,c)] = w[o,c,r,s]

The convolution is now the fully connected layer of linear.py with one "example" per window. Every window uses
the same W: that is all that weight sharing means, and it is why dW sums over positions as well as over images.

Backward, given dy[n,o,p,q] = dL/dy[n,o,p,q]. Up to the columns nothing is new (linear.py):

    dW = dY' X              dw[o,c,r,s] = sum_{n,p,q} dy[n,o,p,q] x[n, c, u p + r - top, v q + s - left]
    db = sum of dY's rows   db[o]       = sum_{n,p,q} dy[n,o,p,q]
    dX = dY W               dX[(n,p,q), (r,s,c)] = sum_o dy[n,o,p,q] w[o,c,r,s]

What is left is how the columns depend on x. They hold copies: pixel (i,j) stands in X once for every window
that covers it, at the tap (r,s) that meets it there. A value used several times collects the gradient of each
use (the chain rule's sum over paths), so

    dx[n,c,i,j] = sum over (p,q,r,s) with u p + r - top = i and v q + s - left = j of dX[(n,p,q), (r,s,c)]

which is called fold. For one tap (r,s) the map (p,q) -> (i,j) is one-to-one: windows u rows and v columns
apart meet distinct pixels. So fold is R S additions of a whole (P,Q) plane into a strided plane of dx, with
nothing written twice in one of them. Different taps do meet the same pixel, hence `+=`. What lands on the
padding belongs to no pixel and is cut off.

The same sum with dX written out, at stride 1 (p = i + top - r):

    dx[n,c,i,j] = sum_{o,r,s} dy[n, o, i + top - r, j + left - s] w[o,c,r,s]

is again a correlation: of dy with the kernel turned by 180 degrees and its input and output channels swapped.
At stride u the terms exist only where u divides i + top - r: dy is first spread out with u - 1 zeros between
its rows, and rows of dy outside 0..P-1 count as zeros (so the padding of this correlation is R - 1 - top above).

Linear algebra says why it must look like this. Without b, y is a linear map A of x. A small change e of x changes y by
A e and so the loss by <dy, A e>; by definition of dx it is <dx, e>. The two agree for every e, so dx = A' dy, where the
adjoint A' (for a matrix, the transpose) is the map with <A' dy, e> = <dy, A e> (a test uses exactly that).

Groups (the two towers of section 3.2: conv2, conv4, conv5): output o reads only the C/G input channels of its
own tower. W is block diagonal, so each of its blocks has columns, a product and gradients of its own.

Memory. X is R S / (u v) times as large as x (conv2: 25 times), so it is built for a few images at a time, at
most COLUMN_BYTES, and built again in the backward instead of being kept: only x and w are saved, which exist
anyway. Images do not interact, so y and dx come out in pieces; dw is the sum over the pieces.

Where the sources differ: the 2012 code rounds the output size *up* and reads zeros past the right and bottom
edge (layer.py:1004), so that conv1 turns 224 pixels into 55; torch rounds down, and `padding=(0, 3, 0, 3)` is
the same thing. Caffe has 227 pixels and no padding, torchvision 224 and 2 on every side. The 2012 code divides
dw and db by the batch size here, we in the loss (cross_entropy.py).

Shapes: N images, C input channels, O output channels, G groups, HxW in, PxQ out, RxS kernel, stride (u, v);
x (N, C, H, W), w (O, C/G, R, S), b (O), y (N, O, P, Q). K = R S C/G taps of one output; M = P Q times the images of
one piece. In the code a name's last capitals are its dimensions: w_GKO is (G, K, O/G).
"""

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from alexnet.errors import UserError
from alexnet.layers.arguments import Two, check_positive, check_real, integers, no_longer, two
from alexnet.layers.backend import Backend, checked, pair_for
from alexnet.layers.pair import PAIRS, Pair, apply_pair, memory_format, to_autocast, wide

Padding = int | tuple[int, ...]  # one number, (rows, columns), or Sides
Sides = tuple[int, int, int, int]  # (left, right, top, bottom), the order of F.pad
Gradients = tuple[Tensor | None, Tensor | None, Tensor | None]

# Columns built at once. On two cores 8 to 32 MiB are equally fast and 128 MiB, far outside the cache, is 1.5
# times slower; conv2 at batch 32 would take 214 MiB.
COLUMN_BYTES = 32 * 2**20


def conv2d_forward(
    x: Tensor, w: Tensor, b: Tensor | None, stride: Two, padding: Sides, groups: int
) -> tuple[Tensor, Tensor, Tensor]:
    """x (N, C, H, W), w (O, C/G, R, S), b (O) -> y (N, O, P, Q), laid out in memory as x; keeps x and w."""
    P, Q = output_size(x, w, stride, padding)
    w_GKO = _weight_rows(w, groups).transpose(1, 2)
    y = torch.empty((len(x), len(w), P, Q), dtype=x.dtype, device=x.device, memory_format=memory_format(x))
    for images in _chunks(x, w, P * Q):
        columns = unfold(x[images], w.shape[2:], stride, padding, groups)
        y_GMO = columns @ w_GKO if b is None else torch.baddbmm(b.reshape(groups, 1, -1), columns, w_GKO)
        y[images] = y_GMO.transpose(0, 1).reshape(-1, P, Q, len(w)).permute(0, 3, 1, 2)
    return y, x, w


def conv2d_backward(
    dy: Tensor,
    x: Tensor,
    w: Tensor,
    stride: Two,
    padding: Sides,
    groups: int,
    needs: tuple[bool, bool, bool],
) -> Gradients:
    """dy (N, O, P, Q) -> dx (N, C, H, W), dw (O, C/G, R, S), db (O); None where `needs` says no."""
    w_GOK = _weight_rows(w, groups)
    dx = torch.empty_like(x) if needs[0] else None
    # Pieces of the batch are summed, and taps of the kernel folded, in float32 also for half types.
    dw_GOK = torch.zeros_like(w_GOK, dtype=wide(w.dtype)) if needs[1] else None
    for images in _chunks(x, w, dy.shape[2] * dy.shape[3]):
        dy_GMO = dy[images].permute(0, 2, 3, 1).reshape(-1, groups, len(w) // groups).transpose(0, 1)
        if dw_GOK is not None:
            dw_GOK += dy_GMO.transpose(1, 2) @ unfold(x[images], w.shape[2:], stride, padding, groups)
        if dx is not None:
            dx[images] = fold(dy_GMO @ w_GOK, dx[images].shape, w.shape[2:], stride, padding)
    dw = None if dw_GOK is None else _weight_from_rows(dw_GOK, w)
    db = dy.sum((0, 2, 3), dtype=wide(dy.dtype)).to(dy.dtype) if needs[2] else None
    return dx, dw, db


def unfold(x: Tensor, kernel: tuple[int, ...], stride: Two, padding: Sides, groups: int) -> Tensor:
    """x (N, C, H, W) -> columns (G, N*P*Q, K): each window a row, taps in the order (r, s, c)."""
    # Channels go last first: the S C/G numbers of one kernel row then lie together and are copied as one run.
    x_NHWC = F.pad(x.permute(0, 2, 3, 1), (0, 0, *padding)).contiguous()
    windows = x_NHWC.unfold(1, kernel[0], stride[0]).unfold(2, kernel[1], stride[1])  # a view: N P Q C R S
    N, P, Q, C, R, S = windows.shape
    windows = windows.unflatten(3, (groups, C // groups)).permute(3, 0, 1, 2, 5, 6, 4)  # G N P Q R S C/G
    return windows.reshape(groups, N * P * Q, R * S * C // groups)


def fold(
    columns: Tensor, shape: tuple[int, ...], kernel: tuple[int, ...], stride: Two, padding: Sides
) -> Tensor:
    """The adjoint of unfold: columns (G, N*P*Q, K) -> (N, C, H, W), the copies of each pixel summed."""
    (N, C, H, W), (R, S), G = shape, kernel, len(columns)
    left, right, top, bottom = padding
    padded = columns.new_zeros((N, H + top + bottom, W + left + right, G, C // G), dtype=wide(columns.dtype))
    P, Q = ((padded.shape[1 + axis] - kernel[axis]) // stride[axis] + 1 for axis in (0, 1))
    taps = columns.reshape(G, N, P, Q, R, S, C // G).permute(4, 5, 1, 2, 3, 0, 6)  # R S N P Q G C/G
    for r in range(R):
        for s in range(S):
            padded[:, r : r + stride[0] * P : stride[0], s : s + stride[1] * Q : stride[1]] += taps[r, s]
    return padded[:, top : top + H, left : left + W].flatten(3).permute(0, 3, 1, 2)


def output_size(x: Tensor, w: Tensor, stride: Two, padding: Sides) -> Two:
    """(P, Q): how many whole windows fit into the padded input, rounded down."""
    left, right, top, bottom = padding
    P = (x.shape[2] + top + bottom - w.shape[2]) // stride[0] + 1
    Q = (x.shape[3] + left + right - w.shape[3]) // stride[1] + 1
    return P, Q


def images_at_once(x: Tensor, w: Tensor, positions: int) -> int:
    """How many images' columns fit into COLUMN_BYTES; at least one. `positions` is P*Q."""
    column_bytes_per_image = positions * x.shape[1] * w.shape[2] * w.shape[3] * x.element_size()
    return max(1, COLUMN_BYTES // column_bytes_per_image)


def _chunks(x: Tensor, w: Tensor, positions: int) -> Iterator[slice]:
    step = images_at_once(x, w, positions)
    return (slice(start, min(start + step, len(x))) for start in range(0, len(x), step))


def _weight_rows(w: Tensor, groups: int) -> Tensor:
    """(O, C/G, R, S) -> (G, O/G, K), taps in the order (r, s, c) of the columns."""
    return w.permute(0, 2, 3, 1).reshape(groups, len(w) // groups, -1)


def _weight_from_rows(rows: Tensor, w: Tensor) -> Tensor:
    """(G, O/G, K) -> (O, C/G, R, S), shape and type of w."""
    return rows.reshape(w.permute(0, 2, 3, 1).shape).permute(0, 3, 1, 2).to(w.dtype)


PAIRS["conv2d", "reference"] = Pair(conv2d_forward, conv2d_backward, operands=3)


def conv2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | Two = 1,
    padding: Padding = 0,
    dilation: int | Two = 1,
    groups: int = 1,
    *,
    backend: str = Backend.reference,
) -> Tensor:
    """`torch.nn.functional.conv2d` with the gradients above. input (N, C, H, W), weight (O, C/G, R, S), bias (O)
    -> (N, O, P, Q).

    padding: one number, (rows, columns) as in torch, or (left, right, top, bottom) as in F.pad; zeros.
    Raises UserError for dilation other than 1, padding given as a word, shapes that do not fit and a type that is not a
    real floating-point type.
    """
    stride, sides = two(stride, "conv2d: stride"), _sides(padding)
    _check(input, weight, bias, stride, sides, two(dilation, "conv2d: dilation"), groups)
    left, right, top, bottom = sides
    stride = no_longer(stride, (input.shape[2] + top + bottom, input.shape[3] + left + right))
    pair = pair_for("conv2d", backend)
    if pair is None:
        return _native(input, weight, bias, stride, sides, groups)
    return apply_pair(pair, to_autocast(input, weight, bias), (stride, sides, groups))


def _native(x: Tensor, w: Tensor, b: Tensor | None, stride: Two, padding: Sides, groups: int) -> Tensor:
    left, right, top, bottom = padding
    if (left, top) == (right, bottom):
        return F.conv2d(x, w, b, stride, (top, left), 1, groups)
    return F.conv2d(F.pad(x, padding), w, b, stride, 0, 1, groups)


def _sides(padding: Any) -> Sides:
    """Any spelling of the padding -> (left, right, top, bottom)."""
    numbers = integers("conv2d: padding", padding, (1, 2, 4))
    if len(numbers) == 4:
        return numbers
    return numbers[-1], numbers[-1], numbers[0], numbers[0]


def _check(
    x: Tensor, w: Tensor, b: Tensor | None, stride: Two, padding: Sides, dilation: Two, groups: int
) -> None:
    check_real("conv2d", x, w, b)
    check_positive("conv2d: groups", groups)
    if dilation != (1, 1):
        raise UserError(f"conv2d: dilation={dilation} must be 1: use torch.nn.functional.conv2d for others")
    if min(padding) < 0 or min(stride) < 1:
        raise UserError(f"conv2d: padding={padding} must be >= 0 and stride={stride} positive")
    if x.dim() != 4 or w.dim() != 4 or x.shape[1] != w.shape[1] * groups or len(w) % groups or not w.numel():
        raise UserError(
            f"conv2d: input {tuple(x.shape)} and weight {tuple(w.shape)} must be (N, C, H, W) and (O, C/groups, R, S), "
            f"none of C, O, R, S zero, C and O multiples of groups={groups}"
        )
    if b is not None and b.shape != w.shape[:1]:
        raise UserError(f"conv2d: bias {tuple(b.shape)} must be ({len(w)},), one number per output")
    if min(output_size(x, w, stride, padding)) < 1:
        raise UserError(
            f"conv2d: a {w.shape[2]}x{w.shape[3]} kernel does not fit into {x.shape[2]}x{x.shape[3]} pixels "
            f"with padding {padding}: give a larger image, more padding or a smaller kernel"
        )


class Conv2d(nn.Conv2d):
    """`torch.nn.Conv2d` (same arguments, parameters and initialisation) with a choice of backend.

    padding may also be (left, right, top, bottom). Raises UserError for dilation other than 1 and for padding_mode
    other than zeros.
    """

    padding: Any  # torch declares two numbers or a word; ours may be four numbers

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | Two,
        stride: int | Two = 1,
        padding: Padding = 0,
        dilation: int | Two = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: str = "zeros",
        *,
        backend: str = Backend.reference,
        **factory: Any,
    ) -> None:
        for name, value in {
            "in_channels": in_channels,
            "out_channels": out_channels,
            "groups": groups,
        }.items():
            check_positive(f"Conv2d: {name}", value)
        kernel, stride = two(kernel_size, "Conv2d: kernel_size"), two(stride, "Conv2d: stride")
        check_positive("Conv2d: kernel_size", min(kernel))
        left, right, top, bottom = sides = _sides(padding)
        super().__init__(in_channels, out_channels, kernel, stride, groups=groups, bias=bias, **factory)
        self.padding = (top, left) if (left, top) == (right, bottom) else sides
        self.dilation, self.padding_mode = two(dilation, "Conv2d: dilation"), padding_mode  # type: ignore[assignment]
        self.backend = checked("conv2d", backend)
        self._check()

    def _check(self) -> None:
        if self.padding_mode != "zeros" or two(self.dilation) != (1, 1):
            raise UserError(
                f"Conv2d: padding_mode={self.padding_mode!r} must be 'zeros' and dilation={self.dilation} must be 1: "
                "use torch.nn.Conv2d for others"
            )

    def forward(self, input: Tensor) -> Tensor:
        self._check()
        window: Any = self.stride, self.padding, self.dilation, self.groups
        return conv2d(input, self.weight, self.bias, *window, backend=self.backend)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, backend={self.backend}"
