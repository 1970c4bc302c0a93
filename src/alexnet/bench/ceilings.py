"""The rates that bound a row: the best of what the library does when nothing hinders it.

The candidates are large products (square and not, each operand either way round) and forward convolutions of the
network's own shapes, in both layouts. Which is the fastest differs from machine to machine, and a convolution may
multiply less than its definition says (Winograd): its rate counts by the definition, as those of the network do.
"""

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F

from alexnet.bench.layers import CONVOLUTIONS
from alexnet.bench.networks import TYPES
from alexnet.bench.timing import Machine, fastest_of
from alexnet.system import set_precision

KEPT = 2  # candidates that are measured again between the rounds


def measured_machine(dtypes: list[str], device: str) -> Machine:
    """Surveys all candidates, and keeps the best of each kind for the rounds."""
    big = torch.ones(2**26, device=device)  # 256 MB: outside the caches
    copies: list[tuple[Callable[[], object], float]] = [(big.clone, 2.0 * big.nbytes)]
    machine = Machine({}, {"copy": copies})
    for dtype in dtypes:
        set_precision(dtype)
        found = [(work / fastest_of(call, samples=2), call, work) for call, work in candidates(dtype, device)]
        found.sort(key=lambda one: -one[0])
        machine.rates[dtype] = found[0][0]
        machine.calls[dtype] = [(call, work) for _, call, work in found[:KEPT]]
    machine.measure("copy")
    return machine


def candidates(dtype: str, device: str) -> list[tuple[Callable[[], object], float]]:
    """Calls and the FLOP of each."""
    side, images = (2048, 32) if device == "cpu" else (8192, 512)

    def noise(*shape: int) -> torch.Tensor:
        return torch.randn(shape, device=device).to(TYPES[dtype])

    a, wide, long = noise(side, side), noise(side // 4, 9216), noise(9216, 4096)
    calls: list[tuple[Callable[[], object], float]] = [
        (partial(torch.mm, left, right), 2.0 * side**3) for left in (a, a.T) for right in (a, a.T)
    ]
    calls.append((partial(torch.mm, wide, long), 2.0 * wide.numel() * 4096))
    calls.append((partial(torch.mm, wide, noise(4096, 9216).T), 2.0 * wide.numel() * 4096))
    for name in ("conv2", "conv3", "conv4"):
        C, O, px, kernel, _, sides, groups = CONVOLUTIONS[name]  # noqa: E741
        x, w = noise(images, C, px, px), noise(O, C // groups, kernel, kernel)
        for layout in (torch.channels_last, torch.contiguous_format):
            operands = x.to(memory_format=layout), w.to(memory_format=layout)
            call = partial(F.conv2d, *operands, padding=sides[0], groups=groups)
            calls.append((call, 2.0 * images * px**2 * w.numel()))
    return calls
