"""From finished runs to the rows of a claim's table: paper | notes of 2012 | ours, n, interval, verdict.

    evidence of every run -> compare() one claim -> judge() all claims together (Holm) -> text, Markdown, JSON

Files carry fractions and nats; what is printed here is percent, percentage points and nats.
"""

import math
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from alexnet.claims import statistics as st
from alexnet.claims.claims import METRICS, Claim, Comparison, Number, Statistic, Unit
from alexnet.cli import WIDTH, columns, markdown
from alexnet.system import finite
from alexnet.training.metrics import Metrics


@dataclass(frozen=True)
class Evidence:
    """What one finished run says.

    `results`: {metric: value} as in run.json, `curves`: {metric: [(epoch, value), ...]} from metrics.csv,
    `classes`: of its data set, for thresholds given as a fraction of ln(classes). A run that `diverged` ended in a
    loss of NaN or infinity: its results are nan.
    """

    results: Mapping[str, float] = field(default_factory=dict)
    curves: Mapping[str, Sequence[tuple[float, float]]] = field(default_factory=dict)
    classes: int = 0
    diverged: bool = False

    @classmethod
    def of_run(cls, measures: Mapping[str, Any], metrics: Metrics, classes: int) -> "Evidence":
        """From the content of measures.json and metrics.csv.

        `results` there is {split: {quantity: value}}; the split `train` (evaluation mode) is `train_eval` here.
        Curves are the means over the last few steps against epochs done, a fraction.
        """
        results = {
            f"{'train_eval' if split == 'train' else split}/{quantity}": float(value)
            for split, values in measures.get("results", {}).items()
            for quantity, value in values.items()
            if isinstance(value, int | float)
        }
        curves = {f"train/{name}": metrics.train_by_steps(name) for name in ("loss", "top1_error")}
        return cls(results, {metric: curve for metric, curve in curves.items() if curve}, classes)


@dataclass(frozen=True)
class Gathered:
    """Of one claim: {arm: {seed: evidence}}, and for within_net {test: {metric: (images,) or (nets, images)}}."""

    arms: Mapping[str, Mapping[int, Evidence]] = field(default_factory=dict)
    tests: Mapping[str, Mapping[str, ArrayLike]] = field(default_factory=dict)


@dataclass(frozen=True)
class Row:
    """One comparison in one metric. `effect` is None when there is nothing to compare yet; `note` says why.

    `seeds` are those of the pairs behind it, in the order of the arms' values; empty where nets are tested twice.
    """

    claim: Claim
    comparison: Comparison
    metric: str
    treatment: st.Summary | None = None
    control: st.Summary | None = None
    seeds: tuple[int, ...] = ()
    effect: st.Effect | None = None
    p_holm: float | None = None
    verdict: st.Verdict | None = None
    note: str = ""

    @property
    def main(self) -> bool:
        """The metric the claim is decided by; the others stand beside it."""
        return self.metric == self.comparison.metric

    @property
    def expects(self) -> bool:
        """Whether a verdict is due, so that the row counts in Holm's correction."""
        return self.main and self.comparison.direction is not st.Direction.report

    @property
    def unit(self) -> Unit:
        return self.comparison.unit if self.main else METRICS[self.metric]

    @property
    def margin(self) -> float:
        return self.comparison.margin or 0.0

    @property
    def paper(self) -> Number | None:
        return self.comparison.printed(self.comparison.paper, self.metric)

    @property
    def notes_2012(self) -> Number | None:
        return self.comparison.printed(self.comparison.notes_2012, self.metric)

    @property
    def arms(self) -> list[tuple[str, st.Summary]]:
        """Those that have finished runs, by name."""
        both = (self.comparison.treatment, self.treatment), (self.comparison.control, self.control)
        return [(name, summary) for name, summary in both if summary]


# From runs to numbers -----------------------------------------------------------------------------------------------


def compare(claim: Claim, gathered: Gathered) -> list[Row]:
    """The rows of one claim without verdicts, from whatever runs are finished."""
    rows = []
    for c in claim.comparisons:
        compared = _within_net if c.statistic is Statistic.within_net else _over_seeds
        rows += [compared(Row(claim, c, metric), gathered) for metric in dict.fromkeys([c.metric, *c.also])]
    return rows


def judge(rows: Sequence[Row]) -> list[Row]:
    """The verdicts of all rows; Holm's correction runs over every comparison that has an expectation.

    One without a p, not measured yet say, is in the family with p = 1, so no verdict weakens when others arrive.
    """
    family = {i: row for i, row in enumerate(rows) if row.expects}
    p = {i: st.tested_p(r.effect, r.comparison.direction, r.margin) for i, r in family.items() if r.effect}
    known = {i: x for i, x in p.items() if not math.isnan(x)}
    corrected = st.holm([known.get(i, 1.0) for i in family]) if family else ()
    adjusted = dict(zip(family, corrected, strict=True))
    judged = []
    for i, row in enumerate(rows):
        if row.effect is not None and row.main:
            p_holm = float(adjusted[i]) if i in known else None
            said = st.verdict(
                row.effect,
                row.comparison.direction,
                margin=row.margin,
                paper=None if row.paper is None else row.paper.value / _scale(row.unit),
                min_n=row.claim.min_seeds,
                p_holm=p_holm,
            )
            row = replace(row, p_holm=p_holm, verdict=said)
        judged.append(row)
    return judged


LOST = st.Verdict(st.Word.DIVERGED, f"{st.Word.DIVERGED}: no pair of runs is left to compare")


def _over_seeds(row: Row, gathered: Gathered) -> Row:
    """From the pairs of runs that both arms have, without those in which a run diverged.

    Nothing to compare is a verdict only where all pairs are there and diverged.
    """
    c = row.comparison
    names = c.treatment, c.control
    arms = [_values(row, gathered.arms.get(name, {})) for name in names]
    there = sorted(set(arms[0]) & set(arms[1]))
    # None is a run that did not arrive, and no mistake.
    seeds = tuple(s for s in there if all(math.isfinite(values[s] or 0.0) for values in arms))
    notes = []
    if len(seeds) < len(there):
        notes = [f"{len(there) - len(seeds)} of {len(there)} pairs diverged"]
    elif not there:
        empty = [name for name, values in zip(names, arms, strict=True) if not values]
        notes = [f"no finished runs of {', '.join(empty)} yet" if empty else "no seed that both arms have"]
    if not seeds:
        return replace(row, note=_joined(*notes), verdict=LOST if there and row.main else None)
    first, second = ([values[seed] for seed in seeds] for values in arms)
    latest = math.nan
    if row.unit is Unit.times:
        # The last arrival that could have been seen: who never arrives is not entered later than one that might.
        curves = [gathered.arms[name][seed].curves[c.metric] for name in names for seed in seeds]
        latest = max(st.running_mean(curve)[-1][0] for curve in curves)
        late = {name: times.count(None) for name, times in zip(names, (first, second), strict=True)}
        notes += [f"{name} did not arrive in {n} of {len(seeds)} runs" for name, n in late.items() if n]
    a, b = ([latest if x is None else x for x in values] for values in (first, second))
    effect = st.time_ratio(first, second, latest) if row.unit is Unit.times else st.paired_difference(a, b)
    compared = replace(row, treatment=st.summarise(a), control=st.summarise(b), seeds=seeds)
    return replace(compared, effect=effect, note=_joined(*notes))


def _within_net(row: Row, gathered: Gathered) -> Row:
    c, tests = row.comparison, gathered.tests
    diverged = [run.diverged for arm in gathered.arms.values() for run in arm.values()]
    lost = f"{sum(diverged)} of {len(diverged)} nets diverged" if any(diverged) else ""
    missing = [name for name in (c.treatment, c.control) if row.metric not in tests.get(name, {})]
    if missing:
        note = _joined(f"no results of {', '.join(missing)} yet", lost)
        nothing = diverged and all(diverged) and row.main
        return replace(row, note=note, verdict=LOST if nothing else None)
    a, b = (np.atleast_2d(np.asarray(tests[name][row.metric])) for name in (c.treatment, c.control))
    nets = max(len(a), len(b))
    note = _joined(f"{st.Source.IMAGES} ({nets} net{'s' * (nets > 1)})", lost)
    means = st.summarise(a.mean(1)), st.summarise(b.mean(1))
    return replace(row, treatment=means[0], control=means[1], effect=st.bootstrap_images(a, b), note=note)


def _values(row: Row, runs: Mapping[int, Evidence]) -> dict[int, float | None]:
    """{seed: value of the row's metric}, nan if the run diverged; a run without the metric counts as not there.

    Of a ratio of times: when it arrived, None if it did not. `gap` is the difference of two other metrics.
    """
    if row.unit is Unit.times:
        # A run that diverged before its first epoch was over has no curve, but it was run.
        curved = {s: run for s, run in runs.items() if run.curves.get(row.metric) or run.diverged}
        return {s: math.nan if run.diverged else arrival(row.comparison, run) for s, run in curved.items()}
    split, _, quantity = row.metric.partition("/")
    first, *rest = (f"val/{quantity}", f"train_eval/{quantity}") if split == "gap" else (row.metric,)
    return {
        seed: run.results[first] - sum(run.results[part] for part in rest)
        for seed, run in runs.items()
        if {first, *rest} <= set(run.results)
    }


def arrival(c: Comparison, run: Evidence) -> float | None:
    """The middle of the first epoch-long stretch whose mean is at the threshold of a time_ratio, None if never."""
    assert c.threshold is not None  # claims.py refuses a time_ratio without one
    threshold = c.threshold * math.log(run.classes) if c.threshold_of_chance else c.threshold
    return st.time_to(st.running_mean(run.curves.get(c.metric, [])), threshold)


def _joined(*parts: str) -> str:
    return "; ".join(part for part in parts if part)


# From numbers to tables ---------------------------------------------------------------------------------------------

TEXT_HEAD = ("comparison", "metric", "paper", "2012", "ours, mean ± sd", "95 % interval", "n")
TEXT_WIDTHS = (19, 24, 7, 7, 15, 17, 5)
MARKDOWN_HEAD = (
    *("Claim", "Comparison", "Arms", "Metric", "Paper"),
    *("2012 notes", "Difference", "95 % interval", "n", "Verdict"),
)
NUMBERS = ("metric", "paper", "notes_2012", "difference", "interval", "n")


def as_text(rows: Iterable[Row]) -> str:
    """One block per claim, at most 100 columns."""
    blocks: dict[str, list[str]] = {}
    for row in rows:
        c = cells(row)
        title = f"{row.claim.name}  {row.claim.title} (section {row.claim.section})"
        lines = blocks.setdefault(row.claim.name, [title, columns(TEXT_HEAD, TEXT_WIDTHS, " ")])
        name, *more = textwrap.wrap(row.comparison.name, TEXT_WIDTHS[0]) if row.main else [""]
        lines += [columns([name, *(c[column] for column in NUMBERS)], TEXT_WIDTHS, " "), *more]
        said = c["verdict"] + (f" ({c['fine_print']})" if c["fine_print"] else "")
        for mark, text in (("   ", c["named_arms"]), ("-> ", said), ("-> ", row.note)):
            lines += textwrap.wrap(text, WIDTH, initial_indent=f"    {mark}", subsequent_indent="       ")
    return "\n\n".join("\n".join(lines) for lines in blocks.values())


def as_markdown(rows: Iterable[Row]) -> str:
    """One table: a line per comparison and metric."""
    lines: list[Sequence[str]] = [MARKDOWN_HEAD]
    for row in rows:
        c = cells(row)
        numbers = [c[column] for column in NUMBERS]
        lines.append([row.claim.title, c["comparison"], c["arms"], *numbers, _joined(c["verdict"], row.note)])
    return markdown(lines) + "\n"


def cells(row: Row) -> dict[str, str]:
    """What a table prints of a row, by column."""
    c, e = row.comparison, row.effect
    expected = str(c.direction) if row.expects else ""
    if row.expects and c.direction is st.Direction.same:
        unit = "" if row.unit is Unit.number else f" {row.unit}"
        expected = f"the same within {row.margin * _scale(row.unit):g}{unit}"
    fine_print = []
    if row.verdict and e:
        known = {"p": e.p, "sign flips": e.p_sign_flip, "Holm": row.p_holm}
        fine_print = [f"{k} {_p_text(p)}" for k, p in known.items() if p is not None and not math.isnan(p)]
        if e.detectable is not None:
            fine_print.append(f"detectable at this n: {number(e.detectable, row.unit, signed=False)}")
    return {
        # A metric beside a ratio of times is a difference.
        "comparison": c.name if row.main else f"{c.treatment} - {c.control}",
        "arms": " / ".join(_summary(row, s) for _, s in row.arms),
        "named_arms": ", ".join(f"{name} {_summary(row, s)}" for name, s in row.arms),
        "expected": expected,
        "sources": _joined(*(f"{n.value:g}: {n.source}" for n in (row.paper, row.notes_2012) if n)),
        "metric": _label(row),
        "paper": _printed(row.paper),
        "notes_2012": _printed(row.notes_2012),
        **effect_cells(e, row.unit),
        "of": "images" if e is not None and e.source is st.Source.IMAGES else "seeds",
        "word": str(row.verdict.word) if row.verdict else "not measured yet",
        "kind": row.verdict.word.name.lower() if row.verdict else "missing",  # its class in the page's style
        "verdict": row.verdict.sentence if row.verdict else "",
        "fine_print": "; ".join(fine_print),
        "note": row.note,
    }


def effect_cells(e: st.Effect | None, unit: Unit) -> dict[str, str]:
    """Difference or ratio, its interval and n, as a table prints them."""
    if e is None:
        return {"difference": "-", "interval": "-", "n": "0"}
    # sd of the differences; of log ratios as the factor exp(sd).
    sd = f"x{math.exp(e.sd):.2f}" if e.ratio else number(e.sd, unit, signed=False)
    spread = "" if math.isnan(e.sd) or e.source is st.Source.IMAGES else f" ± {sd}"
    interval = f"[{number(e.low, unit)}, {number(e.high, unit)}]"
    return {
        "difference": f"{e.bound}{number(e.estimate, unit)}{'x' if e.ratio else ''}{spread}",
        "interval": "-" if e.n < 2 or e.sd < st.NO_SPREAD else interval,
        "n": f"{e.n}",
    }


_LABELS = {
    "top1_error": "top-1",
    "top5_error": "top-5",
    "cross_entropy": "nats",
    "loss": "nats",
    "precision_at_6": "precision@6",
    "chroma_split": "chroma split",
}


def _label(row: Row) -> str:
    """Errors are in percent, their differences in points; train_eval: training images in evaluation mode."""
    split, _, quantity = row.metric.partition("/")
    c = row.comparison
    if row.unit is not Unit.times:
        return f"{split} {_LABELS[quantity]}"
    return f"time to {c.threshold:g}" + (" ln(classes)" if c.threshold_of_chance else f" {_LABELS[quantity]}")


def _printed(n: Number | None) -> str:
    if n is None:
        return "-"
    sign = "" if n.unit is Unit.times else "+" if n.value > 0 else ""
    return f"{sign}{n.value:g}"


def number(value: float, unit: Unit, signed: bool = True) -> str:
    """A fraction in points, everything else as it is."""
    digits = 2 if unit in (Unit.points, Unit.times) else 3
    sign = "+" if signed and unit is not Unit.times else ""
    return f"{value * _scale(unit):{sign}.{digits}f}"


def _p_text(p: float) -> str:
    return "< .001" if p < 0.001 else f"{p:.3f}".lstrip("0") if p < 1 else "1"


def _summary(row: Row, s: st.Summary) -> str:
    """An arm: percent, nats, or epochs."""
    unit = {Unit.points: " %", Unit.nats: " nats", Unit.times: " epochs", Unit.number: ""}[row.unit]
    spread = "" if math.isnan(s.sd) else f" ± {number(s.sd, row.unit, signed=False)}"
    return f"{number(s.mean, row.unit, signed=False)}{spread}{unit}"


def _scale(unit: Unit) -> float:
    return 100.0 if unit is Unit.points else 1.0


def as_json(rows: Iterable[Row]) -> list[dict[str, Any]]:
    """Plain data, fractions and nats, with every run's value; numbers that are not finite become None."""
    plain = []
    for row in rows:
        c = row.comparison
        content = {
            "claim": row.claim.name,
            "title": row.claim.title,
            "section": row.claim.section,
            "treatment": c.treatment,
            "control": c.control,
            "metric": row.metric,
            "unit": str(row.unit),
            "statistic": str(c.statistic),
            "expected": str(c.direction) if row.main else None,
            "margin": c.margin,
            "seeds": row.seeds,
            "paper": row.paper and asdict(row.paper),
            "notes_2012": row.notes_2012 and asdict(row.notes_2012),
            "arms": {c.treatment: None, c.control: None} | {name: asdict(s) for name, s in row.arms},
            "effect": row.effect and asdict(row.effect),
            "p_holm": row.p_holm,
            "verdict": row.verdict and str(row.verdict.word),
            "sentence": row.verdict and row.verdict.sentence,
            "note": row.note,
        }
        plain.append(finite(content))
    return plain
