"""A claim of the paper as data: one YAML file, read strictly.

`conf/claim/s3_3_lrn.yaml` is the claim of section 3.3: the sentence, the numbers the paper and the lab notes of 2012
give, the arms, and what is compared with what, in which metric and with which expectation. An arm is a list of
overrides of a training recipe; arm and seed make an ordinary run:

    python scripts/train.py experiment=claims_cpu name=cpu/s3_3_lrn/none seed=1 model.norm1=false ...

The expectation stands in the file before any run that is judged. An arm without overrides is the recipe itself; all
claims share its runs under the name `<scale>/base`. A mistake in a file is a UserError of one line, before any
training.
"""

import dataclasses
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path

import yaml

from alexnet.claims.config import Scale
from alexnet.claims.statistics import Direction
from alexnet.cli import typed
from alexnet.errors import UserError, did_you_mean

SCALES = tuple(map(str, Scale))
BASE = "base"
# Of the runs that are compared: 1, 2, ... Seed 0 is for trials: a recipe sized on it is not judged by it.
FIRST_SEED = 1


def _recipe(scale: str) -> str:
    return f"claims_{scale}"


class Unit(StrEnum):
    """Of a printed number or of a difference. Errors are fractions in files and percentage points here."""

    points = "points"
    nats = "nats"
    times = "times"  # a ratio
    number = "number"


class Statistic(StrEnum):
    difference = "difference"  # paired over seeds, metric at the end of training
    time_ratio = "time_ratio"  # ratio of the times at which the metric's curve first is below a threshold
    within_net = "within_net"  # the same nets under two tests; bootstrap over images


class Nets(StrEnum):
    one = "one"  # each net alone, then the mean over nets
    all = "all"  # the softmax outputs of all seeds averaged


class Features(StrEnum):
    logits = "logits"
    hidden = "hidden"  # the last hidden layer
    pixels = "pixels"


class Figure(StrEnum):
    """What the report draws beside the numbers."""

    curves = "curves"  # Figure 1
    kernels = "kernels"  # Figure 3
    retrieval = "retrieval"  # Figure 4


# Every metric a claim may name. `train_eval` is a part of the training images seen once more in evaluation mode
# (centre crop, no noise, no dropout); `gap` is val - train_eval; train/* are the running curves of metrics.csv.
_QUANTITIES = {"top1_error": Unit.points, "top5_error": Unit.points, "cross_entropy": Unit.nats}
METRICS: dict[str, Unit] = {
    f"{split}/{quantity}": unit
    for split in ("val", "holdout", "train_eval", "gap")
    for quantity, unit in _QUANTITIES.items()
} | {
    "train/loss": Unit.nats,
    "train/top1_error": Unit.points,
    "conv1/chroma_split": Unit.number,  # statistics.split_excess of the chroma of the two halves of conv1
    "retrieval/precision_at_6": Unit.points,
}


@dataclass
class Number:
    """A number somebody printed: an effect (treatment - control, or their ratio), with its place."""

    value: float
    unit: Unit
    metric: str
    source: str  # "section 3.3", or the file and line of the 2012 notes


@dataclass
class Test:
    """One way of testing trained nets, for within_net comparisons."""

    __test__ = False  # no test case for pytest

    views: int = 1
    nets: Nets = Nets.one
    features: Features = Features.logits


@dataclass
class Tune:
    """Overrides searched per arm with equal budgets, on a seed that no comparison uses."""

    key: str
    values: dict[str, list[float]]  # per scale
    seed: int = 1000  # far from those of the runs that are compared


@dataclass
class Comparison:
    """treatment - control in `metric`. `threshold` (time_ratio) is a value, or a fraction of ln(classes)."""

    treatment: str
    control: str
    metric: str
    direction: Direction
    statistic: Statistic = Statistic.difference
    threshold: float | None = None
    threshold_of_chance: bool = False
    margin: float | None = None  # direction=same: how far from zero is still "same", in file units
    also: list[str] = field(default_factory=list)  # metrics reported beside it, without verdict
    paper: list[Number] = field(default_factory=list)
    notes_2012: list[Number] = field(default_factory=list)

    @property
    def timed(self) -> bool:
        return self.statistic is Statistic.time_ratio

    @property
    def unit(self) -> Unit:
        return Unit.times if self.timed else METRICS[self.metric]

    @property
    def name(self) -> str:
        return f"{self.treatment} {'/' if self.timed else '-'} {self.control}"

    def printed(self, numbers: list[Number], metric: str) -> Number | None:
        """The number given for this metric; beside a holdout error that of val, the only unseen split of 2012."""
        alike = (metric, metric.replace("holdout/", "val/"))
        return next((n for name in alike for n in numbers if n.metric == name), None)


@dataclass(frozen=True)
class Run:
    """One ordinary training run."""

    arm: str
    name: str
    seed: int
    recipe: str
    overrides: tuple[str, ...]

    @property
    def key(self) -> tuple[str, int]:
        return self.name, self.seed

    @property
    def arguments(self) -> list[str]:
        """Of scripts/train.py."""
        return [f"experiment={self.recipe}", f"name={self.name}", f"seed={self.seed}", *self.overrides]


@dataclass
class Claim:
    """A claim file. `name` is the file's stem."""

    name: str
    title: str
    section: str
    quote: str
    arms: dict[str, list[str]] = field(default_factory=dict)
    comparisons: list[Comparison] = field(default_factory=list)
    confounds: list[str] = field(default_factory=list)
    # {scale: what a reader may conclude from the results, and what not}; written when they were there.
    conclusion: dict[str, str] = field(default_factory=dict)
    news: bool = False  # it changes what is commonly believed: said first
    overrides: list[str] = field(default_factory=list)  # of every arm
    recipe: dict[str, str] = field(default_factory=lambda: {s: _recipe(s) for s in SCALES})
    scale_overrides: dict[str, list[str]] = field(default_factory=dict)
    # {scale: {arm: overrides}}, after those of the arm: a number that depends on the network of the recipe.
    arms_at: dict[str, dict[str, list[str]]] = field(default_factory=dict)
    tests: dict[str, Test] = field(default_factory=dict)
    tune: Tune | None = None
    figure: Figure | None = None
    uses: str | None = None  # the claim whose arms this one draws
    seeds: int = 1  # at least so many nets are trained
    min_seeds: int = 2  # below, nothing is resolved
    probe: bool = False  # print the initialisation probe's prediction per arm

    def runs(self, scale: str, seeds: int) -> list[Run]:
        """arms x seeds, seed by seed, so that an interrupted evening leaves complete pairs."""
        return [
            Run(arm, self._run_name(scale, arm), seed, self.recipe[scale], self.arm_overrides(scale, arm))
            for seed in range(FIRST_SEED, FIRST_SEED + max(seeds, self.seeds))
            for arm in self.arms
        ]

    def tuning_runs(self, scale: str) -> list[tuple[str, float, Run]]:
        """(arm, value, run) of the search that chooses `tune.key` per arm."""
        if self.tune is None:
            return []
        found = []
        for arm in self.arms:
            for value in self.tune.values.get(scale, []):
                overrides = (*self.arm_overrides(scale, arm), f"{self.tune.key}={value}")
                name = f"{self._run_name(scale, arm)}_tune_{value}"
                found.append((arm, value, Run(arm, name, self.tune.seed, self.recipe[scale], overrides)))
        return found

    def arm_overrides(self, scale: str, arm: str) -> tuple[str, ...]:
        here = self.arms_at.get(scale, {}).get(arm, [])
        return (*self.overrides, *self.scale_overrides.get(scale, []), *self.arms[arm], *here)

    def _run_name(self, scale: str, arm: str) -> str:
        if self.recipe[scale] == _recipe(scale) and not self.arm_overrides(scale, arm) and self.tune is None:
            return f"{scale}/{BASE}"
        return f"{scale}/{self.uses or self.name}/{arm}"


def load_claims(folder: Path) -> dict[str, Claim]:
    """All claims of a folder, by name, in the order of the paper's sections. UserError for the first mistake."""
    files = sorted(folder.glob("*.yaml"), key=lambda f: (not f.stem.startswith("s"), f.stem))
    if not files:
        raise UserError(f"no claim files (*.yaml) in {folder}: run from the repository, or name the folder")
    claims = {file.stem: load_claim(file) for file in files}
    # A figure drawn from another claim's runs has that claim's arms.
    shared = ("arms", "arms_at", "overrides", "recipe", "scale_overrides", "tune")
    for name, claim in claims.items():
        if claim.uses is not None:
            lender = claims.get(claim.uses)
            if lender is None or lender.uses:
                raise UserError(f"{name}.yaml: uses={claim.uses} must be a claim with runs of its own")
            claims[name] = dataclasses.replace(claim, **{key: getattr(lender, key) for key in shared})
    return claims


def load_claim(path: Path) -> Claim:
    """One claim file. UserError naming file, key and remedy for anything that does not belong."""
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise UserError(f"{path.name}: not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(content, dict):
        raise UserError(f"{path.name}: must be a mapping of keys, not {type(content).__name__}")
    claim: Claim = typed(Claim, {"name": path.stem, **content}, f"{path.name}: ")
    _check(claim, path.name)
    return claim


def select(claims: Mapping[str, Claim], names: str) -> list[Claim]:
    """`all`, one name, or several with commas."""
    if names == "all":
        return list(claims.values())
    wanted = [name.strip() for name in names.split(",")]
    for name in wanted:
        if name not in claims:
            raise UserError(f"claim={name} is unknown: {did_you_mean(name, ['all', *claims])}")
    return [claims[name] for name in dict.fromkeys(wanted)]


# Checking: what types cannot say --------------------------------------------------------------------------------------

# What each statistic is computed from: a running curve, the end of a run, or answers to single test images.
_SPLITS = {
    Statistic.time_ratio: ("train",),
    Statistic.difference: ("val", "holdout", "train_eval", "gap", "conv1"),
    Statistic.within_net: ("val", "retrieval"),
}


def _check(claim: Claim, file: str) -> None:
    if claim.uses is None and not claim.arms:
        raise UserError(f"{file}: arms is empty: name at least one arm, or the claim it uses")
    tune, values = claim.tune, claim.tune.values if claim.tune else {}
    for scales in (claim.recipe, claim.scale_overrides, claim.arms_at, claim.conclusion, values):
        _check_known(scales, SCALES, f"{file}: scale")
    for scale, arms in claim.arms_at.items():
        _check_known(arms, claim.arms, f"{file}: arms_at.{scale}: arm")
    lists = [("overrides", claim.overrides), *claim.arms.items(), *claim.scale_overrides.items()]
    lists += [item for arms in claim.arms_at.values() for item in arms.items()]
    for where, overrides in lists:
        for override in overrides:
            if not re.fullmatch(r"(\+{0,2}[\w./@-]+=.*)|(~[\w./@-]+)", override):
                raise UserError(f"{file}: {where}: {override!r} must be an override, key=value")
            if override.split("=")[0] in ("seed", "name", "experiment"):
                raise UserError(f"{file}: {where}: {override} is set by the runner: remove it")
    if tune:
        for scale in SCALES:
            if not values.get(scale):
                empty = f"tune.values.{scale} is empty"
                raise UserError(f"{file}: {empty}: give at least one value of {tune.key}")
        if not claim.comparisons or not claim.comparisons[0].timed:
            remedy = "make the first comparison a time_ratio"
            raise UserError(f"{file}: tune chooses by a time to a threshold: {remedy}")
    for comparison in claim.comparisons:
        _check_comparison(claim, comparison, f"{file}: {comparison.name}")


def _check_comparison(claim: Claim, c: Comparison, where: str) -> None:
    if claim.uses is None:
        arms = claim.tests if c.statistic is Statistic.within_net else claim.arms
        _check_known((c.treatment, c.control), arms, f"{where}: arm")
    numbers = [*c.paper, *c.notes_2012]
    _check_known((c.metric, *c.also, *(n.metric for n in numbers)), METRICS, f"{where}: metric")
    if c.timed != (c.threshold is not None):
        raise UserError(f"{where}: threshold belongs to statistic=time_ratio: give both or neither")
    if (c.direction is Direction.same) != (c.margin is not None):
        raise UserError(f"{where}: margin belongs to direction=same: give both or neither")
    beside = Statistic.difference if c.timed else c.statistic
    for statistic, metric in ((c.statistic, c.metric), *((beside, metric) for metric in c.also)):
        if metric.partition("/")[0] not in _SPLITS[statistic]:
            one_of = f"must be one of {', '.join(_SPLITS[statistic])}/..."
            raise UserError(f"{where}: the metric of a {statistic}, {metric}, {one_of}")
    for n in numbers:
        unit = Unit.times if c.timed else METRICS[n.metric]
        if n.unit is not unit:
            raise UserError(f"{where}: {n.value} {n.unit} of {n.metric} should be in {unit}")


def _check_known(names: Iterable[str], known: Iterable[str], where: str) -> None:
    known = list(known)
    for name in names:
        if name not in known:
            raise UserError(f"{where} {name} is unknown: {did_you_mean(name, known)}")
