"""From claims to jobs: every run of every arm once, checked before any of them starts.

A job is an ordinary run in its ordinary directory, so scripts/train.py can do it as well. What a job's state is, is
read from that directory and from nothing else.

Training never sees val (evaluate=false); measures.py does, when a run is over. Where a claim tunes a rate per arm,
tuning runs come first; they use a seed of their own and are not measured. The value
with the lowest time to the claim's threshold is taken (where none arrives: the lowest mean over the last epoch).
"""

import copy
import json
import math
import shlex
import shutil
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from functools import cache
from pathlib import Path
from typing import NamedTuple

from alexnet.claims.claims import Claim, Comparison, Run, load_claims, select
from alexnet.claims.config import Reproduce
from alexnet.claims.measures import PICTURES, Want, damage, evidence, failure, is_measured, wanted
from alexnet.claims.statistics import running_mean
from alexnet.claims.tables import Evidence, arrival
from alexnet.cli import CONF
from alexnet.data.module import ImageData
from alexnet.data.prepare import PrepareConfig, prepare
from alexnet.errors import UserError
from alexnet.model import layer_table
from alexnet.system import device_type_of, in_progress, read_json
from alexnet.training import assemble
from alexnet.training.config import Train, compose_train
from alexnet.training.metrics import read_metrics
from alexnet.training.record import differences

CLAIMS = CONF / "claim"
SMOKE_DATA = "synthetic_500"  # conf/experiment/claims_smoke.yaml; drawn where it is missing


class State(StrEnum):
    new = "new"
    interrupted = "interrupted"
    unmeasured = "unmeasured"  # trained, but a claim asks for more than was measured
    damaged = "damaged"  # one of its files does not hold what it should
    finished = "finished"


@dataclass(frozen=True)
class Job:
    """One run with all that the chosen claims want of it."""

    run: Run
    config: Train
    wants: frozenset[Want]
    file: str  # the claim file that asks for it first
    undecided: bool = False  # its rate is not chosen yet, the one in `config` stands in for it

    @property
    def directory(self) -> Path:
        return assemble.run_directory(self.config)

    @property
    def state(self) -> State:
        path = self.directory / "run.json"
        if self.undecided or not path.exists():
            return State.new
        if damage(self.directory):
            return State.damaged
        if is_measured(self.directory, self.wants) and (self.wants or self.trained):
            return State.finished
        return State.unmeasured if self.trained else State.interrupted

    @property
    def trained(self) -> bool:
        """Whether training is over, well or not."""
        return read_json(self.directory / "run.json")["state"] == "finished" or bool(failure(self.directory))

    @property
    def steps_done(self) -> int:
        return 0 if self.undecided else read_metrics(self.directory / "metrics.csv").steps_done


def claims_of(settings: Reproduce) -> list[Claim]:
    return select(load_claims(CLAIMS), ",".join(settings.claims))


def jobs_of(claims: Iterable[Claim], settings: Reproduce) -> list[Job]:
    """Every run of the claims once, tuning runs first, with the wants of all claims that share it."""
    claims, scale = list(claims), settings.scale
    asked = [_job(claim, run, settings) for claim in claims for *_, run in claim.tuning_runs(scale)]
    for claim in claims:
        chosen = choose(claim, settings)
        for run in claim.runs(scale, settings.seeds):
            undecided = claim.tune is not None and run.arm not in chosen
            if claim.tune is not None:
                # Where there is no choice yet, the first rate stands in, which costs the same.
                value = chosen.get(run.arm, claim.tune.values[scale][0])
                run = replace(run, overrides=(*run.overrides, f"{claim.tune.key}={value}"))
            asked.append(_job(claim, run, settings, frozenset(wanted(claim, run.seed)), undecided))
    jobs: dict[tuple[str, int], Job] = {}
    for job in asked:
        first = jobs.get(job.run.key, job)
        jobs[job.run.key] = replace(first, wants=first.wants | job.wants)
    return list(jobs.values())


def _job(
    claim: Claim, run: Run, settings: Reproduce, wants: frozenset[Want] = frozenset(), undecided: bool = False
) -> Job:
    file = f"{claim.uses or claim.name}.yaml"
    run = replace(run, overrides=(*run.overrides, "evaluate=false"))
    try:
        config = _composed(run.recipe, (*settings.overrides, *run.overrides))
    except UserError as error:
        raise UserError(f"{file}, arm {run.arm}: {error}") from error
    config = copy.deepcopy(config)
    config.name, config.seed = run.name, run.seed
    config.output_dir, config.data_dir = settings.output_dir, settings.data_dir
    config.data.root = str(Path(settings.data_dir) / config.data.name)
    return Job(run, config, wants, file, undecided)


@cache
def _composed(recipe: str, overrides: tuple[str, ...]) -> Train:
    """Once per arm and not per run: a hundred compositions would take ten seconds."""
    return compose_train([f"experiment={recipe}", "name=none", *overrides])


def is_tuning(job: Job) -> bool:
    return not job.wants


def choose(claim: Claim, settings: Reproduce) -> dict[str, float]:
    """{arm: value of its tuned key} of the arms whose tuning runs are all over."""
    found: dict[str, dict[float, Evidence | None]] = {}
    for arm, value, run in claim.tuning_runs(settings.scale):
        directory = Path(settings.output_dir) / "train" / run.name / f"seed{run.seed}"
        found.setdefault(arm, {})[value] = evidence(directory)
    chosen = {}
    for arm, values in found.items():
        over = {value: e for value, e in values.items() if e is not None}
        if len(over) == len(values):
            # A figure is drawn from the runs of another claim, which says what they are tuned for.
            comparison = (load_claims(CLAIMS)[claim.uses] if claim.uses else claim).comparisons[0]
            chosen[arm] = min(over, key=lambda value: _rank(comparison, over[value]))
    return chosen


def _rank(comparison: Comparison, found: Evidence) -> tuple[float, float]:
    """(time to the threshold, mean of the last epoch); less is better.

    A rate that ended in NaN is not eligible, although its training errors are numbers.
    """
    curve = running_mean(found.curves.get(comparison.metric, []))
    if found.diverged or not curve:
        return math.inf, math.inf
    time = arrival(comparison, found)
    return math.inf if time is None else time, curve[-1][1]


def rates(claim: Claim, chosen: dict[str, float], settings: Reproduce) -> list[str]:
    """What was chosen, in words: the best at the end of a list might have been better beyond it."""
    lines = []
    for arm, value in chosen.items():
        assert claim.tune is not None
        tried = claim.tune.values[settings.scale]
        ends = {min(tried): "smallest: a smaller", max(tried): "largest: a larger"}
        edge = f" (the {ends[value]} one might be better)" if value in ends else ""
        lines.append(f"{arm}: {claim.tune.key} = {value:g}, of {len(tried)} tried{edge}")
    return lines


# Checks before anything starts --------------------------------------------------------------------------------------


class Sizes(NamedTuple):
    """Images of a data set."""

    train: int
    holdout: int
    val: int


def check(jobs: Iterable[Job]) -> dict[str, Sizes]:
    """Stores, shapes, device and directory of every job -> the sizes of its data, by root.

    Raises UserError for the first job that cannot be run.
    """
    sizes: dict[str, Sizes] = {}
    arms: set[tuple[str, ...]] = set()
    for job in jobs:
        if job.run.overrides in arms:  # seeds differ in nothing that is checked here
            continue
        arms.add(job.run.overrides)
        config, root = job.config, job.config.data.root
        try:
            parts = (Path(root) / split / "manifest.json" for split in ("train", "val"))
            if config.data.name == SMOKE_DATA and not all(part.exists() for part in parts):
                prepare(PrepareConfig(SMOKE_DATA, root, n_train=500, n_val=200, workers=0))
            data = assemble.image_data(config)
            classes = assemble.checked_classes(config.model.num_classes, data)
            layer_table(replace(config.model, num_classes=classes))
            config.backend.resolve(device_type_of(config.trainer["accelerator"]))
            sizes[root] = Sizes(len(data.split[0]), len(data.split[1]), len(data.val_store))
        except UserError as error:
            raise UserError(f"{job.file}, arm {job.run.arm}: {error}") from error
    refuse_other_runs(jobs)
    return sizes


def refuse_other_runs(jobs: Iterable[Job]) -> None:
    """UserError for a directory that holds a run with another configuration, left by an older claim file say.

    Where a store is not on this machine, a run's images are taken on trust.
    """
    opened: dict[str, ImageData | None] = {}
    for job in jobs:
        path, root = job.directory / "run.json", job.config.data.root
        if job.undecided or not path.exists() or job.state is State.damaged:
            continue
        if root not in opened:
            opened[root] = assemble.image_data(job.config) if (Path(root) / "train").exists() else None
        there, now = read_json(path)["config"], assemble.identity(job.config, opened[root])
        if now["model"]["num_classes"] is None:  # as many as the data have, and those are compared by name
            now["model"]["num_classes"] = there["model"]["num_classes"]
        if "store" not in now:
            there.pop("store", None)
        if changed := differences(there, now):
            raise UserError(
                f"{job.file}, arm {job.run.arm}: {job.directory} holds a run with another configuration "
                f"({'; '.join(changed[:4])}): choose another output_dir=..., or delete it"
            )


def keep(jobs: Iterable[Job], folder: Path) -> str:
    """Copies run.json, metrics.csv and the measures of every finished run to <folder>/train/<name>/seed<k>."""
    kept = [job for job in jobs if job.state is State.finished]
    for job in kept:
        there = folder / "train" / job.run.name / f"seed{job.run.seed}"
        there.mkdir(parents=True, exist_ok=True)
        for name in {"run.json", "metrics.csv", *job.wants} - PICTURES:
            if (job.directory / name).exists():  # a run that diverged has no measures
                shutil.copyfile(job.directory / name, there / name)
    size = sum(path.stat().st_size for path in (folder / "train").rglob("*") if path.is_file())
    return f"kept      {len(kept)} finished runs in {folder / 'train'}, {size / 1e6:.1f} MB"


# The same by hand ---------------------------------------------------------------------------------------------------


def train_commands(jobs: Sequence[Job], settings: Reproduce) -> str:
    """The commands of the runs that are not trained; those whose rate waits for tuning are only counted."""
    missing = [job for job in jobs if job.state in (State.new, State.interrupted)]
    lines = [f"# {damage(job.directory)}" for job in jobs if job.state is State.damaged]
    for job in missing:
        if not job.undecided:
            at_work = "# in progress: " if in_progress(job.directory) else ""
            experiment, name, seed, *arm = job.run.arguments
            arguments = [experiment, name, seed, *_places(settings), *settings.overrides, *arm]
            lines.append(at_work + shlex.join(["python", "scripts/train.py", *arguments]))
    if waiting := sum(job.undecided for job in missing):
        lines.append(f"# then print=true again: {waiting} runs whose rate the tuning runs above decide")
    lines.append(f"# then: {reproduce_command(settings.claims, settings)}")
    return "\n".join(lines)


def reproduce_command(claims: Sequence[str], settings: Reproduce) -> str:
    """Of scripts/reproduce.py, for these claims."""
    arguments = [f"claim={','.join(claims)}", f"scale={settings.scale}", f"seeds={settings.seeds}"]
    arguments += _places(settings)
    if settings.overrides:
        arguments.append(f"overrides={json.dumps(settings.overrides)}")
    return shlex.join(["python", "scripts/reproduce.py", *arguments])


def _places(settings: Reproduce) -> list[str]:
    """Where results and data lie, unless it is where they always do."""
    usual, keys = Reproduce(), ("output_dir", "data_dir")
    chosen = {key: getattr(settings, key) for key in keys}
    return [f"{key}={value}" for key, value in chosen.items() if value != getattr(usual, key)]
