import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from alexnet.errors import UserError
from alexnet.layers.backend import OPERATIONS, PAIRS, Backends, pair_for

pytest.importorskip("triton")

from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from alexnet.layers import triton as kernels
from alexnet.layers.local_response_norm import Norm
from alexnet.layers.max_pool2d import Pool
from alexnet.layers.triton import local_response_norm as norm
from alexnet.layers.triton import relu_lrn_pool as block

PAIRS_TESTS = Path(__file__).with_name("triton_pairs.py")
NO_INTERPRETER = pytest.mark.skipif(knobs.runtime.interpret, reason="kernels are interpreted in this process")
CUDA = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]


# Whether Triton interprets is decided when a kernel is defined, so each way has a process of its own.
# In float64, a window over 1,030 maps takes a GPU longer than all else.
@pytest.mark.parametrize(
    ("on", "cases"),
    [
        pytest.param("interpreter", ("-m", "not slow"), marks=pytest.mark.slow),
        pytest.param("interpreter", ("-m", "slow"), marks=pytest.mark.slow),
        pytest.param("cuda", ("-k", "not longer"), marks=CUDA),
        pytest.param("cuda", ("-k", "longer"), marks=[*CUDA, pytest.mark.slow]),
    ],
)
def test_pairs_match_reference(on, cases):
    settings = {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""} if on == "interpreter" else {}
    command = [
        sys.executable,
        *("-m", "pytest", "--noconftest", "-p", "no:cacheprovider", "-n0"),
        *(*cases, str(PAIRS_TESTS)),
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUBLAS_WORKSPACE_CONFIG": ":4096:8", **settings}
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=280)
    assert run.returncode == 0, run.stdout[-6000:] + run.stderr[-2000:]


# What the interpreter lets pass and the compiler does not: each kernel to machine code, without a GPU.
CASES = {
    "paper, conv1": (torch.bfloat16, 96, 2, 0.75, (3, 3), "relu_lrn_pool", "first"),
    "2012, conv1": (torch.float32, 96, 2, 0.75, (3, 3), "lrn_pool_relu", "all"),
    "half, one tower, any beta": (torch.float16, 96, 1, 0.6, (5, 5), "relu_lrn_pool", "all"),
    "one map": (torch.float32, 2, 2, 0.75, (3, 2), "lrn_pool_relu", "first"),
    "float64": (torch.float64, 16, 1, 0.75, (3, 3), "relu_lrn_pool", "first"),
}


@pytest.fixture
def compute_capability_8(tmp_path, monkeypatch):
    """Triton believes in a device that it can compile for; nothing can be launched."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    target = GPUTarget("cuda", 80, 32)
    pretended = SimpleNamespace(
        get_current_target=lambda: target, get_current_device=lambda: -1, get_current_stream=lambda _: 0
    )
    monkeypatch.setattr(driver, "_active", pretended)
    yield
    for module in (norm, block):
        for function in (module.forward_kernel, module.backward_kernel):
            function.device_caches.pop(-1, None)


@NO_INTERPRETER
@pytest.mark.usefixtures("compute_capability_8")
@pytest.mark.parametrize(
    "case",
    [pytest.param(case, marks=[] if case.endswith("conv1") else pytest.mark.slow) for case in CASES],
)
def test_kernels_compile_without_a_gpu(case):
    dtype, maps, groups, beta, kernel, order, ties = CASES[case]
    x = torch.empty(2, maps, 27, 27, dtype=dtype, device="meta")
    windows = Pool(kernel, (2, 2), (0, 0), True, ties)
    fixed = norm.norm_constants(x, Norm(5, 1e-4, beta, 2.0, groups))
    pool = block._pool_constants(x, (13, 13), groups, windows, order)
    winners = block._winners_type(windows)
    for made in (
        norm.forward_kernel.warmup(dtype, dtype, 99, grid=(1,), **fixed),
        norm.backward_kernel.warmup(dtype, dtype, dtype, 99, grid=(1,), **fixed),
        block.forward_kernel.warmup(dtype, dtype, winners, 99, grid=(1,), **pool, **fixed),
        block.backward_kernel.warmup(dtype, winners, dtype, dtype, 99, grid=(1,), **pool, **fixed),
    ):
        assert made.asm["cubin"]
        assert "atom." not in made.asm["ptx"]
        assert "sqrt.approx.f64" not in made.asm["ptx"]  # float64 means float64


@NO_INTERPRETER
@pytest.mark.usefixtures("compute_capability_8")
def test_one_kernel_serves_every_batch():
    fixed = norm.norm_constants(torch.empty(2, 8, 3, 3, device="meta"), Norm(5, 1e-4, 0.75, 2.0, 2))
    kernels_made = {
        id(norm.forward_kernel.warmup(torch.float32, torch.float32, rows, grid=(1,), **fixed))
        for rows in (1, 16, 999)
    }
    assert len(kernels_made) == 1


@pytest.mark.parametrize("operation", sorted(set(OPERATIONS) - set(kernels.KERNELS)))
def test_an_operation_without_a_kernel_is_refused_with_the_way_out(operation):
    with pytest.raises(UserError, match=rf"backend\.{operation}=compiled, or =reference") as refusal:
        pair_for(operation, "triton")
    assert "\n" not in str(refusal.value)


@NO_INTERPRETER
@pytest.mark.parametrize("operation", kernels.KERNELS)
def test_without_cuda_the_backend_is_refused_when_the_network_is_built(operation, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.delitem(PAIRS, (operation, "triton"), raising=False)
    with pytest.raises(UserError, match=r"no CUDA device\. Set backend=reference") as refusal:
        Backends(**{operation: "triton"}).resolve("cuda")
    assert "\n" not in str(refusal.value)


@NO_INTERPRETER
def test_a_tensor_that_is_not_on_cuda_is_refused():
    x, pool = torch.ones(1, 4, 5, 5), Pool((3, 3), (2, 2), (0, 0), True, "first")
    with pytest.raises(UserError, match=r"tensor on cpu.*Set backend\.local_response_norm=reference"):
        norm.local_response_norm_forward(x, 5, 1e-4, 0.75, 2.0, 1)
    with pytest.raises(UserError, match=r"tensor on cpu.*Set backend\.relu_lrn_pool=reference"):
        block.relu_lrn_pool_forward(x, Norm(5, 1e-4, 0.75, 2.0, 1), pool, "relu_lrn_pool")


def test_fast_does_not_choose_what_is_not_measured():
    assert "triton" not in Backends(default="fast").resolve("cuda").values()
    assert "triton" not in Backends(default="fastest").resolve("cuda").values()
