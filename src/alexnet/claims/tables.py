"""From finished runs to the rows of a claim's table: paper | notes of 2012 | ours, n, interval, verdict.

    evidence of every run -> measure() one claim -> judge() all claims together (Holm) -> text, Markdown, JSON

Files carry fractions and nats; what is printed here is percent, percentage points and nats.
"""

import dataclasses
import math
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from alexnet.claims.claims import METRICS, Claim, Comparison, Number, Statistic, Unit
from alexnet.claims.statistics import (
    NO_SPREAD,
    Direction,
    Effect,
    Source,
    Summary,
    Verdict,
    Word,
    bootstrap_images,
    holm,
    paired_difference,
    running_mean,
    summarise,
    tested_p,
    time_ratio,
    time_to,
    verdict,
)
from alexnet.training.metrics import Metrics

WIDTH = 100  # columns of the plain table


@dataclass(frozen=True)
class Evidence:
    """What one finished run says.

    `results`: {metric: value} as in run.json, `curves`: {metric: [(epoch, value), ...]} from metrics.csv,
    `classes`: of its data set, for thresholds given as a fraction of ln(classes). A run that `diverged` ended in a
    loss that is no number: its results are nan.
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

    claim: str
    section: str
    comparison: Comparison
    metric: str
    unit: Unit
    paper: Number | None = None
    notes_2012: Number | None = None
    treatment: Summary | None = None
    control: Summary | None = None
    seeds: tuple[int, ...] = ()
    effect: Effect | None = None
    p_holm: float | None = None
    verdict: Verdict | None = None
    note: str = ""

    @property
    def main(self) -> bool:
        """The metric the claim is decided by; the others stand beside it."""
        return self.metric == self.comparison.metric


# From runs to numbers -----------------------------------------------------------------------------------------------


def measure(claim: Claim, gathered: Gathered) -> list[Row]:
    """The rows of one claim without verdicts, from whatever runs are finished."""
    return [
        _measured(_row(claim, c, metric), gathered)
        for c in claim.comparisons
        for metric in dict.fromkeys([c.metric, *c.also])
    ]


def judge(claims: Mapping[str, Claim], rows: Sequence[Row]) -> list[Row]:
    """The verdicts of all rows; Holm's correction runs over every comparison that has an expectation.

    One without a p, not measured yet say, is in the family with p = 1, so no verdict weakens when others arrive.
    """
    tested = [i for i, row in enumerate(rows) if expects(row)]
    p = {i: _p(rows[i]) for i in tested}
    filled = [1.0 if math.isnan(p[i]) else p[i] for i in tested]
    corrected = dict(zip(tested, holm(filled), strict=True)) if tested else {}
    adjusted = {i: float(value) for i, value in corrected.items() if not math.isnan(p[i])}
    return [_judged(row, claims[row.claim], adjusted.get(i)) for i, row in enumerate(rows)]


def _row(claim: Claim, c: Comparison, metric: str) -> Row:
    ratio = c.statistic is Statistic.time_ratio and metric == c.metric
    return Row(
        claim=claim.name,
        section=claim.section,
        comparison=c,
        metric=metric,
        unit=Unit.times if ratio else METRICS[metric],
        paper=c.printed(c.paper, metric),
        notes_2012=c.printed(c.notes_2012, metric),
    )


def _measured(row: Row, gathered: Gathered) -> Row:
    if row.comparison.statistic is Statistic.within_net:
        return _within_net(row, gathered)
    if row.unit is Unit.times:
        return _times(row, gathered.arms)
    return _differences(row, gathered.arms)


def _differences(row: Row, arms: Mapping[str, Mapping[int, Evidence]]) -> Row:
    values = [
        _values(arms.get(arm, {}), row.metric) for arm in (row.comparison.treatment, row.comparison.control)
    ]
    seeds, note = _pairs(row, *values)
    if not seeds:
        return _without_pairs(row, note, diverged=bool(set(values[0]) & set(values[1])))
    a, b = ([of_arm[s] for s in seeds] for of_arm in values)
    return dataclasses.replace(
        row,
        treatment=summarise(a),
        control=summarise(b),
        seeds=seeds,
        effect=paired_difference(a, b),
        note=note,
    )


def _times(row: Row, arms: Mapping[str, Mapping[int, Evidence]]) -> Row:
    c = row.comparison
    both = [_with_curve(arms.get(arm, {}), c.metric) for arm in (c.treatment, c.control)]
    pairs = sorted(set(both[0]) & set(both[1]))
    seeds = [s for s in pairs if not (both[0][s].diverged or both[1][s].diverged)]
    lost = [f"{len(pairs) - len(seeds)} of {len(pairs)} pairs diverged"] if len(seeds) < len(pairs) else []
    if not seeds:
        return _without_pairs(row, "; ".join(lost) or _missing(row, *both), diverged=bool(pairs))
    times = [[arrival(c, arm[s]) for s in seeds] for arm in both]
    # The latest arrival that could have been seen: a run that never arrives is not entered later than one that might.
    budget = max(running_mean(arm[s].curves[c.metric])[-1][0] for arm in both for s in seeds)
    late = lost + [
        f"{name} did not arrive in {column.count(None)} of {len(seeds)} runs"
        for name, column in zip((c.treatment, c.control), times, strict=True)
        if None in column
    ]
    filled = [[budget if t is None else t for t in column] for column in times]
    return dataclasses.replace(
        row,
        treatment=summarise(filled[0]),
        control=summarise(filled[1]),
        seeds=tuple(seeds),
        effect=time_ratio(times[0], times[1], budget),
        note="; ".join(late),
    )


def _with_curve(runs: Mapping[int, Evidence], metric: str) -> dict[int, Evidence]:
    """A run that diverged before its first epoch was over has none, but it was run."""
    return {seed: run for seed, run in runs.items() if run.curves.get(metric) or run.diverged}


def _without_pairs(row: Row, note: str, diverged: bool) -> Row:
    """Nothing to compare: not there yet, or there and diverged, which is a result."""
    said = Verdict(Word.DIVERGED, f"{Word.DIVERGED}: no pair of runs is left to compare")
    return dataclasses.replace(row, note=note, verdict=said if diverged and row.main else None)


def _within_net(row: Row, gathered: Gathered) -> Row:
    c, tests = row.comparison, gathered.tests
    nets = [run.diverged for arm in gathered.arms.values() for run in arm.values()]
    lost = [f"{sum(nets)} of {len(nets)} nets diverged"] if any(nets) else []
    missing = [name for name in (c.treatment, c.control) if row.metric not in tests.get(name, {})]
    if missing:
        note = "; ".join([f"no results of {', '.join(missing)} yet", *lost])
        return _without_pairs(row, note, diverged=bool(nets) and all(nets))
    a, b = tests[c.treatment][row.metric], tests[c.control][row.metric]
    return dataclasses.replace(
        row,
        treatment=_over_nets(a),
        control=_over_nets(b),
        effect=bootstrap_images(a, b),
        note="; ".join([f"{Source.IMAGES} ({_nets(a, b)})", *lost]),
    )


def _nets(a: ArrayLike, b: ArrayLike) -> str:
    n = max(len(np.atleast_2d(np.asarray(values))) for values in (a, b))
    return "1 net" if n == 1 else f"{n} nets"


def _over_nets(values: ArrayLike) -> Summary:
    return summarise(np.atleast_2d(np.asarray(values)).mean(1))


def _values(runs: Mapping[int, Evidence], metric: str) -> dict[int, float]:
    """{seed: value}; `gap` is the difference of two other metrics. A run without the metric counts as not there."""
    return {seed: _value(run.results, metric) for seed, run in runs.items() if _has(run.results, metric)}


def _parts(metric: str) -> tuple[str, ...]:
    split, _, quantity = metric.partition("/")
    return (f"val/{quantity}", f"train_eval/{quantity}") if split == "gap" else (metric,)


def _has(results: Mapping[str, float], metric: str) -> bool:
    return all(part in results for part in _parts(metric))


def _value(results: Mapping[str, float], metric: str) -> float:
    first, *rest = (results[part] for part in _parts(metric))
    return first - sum(rest)


def _pairs(row: Row, a: dict[int, float], b: dict[int, float]) -> tuple[tuple[int, ...], str]:
    """The seeds both arms have, in order, without those in which a run diverged; and what was left out."""
    seeds = sorted(set(a) & set(b))
    good = tuple(s for s in seeds if math.isfinite(a[s]) and math.isfinite(b[s]))
    note = f"{len(seeds) - len(good)} of {len(seeds)} pairs diverged" if len(good) < len(seeds) else ""
    return good, note or ("" if seeds else _missing(row, a, b))


def _missing(row: Row, a: Mapping[int, Any], b: Mapping[int, Any]) -> str:
    names = [
        n
        for n, there in zip((row.comparison.treatment, row.comparison.control), (a, b), strict=True)
        if not there
    ]
    return f"no finished runs of {', '.join(names)} yet" if names else "no seed that both arms have"


def threshold_of(c: Comparison, run: Evidence) -> float:
    """Where the curve of a time_ratio is cut, in units of its metric."""
    assert c.threshold is not None  # claims.py refuses a time_ratio without one
    return c.threshold * math.log(run.classes) if c.threshold_of_chance else c.threshold


def arrival(c: Comparison, run: Evidence) -> float | None:
    """The middle of the first epoch-long stretch whose mean is at the threshold of a time_ratio, None if never."""
    return time_to(running_mean(run.curves.get(c.metric, [])), threshold_of(c, run))


def expects(row: Row) -> bool:
    """Whether a verdict is due, so that the row counts in Holm's correction."""
    return row.main and row.comparison.direction is not Direction.REPORT


def _p(row: Row) -> float:
    if row.effect is None:
        return math.nan
    return tested_p(row.effect, row.comparison.direction, row.comparison.margin or 0.0)


def _judged(row: Row, claim: Claim, p_holm: float | None) -> Row:
    if row.effect is None or not row.main:
        return row
    said = verdict(
        row.effect,
        row.comparison.direction,
        margin=row.comparison.margin or 0.0,
        paper=None if row.paper is None else row.paper.value / _scale(row.unit),
        min_n=claim.min_seeds,
        p_holm=p_holm,
    )
    return dataclasses.replace(row, p_holm=p_holm, verdict=said)


# From numbers to tables ---------------------------------------------------------------------------------------------


def as_text(claims: Mapping[str, Claim], rows: Iterable[Row]) -> str:
    """One block per claim, at most 100 columns."""
    blocks = []
    for name, group in _by_claim(rows).items():
        claim = claims[name]
        lines = [f"{name}  {claim.title} (section {claim.section})", _columns(*TEXT_HEAD)]
        for row in group:
            lines += _text_row(row)
        blocks.append("\n".join(lines))
    return "\n\n".join(blocks)


def as_markdown(claims: Mapping[str, Claim], rows: Iterable[Row]) -> str:
    """One table: a line per comparison and metric."""
    head = (
        "Claim",
        "Comparison",
        "Arms",
        "Metric",
        "Paper",
        "2012 notes",
        "Difference",
        "95 % interval",
        "n",
        "Verdict",
    )
    lines = [_pipes(head), _pipes(["---"] * len(head))]
    for row in rows:
        c = cells(row)
        verdict_cell = "; ".join(part for part in (c["verdict"], c["note"]) if part)
        lines.append(
            _pipes((claims[row.claim].title, c["comparison"], c["arms"], *_cells(row), verdict_cell))
        )
    return "\n".join(lines) + "\n"


def cells(row: Row) -> dict[str, str]:
    """What a table prints of a row, by column."""
    names = ("metric", "paper", "notes_2012", "difference", "interval", "n")
    over_images = row.effect is not None and row.effect.source is Source.IMAGES
    return {
        "comparison": _named(row),
        "arms": " / ".join(_summary(row, s) for s in (row.treatment, row.control) if s),
        "named_arms": _named_arms(row),
        "expected": _expected(row),
        "sources": "; ".join(f"{n.value:g}: {n.source}" for n in (row.paper, row.notes_2012) if n),
        **dict(zip(names, _cells(row), strict=True)),
        "of": "images" if over_images else "seeds",
        "verdict": row.verdict.sentence if row.verdict else "",
        "fine_print": _fine_print(row, row.effect).strip(" ()") if row.verdict and row.effect else "",
        "note": row.note,
    }


def _named(row: Row) -> str:
    """What is compared; a metric beside a ratio of times is a difference."""
    c = row.comparison
    return c.name if row.main else f"{c.treatment} - {c.control}"


def _expected(row: Row) -> str:
    """lower, higher, or the same within the margin; empty for a row without an expectation."""
    if not expects(row):
        return ""
    c = row.comparison
    if c.direction is not Direction.SAME:
        return str(c.direction)
    unit = {Unit.points: "points", Unit.nats: "nats", Unit.times: "times", Unit.number: ""}[row.unit]
    return f"the same within {(c.margin or 0.0) * _scale(row.unit):g} {unit}".strip()


def as_json(claims: Mapping[str, Claim], rows: Iterable[Row]) -> list[dict[str, Any]]:
    """Plain data, fractions and nats, with every run's value; numbers that are not finite become None."""
    return [_plain(row, claims[row.claim]) for row in rows]


TEXT_HEAD = ("comparison", "metric", "paper", "2012", "ours, mean ± sd", "95 % interval", "n")
_TEXT_WIDTHS = (19, 24, 7, 7, 15, 17, 5)


def _columns(*cells: str) -> str:
    return " ".join(cell.ljust(w) for cell, w in zip(cells, _TEXT_WIDTHS, strict=True)).rstrip()


def _pipes(cells: Iterable[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _text_row(row: Row) -> list[str]:
    names = textwrap.wrap(row.comparison.name, _TEXT_WIDTHS[0]) if row.main else [""]
    lines = [_columns(names[0], *_cells(row)), *names[1:]]
    if row.treatment and row.control:
        lines += _wrapped(_named_arms(row))
    said = row.verdict.sentence if row.verdict else ""
    if row.verdict and row.effect:
        said += _fine_print(row, row.effect)
    return lines + [line for text in (said, row.note) if text for line in _wrapped(text, "-> ")]


def _named_arms(row: Row) -> str:
    named = ((row.comparison.treatment, row.treatment), (row.comparison.control, row.control))
    return ", ".join(f"{name} {_summary(row, s)}" for name, s in named if s)


def _wrapped(text: str, mark: str = "   ") -> list[str]:
    return textwrap.wrap(text, WIDTH, initial_indent=f"    {mark}", subsequent_indent="       ")


def _fine_print(row: Row, effect: Effect) -> str:
    """p values and what this n could have found."""
    parts = [] if math.isnan(effect.p) else [f"p {_p_text(effect.p)}"]
    if effect.p_sign_flip is not None:
        parts.append(f"sign flips {_p_text(effect.p_sign_flip)}")
    if row.p_holm is not None:
        parts.append(f"Holm {_p_text(row.p_holm)}")
    if effect.detectable is not None:
        parts.append(
            f"detectable at this n: {_number(effect.detectable * _scale(row.unit), row.unit, False)}"
        )
    return f" ({'; '.join(parts)})" if parts else ""


def _cells(row: Row) -> tuple[str, ...]:
    metric = _label(row)
    printed = [_printed(n) for n in (row.paper, row.notes_2012)]
    if row.effect is None:
        return (metric, *printed, "-", "-", "0")
    e, scale = row.effect, _scale(row.unit)
    spread = "" if math.isnan(e.sd) or e.source is Source.IMAGES else f" ± {_spread(row, e)}"
    times = "x" if e.ratio else ""
    ours = f"{e.bound}{_number(e.estimate * scale, row.unit)}{times}{spread}"
    interval = f"[{_number(e.low * scale, row.unit)}, {_number(e.high * scale, row.unit)}]"
    return (metric, *printed, ours, "-" if e.n < 2 or e.sd < NO_SPREAD else interval, f"{e.n}")


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


def _spread(row: Row, e: Effect) -> str:
    """sd of the differences; of log ratios as the factor exp(sd)."""
    return f"x{math.exp(e.sd):.2f}" if e.ratio else _number(e.sd * _scale(row.unit), row.unit, False)


def _printed(n: Number | None) -> str:
    if n is None:
        return "-"
    sign = "" if n.unit is Unit.times else "+" if n.value > 0 else ""
    return f"{sign}{n.value:g}"


def _number(value: float, unit: Unit, signed: bool = True) -> str:
    digits = 2 if unit in (Unit.points, Unit.times) else 3
    sign = "+" if signed and unit is not Unit.times else ""
    return f"{value:{sign}.{digits}f}"


def _p_text(p: float) -> str:
    return "< .001" if p < 0.001 else f"{p:.3f}".lstrip("0") if p < 1 else "1"


def _summary(row: Row, s: Summary) -> str:
    """An arm: percent, nats, or epochs."""
    scale = _scale(row.unit)
    unit = {Unit.points: " %", Unit.nats: " nats", Unit.times: " epochs", Unit.number: ""}[row.unit]
    spread = "" if math.isnan(s.sd) else f" ± {_number(s.sd * scale, row.unit, False)}"
    return f"{_number(s.mean * scale, row.unit, False)}{spread}{unit}"


def _scale(unit: Unit) -> float:
    return 100.0 if unit is Unit.points else 1.0


def _by_claim(rows: Iterable[Row]) -> dict[str, list[Row]]:
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(row.claim, []).append(row)
    return groups


def _plain(row: Row, claim: Claim) -> dict[str, Any]:
    c = row.comparison
    return _without_nan(
        {
            "claim": row.claim,
            "title": claim.title,
            "section": row.section,
            "treatment": c.treatment,
            "control": c.control,
            "metric": row.metric,
            "unit": str(row.unit),
            "statistic": str(c.statistic),
            "expected": str(c.direction) if row.main else None,
            "margin": c.margin,
            "seeds": row.seeds,
            "paper": row.paper and dataclasses.asdict(row.paper),
            "notes_2012": row.notes_2012 and dataclasses.asdict(row.notes_2012),
            "arms": {
                name: s and dataclasses.asdict(s)
                for name, s in ((c.treatment, row.treatment), (c.control, row.control))
            },
            "effect": row.effect and dataclasses.asdict(row.effect),
            "p_holm": row.p_holm,
            "verdict": row.verdict and str(row.verdict.word),
            "sentence": row.verdict and row.verdict.sentence,
            "note": row.note,
        }
    )


def _without_nan(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _without_nan(v) for k, v in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value
