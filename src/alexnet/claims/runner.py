"""From claims to finished runs, one after another in this process, and to the report.

    claims -> jobs -> checks -> estimate, from a few measured steps of every distinct network -> runs -> report

What is there is never done again: finished runs are skipped, interrupted ones resume with the same bits, and a kill
at any moment costs what was trained since the last checkpoint. A run is locked while it is worked on, so that several
processes, one a core say, can be given the same claims.
"""

import contextlib
import copy
import io
import json
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from alexnet.claims import planning
from alexnet.claims.claims import Claim
from alexnet.claims.config import Reproduce
from alexnet.claims.jobs import (
    Job,
    Sizes,
    State,
    check,
    choose,
    claims_of,
    is_tuning,
    jobs_of,
    keep,
    rates,
    refuse_other_runs,
    train_commands,
)
from alexnet.claims.measures import TRAIN_IMAGES, Want, damage, diverged, evidence, measure, record_failure
from alexnet.cli import plain
from alexnet.errors import UserError
from alexnet.system import device_type_of, git_state, in_progress, locked, read_json
from alexnet.training import assemble
from alexnet.training.callbacks import Stalled
from alexnet.training.config import Train
from alexnet.training.record import RunRecord, read_record
from alexnet.training.run import train

WARM_UP, TIMED = 2, 3  # steps of the probe of speed
OVER = (State.finished, State.damaged)  # nothing is done about these
PATIENCE = 10.0  # seconds between two looks at a run that another process is at


# The verb -----------------------------------------------------------------------------------------------------------


def reproduce(settings: Reproduce) -> None:
    """Runs what is missing of the claims and renders the report; or only plans, prints or renders.

    Raises UserError before any training for an unknown claim, override or store, for a directory that holds another
    run, and when the estimate exceeds `budget_minutes`.
    """
    git_state()  # of the code that runs, not of what is committed in the hours to come
    claims = claims_of(settings)
    if settings.plan:
        print(planning.plan(claims, settings))
        return
    if settings.compare is not None:
        print(planning.compare_results(settings.report_directory / "results.json", Path(settings.compare)))
        return
    jobs, failed = jobs_of(claims, settings), []
    if settings.keep is not None:
        print(keep(jobs, Path(settings.keep)))
        return
    if not settings.report:
        sizes = check(jobs)
        if settings.print:
            print(train_commands(jobs, settings))
            return
        _writer()  # what the report needs is missed before the training and not after it
        failed = run_all(claims, jobs, sizes, settings)
    print(_writer()(claims, settings))
    failed += [line for line in (damage(job.directory) for job in jobs if not job.undecided) if line]
    if failed:
        raise UserError(f"{len(failed)} of {len(jobs)} runs are left out: {'; '.join(failed)}")


def _writer() -> Callable[[Sequence[Claim], Reproduce], str]:
    """The report's, which wants matplotlib and a template engine. UserError without them."""
    try:
        from alexnet.claims.report import write_report
    except ModuleNotFoundError as error:
        raise UserError(
            f"the report needs {error.name}, which is not installed: pip install -e '.[plots]'"
        ) from error
    return write_report


def run_all(
    claims: Sequence[Claim], jobs: Sequence[Job], sizes: Mapping[str, Sizes], settings: Reproduce
) -> list[str]:
    """Trains and measures every job that is not finished, tuning runs first. Returns a line for each that failed."""
    print(plan(claims, jobs, settings), flush=True)
    estimates = estimate(jobs, sizes)
    total = sum(estimates.values()) / 60
    print(f"estimate  {total:.1f} minutes, from {TIMED} measured steps of each network", flush=True)
    if settings.budget_minutes is not None and total > settings.budget_minutes:
        raise UserError(
            f"budget_minutes={settings.budget_minutes:g}, but these runs need about {total:.1f} minutes here: "
            "raise it, or choose fewer claims or seeds"
        )
    progress = Progress(estimates)
    failed = run_jobs([job for job in jobs if is_tuning(job)], progress)
    arms = [job for job in jobs_of(claims, settings) if not is_tuning(job)]  # the rates are chosen now
    if any(job.undecided for job in jobs):
        refuse_other_runs(arms)
        print(*_rate_lines(claims, settings), sep="\n", flush=True)
    return failed + run_jobs(arms, progress)


def run_jobs(jobs: Sequence[Job], progress: "Progress") -> list[str]:
    """One after another; returns a line for each that failed, which stops no other.

    What another process is at comes last, and is done here should that one have been killed.
    """
    jobs, failed = [job for job in jobs if job.state not in OVER], []
    while jobs:
        busy = []
        for job in jobs:
            with locked(job.directory) as ours:
                if not ours:
                    busy.append(job)
                elif job.state is State.finished:
                    progress.report(job, "done by another process")
                else:
                    try:
                        with cpu_time(job):
                            text = run_job(job)
                    except UserError as error:
                        text = f"failed: {error}"
                        failed.append(f"{job.run.name} seed {job.run.seed} {text}")
                    progress.report(job, text)
        if len(busy) == len(jobs):
            time.sleep(PATIENCE)
        jobs = busy
    return failed


@contextlib.contextmanager
def cpu_time(job: Job) -> Iterator[None]:
    """Adds the CPU seconds that this process trains a run to its run.json: a clock counts other programs too."""
    started, path, trains = time.process_time(), job.directory / "run.json", job.state is not State.unmeasured
    try:
        yield
    finally:
        if trains and path.exists():
            record = RunRecord(job.directory, read_record(job.directory))
            spent = record.content.get("cpu_seconds", 0.0) + time.process_time() - started
            record.update(cpu_seconds=round(spent, 1))


def run_job(job: Job) -> str:
    """Trains (from where it stopped) and measures; returns a line of what came out.

    A loss of NaN or infinity, or a stop by the watchdog, is a result and not a mistake of the user.
    """
    reason = ""
    if job.state in (State.new, State.interrupted):
        try:
            with contextlib.redirect_stdout(io.StringIO()):
                train(copy.deepcopy(job.config), lock=False)  # it is ours already
        except UserError as error:
            if not isinstance(error, Stalled) and not diverged(job.directory):
                raise
            reason = str(error).splitlines()[0]
    if not reason and diverged(job.directory):
        reason = "the loss ended in NaN or infinity"
    if reason:
        record_failure(job.directory, reason)
        return f"diverged ({reason})"
    measure(job.directory, job.config, job.wants)
    if is_tuning(job):
        wrong = read_json(job.directory / "run.json")["train"]["top1_error"]
        return f"training error {100 * wrong:.1f} % in the last epoch"
    found = evidence(job.directory)
    assert found is not None
    return f"val top-1 error {100 * found.results['val/top1_error']:.1f} %"


# Time ---------------------------------------------------------------------------------------------------------------


class Speed(NamedTuple):
    """Of one network on this machine, in seconds."""

    step: float
    image: float  # of evaluation
    start: float  # building everything


def estimate(jobs: Iterable[Job], sizes: Mapping[str, Sizes]) -> dict[tuple[str, int], float]:
    """Seconds left of every unfinished job, by (name, seed)."""
    speeds: dict[str, Speed] = {}
    found = {}
    for job in jobs:
        if job.state in OVER:
            continue
        # What the time of a step depends on: everything but initial weights, rates and names.
        c = job.config
        model = {k: v for k, v in plain(c.model).items() if not k.startswith("init")}
        key = json.dumps([model, plain(c.data), plain(c.augment), plain(c.backend)])
        if key not in speeds:
            speeds[key] = measure_speed(c)
        found[job.run.key] = seconds_left(job, sizes[c.data.root], speeds[key])
    return found


def measure_speed(config: Train) -> Speed:
    """A few steps of the untrained network on a real batch; nothing is written."""
    device = torch.device(device_type_of(config.trainer["accelerator"]))

    def clock() -> float:
        """On a CPU that of this process's threads: what other programs take meanwhile does not count."""
        return time.process_time() / torch.get_num_threads() if device.type == "cpu" else time.monotonic()

    started = clock()
    run = assemble.build_run(replace(copy.deepcopy(config), name="speed", probe=True, overwrite=False))
    classifier, resolved = run.classifier.to(device), run.resolved
    optimizer = classifier.make_optimizer()
    batch = next(iter(run.data.train_dataloader()))
    images, labels = batch.images.to(device), batch.labels.to(device)
    batch = batch._replace(images=images, labels=labels, draws=batch.draws.to(device))
    start, steps = clock() - started, []
    with torch.autocast(device.type, torch.bfloat16, enabled=resolved["precision"] == "bf16-mixed"):
        for _ in range(WARM_UP + TIMED):
            started = clock()
            loss = classifier.training_step(batch, 0)["loss"]
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            loss.detach().item()  # waits for the device
            steps.append(clock() - started)
    stored = np.array(run.data.train_store.images[: len(images)])  # whole, as evaluation sees them
    whole = torch.from_numpy(stored).to(device)
    classifier.eval()
    with torch.no_grad():
        for _ in range(2):  # the first call may compile
            started = clock()
            float(classifier(classifier.augment.centre(whole)).sum())
            evaluation = clock() - started
    return Speed(min(steps[WARM_UP:]), evaluation / len(whole), start)


def seconds_left(job: Job, sizes: Sizes, speed: Speed) -> float:
    """Training steps, the holdout after every epoch and at the end, and what is wanted of the trained network."""
    limit = job.config.trainer["limit_train_batches"]
    batches = -(-sizes.train // job.config.data.batch_size)
    batches = max(1, min(batches, limit) if isinstance(limit, int) else int(batches * limit))
    trained = job.state is State.unmeasured
    steps = 0 if trained else max(0, job.config.optim.epochs * batches - job.steps_done)
    images = 0.0 if trained else steps / batches * sizes.holdout + sizes.holdout
    costs = {
        Want.basic: min(TRAIN_IMAGES, sizes.train) + sizes.holdout,
        Want.one_view: sizes.val,
        Want.ten_views: 10 * sizes.val,
        Want.hidden: sizes.train,
        Want.pixels: sizes.train / 4,
    }
    images += sum(costs.get(want, 0) for want in job.wants if not (job.directory / want).exists())
    return steps * speed.step + images * speed.image + speed.start


def plan(claims: Sequence[Claim], jobs: Sequence[Job], settings: Reproduce) -> str:
    """What is there and what is to be done."""
    states = [job.state for job in jobs]
    parts = [f"{states.count(state)} {state}" for state in State if state in states]
    tuning = sum(is_tuning(job) and job.state not in OVER for job in jobs)
    elsewhere = sum(job.state not in OVER and in_progress(job.directory) for job in jobs)
    runs = f"runs      {len(jobs)}: {', '.join(parts)}"
    runs += f"; {tuning} of them tuning" if tuning else ""
    runs += f"; {elsewhere} in progress in another process" if elsewhere else ""
    named = f"claims    {', '.join(claim.name for claim in claims)}"
    scale = f"scale     {settings.scale}, {settings.seeds} seed{'s' * (settings.seeds > 1)}"
    return "\n".join([named, scale, runs, *_rate_lines(claims, settings)])


def _rate_lines(claims: Sequence[Claim], settings: Reproduce) -> list[str]:
    lines = [line for claim in claims for line in rates(claim, choose(claim, settings), settings)]
    return [f"rate      {line}" for line in dict.fromkeys(lines)]  # a figure has the rates of its claim


class Progress:
    """A line per run, with the time left: the estimate times how wrong it has been so far."""

    def __init__(self, estimates: Mapping[tuple[str, int], float]) -> None:
        self.estimates = dict(estimates)
        self.total, self.done, self.predicted = len(estimates), 0, 0.0
        self.started = time.monotonic()

    def report(self, job: Job, text: str) -> None:
        self.done += 1
        self.predicted += self.estimates.pop(job.run.key, 0.0)
        spent = time.monotonic() - self.started
        left = sum(self.estimates.values()) * spent / max(self.predicted, 1e-9)
        print(
            f"[{self.done:>{len(str(self.total))}}/{self.total}] {job.run.name} seed {job.run.seed}: {text}; "
            f"{spent / 60:.1f} min, {left / 60:.1f} min left",
            flush=True,
        )
