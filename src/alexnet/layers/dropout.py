"""Dropout (section 4.2), with a mask that is a rule and not a draw.

Forward, for unit u of row r (one row per image), with mask m[r,u] = 1 with probability 1 - p, else 0, and a
constant c:

    y[r,u] = c m[r,u] x[r,u]

How x reaches the loss: only through its own y, with the slope c m, which does not depend on x.

Backward, with the same mask:

    dx[r,u] = c m[r,u] dy[r,u]

A dropped unit takes no part in the forward pass and gets no gradient.

Two conventions keep the mean of what the next layer sees:

    mask_only   train c = 1,        test y = (1 - p) x     paper, 2012 code (layer.cu:1126-1153)
    inverted    train c = 1/(1-p),  test y = x             Caffe, torch

They are the same network but not the same training run. The next layer computes W (m x) in one and V (m x)/(1-p)
in the other: equal when V = (1-p) W. Then dV = dW/(1-p), and the update W <- W - rate (dW + decay W), times
(1-p), reads V <- V - (1-p)^2 rate (dV + decay/(1-p)^2 V). So at p = 1/2, swapping one for the other with all
numbers unchanged doubles the next layer's output at the start and quadruples its step.

The mask. Drawing m from a generator ties it to the device, the order of the layers and the number of processes.
Here it is a function of (key, row, unit), a hash of 32-bit words (constants in hexadecimal, all modulo 2^32):

    mix(h):  h += 9E3779B9;  h ^= h >> 16;  h *= 7FEB352D;  h ^= h >> 15;  h *= 846CA68B;  h ^= h >> 16
    bits   = mix(mix(mix(mix(low key) ^ high key) ^ row) ^ mix(unit))
    m      = [bits >= p 2^32]

The multiplications and shifts of `mix` are the `lowbias32` finaliser of the hash-prospector project; the addition
keeps 0 from being mapped to 0. The unit is mixed on its own first, because rows whose words differ in low bits
only would otherwise carry the same mask in another order. Any slice of rows can be computed alone (`first_row`),
so processes that share a batch agree, and a resumed run repeats its masks.

Torch has no unsigned 32-bit arithmetic everywhere, so words travel in int64, cut to 32 bits after each step. The
addend and the second multiplier are written less 2^32, which leaves the low 32 bits the same: products stay inside
int64, and on a GPU the compiler adds to indices in int32, where 9E3779B9 does not fit.

Shapes: x (N, ...): N rows, the other dimensions counted off as units; key a 0-dim int64; m bool, shaped as x.
"""

import math
from collections.abc import Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from alexnet.layers.arguments import check_choice, check_number, check_real, refuse_inplace
from alexnet.layers.backend import Backend, checked, pair_for
from alexnet.layers.pair import PAIRS, Pair, apply_pair

Word = TypeVar("Word", int, Tensor)
WORD = 0xFFFFFFFF  # the low 32 bits
MODES = ("inverted", "mask_only")


def mix(h: Word) -> Word:
    """A 32-bit word (an int, or int64 tensors of words) whose every bit depends on every bit of h."""
    h = (h + (0x9E3779B9 - (1 << 32))) & WORD
    h = ((h ^ (h >> 16)) * 0x7FEB352D) & WORD
    h = ((h ^ (h >> 15)) * (0x846CA68B - (1 << 32))) & WORD
    return h ^ (h >> 16)


def dropout_key(seed: int, step: int, layer: int) -> int:
    """The key of one layer's mask at one step, 0 <= key < 2^63."""
    h = 0
    passes = []
    for _ in range(2):
        for word in (seed, seed >> 32, step, step >> 32, layer):
            h = mix(h ^ (word & WORD))
        passes.append(h)
    return (passes[0] >> 1) << 32 | passes[1]


def dropout_mask(
    shape: Sequence[int],
    p: float,
    key: int | Tensor,
    first_row: int = 0,
    device: torch.device | str | None = None,
) -> Tensor:
    """True where a unit is kept; bool, `shape`. Row i of it is row first_row + i of the whole batch's mask."""
    key = _key_tensor(key, device)
    bits_NU = mix(row_words(shape[0], key, first_row) ^ unit_words(math.prod(shape[1:]), device))
    return (bits_NU >= round(p * 2**32)).reshape(tuple(shape))


def row_words(rows: int, key: Tensor, first_row: int) -> Tensor:
    """The key and the row, mixed: (rows, 1) words."""
    row_N1 = torch.arange(rows, device=key.device)[:, None] + first_row
    return mix(mix(mix(key & WORD) ^ ((key >> 32) & WORD)) ^ (row_N1 & WORD))


def unit_words(units: int, device: torch.device | str | None) -> Tensor:
    """The unit, mixed: (units) words."""
    return mix(torch.arange(units, device=device))


def dropout_forward(x: Tensor, key: Tensor, p: float, first_row: int, scale: float) -> tuple[Tensor, Tensor]:
    """x (N, ...) -> y = scale m x; keeps the mask, one byte a unit."""
    keep = dropout_mask(x.shape, p, key, first_row, x.device)
    return (
        x * scale * keep,
        keep,
    )  # a product: a NaN of a dropped unit stays one, a run that diverged must show it


def dropout_backward(dy: Tensor, keep: Tensor, p: float, first_row: int, scale: float) -> Tensor:
    """dy (N, ...) -> dx. (p and first_row are already in keep; a pair that keeps only the key needs them.)"""
    return dy * scale * keep


PAIRS["dropout", "reference"] = Pair(dropout_forward, dropout_backward)


def dropout(
    input: Tensor,
    p: float = 0.5,
    training: bool = True,
    inplace: bool = False,
    *,
    key: int | Tensor | None = None,
    first_row: int = 0,
    mode: str = "inverted",
    backend: str = Backend.reference,
) -> Tensor:
    """`torch.nn.functional.dropout` with the gradient and the mask above; the type is kept.

    input (N, ...) whose first row is row `first_row` of the batch. key=None draws one from torch's own generator,
    which `torch.manual_seed` sets. Raises UserError for p outside 0..1, an unknown mode and inplace=True.
    """
    _check(p, mode)
    refuse_inplace("dropout", inplace)
    check_real("dropout", input)
    if not training:
        return input if mode == "inverted" else input * (1 - p)
    key = _key_tensor(key, input.device)
    scale = 1.0 if mode == "mask_only" else _inverse(1 - p)
    pair = pair_for("dropout", backend)
    if pair is None:
        return input * dropout_mask(input.shape, p, key, first_row, input.device) * scale
    return apply_pair(pair, (input, key), (p, first_row, scale))


def _key_tensor(key: int | Tensor | None, device: torch.device | str | None) -> Tensor:
    if key is None:
        return torch.randint(2**63 - 1, (), dtype=torch.int64, device=device)
    if isinstance(key, int):  # filled there: a number copied to a GPU would wait for it
        return torch.full((), key, dtype=torch.int64, device=device)
    return torch.as_tensor(key, dtype=torch.int64, device=device)


def _inverse(kept: float) -> float:
    return 1 / kept if kept else 0.0  # p = 1 drops every unit: zeros, as in torch


def _check(p: float, mode: str) -> None:
    check_number("dropout: p", p, 0, 1)
    check_choice("dropout: mode", mode, MODES)


class Dropout(nn.Dropout):
    """`torch.nn.Dropout` (never in place) with a mode, a key for its mask and a choice of backend.

    Raises UserError for p outside 0..1, an unknown mode and inplace=True.
    """

    def __init__(
        self,
        p: float = 0.5,
        inplace: bool = False,
        *,
        mode: str = "inverted",
        backend: str = Backend.reference,
    ) -> None:
        _check(p, mode)
        refuse_inplace("Dropout", inplace)
        super().__init__(p)
        self.mode = mode
        self.backend = checked("dropout", backend)

    def forward(self, input: Tensor, key: int | Tensor | None = None, first_row: int = 0) -> Tensor:
        rule: dict[str, Any] = {"key": key, "first_row": first_row, "mode": self.mode}
        return dropout(input, self.p, self.training, self.inplace, **rule, backend=self.backend)

    def extra_repr(self) -> str:
        return f"p={self.p}, mode={self.mode}, backend={self.backend}"
