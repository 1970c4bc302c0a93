"""Response normalisation, one kernel forward and one backward; derivation in layers/local_response_norm.py.

Layout. Channels-last, the maps of one tower at one pixel lie together: a *row* of T = C/G numbers. The whole tensor
is N H W G rows, one after the other, and a window never leaves its row: where a row ends, the tower ends.

Who owns what. A program owns a block of whole rows, so nothing it needs is computed by another program and nothing
is written twice: no atomics, the same bits every time. A chip counts in powers of two; the lanes beyond T hold
zeros, and zeros are what a window sees beyond its tower.

Forward, with the window reaching `before` maps down and `after` maps up:

    s[c] = k + (alpha/n) sum_{d = -before .. after} x[c+d]^2        n loads of one row, each d numbers further on:
    y[c] = x[c] s[c]^-beta                                          one from memory, the others from the cache

Backward. s is computed again, by the same n loads; kept it would cost a write and a read of four bytes. Then

    q[c] = dy[c] x[c] s[c]^(-beta-1)                                in registers only: its neighbours come from
    dx[c] = dy[c] s[c]^-beta                                        other threads of the program (`tl.gather`),
            - (2 alpha beta/n) x[c] sum_{d = -after .. before} q[c+d]   in the reflected window

Memory per element of x, at B bytes a number: 2B forward (x, y) and 3B backward (dy, x, dx), which is the least
that a forward and a backward can move. Computed in float32 (float64 if x is), rounded once, at the store.
"""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton import knobs

from alexnet.errors import UserError
from alexnet.layers.local_response_norm import Norm

BLOCK = 1024  # numbers a program owns: 8 for each thread of its four warps
MOST_MAPS = 2048  # of a tower; a program owns whole rows, and longer ones take the compiler minutes


@triton.jit
def offsets(row: tl.tensor, c: tl.tensor, MAPS: tl.constexpr) -> tl.tensor:
    """Where maps c of the rows lie. In 64 bits: a batch of 8192 of conv1's outputs has over 2^31 numbers."""
    return row.to(tl.int64)[:, None] * MAPS + c[None, :]


@triton.jit
def present(there: tl.tensor, c: tl.tensor, MAPS: tl.constexpr) -> tl.tensor:
    """Which maps c of the rows exist."""
    return there[:, None] & ((c >= 0) & (c < MAPS))[None, :]


@triton.jit
def responses(
    x: tl.tensor, row: tl.tensor, c: tl.tensor, there: tl.tensor,
    MAPS: tl.constexpr, RELU: tl.constexpr, WIDE: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """What the norm sees of maps c: x, or max(x, 0); zero where nothing is."""
    a = tl.load(x + offsets(row, c, MAPS), mask=present(there, c, MAPS), other=0.0).to(WIDE)
    if RELU:
        a = tl.where(a <= 0, 0.0, a)  # a NaN stays
    return a


@triton.jit
def denominators(
    x: tl.tensor, row: tl.tensor, c: tl.tensor, there: tl.tensor,
    MAPS: tl.constexpr, RELU: tl.constexpr, WIDE: tl.constexpr, BEFORE: tl.constexpr, AFTER: tl.constexpr,
    ALPHA_N: tl.constexpr, K: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """s of maps c of the rows."""
    total = tl.zeros((row.shape[0], c.shape[0]), WIDE)
    for i in tl.static_range(BEFORE + 1 + AFTER):
        a = responses(x, row, c + (i - BEFORE), there, MAPS, RELU, WIDE)
        total += a * a
    return total * ALPHA_N + K


@triton.jit
def inverse_power(s: tl.tensor, BETA: tl.constexpr) -> tl.tensor:
    """s^-beta; the paper's 3/4 as 1/2 + 1/4, two roots."""
    if BETA == 0.75:
        # rsqrt is an approximation that float32 can live with, and float64 cannot
        root = 1.0 / tl.sqrt(s) if s.dtype == tl.float64 else tl.rsqrt(s)
        return root * tl.sqrt(root)
    else:
        return tl.exp2(tl.log2(s) * -BETA)


@triton.jit
def competition(
    q: tl.tensor, c: tl.tensor, MAPS: tl.constexpr, BEFORE: tl.constexpr, AFTER: tl.constexpr
) -> tl.tensor:
    """The sum of q over the reflected window of each map; q is zero beyond the row."""
    total = q
    for i in tl.static_range(AFTER + 1 + BEFORE):
        if i != AFTER:
            j = c + (i - AFTER)
            inside = (j >= 0) & (j < MAPS)
            index = tl.broadcast_to(tl.where(inside, j, 0)[None, :], q.shape)
            total += tl.where(inside[None, :], tl.gather(q, index, 1), 0.0)
    return total


@triton.jit
def norm_gradient(
    dy: tl.tensor, x: tl.tensor, row: tl.tensor, c: tl.tensor, there: tl.tensor,
    MAPS: tl.constexpr, RELU: tl.constexpr, WIDE: tl.constexpr, BEFORE: tl.constexpr, AFTER: tl.constexpr,
    ALPHA_N: tl.constexpr, BETA: tl.constexpr, K: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """dy in registers, x in memory -> dx in registers; with RELU that of the ReLU in front included."""
    a = responses(x, row, c, there, MAPS, RELU, WIDE)
    s = denominators(x, row, c, there, MAPS, RELU, WIDE, BEFORE, AFTER, ALPHA_N, K)
    t = dy * inverse_power(s, BETA)
    dx = t - competition(t * a / s, c, MAPS, BEFORE, AFTER) * a * (2 * ALPHA_N * BETA)
    if RELU:
        dx = tl.where(a <= 0, 0.0, dx)
    return dx


@triton.jit(do_not_specialize=["rows"])
def forward_kernel(
    x: tl.tensor, y: tl.tensor, rows: tl.tensor,
    ROWS: tl.constexpr, LANES: tl.constexpr, MAPS: tl.constexpr, WIDE: tl.constexpr, BEFORE: tl.constexpr,
    AFTER: tl.constexpr, ALPHA_N: tl.constexpr, BETA: tl.constexpr, K: tl.constexpr,
) -> None:  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    c, there = tl.arange(0, LANES), row < rows
    a = responses(x, row, c, there, MAPS, False, WIDE)
    s = denominators(x, row, c, there, MAPS, False, WIDE, BEFORE, AFTER, ALPHA_N, K)
    tl.store(y + offsets(row, c, MAPS), a * inverse_power(s, BETA), mask=present(there, c, MAPS))


@triton.jit(do_not_specialize=["rows"])
def backward_kernel(
    dy: tl.tensor, x: tl.tensor, dx: tl.tensor, rows: tl.tensor,
    ROWS: tl.constexpr, LANES: tl.constexpr, MAPS: tl.constexpr, WIDE: tl.constexpr, BEFORE: tl.constexpr,
    AFTER: tl.constexpr, ALPHA_N: tl.constexpr, BETA: tl.constexpr, K: tl.constexpr,
) -> None:  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    c, there = tl.arange(0, LANES), row < rows
    dy_wide = responses(dy, row, c, there, MAPS, False, WIDE)
    gradient = norm_gradient(dy_wide, x, row, c, there, MAPS, False, WIDE, BEFORE, AFTER, ALPHA_N, BETA, K)
    tl.store(dx + offsets(row, c, MAPS), gradient, mask=present(there, c, MAPS))


def local_response_norm_forward(x: Tensor, *constants: Any) -> tuple[Tensor, Tensor]:
    """x (N, C, ...) and size, alpha, beta, k, groups -> y; keeps x."""
    x_rows = x.movedim(1, -1).contiguous()  # (N, ..., C): a view where x is channels-last
    y, fixed = torch.empty_like(x_rows), norm_constants(x, Norm(*constants))
    rows = x.numel() // fixed["MAPS"]
    with device_of("local_response_norm", x):
        forward_kernel[programs(rows, fixed)](x_rows, y, rows, **fixed)
    return y.movedim(-1, 1), x


def local_response_norm_backward(dy: Tensor, x: Tensor, *constants: Any) -> Tensor:
    """dy (N, C, ...) -> dx."""
    dy_rows, x_rows = dy.movedim(1, -1).contiguous(), x.movedim(1, -1).contiguous()
    dx, fixed = torch.empty_like(x_rows), norm_constants(x, Norm(*constants))
    rows = x.numel() // fixed["MAPS"]
    with device_of("local_response_norm", x):
        backward_kernel[programs(rows, fixed)](dy_rows, x_rows, dx, rows, **fixed)
    return dx.movedim(-1, 1)


def norm_constants(x: Tensor, norm: Norm) -> dict[str, Any]:
    """What a kernel is compiled for: one kernel a layer and type, whatever the batch. Raises UserError."""
    size, alpha, beta, k, groups = norm
    maps = x.shape[1] // groups
    if maps > MOST_MAPS:
        raise UserError(
            f"backend=triton normalises towers of at most {MOST_MAPS} maps, not {maps}: set backend=reference"
        )
    lanes = triton.next_power_of_2(maps)
    return {
        "ROWS": max(1, BLOCK // lanes),
        "LANES": lanes,
        "MAPS": maps,
        "WIDE": tl.float64 if x.dtype == torch.float64 else tl.float32,
        "BEFORE": min(size // 2, maps - 1),  # a tower has no more neighbours than that
        "AFTER": min((size - 1) // 2, maps - 1),
        "ALPHA_N": alpha / size,
        "BETA": float(beta),
        "K": float(k),
        "enable_fp_fusion": True,  # multiply and add in one rounding; Triton 3.10 changes the default
    }


def programs(rows: int, fixed: dict[str, Any]) -> tuple[int]:
    """The grid: as many programs as blocks of rows."""
    return (triton.cdiv(rows, fixed["ROWS"]),)


def device_of(operation: str, x: Tensor) -> AbstractContextManager[Any]:
    """Triton launches on the current device: this makes it the one where x lies."""
    if x.is_cuda:
        return torch.cuda.device(x.device)
    if knobs.runtime.interpret:
        return nullcontext()
    raise UserError(
        f"backend.{operation}=triton got a tensor on {x.device}: its kernels run on CUDA only. "
        f"Set backend.{operation}=reference"
    )
