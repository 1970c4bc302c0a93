"""How the compiled pairs lay out memory: channels last, borders around it, small constant tensors beside it."""

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor


def channels_last(x: Tensor) -> Tensor:
    """x (N, C, H, W) -> its (N, H, W, C) contiguous form: a view where x is channels-last, else a copy."""
    return x.detach().permute(0, 2, 3, 1).contiguous()


def bordered(x: Tensor, left: int, right: int, top: int, bottom: int, value: float = 0.0) -> Tensor:
    """x (N, H, W, C) with a border of `value`; F.pad fills the whole of it first, which takes twice as long."""
    N, H, W, C = x.shape
    out = x.new_empty((N, top + H + bottom, left + W + right, C))
    out[:, top : top + H, left : left + W] = x
    rows = out[:, top : top + H]
    for part in (out[:, :top], out[:, top + H :], rows[:, :, :left], rows[:, :, left + W :]):
        part.fill_(value)
    return out


def constant(make: Callable[..., Any]) -> Callable[..., Any]:
    """Caches a small tensor that depends on numbers only. Made outside inference mode, it can be used in any mode."""

    @cache
    def made(*arguments: Any) -> Any:
        with torch.inference_mode(False):
            return make(*arguments)

    def made_or_traced(*arguments: Any) -> Any:
        return make(*arguments) if torch.compiler.is_compiling() else made(*arguments)

    return made_or_traced
