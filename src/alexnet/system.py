"""What `trainer.precision` names, and the process-wide switches of torch that make it true.

    32-true         float32; products and convolutions in IEEE float32
    tf32            float32, but products and convolutions round their operands to TF32 (10 bits of mantissa
                    instead of 23); CUDA only
    bf16-masters    float32 master weights; a bfloat16 copy of them does the work (optim_masters.py); one device
    bf16-mixed, 16-mixed, bf16-true, 16-true, 64-true
                    as Lightning defines them
    auto            chosen by device and backend (build.precision_for)

Under every name, products of bfloat16 or float16 accumulate in float32.

torch keeps these switches for the whole process and starts with a mixture: products in IEEE float32, cuDNN's
convolutions in TF32. A CPU multiplies in IEEE float32 under every name.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from alexnet.errors import UserError

MASTERS = "bf16-masters"
TF32 = "tf32"
LIGHTNING = ("32-true", "bf16-mixed", "16-mixed", "bf16-true", "16-true", "64-true")
PRECISIONS = ("auto", LIGHTNING[0], TF32, MASTERS, *LIGHTNING[1:])


def checked_precision(name: str, device_type: str) -> str:
    """The name itself. Raises UserError if it is unknown, or if the device cannot compute so."""
    if name not in PRECISIONS:
        raise UserError(f"trainer.precision={name} must be one of {', '.join(PRECISIONS)}")
    if name == TF32 and device_type != "cuda":
        raise UserError(f"trainer.precision={TF32} needs a CUDA device: set trainer.precision=32-true")
    return name


def lightning_precision(name: str) -> str:
    """The name for lightning.Trainer, which sees only the type that weights and activations are stored in."""
    return name if name in LIGHTNING else "32-true"


def float32_format(name: str) -> str:
    """The format in which float32 operands are multiplied under this precision: "ieee" or "tf32"."""
    return "tf32" if name == TF32 else "ieee"


def set_precision(name: str) -> None:
    """Sets how this process multiplies from now on, on all devices.

    A graph of torch.compile depends on these switches: set them before the first call, or it is compiled again.
    """
    tf32 = float32_format(name) == "tf32"
    # Not cudnn.conv.fp32_precision: after "ieee" there, torch 2.11 to 2.14 raise whenever cudnn.allow_tf32 is read,
    # which torch.backends.cudnn.flags() and Inductor do. allow_tf32=False computes the same.
    torch.set_float32_matmul_precision("high" if tf32 else "highest")
    torch.backends.cudnn.allow_tf32 = tf32
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
    torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False


@contextmanager
def under_precision(name: str) -> Iterator[None]:
    """`set_precision` for a while; afterwards the float32 format is what it was."""
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    set_precision(name)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before[0])
        torch.backends.cudnn.allow_tf32 = before[1]
