"""Signals that ask a run to stop: SIGTERM, SIGINT (Ctrl-C), SIGHUP (the terminal is gone), SIGUSR1 (its time is up).

While steps are trained, a signal is only noted: the running step ends, a checkpoint is written by
callbacks.LastCheckpoint, and the process leaves with 128 + the signal's number, as a shell says it. At any other time
there is nothing to save, and it leaves at once. A second signal has its usual effect.

Under SLURM, SIGUSR1 also puts the job back into its queue: `#SBATCH --signal=USR1@60` sends it 60 seconds early.
"""

import os
import signal
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)


class Interrupted(SystemExit):
    """The process leaves because of a signal. No error: nothing that catches errors stops it."""

    def __init__(self, number: int, step: int | None = None) -> None:
        super().__init__(128 + number)
        self.number, self.step = number, step

    def __str__(self) -> str:
        saved = "" if self.step is None else f" after step {self.step:,}, which is saved"
        return f"interrupted by {signal.Signals(self.number).name}{saved}"


class Signals:
    """What has come. `waits`: a signal is only noted, and somebody looks at `received` after each step."""

    def __init__(self) -> None:
        self.received = 0
        self.waits = False
        self._usual: dict[int, Any] = {}

    @contextmanager
    def listening(self) -> Iterator[None]:
        usual = {number: signal.getsignal(number) for number in SIGNALS}
        # A signal that was ignored when the process started stays so: nohup, jobs in the background.
        self._usual = {n: handler for n, handler in usual.items() if handler is not signal.SIG_IGN}
        self.listen()
        try:
            yield
        finally:
            self._restore()
            self._usual = {}

    def listen(self) -> None:
        """Also after somebody else has put a handler in the place of ours."""
        if threading.current_thread() is threading.main_thread():
            for number in self._usual:
                signal.signal(number, self._handle)

    def _handle(self, number: int, frame: Any) -> None:
        self._restore()
        self.received = number
        if not self.waits:
            raise Interrupted(number)

    def _restore(self) -> None:
        if threading.current_thread() is threading.main_thread():
            for number, handler in self._usual.items():
                signal.signal(number, handler)


def requeue(number: int) -> str:
    """Puts this SLURM job back into its queue if the signal asks for it; what became of that, in a few words."""
    job = os.environ.get("SLURM_JOB_ID")
    if number != signal.SIGUSR1 or job is None:
        return ""
    if "SLURM_ARRAY_JOB_ID" in os.environ:
        job = f"{os.environ['SLURM_ARRAY_JOB_ID']}_{os.environ['SLURM_ARRAY_TASK_ID']}"
    try:
        subprocess.run(["scontrol", "requeue", job], check=True, capture_output=True, timeout=30)
    except (OSError, subprocess.SubprocessError) as error:
        return f"; SLURM job {job} could not be requeued ({error}): submit it again"
    return f"; SLURM job {job} is in its queue again"
