"""The machine and the process: precision, allocator, device, locks, files, and what a record says about them.

What `trainer.precision` names, and the process-wide switches of torch that make it true:

    32-true         float32; products and convolutions in IEEE float32
    tf32            float32, but products and convolutions round their operands to TF32 (10 bits of mantissa
                    instead of 23); CUDA only
    bf16-master-weights
                    float32 master weights, of which bfloat16 working copies do the work (master_weights.py); one device
    bf16-mixed, 16-mixed, bf16-true, 16-true, 64-true
                    as Lightning defines them; 16-mixed on CUDA only
    auto            chosen by device and backend (training/assemble.py)

Lightning's short names (32, bf16, ...) mean what they mean there.

Under every name, products of bfloat16 or float16 accumulate in float32. torch keeps these switches for the whole
process and starts with a mixture: products in IEEE float32, cuDNN's convolutions in TF32. A CPU multiplies in IEEE
float32 under every name.
"""

import ctypes
import errno
import json
import math
import os
import platform
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout

from alexnet.errors import UserError

# Precision ----------------------------------------------------------------------------------------------

MASTER_WEIGHTS = "bf16-master-weights"
TF32 = "tf32"
LIGHTNING = ("32-true", "bf16-mixed", "16-mixed", "bf16-true", "16-true", "64-true")
PRECISIONS = ("auto", LIGHTNING[0], TF32, MASTER_WEIGHTS, *LIGHTNING[1:])
# Other names of the same: Lightning's short ones, and that of runs until November 2026.
SHORT = {
    "32": "32-true",
    "64": "64-true",
    "16": "16-mixed",
    "bf16": "bf16-mixed",
    "bf16-masters": MASTER_WEIGHTS,
}


def full_precision_name(name: Any) -> str:
    """The name in PRECISIONS that is meant; one that nobody knows stays as it is."""
    return SHORT.get(str(name), str(name))


def checked_precision(name: str, device_type: str) -> str:
    """The full name. Raises UserError if it is unknown, or if the device cannot compute so."""
    full = full_precision_name(name)
    if full not in PRECISIONS:
        raise UserError(f"trainer.precision={name} must be one of {', '.join(PRECISIONS)}")
    instead = {TF32: "32-true", "16-mixed": "bf16-mixed"}.get(full)
    if instead and device_type != "cuda":
        raise UserError(f"trainer.precision={name} needs a CUDA device: set trainer.precision={instead}")
    return full


def set_precision(name: str) -> None:
    """Sets how this process multiplies from now on, on all devices.

    A graph of torch.compile depends on these switches: set them before the first call, or it is compiled again.
    """
    tf32 = name == TF32
    # Not cudnn.conv.fp32_precision: after "ieee" there, torch 2.11 to 2.14 raise whenever cudnn.allow_tf32 is read,
    # which torch.backends.cudnn.flags() and Inductor do. allow_tf32=False computes the same.
    torch.set_float32_matmul_precision("high" if tf32 else "highest")
    torch.backends.cudnn.allow_tf32 = tf32
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
    torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False


@contextmanager
def under_precision(name: str) -> Iterator[None]:
    """`set_precision` for a while; afterwards the float32 format is what it was."""
    products, convolutions = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    set_precision(name)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(products)
        torch.backends.cudnn.allow_tf32 = convolutions


# Allocator ----------------------------------------------------------------------------------------------

# mallopt's numbers (malloc.h), and the largest value an int can hold.
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
KEEP = 2**31 - 1


def keep_freed_memory() -> bool:
    """Lets this process keep what it frees, which halves the time of a CPU step. False if the C library is not glibc.

    By default glibc asks the kernel for every tensor of more than 32 MB and gives it back when the tensor dies, so
    each step faults in all its pages anew: on two cores a copy of (64, 96, 55, 55) float32 took 20 ms, and 6 ms with
    memory that is kept. Stock modules gain as much as ours, so a benchmark must set it on both sides.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return False
    return bool(mallopt(M_MMAP_THRESHOLD, KEEP)) and bool(mallopt(M_TRIM_THRESHOLD, KEEP))


# Device -------------------------------------------------------------------------------------------------


def device_type_of(accelerator: str, key: str = "trainer.accelerator", otherwise: str = "trainer=cpu") -> str:
    """'cuda' or 'cpu': where a run with this accelerator takes place. UserError names the `key` that chose it."""
    if accelerator not in ("auto", "cpu", "gpu", "cuda"):
        raise UserError(f"{key}={accelerator} must be one of auto, cpu, gpu")
    if accelerator in ("gpu", "cuda") and not torch.cuda.is_available():
        raise UserError(f"{key}={accelerator}: there is no GPU that torch can use. Set {otherwise}")
    return "cuda" if accelerator != "cpu" and torch.cuda.is_available() else "cpu"


def has_native_bf16(device_type: str) -> bool:
    """Whether matrix products of bfloat16 are done by the hardware rather than by widening."""
    if device_type == "cuda":
        return torch.cuda.get_device_capability() >= (8, 0)
    flags = next((line.split() for line in _cpuinfo() if line.startswith("flags")), [])
    return "amx_bf16" in flags or "avx512_bf16" in flags


def _cpuinfo() -> list[str]:
    """What Linux knows of each core, a line each; empty elsewhere."""
    try:
        return Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return []


# Locks, files, and what a stranger needs to repeat a number ---------------------------------------------

WAIT = 0.2  # seconds; longer than `in_progress` holds a lock
# What a file system without flock answers.
NO_LOCKS = (errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK)
PACKAGES = ("torch", "torchvision", "lightning", "hydra-core", "numpy", "alexnet")


@contextmanager
def locked(directory: Path, name: str = "lock", wait: float = WAIT) -> Iterator[bool]:
    """Whether this process now has the directory to itself. A lock ends with its process, however that ends.

    Waits `wait` seconds for it, for ever if that is -1. Where files cannot be locked it says so and goes on.
    """
    directory.mkdir(parents=True, exist_ok=True)
    lock = FileLock(directory / name)
    try:
        lock.acquire(timeout=wait)
    except Timeout:
        yield False
        return
    except (OSError, NotImplementedError) as error:
        if isinstance(error, OSError) and error.errno not in NO_LOCKS:
            raise
        warning = f"{directory}: this file system has no locks; do not start a second process there"
        print(warning, file=sys.stderr)
    try:
        yield True
    finally:
        lock.release()


def in_progress(directory: Path) -> bool:
    """Whether another process has it. For an instant nobody else can take it: `locked` tries for longer."""
    if not (directory / "lock").exists() or not os.access(directory / "lock", os.W_OK):
        return False
    with locked(directory) as free:
        return not free


def write_whole(path: Path, content: str) -> None:
    """Whole or not at all: written beside its place and renamed, so a kill or a full disk leaves what was there."""
    with replaced(path) as partial:
        partial.write_text(content, encoding="utf-8")


@contextmanager
def replaced(path: Path) -> Iterator[Path]:
    """A path beside `path` to write to, which takes its place at the end. Raises UserError if `path` is a link, a
    device or a directory: it would be gone."""
    if path.is_symlink() or (path.exists() and not path.is_file()):
        raise UserError(f"{path} must be a regular file, since it is replaced by one: choose another path")
    partial = path.with_name(path.name + ".partial")
    try:
        yield partial
        os.replace(partial, path)
    except OSError as error:
        error.filename = error.filename or str(path)  # a full disk names none
        raise
    finally:
        partial.unlink(missing_ok=True)


def write_json(path: Path, content: dict[str, Any]) -> None:
    write_whole(path, json.dumps(content, indent=1) + "\n")


def finite(value: Any) -> Any:
    """Plain data as JSON can hold it: null for NaN and infinity."""
    if isinstance(value, dict):
        return {key: finite(v) for key, v in value.items()}
    if isinstance(value, list | tuple):
        return [finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises UserError, which names the file, if it is damaged or holds something else."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:  # also what is no UTF-8
        raise UserError(f"{path} is damaged: it is no JSON ({error}). Restore or delete it") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} is damaged: it holds no object of JSON. Restore or delete it")
    return content


def command_line() -> str:
    return " ".join(["python", *(repr(word) if " " in word else word for word in sys.argv)])


def environment() -> dict[str, Any]:
    """Versions, hardware and the commit: what a stranger needs to repeat a number."""
    lines = _cpuinfo()
    names = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    hardware: dict[str, Any] = {
        "cpu": next(names, "unknown") if lines else platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
    }
    if torch.cuda.is_available():
        hardware["gpus"] = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {"versions": versions(), "hardware": hardware, "git": git_state()}


def versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed as a package"
    return found


@cache
def git_state() -> dict[str, Any] | None:
    """Commit of the checkout this package lies in and whether it was changed; None without one.

    Read once: a process that trains for hours goes on with the code it has imported, whatever is committed meanwhile.
    """

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(Path(__file__).parent), *arguments]
        ended = subprocess.run(command, capture_output=True, text=True, check=True, timeout=20)
        return ended.stdout.strip()

    try:
        return {"commit": git("rev-parse", "HEAD"), "changed": bool(git("status", "--porcelain", "-uno"))}
    except (OSError, subprocess.SubprocessError):
        return None
