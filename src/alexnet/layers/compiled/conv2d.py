"""The convolution by library forward convolutions and matrix products; derivation in layers/conv2d.py.

Forward: the library's convolution, channels-last.

Input gradient: dx is the adjoint map applied to dy, the transposed convolution of dy with w, itself a forward
operation of the library.

Weight gradient, in one of two forms.

*Columns.* As in layers/conv2d.py: dW = dY' X, with a row of X for every output position. X is built for as many images
at once as fit into COLUMN_BYTES and multiplied once for every tower. dY is dy itself in channels-last memory, no copy.
CUDA takes columns for every convolution and type. A CPU takes them for float32 and float64, and for bfloat16 where the
kernel is small (at most 3 x 3 taps) or the map is.

    CPU    32 MiB of columns, which stay in the cache; a copy of whole kernel rows, not compiled.
    CUDA   256 MiB, so that products are few and their summed index is long enough to fill the device. One compiled
           kernel writes X. It fills each row up with zeros to a multiple of 8 numbers (conv1: 147 or 363 numbers become
           152 or 368), so that in half types every row starts at a multiple of 16 bytes, as tensor cores need it.

*Shifted products*, on a CPU in bfloat16. At stride 1, with tap (r,s) at the row r - top and the column s - left of its
output,

    dw[o,c,r,s] = sum_{n,p,q} dy[n,o,p,q] x[n, c, p + r - top, q + s - left]

is for each tap one inner product over all positions of all images. Lay the images of a map one after another on
one line, row by row, with enough zeros behind every row and every image that a tap outside the image meets a zero
(the zeros after one row are those before the next). Lay dy on the same line with zeros in the same gaps. Then a
tap is a shift: with the line position m of output (n,p,q) and W' columns from row to row,

    dw[:,:,r,s] = D X(delta)',   D[o,m] = dy,   X(delta)[c,m] = x[c, m + delta],   delta = (r - top) W' + s - left

a matrix product of two views: x is copied once, not R S times as in im2col. Both factors have the summed index
contiguous, which is what the library multiplies fastest on a CPU. On CUDA these views are too slow: a shift by one
number is 2 bytes in half types, where an operand must start at a multiple of 16.

Stride u: *space to depth*. The pixels of every u x v block become u v channels, and the kernel, filled up with
zeros to a multiple of the stride, becomes one of ceil(R/u) x ceil(S/v) taps at stride 1. The same numbers are
multiplied, plus those zeros: exact for finite x. In bf16 conv1 runs so in the forward too, as 48 channels fill a vector
of the processor and 3 do not.

Measured on a CPU core with AVX-512 and no AMX, as a share of the library's speed, float32 | bfloat16, `paper` with
batch 16 and, in bfloat16, `mini` (maps of 13 and 6 pixels) with batch 128. Every share is below 1: on a CPU `fastest`
takes the library's weight gradient for all of these convolutions (OURS_WINS in layers/backend.py).

                                 conv1       conv2       conv3       conv4       conv5
    shifted products             .41 | .68   .43 | .68   .76 | .77   .65 | .78   .66 | .75
    columns, a few images        .65 | .61   .63 | .65   .90 | .84   .78 | .84   .68 | .72
    columns of a kernel row      .55 | .66   .61 | .61   .89 | .83   .76 | .82   .68 | .74
    mini: shifted | columns                  .62 | .68   .61 | .81   .61 | .74   .62 | .78
    batch and channels swapped, a convolution with a kernel as large as the image: below .2

Counted on a CUDA that computes nothing, backward of the five convolutions of `tiny`, batch 128, bfloat16 (no times):
                            products   not aligned to 16 bytes   launches   GB moved   peak memory
    shifted products           144              130                213        8.6            167 MiB
    columns                     10                0                 33        2.5            232 MiB
    library                      0                0                 21        0.4
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from alexnet.compile import batched, compiled
from alexnet.layers.compiled.layout import bordered
from alexnet.layers.conv2d import Gradients, Sides, output_size, unfold
from alexnet.layers.pair import wide

Two = tuple[int, int]
NO_SIDES = (0, 0, 0, 0)
FEW_CHANNELS = 4  # the most for which space to depth is faster in the forward
FEW_TAPS = 9  # the most for which columns are faster than shifted products
MANY_ZEROS = 1.2  # length of a line over its positions that count, from which columns are faster
COLUMN_BYTES = {"cpu": 32 * 2**20, "cuda": 256 * 2**20}  # columns built at once
ALIGNED = 8  # numbers: 16 bytes of a half type


def conv2d_forward(
    x: Tensor, w: Tensor, b: Tensor | None, stride: Two, padding: Sides, groups: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x (N, C, H, W), w (O, C/G, R, S), b (O) -> y (N, O, P, Q); keeps x, x as it was convolved, and w."""
    if uses_space_to_depth(x, stride):
        blocks = space_to_depth(x, w, stride, padding, groups)
        if _zeros_matter(x):
            return _convolve(x, w, b, stride, padding, groups), x, blocks, w
        return F.conv2d(blocks, kernel_to_depth(w, stride), b, 1, 0, 1, groups), x, blocks, w
    x = x.contiguous(memory_format=torch.channels_last)
    return _convolve(x, w, b, stride, padding, groups), x, x, w


def uses_space_to_depth(x: Tensor, stride: Two) -> bool:
    """Whether the forward runs on blocks of pixels as channels."""
    return max(stride) > 1 and x.shape[1] <= FEW_CHANNELS and x.dtype == torch.bfloat16


def _zeros_matter(x: Tensor) -> bool:
    """Whether the added taps may change an output: 0 times an infinity is NaN. CUDA is not asked, it would wait."""
    if torch.compiler.is_compiling() or x.is_cuda:
        return torch.compiler.is_compiling()
    return not math.isfinite(x.abs().amax())  # NaN and infinity both reach it, in a tenth of isfinite's time


def _convolve(x: Tensor, w: Tensor, b: Tensor | None, stride: Two, padding: Sides, groups: int) -> Tensor:
    left, right, top, bottom = padding
    if (left, top) == (right, bottom):
        return F.conv2d(x, w, b, stride, (top, left), 1, groups)
    return F.conv2d(F.pad(x, padding), w, b, stride, 0, 1, groups)


def conv2d_backward(
    dy: Tensor,
    x: Tensor,
    convolved: Tensor,
    w: Tensor,
    stride: Two,
    padding: Sides,
    groups: int,
    needs: tuple[bool, bool, bool],
) -> Gradients:
    """dy (N, O, P, Q) -> dx, dw, db, all ours; None where `needs` says no."""
    dx = input_gradient(dy, x, w, stride, padding, groups) if needs[0] else None
    dw = None
    if needs[1] and uses_im2col(dy, x, w, stride, padding):
        dw = product_of_columns(dy, x, w, stride, padding, groups, x.device.type)
    elif needs[1] and max(stride) > 1:
        blocks = (
            convolved if uses_space_to_depth(x, stride) else space_to_depth(x, w, stride, padding, groups)
        )
        dw = kernel_from_depth(shifted_products(dy, blocks, NO_SIDES, groups), w, stride)
    elif needs[1]:
        dw = shifted_products(dy, x, padding, groups)
    return dx, dw, bias_gradient(dy) if needs[2] else None


def uses_im2col(dy: Tensor, x: Tensor, w: Tensor, stride: Two, padding: Sides) -> bool:
    """Whether the weight gradient is a product of columns rather than shifted products; figures above."""
    left, right, top, bottom = padding
    # A window that lies wholly in the padding begins before the zeros of its row do.
    beyond = max(stride) == 1 and (max(top, bottom) >= w.shape[2] or max(left, right) >= w.shape[3])
    if x.device.type != "cpu" or wide(x.dtype) == x.dtype or beyond:
        return True
    if max(stride) > 1:
        return False
    row, image = line_steps(x, padding)
    zeros = row * image / (dy.shape[2] * dy.shape[3])
    return w.shape[2] * w.shape[3] <= FEW_TAPS or zeros > MANY_ZEROS


def line_steps(x: Tensor, padding: Sides) -> Two:
    """From one row to the next on a line, and rows from one image to the next: with the zeros behind each."""
    left, right, top, bottom = padding
    return x.shape[3] + max(left, right), x.shape[2] + max(top, bottom)


def bias_gradient(dy: Tensor) -> Tensor:
    """dy (N, O, P, Q) -> db (O), summed in float32 for half types."""
    return _sum(*batched(dy.permute(0, 2, 3, 1).reshape(-1, dy.shape[1])))


@compiled
def _sum(rows: Tensor) -> Tensor:
    return rows.sum(0, dtype=wide(rows.dtype)).to(rows.dtype)


def input_gradient(dy: Tensor, x: Tensor, w: Tensor, stride: Two, padding: Sides, groups: int) -> Tensor:
    """dy (N, O, P, Q) -> dx, shape of x: the transposed convolution, less what lands on the padding."""
    dy = dy.contiguous(memory_format=torch.channels_last)
    (H, W), (left, right, top, bottom) = x.shape[2:], padding
    P, Q = output_size(x, w, stride, padding)
    # Pixels on the right and at the bottom that no window reaches.
    rest = (
        H + top + bottom - (P - 1) * stride[0] - w.shape[2],
        W + left + right - (Q - 1) * stride[1] - w.shape[3],
    )
    if (left, top) == (right, bottom):
        return F.conv_transpose2d(dy, w, None, stride, (top, left), rest, groups)
    padded = F.conv_transpose2d(dy, w, None, stride, 0, rest, groups)
    return padded[:, :, top : top + H, left : left + W]


def product_of_columns(
    dy: Tensor, x: Tensor, w: Tensor, stride: Two, padding: Sides, groups: int, device_type: str
) -> Tensor:
    """dy (N, O, P, Q), x (N, C, H, W) -> dw, shape of w: dY' X for every tower, summed over pieces of the batch.

    `device_type` decides how the columns are built; it is given, so that a test can have those of CUDA on a CPU.
    """
    K = w[0].numel()
    row = K if device_type == "cpu" else K + -K % ALIGNED
    image_bytes = dy.shape[2] * dy.shape[3] * groups * row * x.element_size()
    at_once = COLUMN_BYTES["cpu" if device_type == "cpu" else "cuda"]
    pieces = max(1, min(len(x), -(-len(x) * image_bytes // at_once)))
    products = dy.new_empty((pieces, groups, len(w) // groups, row))
    for dw_GOK, dy_i, x_i in zip(products, dy.tensor_split(pieces), x.tensor_split(pieces), strict=True):
        dy_GOM = dy_i.permute(0, 2, 3, 1).reshape(-1, groups, len(w) // groups).permute(1, 2, 0)
        # Passed on without a name, so that the columns of one piece are freed before the next are built.
        _multiply(dy_GOM, columns(x_i, w.shape[2:], stride, padding, groups, device_type), dw_GOK)
    dw = products[0] if pieces == 1 else products.sum(0, dtype=wide(w.dtype)).to(w.dtype)
    dw_ORSC = dw[..., :K].reshape(w.permute(0, 2, 3, 1).shape)
    return dw_ORSC.permute(0, 3, 1, 2).contiguous(memory_format=torch.channels_last)


def _multiply(dy_GOM: Tensor, columns_GMK: Tensor, out: Tensor) -> None:
    # One call per tower: a library divides the long sum of a single product among its processors, not of a batch's.
    for dy_OM, columns_MK, dw_OK in zip(dy_GOM, columns_GMK, out, strict=True):
        torch.mm(dy_OM, columns_MK, out=dw_OK)


def columns(
    x: Tensor, kernel: tuple[int, ...], stride: Two, padding: Sides, groups: int, device_type: str
) -> Tensor:
    """x (N, C, H, W) -> X (G, N*P*Q, K), on CUDA in aligned rows. A CPU copies whole runs faster than compiled code."""
    if device_type == "cpu":
        return unfold(x, kernel, stride, padding, groups)
    return _aligned_columns(*batched(x), tuple(kernel), stride, padding, groups)


@compiled
def _aligned_columns(x: Tensor, kernel: tuple[int, ...], stride: Two, padding: Sides, groups: int) -> Tensor:
    columns_GMK = unfold(x, kernel, stride, padding, groups)
    return F.pad(columns_GMK, (0, -columns_GMK.shape[2] % ALIGNED))


def shifted_products(dy: Tensor, x: Tensor, padding: Sides, groups: int) -> Tensor:
    """At stride 1: dy (N, O, P, Q), x (N, C, H, W) -> dw (O, C/G, R, S), by R S shifted products per group."""
    (H, W), (P, Q) = x.shape[2:], dy.shape[2:]
    left, right, top, bottom = padding
    R, S = H + top + bottom - P + 1, W + left + right - Q + 1
    row, image = line_steps(x, padding)
    before = top * row + left
    x_CM = lines(x, image, row, before, (R - 1 - top) * row + S - 1 - left)
    dy_OM = lines(dy, image, row, 0, 0)
    M = dy_OM.shape[1]
    x_GCM, dy_GOM = x_CM.unflatten(0, (groups, -1)), dy_OM.unflatten(0, (groups, -1))
    dw = dy.new_empty((R, S, groups, dy.shape[1] // groups, x.shape[1] // groups))
    for r in range(R):
        for s in range(S):
            shift = r * row + s
            for g in range(groups):
                torch.mm(dy_GOM[g], x_GCM[g, :, shift : shift + M].T, out=dw[r, s, g])
    return dw.flatten(2, 3).permute(2, 3, 0, 1).contiguous(memory_format=torch.channels_last)


def lines(x: Tensor, image: int, row: int, before: int, after: int) -> Tensor:
    """x (N, C, H, W) -> (C, before + N*image*row + after): each map one line, zeros in the gaps and at the ends."""
    x_NHWC = bordered(x.detach().permute(0, 2, 3, 1), 0, row - x.shape[3], 0, image - x.shape[2])
    (pixels,) = batched(x_NHWC.view(-1, x.shape[1]))
    line = x.new_empty((x.shape[1], before + len(pixels) + after))
    line[:, :before] = 0
    line[:, before + len(pixels) :] = 0
    middle = line[:, before : before + len(pixels)].T
    _copy(*batched(middle), pixels)
    return line


@compiled
def _copy(target: Tensor, source: Tensor) -> None:
    target.copy_(source)  # a transposition, which the compiler does in registers, block by block


def space_to_depth(x: Tensor, w: Tensor, stride: Two, padding: Sides, groups: int) -> Tensor:
    """x (N, C, H, W) -> (N, G u v C/G, H', W') channels-last: the pixels of each u x v block as channels.

    H' and W' are what the P x Q outputs of the kernel w read; the padding is in them.
    """
    (P, Q), (u, v) = output_size(x, w, stride, padding), stride
    rows, columns = P - 1 - (-w.shape[2] // u), Q - 1 - (-w.shape[3] // v)
    left, _, top, _ = padding
    sides = (0, 0, left, columns * v - x.shape[3] - left, top, rows * u - x.shape[2] - top)
    x_NHWC = x.permute(0, 2, 3, 1)
    if x.is_cuda:
        return _compiled_to_depth(*batched(x_NHWC), sides, rows, columns, u, v, groups).permute(0, 3, 1, 2)
    return _to_depth(x_NHWC, sides, rows, columns, u, v, groups).permute(0, 3, 1, 2)


def _to_depth(
    x: Tensor, sides: tuple[int, ...], rows: int, columns: int, u: int, v: int, groups: int
) -> Tensor:
    blocks = F.pad(x, sides).view(len(x), rows, u, columns, v, groups, -1)
    return blocks.permute(0, 1, 3, 5, 2, 4, 6).flatten(3).contiguous()


_compiled_to_depth = compiled(_to_depth)  # on a CPU its copy, pixel by pixel, takes five times as long


def kernel_to_depth(w: Tensor, stride: Two) -> Tensor:
    """w (O, C/G, R, S) -> (O, u v C/G, R', S') with R' = ceil(R/u), S' = ceil(S/v)."""
    u, v = stride
    padded = F.pad(w, (0, -w.shape[3] % v, 0, -w.shape[2] % u))
    blocks = padded.unflatten(3, (-1, v)).unflatten(2, (-1, u))  # O C/G R' u S' v
    return blocks.permute(0, 3, 5, 1, 2, 4).flatten(1, 3).contiguous(memory_format=torch.channels_last)


def kernel_from_depth(dw: Tensor, w: Tensor, stride: Two) -> Tensor:
    """(O, u v C/G, R', S') -> (O, C/G, R, S), shape of w: `kernel_to_depth` undone, the added taps dropped."""
    blocks = dw.unflatten(1, (*stride, -1)).permute(0, 3, 4, 1, 5, 2)  # O C/G R' u S' v
    return blocks.flatten(4, 5).flatten(2, 3)[:, :, : w.shape[2], : w.shape[3]]


def library_backward(
    dy: Tensor,
    x: Tensor,
    convolved: Tensor,
    w: Tensor,
    stride: Two,
    padding: Sides,
    groups: int,
    needs: tuple[bool, bool, bool],
) -> Gradients:
    """dy (N, O, P, Q) -> dx (ours), dw and db by the library's gradient kernel."""
    dx = input_gradient(dy, x, w, stride, padding, groups) if needs[0] else None
    if not needs[1]:
        return dx, None, bias_gradient(dy) if needs[2] else None
    dy = dy.contiguous(memory_format=torch.channels_last)
    deep = uses_space_to_depth(x, stride)
    operand, kernel = convolved, kernel_to_depth(w, stride) if deep else w
    left, right, top, bottom = padding
    step, sides = ([1, 1], [0, 0]) if deep else (list(stride), [top, left])
    if not deep and (left, top) != (right, bottom):
        operand, sides = F.pad(x, padding), [0, 0]
    mask = [False, True, needs[2]]
    operands = dy, operand, kernel, [len(w)], step, sides, [1, 1], False, [0, 0], groups, mask
    _, dw, db = torch.ops.aten.convolution_backward(*operands)
    return dx, kernel_from_depth(dw, w, stride) if deep else dw, db
