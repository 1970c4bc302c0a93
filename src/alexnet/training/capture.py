"""The whole training step as one CUDA graph.

A step is 150 to 300 kernels. Launching them one by one costs the host several milliseconds, more than a small network
costs the GPU. A CUDA graph records the launches once; afterwards one call replays them all.

A replay repeats what was recorded to the letter: the same kernels on the same memory, with the same Python numbers.
Hence two rules:

    What changes at every step lies in tensors of fixed memory, which are filled before the replay: the images, their
    labels and draws, the key of the dropout masks, and one learning rate per parameter group (`Inputs`).
    What changes rarely is the signature of a graph: the size of the batch, whether there is colour noise, and which
    groups are frozen. Another signature gets another graph.

The first step of a signature runs as it is. It is a real step and the warm-up at once: it compiles, and it allocates
the velocities. So nothing has to be undone. The second step is recorded and then replayed.

In Lightning this is a strategy: `training_step` does the forward pass, the backward pass and the update, and what
Lightning would do after it does nothing. Loops, schedules, checkpoints and callbacks are as without it. Hooks that
lie inside a step (on_before_backward, on_after_backward, on_before_zero_grad, on_before_optimizer_step) are not
called; `obstacle` names a callback that needs them.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.strategies import SingleDeviceStrategy
from torch import Tensor

from alexnet.data.augment import Draws
from alexnet.data.module import Batch
from alexnet.layers import dropout_key
from alexnet.training.classifier import Classifier
from alexnet.training.config import single_device
from alexnet.training.master_weights import FusedKrizhevsky

Outputs = dict[str, Tensor]
Step = Callable[[], Outputs]
Signature = tuple[int, bool, tuple[bool, ...]]  # images, colour noise, which groups are frozen

HOOKS_INSIDE = ("on_before_backward", "on_after_backward", "on_before_zero_grad", "on_before_optimizer_step")


@dataclass
class Inputs:
    """What enters a step, in memory that stays where it is."""

    batch: Batch
    key: Tensor  # () int64
    rates: list[Tensor | None]  # () float32 per parameter group; None where the group is frozen
    filled: list[float]  # the rates that these tensors hold

    @classmethod
    def like(cls, batch: Batch, rates: list[float]) -> "Inputs":
        device = batch.images.device
        draws = Draws(*(t.clone() for t in batch.draws))
        held = Batch(batch.images.clone(), batch.labels.clone(), draws, batch.first_row)
        key = torch.zeros((), dtype=torch.int64, device=device)
        held_rates = [torch.zeros((), device=device) if rate else None for rate in rates]
        return cls(held, key, held_rates, [0.0] * len(rates))

    def fill(self, batch: Batch, key: int, rates: list[float]) -> None:
        # The corners of the crops are not read again: the images are the crops.
        held, new = ([b.images, b.labels, b.draws.flip, b.draws.colour] for b in (self.batch, batch))
        torch._foreach_copy_(held, new)
        self.key.fill_(key)
        for held_rate, filled, rate in zip(self.rates, self.filled, rates, strict=True):
            if held_rate is not None and rate != filled:
                held_rate.fill_(rate)
        self.filled = rates


class CudaGraphs:
    """Records steps as CUDA graphs, which share one pool of memory: they never run at the same time."""

    def __init__(self, device: torch.device, pool: Any = None) -> None:
        self.stream = torch.cuda.Stream(device)  # what is recorded must not lie on the default stream
        self.pool = pool or torch.cuda.graph_pool_handle()

    def warm_up(self, step: Step) -> Outputs:
        """Runs the step once."""
        current = torch.cuda.current_stream(self.stream.device)
        self.stream.wait_stream(current)
        with torch.cuda.stream(self.stream):
            outputs = step()
        current.wait_stream(self.stream)
        return outputs

    def record(self, step: Step) -> Step:
        """A function that does what `step` did when it was recorded, and returns its outputs. Records only."""
        graph = torch.cuda.CUDAGraph()
        # thread_local: a thread that reads the next images may allocate and copy meanwhile.
        with torch.cuda.graph(graph, self.pool, self.stream, capture_error_mode="thread_local"):
            outputs = step()

        def replay() -> Outputs:
            graph.replay()
            return outputs

        return replay


class CapturedStep:
    """One training step per call, from a batch on the device to updated weights.

    Outputs are those of `Classifier.training_step`. Their memory is written anew by the next call.
    """

    def __init__(self, classifier: Classifier, optimizer: FusedKrizhevsky, recorder: CudaGraphs) -> None:
        self.classifier, self.optimizer, self.recorder = classifier, optimizer, recorder
        self.inputs: dict[Signature, Inputs] = {}
        self.replays: dict[Signature, Step] = {}

    def __call__(self, batch: Batch) -> Outputs:
        rates = self.optimizer.rates()
        colour_on = self.classifier.colour_on
        signature = (len(batch.labels), colour_on, tuple(rate == 0 for rate in rates))
        is_first = signature not in self.inputs
        if is_first:
            self.inputs[signature] = Inputs.like(batch, rates)
        inputs = self.inputs[signature]
        inputs.fill(batch, dropout_key(self.classifier.seed, self.classifier.global_step, 0), rates)

        def step() -> Outputs:
            return self._step(inputs, colour_on)

        if is_first:
            return self.recorder.warm_up(step)
        if signature not in self.replays:
            self.replays[signature] = self.recorder.record(step)
        return self.replays[signature]()

    def _step(self, inputs: Inputs, colour_on: bool) -> Outputs:
        """What is recorded: forward, backward, update. Everything that changes from step to step is in `inputs`."""
        outputs = self.classifier.outputs(inputs.batch, inputs.key, colour_on)
        self.optimizer.zero_grad()
        outputs["loss"].backward()
        trainer = self.classifier.trainer
        clip = trainer.gradient_clip_val, trainer.gradient_clip_algorithm
        self.classifier.configure_gradient_clipping(self.optimizer, *clip)
        self.optimizer.step(rates=inputs.rates)
        return {name: value.detach() for name, value in outputs.items()}


class CapturedStrategy(SingleDeviceStrategy):
    """Lightning's strategy for one device, with the captured step in the place of its own."""

    strategy_name = "captured"

    def __init__(
        self,
        device: torch.device | None = None,
        make_recorder: Callable[[torch.device], CudaGraphs] = CudaGraphs,
    ) -> None:
        super().__init__(device or torch.device("cuda", torch.cuda.current_device()))
        self.make_recorder = make_recorder
        self.step: CapturedStep | None = None

    def training_step(self, *args: Any, **kwargs: Any) -> Outputs:
        if self.step is None:
            classifier, optimizer = self.lightning_module, self.optimizers[0]
            assert isinstance(classifier, Classifier)
            assert isinstance(optimizer, FusedKrizhevsky)
            classifier.captured = True
            self.step = CapturedStep(classifier, optimizer, self.make_recorder(self.root_device))
        with self.precision_plugin.train_step_context():
            return self.step(args[0])

    def backward(self, closure_loss: Tensor, optimizer: Any, *args: Any, **kwargs: Any) -> Tensor:
        """Nothing: the step has done it."""
        return closure_loss

    def optimizer_step(
        self, optimizer: Any, closure: Callable[[], Any], model: Any = None, **kwargs: Any
    ) -> Any:
        """Runs the closure, which is the whole step."""
        return closure()

    def teardown(self) -> None:
        if self.step is not None:
            self.step.classifier.captured = False
        self.step = None  # its graphs, before the weights leave the device
        super().teardown()


def obstacle(trainer: dict[str, Any], resolved: dict[str, Any], callbacks: Iterable[Callback]) -> str:
    """Why the step of a run cannot be captured, in a few words; empty if it can.

    `resolved` is what the configuration came to on this machine (assemble.py).
    """
    device, fused = resolved["device"], resolved["speedups"]["fused_update"]
    obstacles = [
        (device != "cuda", f"the device is {device}, and only CUDA has graphs"),
        (not single_device(trainer), "several devices exchange their gradients inside the step"),
        (not fused, "the backend is not compiled, so the rate is a Python number (backend=fast)"),
        (resolved["precision"] == "16-mixed", "precision 16-mixed looks at its gradients in every step"),
        (trainer.get("detect_anomaly"), "detect_anomaly looks at every gradient"),
    ]
    for kind in map(type, callbacks):
        for hook in HOOKS_INSIDE:
            overrides = getattr(kind, hook) is not getattr(Callback, hook)
            obstacles.append((overrides, f"{kind.__name__}.{hook} lies inside the step"))
    return next((reason for stands, reason in obstacles if stands), "")
