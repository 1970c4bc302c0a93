"""The reader's own pair: a Python file that defines x_forward and x_backward of an operation.

A file is code, so it runs only where a person named it on the command line: Backends.resolve runs what a configuration
says, and nobody what a checkpoint or a run's record says.
"""

import importlib.util
from functools import cache
from hashlib import sha256
from pathlib import Path
from types import ModuleType

from alexnet.errors import UserError


def is_file(backend: str | None) -> bool:
    """Whether a backend is a path to a file instead of a name."""
    return backend is not None and str(backend).endswith(".py")


def label(path: str) -> str:
    """Name and hash of a file, for records: 'relu.py (sha256 0123456789abcdef)'."""
    return f"{Path(path).name} (sha256 {file_hash(path)[:16]})"


def file_hash(path: str) -> str:
    """SHA-256 of a file. Raises UserError where there is none."""
    if not Path(path).is_file():
        raise UserError(
            f"{path} does not exist: scripts/check_gradients.py exercise=list shows how to write one"
        )
    return sha256(Path(path).read_bytes()).hexdigest()


def import_file(path: str) -> ModuleType:
    """The module of a file, run once for each of its versions. Raises UserError, one line, if it cannot be imported."""
    return _imported(str(Path(path).resolve()), file_hash(path))


@cache
def _imported(path: str, digest: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"reader_{Path(path).stem}_{digest[:8]}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except SyntaxError as error:
        raise UserError(f"{path}, line {error.lineno}: {error.msg}") from error
    except Exception as error:
        raise UserError(f"{path} cannot be imported: {type(error).__name__}: {error}") from error
    return module
