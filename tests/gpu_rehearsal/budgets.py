"""What a training step on a GPU may cost, as far as a CUDA that computes nothing can count it: the one table."""

import json
import subprocess
import sys
from functools import cache
from typing import Any, NamedTuple

import nullcuda

# As experiment=tiny_imagenet trains, in batches of 128; and a small network, where the size changes no count.
TINY = ["model=tiny", "augment=code145", "optim=code145"]
SMALL = ["model=mini", "model.width=0.25", "model.hidden=[64,64]"]
EAGER = "trainer.capture=false"

SMALL_CASES = {
    "reference": [*SMALL, "backend=reference", EAGER],
    "streamed": [*SMALL, "backend=reference", "data.resident=never", EAGER],
    "averaged": [*SMALL, "backend=reference", "optim.ema_decay=0.9", EAGER],
}
TINY_CASES = {
    "fastest": [*TINY, "backend=fastest", EAGER],
    "fast": [*TINY, "backend=fast", EAGER],
    "captured": [*TINY, "backend=fastest", "trainer.capture=true"],
}
CASES = SMALL_CASES | TINY_CASES


class Budget(NamedTuple):
    case: str
    figure: str  # of rehearse.figures
    most: float


BUDGETS = [
    Budget("fastest", "launches", 160),
    Budget("fastest", "GB", 6.5),  # at least 2.7: each tensor read and written once
    Budget("fastest", "peak GiB", 2),
    Budget("fast", "products", 60),
    Budget("fast", "unaligned products", 0),  # an operand that does not begin at a multiple of 16 bytes
    Budget("fast", "products of 3 rows", 0),  # conv1, tap by tap: each reads all of dy for 3 rows
    Budget("fast", "peak GiB", 2.5),
    # 0.95 where the same step uncaptured took 18; a busy machine triples the CPU time of both.
    Budget("captured", "host CPU ms", 3.0),
    Budget("captured", "violations", 0),
    *(Budget(case, "waits in a step", 0) for case in CASES),
    *(Budget(case, "waits between steps", 0) for case in CASES),
    *(Budget(case, "impossible grids", 0) for case in CASES),
    *(Budget(case, "convolutions not NHWC", 0) for case in ("fastest", "fast", "captured")),
    *(Budget(case, "kernels not weighed", 0) for case in ("fastest", "fast")),
]

IMAGES = 2400  # 17 batches of 128
PREPARE = """
import sys
from alexnet.data.prepare import PrepareConfig, prepare
prepare(PrepareConfig(name="synthetic", root=sys.argv[1], px=64, n_train=int(sys.argv[2]), n_val=40, workers=0))
"""


def figures(case: str) -> dict[str, Any]:
    """What rehearse.py counts of a case."""
    found: dict[str, Any] = _figures(case in SMALL_CASES)[case]
    if "error" in found:
        raise RuntimeError(found["error"])
    return found


@cache
def _figures(small: bool) -> dict[str, Any]:
    cases, data = SMALL_CASES if small else TINY_CASES, nullcuda.folder().parent / "nullcuda-data"
    try:
        if not (data / "synthetic/val/manifest.json").exists():
            run(["-c", PREPARE, str(data / "synthetic"), str(IMAGES)])
        output = run([str(nullcuda.HERE / "rehearse.py"), str(data), json.dumps(cases)])
    except RuntimeError as error:  # kept, so that it is not tried again for every figure
        return {case: {"error": str(error)} for case in cases}
    found: dict[str, Any] = json.loads(output.splitlines()[-1])
    return found


def run(arguments: list[str], check: bool = True) -> str:
    """A Python on the null CUDA; its output, or an error with the end of it."""
    command = [sys.executable, *arguments]
    done = subprocess.run(
        command, env=nullcuda.environment(), cwd=nullcuda.ROOT, capture_output=True, text=True
    )
    if check and done.returncode:
        raise RuntimeError(
            f"{' '.join(arguments)[:200]} failed:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
        )
    return done.stdout
