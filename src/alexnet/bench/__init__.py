"""How fast each part is, beside every baseline worth having (scripts/benchmark.py).

    layers       response norm, the block of ReLU, norm and pool, each convolution and its gradients
    step         one training step of a whole network
    data         store -> augmented batch
    end_to_end   images -> trained network: bare loop, Lightning, and the usual pipeline of JPEG files
    memory       peak memory of a step, one fresh process per variant

Rules. All contestants of a row run in one process, in turn (A B C A B C ...), on the same allocator; the median over
the rounds counts, and the spread is shown. The first call, which compiles, is timed apart. Before anything is timed,
ours is compared with the reference, and the reference with the stock modules. Headline ratios are against the *best*
baseline of the row; "as people run it" is stock eager (with autocast for bfloat16) in a fresh process with the default
allocator. A bound is what this machine, measured in the same run, could do at best. Rows that we lose stay.
"""

from dataclasses import dataclass, field
from enum import StrEnum

import torch

from alexnet.errors import UserError


class Suite(StrEnum):
    layers = "layers"
    step = "step"
    data = "data"
    end_to_end = "end_to_end"
    memory = "memory"
    all = "all"


@dataclass
class Benchmark:
    """scripts/benchmark.py."""

    suite: Suite = Suite.all
    # Batch 16, 3 rounds and fewer baselines: does everything run? Its ratios mean nothing.
    quick: bool = False
    # None: 64 images (256 for the small nets), or 16 if quick.
    batch: int | None = None
    # None: 5, or 3 if quick.
    rounds: int | None = None
    dtypes: list[str] = field(default_factory=lambda: ["float32", "bfloat16"])
    models: list[str] = field(default_factory=lambda: ["paper", "mini"])
    device: str = "cpu"
    # None: as many as torch takes.
    threads: int | None = None
    # Keep freed memory (allocator.py), for ours and the baselines alike.
    tuned_allocator: bool = True
    # Only the rows whose name contains this.
    only: str = ""
    output_dir: str = "outputs"

    def __post_init__(self) -> None:
        for name in ("batch", "rounds", "threads"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"{name}={value} is no count: give 1 or more")
        unknown = set(self.dtypes) - {"float32", "bfloat16"}
        if unknown or not self.dtypes:
            raise UserError(f"dtypes={self.dtypes}: choose from float32 and bfloat16")
        unknown = set(self.models) - {"paper", "mini"}
        if unknown or not self.models:
            raise UserError(f"models={self.models}: choose from paper and mini")
        on_gpu = self.device.partition(":")[0] == "cuda" and torch.cuda.is_available()
        if self.device != "cpu" and not on_gpu:
            raise UserError(
                f"device={self.device}: there is no such device here that torch can use. Set device=cpu"
            )

    @property
    def suites(self) -> list[Suite]:
        return [s for s in Suite if s != Suite.all] if self.suite == Suite.all else [self.suite]

    @property
    def interleaved_rounds(self) -> int:
        return self.rounds or (3 if self.quick else 5)

    def batch_of(self, model: str = "paper") -> int:
        return self.batch or (16 if self.quick else 256 if model == "mini" else 64)
