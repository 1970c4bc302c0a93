"""Two looks at results that are there, without a run: what more seeds could find, and whether two results agree.

plan=true        the known spread of the differences -> the smallest true effect that n seeds find, and the minutes
compare=<file>   this report beside another results.json: of another machine, commit or scale
"""

import json
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from alexnet.claims.claims import Claim, Comparison, Statistic, Unit
from alexnet.claims.config import Reproduce
from alexnet.claims.jobs import Job, State, jobs_of
from alexnet.claims.statistics import Effect, Source, minimum_detectable_effect, seeds_needed
from alexnet.claims.tables import effect_cells, number
from alexnet.cli import CONF, table
from alexnet.errors import UserError

PUBLISHED = CONF.parent / ".github" / "results"
WORTH = {
    Unit.points: 0.02,
    Unit.nats: 0.05,
    Unit.times: 1.25,
    Unit.number: 0.1,
}  # an effect worth talking about

Key = tuple[str, str, str, str]  # claim, treatment, control, metric


def plan(claims: Sequence[Claim], settings: Reproduce) -> str:
    """A line per comparison: n asked for, the smallest true effect that it finds with 80 % power, and the minutes.

    The spread and the minutes of a run are those of the results published for this scale, and where these have none
    those of earlier ones; what was never measured has no spread, and takes the mean minutes of the others.
    """
    folder = PUBLISHED / f"claims_{settings.scale}"  # beside it earlier ones, claims_cpu_2026-11-26 say
    paths = [*sorted(PUBLISHED.glob(f"{folder.name}_*/results.json")), folder / "results.json"]
    known = [read_results(path) for path in paths if path.exists()]
    effects = {key: effect for results in known for key, effect in effects_of(results).items()}
    minutes_known = [of for results in known if not math.isnan((of := minutes_per_run(results))[""])]
    jobs, per_run = jobs_of(claims, settings), minutes_known[-1] if minutes_known else {"": math.nan}
    rows = [("claim", "comparison", "n", "known sd", "finds", "n for", "to find", "minutes")]
    for claim in claims:
        missing = [job for job in own_jobs(claim, jobs, settings) if job.state is not State.finished]
        minutes = _minutes(len(missing) * per_run.get(claim.name, per_run[""]))
        for i, c in enumerate(claim.comparisons):
            effect = effects.get((claim.name, c.treatment, c.control, c.metric))
            cells = _power(c, effect, max(settings.seeds, claim.seeds))
            rows.append((claim.name * (i == 0), c.name, *cells, minutes * (i == 0)))
    left = Counter(Path(job.file).stem for job in jobs if job.state is not State.finished)
    total = sum(n * per_run.get(name, per_run[""]) for name, n in left.items())
    nothing = f"nothing is published for scale={settings.scale}"
    source = f"spread and minutes of {folder}*" if known else nothing
    return f"{table(rows, right=(2, 5, 7))}\n\n{sum(left.values())} runs, {_minutes(total)} minutes of a core; {source}"


def _power(c: Comparison, effect: Effect | None, n: int) -> tuple[str, str, str, str, str]:
    """n, the known sd, what n seeds find, and how many would find an effect worth talking about."""
    if c.statistic is Statistic.within_net:
        return "images", "", "", "", ""
    ratio = c.statistic is Statistic.time_ratio
    worth = WORTH[c.unit]
    sought = f"{worth:g}x" if ratio else f"{number(worth, c.unit, signed=False)} {c.unit}"
    if effect is None or not math.isfinite(effect.sd) or n < 2:
        return str(n), "?", "?", "?", sought
    least = minimum_detectable_effect(effect.sd, n)
    needed = seeds_needed(math.log(worth) if ratio else worth, effect.sd)
    sd, finds = (
        f"{math.exp(x):.2f}x" if ratio else number(x, c.unit, signed=False) for x in (effect.sd, least)
    )
    return str(n), sd, finds, str(needed or "many"), sought


def own_jobs(claim: Claim, jobs: Iterable[Job], settings: Reproduce) -> list[Job]:
    names = {run.name for run in claim.runs(settings.scale, settings.seeds)}
    names |= {run.name for *_, run in claim.tuning_runs(settings.scale)}
    return [job for job in jobs if job.run.name in names]


def minutes_per_run(results: Mapping[str, Any]) -> dict[str, float]:
    """Of a claim, by name; under the empty name the mean of all."""
    claims = results.get("claims", {})
    runs = {name: c["runs"] + c["tuning_runs"] for name, c in claims.items()}
    found = {name: c["minutes"] / runs[name] for name, c in claims.items() if runs[name]}
    return {**found, "": sum(found.values()) / len(found) if found else math.nan}


def _minutes(minutes: float) -> str:
    return "?" if math.isnan(minutes) else f"{minutes:.0f}"


def compare_results(here: Path, there: Path) -> str:
    """A line per comparison that both have: both effects, and whether sign, intervals and verdict agree."""
    ours, theirs = read_results(here), read_results(there)
    rows_of = [{_key(row): row for row in _rows(results)} for results in (ours, theirs)]
    both = [key for key in rows_of[0] if key in rows_of[1]]
    rows = [("comparison", "metric", "here", "n", "there", "n", "")]
    agreed = 0
    for key in both:
        a, b = (rows[key] for rows in rows_of)
        one, other = (effect_cells(_effect(row), Unit(row["unit"])) for row in (a, b))
        apart = differences_of(a, b)
        agreed += not apart
        name = f"{key[0]}: {key[1]}, {key[2]}"
        shown = [f"{cells['difference'].split(' ')[0]} {cells['interval']}" for cells in (one, other)]
        rows.append((name, key[3], shown[0], one["n"], shown[1], other["n"], ", ".join(apart) or "agree"))
    only = [len(set(of) - set(both)) for of in rows_of]
    return (
        f"{table(rows, right=(3, 5))}\n\n{agreed} of {len(both)} comparisons agree; {only[0]} are only here, "
        f"{only[1]} only there\nhere   {here}\nthere  {there}"
    )


def differences_of(a: Mapping[str, Any], b: Mapping[str, Any]) -> list[str]:
    """What two rows of results.json do not agree in."""
    one, other = _effect(a), _effect(b)
    if one is None or other is None:
        return ["not measured"] if (one is None) != (other is None) else []
    null = 1.0 if one.ratio else 0.0
    return [
        *["sign"] * ((one.estimate - null) * (other.estimate - null) < 0),
        *["intervals apart"] * (one.high < other.low or other.high < one.low),
        *["verdict"] * (a["verdict"] != b["verdict"]),
    ]


def read_results(path: Path) -> dict[str, Any]:
    """results.json. Raises UserError, which names the file, if it is missing or holds something else."""
    if not path.exists():
        raise UserError(f"{path} does not exist: render it with report=true, or name another file")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        _rows(content)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} must be a results.json of scripts/reproduce.py") from error
    return dict(content)


def effects_of(results: Mapping[str, Any]) -> dict[Key, Effect]:
    found = {_key(row): _effect(row) for row in _rows(results)}
    return {key: effect for key, effect in found.items() if effect is not None}


def _rows(results: Mapping[str, Any]) -> list[dict[str, Any]]:
    return [row for claim in results.get("claims", {}).values() for row in claim["rows"]]


def _key(row: Mapping[str, Any]) -> Key:
    return row["claim"], row["treatment"], row["control"], row["metric"]


def _effect(row: Mapping[str, Any]) -> Effect | None:
    """JSON has no infinity and no NaN; where an end of an interval is missing, it is open."""
    if row["effect"] is None:
        return None
    open_ended = {"low": -math.inf, "high": math.inf, "sd": math.nan, "p": math.nan}
    values: dict[str, Any] = {k: open_ended.get(k) if v is None else v for k, v in row["effect"].items()}
    return Effect(**{**values, "source": Source(values["source"])})
