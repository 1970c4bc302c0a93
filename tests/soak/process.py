"""Scripts in forked children of this process, which has imported everything: one costs what its own work costs."""

import contextlib
import json
import os
import runpy
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from alexnet.cli import SCRIPTS
from alexnet.system import git_state, versions
from alexnet.training.interrupt import SIGNALS

HUNG = -1000  # the exit code of what was still there at its deadline
OUT = "SOAK_OUT"  # the variable that names the directory of the figures


class Ended(NamedTuple):
    """A child's end: its exit code, negative for a signal, and what it said."""

    code: int
    out: str
    err: str
    seconds: float

    @property
    def refused(self) -> bool:
        """Exit code 2 and exactly one line."""
        return self.code == 2 and [line.startswith("error: ") for line in self.err.splitlines()] == [True]


class Child:
    """A forked process, a group of its own, that runs `body` as a script's; its output goes to files in `log`."""

    def __init__(self, body: Callable[[], Any], log: Path) -> None:
        log.mkdir(parents=True, exist_ok=True)
        self.log, self.started = log, time.monotonic()
        self.pid = os.fork()
        if not self.pid:
            self._run(body)

    def _run(self, body: Callable[[], Any]) -> NoReturn:
        code: Any = 1
        try:
            os.setsid()
            for number, name in ((1, "out"), (2, "err")):
                file = (self.log / name).open("w", buffering=1)
                os.dup2(file.fileno(), number)
                setattr(sys, f"std{name}", file)
            for number in SIGNALS:  # nohup and the background ignore some
                signal.signal(
                    number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL
                )
            body()
            code = 0
        except SystemExit as error:
            code = error.code if isinstance(error.code, int) else int(error.code is not None)
        except BaseException:
            traceback.print_exc()
        finally:
            with contextlib.suppress(BaseException):
                sys.stdout.flush()
                sys.stderr.flush()
            os._exit(code)

    def kill(self, number: int = signal.SIGKILL) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, number)

    def wait(self, seconds: float = 60.0) -> Ended:
        """Its end; nothing is left of it."""
        deadline = time.monotonic() + seconds
        while not (ended := os.waitpid(self.pid, os.WNOHANG))[0] and time.monotonic() < deadline:
            time.sleep(0.004)
        hung = not ended[0]
        self.kill()
        if hung:
            os.waitpid(self.pid, 0)
        out, err = ((self.log / name).read_text(errors="replace") for name in ("out", "err"))
        code = HUNG if hung else os.waitstatus_to_exitcode(ended[1])
        return Ended(code, out, err, time.monotonic() - self.started)


def script(name: str, *arguments: str) -> Callable[[], None]:
    """`python scripts/<name>.py <arguments>` as a function."""

    def body() -> None:
        sys.argv = [str(SCRIPTS / f"{name}.py"), *arguments]
        runpy.run_path(sys.argv[0], run_name="__main__")

    return body


class Tally:
    """What was tried and how it ended; `faults` are the lines for what must not happen."""

    def __init__(self, part: str) -> None:
        self.part, self.started = part, time.monotonic()
        self.counts = dict.fromkeys(("tried", "refused", "recovered", "lost", "crashed", "hung"), 0)
        self.more: dict[str, Any] = {}
        self.faults: list[str] = []

    def add(self, ended: str, fault: str = "", tried: int = 1) -> None:
        self.counts["tried"] += tried
        self.counts[ended] += tried
        if fault:
            self.faults.append(fault)
            print(fault, file=sys.__stderr__, flush=True)

    def write(self) -> None:
        """<SOAK_OUT>/<part>.json, if the variable is set."""
        content = {"part": self.part, "date": time.strftime("%Y-%m-%d"), **self.counts, **self.more}
        content |= {"seconds": round(time.monotonic() - self.started), "faults": self.faults}
        found = versions()
        content |= {
            "versions": {name: found[name] for name in ("python", "torch", "lightning")},
            "git": git_state(),
        }
        if directory := os.environ.get(OUT):
            path = Path(directory) / f"{self.part}.json"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(content, indent=1) + "\n")


@contextlib.contextmanager
def tally(part: str) -> Iterator[Tally]:
    """Counts, written whatever happens; the test fails if there was a fault."""
    counted = Tally(part)
    try:
        yield counted
    finally:
        counted.write()
    assert not counted.faults, "\n".join(counted.faults)


def number(name: str, default: float) -> float:
    """SOAK_<NAME>: how many, or how long."""
    return float(os.environ.get(f"SOAK_{name}", default))
