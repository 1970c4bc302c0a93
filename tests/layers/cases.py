"""Inputs that catch mistakes, and the comparisons that every layer must pass."""

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from alexnet.errors import UserError
from alexnet.layers.backend import PAIRS

# PyTorch's own code warns about its own future; nothing a layer could put right.
COMPILES = pytest.mark.filterwarnings("ignore")

Outcome = tuple[Tensor, list[Tensor]]


def normals(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    """Standard normals from a generator of their own."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def gapped(x: Tensor) -> Tensor:
    """The same values, every second element of a larger tensor: neither contiguous nor dense."""
    pairs = x.new_full((*x.shape, 2), float("nan"))
    pairs[..., 0] = x
    return pairs[..., 0]


def layouts(x: Tensor) -> dict[str, Tensor]:
    """The same values in every layout that a layer meets."""
    kinds = {"contiguous": x.contiguous(), "gapped": gapped(x), "transposed": x.mT.contiguous().mT}
    if x.dim() == 4:
        kinds["channels_last"] = x.contiguous(memory_format=torch.channels_last)
    return kinds


def outcome(function: Callable[..., Tensor], *inputs: Tensor, seed: int = 1) -> Outcome:
    """The output, and the gradients of every floating input under a random non-contiguous cotangent."""
    leaves = [x.detach().requires_grad_(x.is_floating_point()) for x in inputs]
    y = function(*leaves)
    y.backward(gapped(normals(*y.shape, seed=seed).to(y.dtype)))
    return y.detach(), [leaf.grad for leaf in leaves if leaf.grad is not None]


def assert_matches_native(function: Callable[..., Tensor], *inputs: Tensor, **tolerances: float) -> None:
    """`function(*inputs, backend=...)`: output and gradients of reference and native agree."""
    ours = outcome(lambda *x: function(*x, backend="reference"), *inputs)
    native = outcome(lambda *x: function(*x, backend="native"), *inputs)
    torch.testing.assert_close(ours, native, **tolerances)


def assert_layouts_agree(function: Callable[[Tensor], Tensor], x: Tensor) -> None:
    """Output and gradient do not depend on how x lies in memory."""
    expected = outcome(function, x)
    for kind in layouts(x).values():
        torch.testing.assert_close(outcome(function, kind), expected)


def assert_wrong_gradients_are_noticed(
    operation: str, wrong: dict[str, Callable[..., Any]], comparison: Callable[[], None]
) -> None:
    """The comparison passes with the real backward and fails with each wrong one in its place."""
    comparison()
    right = PAIRS[operation, "reference"]
    for name, backward in wrong.items():
        with pytest.MonkeyPatch.context() as patch:
            patch.setitem(PAIRS, (operation, "reference"), right._replace(backward=backward))
            try:
                comparison()
            except AssertionError:
                continue
        pytest.fail(f"{operation}: nobody noticed the gradient with {name}")


def assert_once_differentiable(function: Callable[[Tensor], Tensor], x: Tensor) -> None:
    """Differentiating the hand-derived gradient again is an error, not a wrong number."""
    leaf = x.detach().requires_grad_()
    (dx,) = torch.autograd.grad(function(leaf).square().sum(), leaf, create_graph=True)
    with pytest.raises(UserError, match="second derivatives"):
        dx.sum().backward()


def assert_module_travels(module: nn.Module, *inputs: Tensor) -> None:
    """A copied, a pickled and a compiled module do what the module does, and it prints its backend."""
    assert "backend=reference" in repr(module)
    expected = outcome(module, *inputs)
    torch.testing.assert_close(outcome(copy.deepcopy(module), *inputs), expected)
    torch.testing.assert_close(outcome(pickle.loads(pickle.dumps(module)), *inputs), expected)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(outcome(compiled, *inputs), expected)
