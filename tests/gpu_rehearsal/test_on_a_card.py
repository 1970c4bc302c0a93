"""On a real GPU: every pair against float64 on the CPU, a captured run against an eager one, resume and evaluation.

python -m pytest -m gpu tests; .ci/gpu runs it as its stage `correct`.
"""

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import Callback
from torch.utils._pytree import tree_leaves

from alexnet.evaluate import Evaluate, evaluate
from alexnet.gradcheck.cases import Case, Evaluation, Operation
from alexnet.gradcheck.checks import Trial, largest_share
from alexnet.gradcheck.operations import ALL
from alexnet.layers.backend import Backend, Backends, pair_for
from alexnet.system import under_precision
from alexnet.training import assemble
from alexnet.training.run import train

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
    pytest.mark.filterwarnings("ignore"),  # of torch's compiler, about itself
]
BACKENDS = ("reference", "compiled", "library", "triton")
RUN = ("trainer=gpu", "augment=code145", "optim=code145", "optim.epochs=2", "watchdog=warn")
MISMATCH = "the numbers differ"  # how a comparison fails; anything else that fails is a test that cannot run


@pytest.fixture(autouse=True)
def _exact() -> Iterator[None]:
    """float32 is IEEE in products and convolutions, bfloat16 is summed in float32, cuDNN repeats itself."""
    deterministic = torch.backends.cudnn.deterministic
    with under_precision("32-true"):
        torch.backends.cudnn.deterministic = True
        yield
    torch.backends.cudnn.deterministic = deterministic


def pairs() -> Iterator[Any]:
    for operation in ALL:
        for backend in BACKENDS:
            if backend == "library" and operation.name != "conv2d":
                continue
            if backend == "triton" and operation.name not in ("local_response_norm", "relu_lrn_pool"):
                continue
            yield pytest.param(operation, backend, id=f"{operation.name}-{backend}")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize(("operation", "backend"), pairs())
def test_a_pair_equals_float64_on_the_cpu(operation: Operation, backend: str, dtype: torch.dtype) -> None:
    """At the paper's shapes, within the rounding bounds derived in gradcheck/cases.py."""
    assert pair_for(operation.name, backend) is not None
    for case in operation.cases:
        if case.kind == "paper":
            share = share_of_bound(operation, case, backend, dtype)
            assert share <= 1, f"{MISMATCH}: {case.name}: {share:.3g} of the rounding bound"


def share_of_bound(operation: Operation, case: Case, backend: str, dtype: torch.dtype) -> float:
    """The largest error of output and gradients, as a share of the bound for numbers that `dtype` can hold."""
    trial = Trial(operation, case, backend, "cuda", dtype)
    ours = trial.evaluate(trial.inputs())
    exact_inputs = [x.cpu().double() if x.is_floating_point() else x.cpu() for x in ours.inputs]
    dy = ours.dy.cpu().double()
    exact = Evaluation.of(operation.function, case.options, exact_inputs, dy, "native")
    bounds = [rounding.bound(dtype) for rounding in operation.rounding(exact)]
    pairs = zip((ours.y, *ours.gradients), (exact.y, *exact.gradients), strict=True)
    return max(largest_share(a.cpu(), b, bound) for (a, b), bound in zip(pairs, bounds, strict=True))


class Stop(Exception):
    """A run is interrupted."""


class StopAfterOneEpoch(Callback):
    def on_train_epoch_end(self, *_: Any) -> None:
        raise Stop


@pytest.fixture
def ended(compose: Callable[..., Any]) -> Callable[..., dict[str, Any]]:
    """ended(name, *overrides): the last checkpoint of a run of two epochs, which goes on where one was interrupted."""

    def last_checkpoint(name: str, *overrides: str, interrupted: bool = False) -> dict[str, Any]:
        run = assemble.build_run(compose(*RUN, f"name={name}", *overrides))
        run.trainer.callbacks.extend([StopAfterOneEpoch()] * interrupted)  # after those that save
        run.start()
        with pytest.raises(Stop) if interrupted else nullcontext():
            run.fit()
        return torch.load(run.directory / "checkpoints/last.ckpt", map_location="cpu", weights_only=True)

    return last_checkpoint


def assert_equal_bits(ours: dict[str, Any], theirs: dict[str, Any]) -> None:
    for part in ("state_dict", "optimizer_states"):
        for a, b in zip(tree_leaves(ours[part]), tree_leaves(theirs[part]), strict=True):
            equal = torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b
            assert equal, f"{MISMATCH}: {part}, {getattr(a, 'shape', a)}"


@pytest.mark.parametrize("backend", ["fast", "fastest"])
def test_a_captured_run_ends_with_the_bits_of_an_eager_one(backend: str, ended: Callable[..., Any]) -> None:
    """Two epochs, the last batch of each smaller, the rate changed between them."""
    eager = ended("eager", f"backend={backend}", "trainer.capture=false")
    captured = ended("captured", f"backend={backend}", "trainer.capture=true")
    assert_equal_bits(captured, eager)


def test_an_interrupted_run_ends_with_the_bits_of_a_whole_one(ended: Callable[..., Any]) -> None:
    whole = ended("whole", "backend=fastest")
    ended("interrupted", "backend=fastest", interrupted=True)
    assert_equal_bits(ended("interrupted", "backend=fastest"), whole)


def test_train_and_evaluate_ten_views(compose: Callable[..., Any], data_dir: Path, tmp_path: Path) -> None:
    """The same network by two backends: errors of the same images, cross-entropy to a percent."""
    train(compose(*RUN, "backend=fastest"))
    entropies = []
    for backend in ("reference", "fastest"):
        config = Evaluate(
            checkpoint=str(tmp_path / "train/test/seed0"),
            views=10,
            backend=Backends(default=Backend(backend)),
            device="cuda",
            data_dir=str(data_dir),
            output_dir=str(tmp_path),
        )
        (result,) = evaluate(config)
        assert result.n == 40
        entropies.append(result.cross_entropy.value)
    assert entropies[1] == pytest.approx(entropies[0], rel=0.01), MISMATCH
