"""ReLU, response norm and pool, one kernel forward and one backward; derivation in layers/relu_lrn_pool.py.

Layout as in local_response_norm.py: a row is the T maps of one tower at one pixel, and a program owns whole rows.
Pixel (i,j) of the input is row ((n H + i) W + j) G + g, window (p,q) is row ((n P + p) Q + q) G + g of the output.

Forward. A program owns rows of the *output*. For each of the R S places of its windows it computes the response

    b[i,j,c] = a[i,j,c] (k + (alpha/n) sum_{d} a[i,j,c+d]^2)^-beta,    a = max(x, 0), or x in the order of 2012

and keeps the largest and its place r S + s; b is never written. Windows overlap, so a response is computed
R S / (u v) times, 2.25 for 3 wide and 2 apart; x comes from memory once and from the cache after that.

Kept are x and the winners, nothing else: for ties="first" one byte, the place; for ties="all" one bit for every
place that holds the maximum (16 of them, 32 if the window is larger), which spares comparing b with y in the
backward, where another order of operations could round it differently. In the order of 2012 the ReLU stands last:
a window that it closes has no winner.

Backward. A program owns rows of the *input* and gathers, as max_pool2d.py derives: with i = u a + rho, pixel i lies
in the windows p = a - t at the places r = rho + u t, t = 0, 1, ...; likewise j.

    db[i,j] = sum_{t} sum_{t'} dy[p,q] [the winner of (p,q) stands at (r,s)]        at most 4 terms for 3 over 2

It stays in registers and goes through the norm's own backward, a and s computed again, and the ReLU's. Every number
of dx is written once, in a fixed order of summation: no atomics, no zero fill, the same bits every time.

Memory per element of x, at B bytes a number and u v = 4: forward B for x, B/4 for y, 1/4 for the winners; backward
2B for x and dx, B/4 for dy, 1/4 for the winners. In bf16 that is 2.75 and 4.75 bytes.

Responses are compared in float32, before they are rounded; so in bf16 two of them can have one winner here and tie
in the reference, which rounds first.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from alexnet.errors import UserError
from alexnet.layers.local_response_norm import Norm
from alexnet.layers.max_pool2d import Pool, output_size
from alexnet.layers.triton.local_response_norm import (
    denominators,
    device_of,
    inverse_power,
    norm_constants,
    norm_gradient,
    offsets,
    present,
    programs,
    responses,
)

NO_WINNER = {"first": -1, "all": 0}  # what a window without a winner keeps
MOST_BITS = 31


@triton.jit(do_not_specialize=["windows"])
def forward_kernel(
    x: tl.tensor, y: tl.tensor, won: tl.tensor, windows: tl.tensor,
    H: tl.constexpr, W: tl.constexpr, P: tl.constexpr, Q: tl.constexpr, G: tl.constexpr, R: tl.constexpr,
    S: tl.constexpr, U: tl.constexpr, V: tl.constexpr, ALL: tl.constexpr, NONE: tl.constexpr,
    RELU: tl.constexpr, ROWS: tl.constexpr, LANES: tl.constexpr, MAPS: tl.constexpr, WIDE: tl.constexpr,
    BEFORE: tl.constexpr, AFTER: tl.constexpr, ALPHA_N: tl.constexpr, BETA: tl.constexpr, K: tl.constexpr,
) -> None:  # fmt: skip
    window = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    c = tl.arange(0, LANES)
    g, q, p = window % G, window // G % Q, window // (G * Q) % P
    n = window // (G * Q * P)
    best = tl.full((ROWS, LANES), float("-inf"), WIDE)
    winners = tl.zeros((ROWS, LANES), tl.int32)
    for place in range(R * S):  # a loop of the chip: written out it would be nine times the program
        i, j = p * U + place // S, q * V + place % S
        row = ((n * H + i) * W + j) * G + g
        there = (window < windows) & (i < H) & (j < W)  # rounded up, a last window reaches over the edge
        a = responses(x, row, c, there, MAPS, RELU, WIDE)
        d = denominators(x, row, c, there, MAPS, RELU, WIDE, BEFORE, AFTER, ALPHA_N, K)
        b = tl.where(there[:, None], a * inverse_power(d, BETA), float("-inf"))
        better = (b > best) | (b != b)  # a NaN beats every number; its winner's gradient is NaN anyway
        if ALL:
            ties = there[:, None] & (b == best)
            winners = tl.where(better, 1 << place, tl.where(ties, winners | (1 << place), winners))
        else:
            winners = tl.where(better, place, winners)
        best = tl.where(better, b, best)
    if not RELU:
        winners = tl.where(best <= 0, NONE, winners)
        best = tl.where(best <= 0, 0.0, best)
    live = present(window < windows, c, MAPS)
    tl.store(y + offsets(window, c, MAPS), best, mask=live)
    tl.store(won + offsets(window, c, MAPS), winners, mask=live)


@triton.jit
def pooled_gradient(
    dy: tl.tensor, won: tl.tensor, row: tl.tensor, c: tl.tensor, inside: tl.tensor,
    H: tl.constexpr, W: tl.constexpr, P: tl.constexpr, Q: tl.constexpr, G: tl.constexpr, R: tl.constexpr,
    S: tl.constexpr, U: tl.constexpr, V: tl.constexpr, ALL: tl.constexpr, NONE: tl.constexpr,
    MAPS: tl.constexpr, WIDE: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """db of the rows: what the windows that they lie in send to them."""
    g, j, i = row % G, row // G % W, row // (G * W) % H
    n = row // (G * W * H)
    db = tl.zeros((row.shape[0], c.shape[0]), WIDE)
    for t in tl.static_range((R + U - 1) // U):
        for t_column in tl.static_range((S + V - 1) // V):
            p, r = i // U - t, i % U + U * t
            q, s = j // V - t_column, j % V + V * t_column
            window = ((n * P + p) * Q + q) * G + g
            there = inside & (p >= 0) & (p < P) & (r < R) & (q >= 0) & (q < Q) & (s < S)
            live, place = present(there, c, MAPS), (r * S + s)[:, None]
            winners = tl.load(won + offsets(window, c, MAPS), mask=live, other=NONE).to(tl.int32)
            mine = (winners >> place) & 1 == 1 if ALL else winners == place
            db += tl.load(dy + offsets(window, c, MAPS), mask=live & mine, other=0.0).to(WIDE)
    return db


@triton.jit(do_not_specialize=["rows"])
def backward_kernel(
    dy: tl.tensor, won: tl.tensor, x: tl.tensor, dx: tl.tensor, rows: tl.tensor,
    H: tl.constexpr, W: tl.constexpr, P: tl.constexpr, Q: tl.constexpr, G: tl.constexpr, R: tl.constexpr,
    S: tl.constexpr, U: tl.constexpr, V: tl.constexpr, ALL: tl.constexpr, NONE: tl.constexpr,
    RELU: tl.constexpr, ROWS: tl.constexpr, LANES: tl.constexpr, MAPS: tl.constexpr, WIDE: tl.constexpr,
    BEFORE: tl.constexpr, AFTER: tl.constexpr, ALPHA_N: tl.constexpr, BETA: tl.constexpr, K: tl.constexpr,
) -> None:  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    c, there = tl.arange(0, LANES), row < rows
    db = pooled_gradient(dy, won, row, c, there, H, W, P, Q, G, R, S, U, V, ALL, NONE, MAPS, WIDE)
    gradient = norm_gradient(db, x, row, c, there, MAPS, RELU, WIDE, BEFORE, AFTER, ALPHA_N, BETA, K)
    tl.store(dx + offsets(row, c, MAPS), gradient, mask=present(there, c, MAPS))


def relu_lrn_pool_forward(x: Tensor, norm: Norm, pool: Pool, order: str) -> tuple[Tensor, Tensor, Tensor]:
    """x (N, C, H, W) -> y (N, C, P, Q); keeps x and the winners (N, P, Q, C)."""
    windows = output_size(x.shape[-2:], *pool[:4])
    x_NHWC = x.permute(0, 2, 3, 1).contiguous()
    y = x_NHWC.new_empty((len(x), *windows, x.shape[1]))
    winners = torch.empty_like(y, dtype=_winners_type(pool))
    fixed = norm_constants(x, norm)
    rows = y.numel() // fixed["MAPS"]
    fixed |= _pool_constants(x, windows, norm.groups, pool, order)
    with device_of("relu_lrn_pool", x):
        forward_kernel[programs(rows, fixed)](x_NHWC, y, winners, rows, **fixed)
    return y.permute(0, 3, 1, 2), x, winners


def relu_lrn_pool_backward(
    dy: Tensor, x: Tensor, winners: Tensor, norm: Norm, pool: Pool, order: str
) -> Tensor:
    """dy (N, C, P, Q), x, the winners -> dx (N, C, H, W)."""
    dy_NPQC, x_NHWC = dy.permute(0, 2, 3, 1).contiguous(), x.permute(0, 2, 3, 1).contiguous()
    dx = torch.empty_like(x_NHWC)
    fixed = norm_constants(x, norm)
    rows = x.numel() // fixed["MAPS"]
    fixed |= _pool_constants(x, dy.shape[-2:], norm.groups, pool, order)
    with device_of("relu_lrn_pool", x):
        backward_kernel[programs(rows, fixed)](dy_NPQC, winners, x_NHWC, dx, rows, **fixed)
    return dx.permute(0, 3, 1, 2)


def _pool_constants(x: Tensor, windows: Any, groups: Any, pool: Pool, order: str) -> dict[str, Any]:
    return {
        **dict(zip("HWPQ", (*x.shape[-2:], *windows), strict=True)),
        **dict(zip("GRSUV", (groups, *pool.kernel, *pool.stride), strict=True)),
        "ALL": pool.ties == "all",
        "NONE": NO_WINNER[pool.ties],
        "RELU": order == "relu_lrn_pool",
    }


def _winners_type(pool: Pool) -> torch.dtype:
    """Room for a place, or for one bit a place; the sign bit stays free."""
    places = pool.kernel[0] * pool.kernel[1]
    if pool.ties == "first":
        return torch.int8
    if places > MOST_BITS:
        raise UserError(
            f'backend.relu_lrn_pool=triton: ties="all" has room for {MOST_BITS} places, and kernel_size={pool.kernel} '
            f"has {places}. Set backend.relu_lrn_pool=reference"
        )
    return torch.int16 if places < 16 else torch.int32
