"""What can be asked of scripts/benchmark.py."""

import os
from dataclasses import dataclass, field
from enum import StrEnum

import torch

from alexnet.cli import CONF
from alexnet.errors import UserError


class Suite(StrEnum):
    layers = "layers"
    step = "step"
    data = "data"
    end_to_end = "end_to_end"
    memory = "memory"
    gpu = "gpu"
    all = "all"


MODELS = CONF / "model"
PRECISIONS = ("float32", "bfloat16", "tf32")
# What an empty list stands for.
USUAL = {"dtypes": ["float32", "bfloat16"], "models": ["paper", "mini"]}
ON_GPU = {"dtypes": ["bfloat16", "float32", "tf32"], "models": ["tiny", "code145", "mini"]}


@dataclass
class Benchmark:
    """scripts/benchmark.py."""

    suite: Suite = Suite.all
    # Batch 16, 3 rounds and fewer baselines: does everything run? Its ratios mean nothing.
    quick: bool = False
    # None: 64 images (256 for the small nets), or 16 if quick; suite=gpu 128 and 1024.
    batch: int | None = None
    # None: 5, or 3 if quick.
    rounds: int | None = None
    # float32, bfloat16, tf32 (CUDA). Empty: float32 and bfloat16; suite=gpu bfloat16, float32, tf32, in this order.
    dtypes: list[str] = field(default_factory=list)
    # Names in conf/model. Empty: paper and mini; suite=gpu tiny, code145, mini.
    models: list[str] = field(default_factory=list)
    device: str = "cpu"
    # None: as many as torch takes.
    threads: int | None = None
    # Keep freed memory (system.keep_freed_memory), for ours and the baselines alike.
    tuned_allocator: bool = True
    # Only the rows whose name contains this.
    only: str = ""
    # False: time it without asking whether it is right (a rehearsal on a device that computes nothing).
    check: bool = True
    # suite=gpu begins nothing new after so many seconds. None: as long as it takes.
    budget_s: float | None = None
    output_dir: str = "outputs"

    def __post_init__(self) -> None:
        for name in ("batch", "rounds", "threads"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"{name}={value} must be a positive integer")
        if self.threads is not None and self.threads > (os.cpu_count() or 1):
            raise UserError(
                f"threads={self.threads} must be at most {os.cpu_count()}, the cores of this machine"
            )
        if self.budget_s is not None and self.budget_s <= 0:
            raise UserError(f"budget_s={self.budget_s:g} must be positive; null is no limit")
        usual = ON_GPU if self.suite == Suite.gpu else USUAL
        self.dtypes, self.models = self.dtypes or usual["dtypes"], self.models or usual["models"]
        models = sorted(path.stem for path in MODELS.glob("*.yaml"))
        for name, known in (("dtypes", list(PRECISIONS)), ("models", models)):
            if not set(getattr(self, name)) <= set(known):
                raise UserError(f"{name}={getattr(self, name)} must be some of {', '.join(known)}")
        if self.device == "cpu" and ("tf32" in self.dtypes or self.suite == Suite.gpu):
            raise UserError("suite=gpu and dtypes=[tf32] need a GPU: set device=cuda, or leave them out")
        on_gpu = self.device.partition(":")[0] == "cuda" and torch.cuda.is_available()
        if self.device != "cpu" and not on_gpu:
            raise UserError(
                f"device={self.device}: there is no such device here that torch can use. Set device=cpu"
            )

    @property
    def suites(self) -> list[Suite]:
        if self.suite == Suite.all:
            return [suite for suite in Suite if suite not in (Suite.all, Suite.gpu)]
        return [self.suite]

    @property
    def interleaved_rounds(self) -> int:
        return self.rounds or (3 if self.quick else 5)

    def batch_of(self, model: str = "paper") -> int:
        small = model in ("mini", "tiny")
        return self.batch or (16 if self.quick else 256 if small else 64)

    @property
    def batches_on_gpu(self) -> tuple[int, ...]:
        return (self.batch,) if self.batch else (16,) if self.quick else (128, 1024)
