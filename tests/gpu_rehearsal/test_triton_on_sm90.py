"""The hand-written kernels, compiled for the H100 without one: registers, stack and atomics."""

import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from alexnet.layers.local_response_norm import Norm
from alexnet.layers.max_pool2d import Pool
from alexnet.layers.triton import local_response_norm as norm
from alexnet.layers.triton import relu_lrn_pool as block

CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
MOST_REGISTERS = 80  # with 128 threads a block: 6 blocks and 24 warps on a multiprocessor, of its 64

pytestmark = [
    pytest.mark.skipif(knobs.runtime.interpret, reason="kernels are interpreted in this process"),
    pytest.mark.skipif(not CUOBJDUMP.exists(), reason="this triton brings no cuobjdump"),
]


@pytest.fixture(autouse=True)
def _h100(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Triton believes in an H100, for which it compiles; nothing is launched."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    target = GPUTarget("cuda", 90, 32)
    pretended = SimpleNamespace(
        get_current_target=lambda: target, get_current_device=lambda: -1, get_current_stream=lambda _: 0
    )
    monkeypatch.setattr(driver, "_active", pretended)
    yield
    for module in (norm, block):
        for function in (module.forward_kernel, module.backward_kernel):
            function.device_caches.pop(-1, None)


def compiled(maps: int, side: int, order: str | None, dtype: torch.dtype) -> Iterator[Any]:
    """Forward and backward kernel of a norm (order None) or a block, two towers."""
    x = torch.empty(2, maps, side, side, dtype=dtype, device="meta")
    fixed = norm.norm_constants(x, Norm(5, 1e-4, 0.75, 2.0, 2))
    if order is None:
        yield norm.forward_kernel.warmup(dtype, dtype, 99, grid=(1,), **fixed)
        yield norm.backward_kernel.warmup(dtype, dtype, dtype, 99, grid=(1,), **fixed)
        return
    pooled = -(-(side - 3) // 2) + 1
    windows = Pool((3, 3), (2, 2), (0, 0), True, "all")
    pool = block._pool_constants(x, (pooled, pooled), 2, windows, order)
    winners = block._winners_type(windows)
    yield block.forward_kernel.warmup(dtype, dtype, winners, 99, grid=(1,), **pool, **fixed)
    yield block.backward_kernel.warmup(dtype, winners, dtype, dtype, 99, grid=(1,), **pool, **fixed)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("maps", "side", "order"),
    [(96, 55, "lrn_pool_relu"), (96, 55, "relu_lrn_pool"), (256, 27, None), (256, 27, "relu_lrn_pool")],
    ids=["block1_2012", "block1_paper", "norm2", "block2"],
)
def test_kernels_fit_an_h100(maps: int, side: int, order: str | None, tmp_path: Path) -> None:
    for dtype in (torch.bfloat16, torch.float32):
        for kernel in compiled(maps, side, order, dtype):
            binary = tmp_path / "kernel.cubin"
            binary.write_bytes(kernel.asm["cubin"])
            command = [CUOBJDUMP, "--dump-resource-usage", binary]
            usage = subprocess.run(command, check=True, capture_output=True, text=True).stdout
            found = {name: int(value) for name, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}
            assert found["REG"] <= MOST_REGISTERS, usage
            assert found["STACK"] == found["LOCAL"] == 0, usage
            assert not re.search(r"\b(atom|red)\.", kernel.asm["ptx"])
