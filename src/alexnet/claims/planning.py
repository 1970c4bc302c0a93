"""Two looks at results that are there, without a run: what more seeds could find, and whether two results agree.

plan=true        the known spread of the differences -> the smallest true effect that n seeds find, and the minutes
compare=<file>   this report beside another results.json: of another machine, commit or scale
"""

import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from alexnet.claims.claims import Claim, Comparison, Statistic, Unit
from alexnet.claims.config import Reproduce
from alexnet.claims.jobs import State, jobs_of
from alexnet.claims.statistics import Effect, Source, minimum_detectable_effect, seeds_needed
from alexnet.claims.tables import effect_cells, number
from alexnet.cli import CONF, table
from alexnet.errors import UserError

PUBLISHED = CONF.parent / ".github" / "results"
# An effect worth talking about.
WORTH = {Unit.points: 0.02, Unit.nats: 0.05, Unit.times: 1.25, Unit.number: 0.1}

Key = tuple[str, str, str, str]  # claim, treatment, control, metric


def plan(claims: Sequence[Claim], settings: Reproduce) -> str:
    """A line per comparison: n asked for, the smallest true effect that it finds with 80 % power, and the minutes.

    The spread and the minutes of a run are those of the results published for this scale, and where these have none
    those of earlier ones; what was never measured has no spread, and takes the mean minutes of the others.
    """
    folder = PUBLISHED / f"claims_{settings.scale}"  # beside it earlier ones, claims_cpu_2026-11-26 say
    paths = [*sorted(PUBLISHED.glob(f"{folder.name}_*/results.json")), folder / "results.json"]
    known = [read_results(path) for path in paths if path.exists()]
    effects: dict[Key, Effect] = {}
    per_run: dict[str, float] = {}  # minutes, by claim
    for results in known:
        effects |= {key: effect for key, (_, effect) in rows_of(results).items() if effect}
        claims_there = results.get("claims", {})
        runs = {name: c["runs"] + c["tuning_runs"] for name, c in claims_there.items()}
        per_run = {name: claims_there[name]["minutes"] / n for name, n in runs.items() if n} or per_run
    mean = sum(per_run.values()) / len(per_run) if per_run else math.nan
    left = [job for job in jobs_of(claims, settings) if job.state is not State.finished]

    def minutes(runs: Mapping[str, int]) -> str:
        """Of so many runs of each claim."""
        total = sum(n * per_run.get(name, mean) for name, n in runs.items())
        return "?" if math.isnan(total) else f"{total:.0f}"

    rows = [("claim", "comparison", "n", "known sd", "finds", "n for", "to find", "minutes")]
    for claim in claims:
        names = {run.name for run in claim.runs(settings.scale, settings.seeds)}
        names |= {run.name for *_, run in claim.tuning_runs(settings.scale)}
        needed = minutes({claim.name: sum(job.run.name in names for job in left)})
        for i, c in enumerate(claim.comparisons):
            effect = effects.get((claim.name, c.treatment, c.control, c.metric))
            cells = _power(c, effect, max(settings.seeds, claim.seeds))
            rows.append((claim.name * (i == 0), c.name, *cells, needed * (i == 0)))
    total = minutes(Counter(Path(job.file).stem for job in left))
    nothing = f"nothing is published for scale={settings.scale}"
    source = f"spread and minutes of {folder}*" if known else nothing
    return f"{table(rows, right=(2, 5, 7))}\n\n{len(left)} runs, {total} minutes of a core; {source}"


def _power(c: Comparison, effect: Effect | None, n: int) -> tuple[str, str, str, str, str]:
    """n, the known sd, what n seeds find, and how many would find an effect worth talking about."""
    if c.statistic is Statistic.within_net:
        return "images", "", "", "", ""
    worth = WORTH[c.unit]
    sought = f"{worth:g}x" if c.timed else f"{number(worth, c.unit, signed=False)} {c.unit}"
    if effect is None or not math.isfinite(effect.sd) or n < 2:
        return str(n), "?", "?", "?", sought
    spread = effect.sd, minimum_detectable_effect(effect.sd, n)
    needed = seeds_needed(math.log(worth) if c.timed else worth, effect.sd)
    sd, finds = (f"{math.exp(x):.2f}x" if c.timed else number(x, c.unit, signed=False) for x in spread)
    return str(n), sd, finds, str(needed or "many"), sought


def compare_results(here: Path, there: Path) -> str:
    """A line per comparison that both have: both effects, and whether sign, intervals and verdict agree."""
    ours, theirs = (rows_of(read_results(path)) for path in (here, there))
    both = [key for key in ours if key in theirs]
    rows: list[tuple[str, ...]] = [("comparison", "metric", "here", "n", "there", "n", "")]
    for key in both:
        (a, one), (b, other) = ours[key], theirs[key]
        claim, treatment, control, metric = key
        apart = ["not measured"] if (one is None) != (other is None) else []
        if one and other:
            null = 1.0 if one.ratio else 0.0
            apart = [
                *["sign"] * ((one.estimate - null) * (other.estimate - null) < 0),
                *["intervals apart"] * (one.high < other.low or other.high < one.low),
                *["verdict"] * (a["verdict"] != b["verdict"]),
            ]
        shown = []
        for row, effect in ((a, one), (b, other)):
            cells = effect_cells(effect, Unit(row["unit"]))
            shown += [f"{cells['difference'].split(' ')[0]} {cells['interval']}", cells["n"]]
        rows.append((f"{claim}: {treatment}, {control}", metric, *shown, ", ".join(apart) or "agree"))
    agreed = sum(row[-1] == "agree" for row in rows)
    only = f"{len(ours) - len(both)} are only here, {len(theirs) - len(both)} only there"
    counts = f"{agreed} of {len(both)} comparisons agree; {only}"
    return f"{table(rows, right=(3, 5))}\n\n{counts}\nhere   {here}\nthere  {there}"


def read_results(path: Path) -> dict[str, Any]:
    """results.json. Raises UserError, which names the file, if it is missing or holds something else."""
    if not path.exists():
        raise UserError(f"{path} does not exist: render it with report=true, or name another file")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        rows_of(content)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} must be a results.json of scripts/reproduce.py") from error
    return dict(content)


def rows_of(results: Mapping[str, Any]) -> dict[Key, tuple[dict[str, Any], Effect | None]]:
    """Every row and its effect. JSON has no infinity and no NaN: a missing end of an interval is open."""
    missing = {"low": -math.inf, "high": math.inf, "sd": math.nan, "p": math.nan}
    found = {}
    for row in [row for claim in results.get("claims", {}).values() for row in claim["rows"]]:
        effect = None
        if row["effect"] is not None:
            values: dict[str, Any] = {k: missing.get(k) if v is None else v for k, v in row["effect"].items()}
            effect = Effect(**{**values, "source": Source(values["source"])})
        found[row["claim"], row["treatment"], row["control"], row["metric"]] = row, effect
    return found
