"""Builds nullcuda.c, says how to run a process on it, and reads its log."""

import ctypes
import os
import re
import shutil
import subprocess
import sys
import traceback
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
NAMES = re.compile(r"\b(?:__cuda|cuda|cublas|cudnn|cu)[A-Z]\w+")  # functions of CUDA's libraries


def missing() -> str | None:
    """Why there can be no null CUDA on this machine; None if there can."""
    import torch

    if torch.version.cuda is None:
        return "this torch is not a CUDA build"
    if Path("/dev/nvidiactl").exists():
        return "there is a real GPU"
    if not (shutil.which("gcc") and shutil.which("nm")):
        return "there is no gcc or no nm"
    if find_spec("triton") is None or not headers():
        return "there are no headers of CUDA (packages triton, nvidia-cuda-runtime, nvidia-cudnn)"
    return None


def headers() -> list[Path]:
    """Where NVIDIA's packages keep the headers of CUDA and cudnn."""
    package = find_spec("nvidia")
    roots = list(package.submodule_search_locations or []) if package else []
    return [path for root in roots for path in Path(root).glob("cu*/include")]


def folder() -> Path:
    """Where the library and the caches of the compilers stay from one run to the next; pytest's own, git-ignored."""
    import torch

    return ROOT / ".pytest_cache/d" / f"nullcuda-{torch.__version__}"


def build() -> Path:
    """Compiles the library, under the name by which Triton looks for the driver."""
    import torch
    import triton

    library, source = folder() / "libcuda.so.1", HERE / "nullcuda.c"
    if library.exists() and library.stat().st_mtime > source.stat().st_mtime:
        return library
    library.parent.mkdir(parents=True, exist_ok=True)
    backend = Path(triton.__file__).parent / "backends/nvidia"
    include = [f"-I{path}" for path in (*headers(), backend / "include")]
    made, stubs = (library.with_name(f"{os.getpid()}{end}") for end in (".so", ".c"))
    gcc = ["gcc", "-shared", "-fPIC", "-O1", "-w", *include, "-o", made, source]
    subprocess.run([*gcc, "-ldl", "-lpthread"], check=True)

    # Every function that torch or Triton may call and nullcuda.c does not answer: it succeeds and does nothing.
    lib = Path(torch.__file__).parent / "lib"
    torchs = [lib / f"lib{name}.so" for name in ("c10_cuda", "torch_cuda", "torch_python", "caffe2_nvrtc")]
    called = symbols("--undefined-only", *torchs) | set(NAMES.findall((backend / "driver.c").read_text()))
    unanswered = sorted(called - symbols("--defined-only", made))
    stubs.write_text("".join(f"int {name}(void) {{ return 0; }}\n" for name in unanswered))
    subprocess.run([*gcc, stubs, "-ldl", "-lpthread"], check=True)
    stubs.unlink()
    made.replace(library)
    return library


def symbols(which: str, *libraries: Path) -> set[str]:
    listed = subprocess.run(["nm", "-D", which, *libraries], check=True, capture_output=True, text=True)
    return set(NAMES.findall(listed.stdout))


def environment() -> dict[str, str]:
    """The environment of a process that runs on the null CUDA."""
    library = build()
    return {
        **os.environ,
        "LD_PRELOAD": str(library),
        "LD_LIBRARY_PATH": os.pathsep.join([str(library.parent), os.environ.get("LD_LIBRARY_PATH", "")]),
        "TRITON_LIBCUDA_PATH": str(library.parent),
        "TRITON_CACHE_DIR": str(library.parent / "triton"),
        "TORCHINDUCTOR_CACHE_DIR": str(library.parent / "inductor"),
        "TORCHINDUCTOR_COMPILE_THREADS": "1",
        "TORCHINDUCTOR_BENCHMARK_KERNEL": "1",  # kernels say how many bytes they move
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([str(ROOT / "src"), str(HERE), os.environ.get("PYTHONPATH", "")]),
    }


class Event(NamedTuple):
    kind: str
    text: str


class Log:
    """`with Log() as log: ...` fills log.events. For a process that runs on the null CUDA."""

    def __init__(self) -> None:
        self.library = ctypes.CDLL(None)
        self.library.nullcuda_stop.restype = ctypes.c_char_p
        self.hook = ctypes.CFUNCTYPE(None)(self._say_where)
        self.events: list[Event] = []

    def __enter__(self) -> "Log":
        self.library.nullcuda_start(self.hook)
        return self

    def __exit__(self, *_: object) -> None:
        lines = self.library.nullcuda_stop().decode(errors="replace").splitlines()
        self.events = [Event(*line.split("\t", 1)) for line in lines]

    def note(self, text: str, kind: str = "note") -> None:
        self.library.nullcuda_note(kind.encode(), text.encode())

    def _say_where(self) -> None:
        """Which line waits: the innermost of ours, and the innermost of all."""
        stack = traceback.extract_stack()[:-1]
        ours = [frame for frame in stack if "/alexnet/" in frame.filename]
        lines = [f"{Path(f.filename).name}:{f.lineno} {f.name}" for f in (*ours[-1:], *stack[-1:])]
        self.note(" <- ".join(dict.fromkeys(lines)), kind="where")


if __name__ == "__main__":  # python nullcuda.py <command> [argument ...]: the command on the null CUDA
    os.execvpe(sys.argv[1], sys.argv[1:], environment())
