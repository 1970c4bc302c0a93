"""Bytes that a step moves between the device's memory and its kernels, counted without a device.

    kernels of Inductor          its own estimate for each (TORCHINDUCTOR_BENCHMARK_KERNEL)
    kernels of torch             what the operator reads and writes, if it launched a kernel
    products, convolutions       their three operands, from nullcuda's log
    copies and fills             from the log

Each operand counts once: what a cache does not hold and is read twice counts too little.
"""

import ctypes
import math
import re
from collections import Counter
from collections.abc import Iterable
from typing import Any
from unittest import mock

import torch
from nullcuda import Event
from torch._inductor.runtime.triton_heuristics import CachingAutotuner
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

WRITES_ONLY = ("aten::copy_", "aten::fill_", "aten::zero_")  # what the first operand held is not read


class Moved(TorchDispatchMode):
    """`with Moved() as moved: step()`; then moved.bytes, by the kernel's name."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes: Counter[str] = Counter()
        self.estimated = 0  # launches whose bytes Inductor knows
        self.launches = ctypes.CDLL(None).nullcuda_torch_kernels

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        return True  # compiled functions stay compiled

    def __enter__(self) -> "Moved":
        run = CachingAutotuner.run

        def counted(kernel: CachingAutotuner, *arguments: Any, **choices: Any) -> Any:
            gigabytes = kernel.inductor_meta.get("kernel_num_gb")
            self.estimated += gigabytes is not None
            self.bytes[kernel.fn.__name__] += round(1e9 * (gigabytes or 0))
            return run(kernel, *arguments, **choices)

        self.patch = mock.patch.object(CachingAutotuner, "run", counted)
        self.patch.start()
        return super().__enter__()

    def __exit__(self, *raised: Any) -> None:
        super().__exit__(*raised)
        self.patch.stop()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        before = self.launches()
        out = func(*args, **(kwargs or {}))
        if self.launches() > before:
            self.bytes[func._schema.name] += operands(func._schema, args, kwargs or {}, out)
        return out


def operands(schema: Any, args: Any, kwargs: Any, out: Any) -> int:
    """Bytes that one call of an operator reads and writes."""
    read = written = 0
    for i, argument in enumerate(schema.arguments):
        size = nbytes(args[i] if i < len(args) else kwargs.get(argument.name))
        is_written = argument.alias_info is not None and argument.alias_info.is_write
        only = is_written and (argument.kwarg_only or schema.name in WRITES_ONLY)
        read += 0 if only else size
        written += size if is_written else 0
    return read + (written or nbytes(out))


def nbytes(values: Any) -> int:
    """Of the tensors on the device; an expanded one counts as much as there is of it."""
    tensors = [x for x in tree_leaves(values) if isinstance(x, torch.Tensor) and x.is_cuda]
    return sum(min(x.numel() * x.element_size(), x.untyped_storage().nbytes()) for x in tensors)


def logged_bytes(events: Iterable[Event]) -> Counter[str]:
    """Bytes of what the log gives the sizes of."""
    found: Counter[str] = Counter()
    for kind, text in events:
        if kind == "product":
            m, n, k, _, size, batch = map(int, re.findall(r"\d+", text))
            found[kind] += (m * n + m * k + n * k) * size * batch
        elif kind == "convolution":
            for dims, size in re.findall(r"([\dx]+) N\w+ (\d)", text):
                found[kind] += math.prod(map(int, dims.split("x"))) * int(size)
        elif kind in ("copy", "memset"):
            passes = 2 if text.startswith("device to device") else 1
            found[kind] += passes * int(text.split()[-1])
    return found
