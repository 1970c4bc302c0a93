"""From finished runs to one page, <output_dir>/reproduce/<scale>/report.html, and the same numbers as results.json.

    runs on disk -> Gathered, claim by claim -> compare() and judge() -> the page, its pictures, JSON, Markdown

Nothing is computed from images or networks here: every number comes from the files that a run and its measures left,
so that the page can be rendered again anywhere, from whatever is finished.
"""

import base64
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from alexnet.claims.claims import Claim, Figure, Nets, Run
from alexnet.claims.config import Reproduce
from alexnet.claims.jobs import (
    Chosen,
    Job,
    State,
    choose,
    jobs_of,
    rates,
    refuse_other_runs,
    reproduce_command,
    train_commands,
)
from alexnet.claims.measures import Want, evidence, per_image, want_of
from alexnet.claims.tables import (
    Evidence,
    Gathered,
    Row,
    as_json,
    as_markdown,
    as_text,
    cells,
    compare,
    judge,
)
from alexnet.pages import figures
from alexnet.pages.figures import Curve
from alexnet.pages.html import picture, render
from alexnet.system import command_line, environment, write_json
from alexnet.training.metrics import Metrics, read_metrics

COLOURS_ALIKE = 5  # pages.figures has so many colours; later arms are dashed


@dataclass(frozen=True)
class Done:
    """One run of a claim that is over, as its files tell it."""

    run: Run
    directory: Path

    @cached_property
    def record(self) -> dict[str, Any]:
        return dict(json.loads((self.directory / "run.json").read_text()))

    @cached_property
    def evidence(self) -> Evidence:
        found = evidence(self.directory)
        assert found is not None  # it is over
        return found

    @cached_property
    def metrics(self) -> Metrics:
        return read_metrics(self.directory / "metrics.csv")

    @property
    def measured_by(self) -> dict[str, Any] | None:
        """The state of the code at its first measurement."""
        path = self.directory / Want.basic
        return json.loads(path.read_text()).get("git") if path.exists() else None

    def has(self, want: Want) -> bool:
        return (self.directory / want).exists()


@dataclass(frozen=True)
class Section:
    """What the page says of one claim."""

    claim: Claim
    done: list[Done]
    tuning: list[Done]
    missing: list[Job]
    rows: list[Row]
    chosen: Chosen

    @property
    def provenance(self) -> dict[str, Any]:
        return provenance(self.done, self.tuning)

    @property
    def by_arm(self) -> dict[str, list[Done]]:
        return {arm: [d for d in self.done if d.run.arm == arm] for arm in self.claim.arms}


def write_report(claims: Sequence[Claim], settings: Reproduce) -> str:
    """Writes the page, its pictures, results.json and table.md; returns the tables as text, and where all that lies."""
    directory = settings.report_directory
    directory.mkdir(parents=True, exist_ok=True)
    sections = sections_of(claims, settings)
    rows = [row for section in sections for row in section.rows]
    write_json(directory / "results.json", results(sections, settings))
    (directory / "table.md").write_text(as_markdown(rows), encoding="utf-8")
    page = render("claims/claims.html", **page_values(sections, directory, settings))
    (directory / "report.html").write_text(page, encoding="utf-8")
    missing = {(job.run.name, job.run.seed): job for section in sections for job in section.missing}
    lines = [as_text(rows), "", *_mixed(sections), *_missing_lines(list(missing.values()), settings)]
    return "\n".join(
        [
            *lines,
            f"Holm      comparisons of this report with an expectation: {holm_family(sections)}",
            f"results   {directory / 'results.json'}",
            f"report    {directory / 'report.html'}",
        ]
    )


def _mixed(sections: Sequence[Section]) -> list[str]:
    """A warning where runs of different code, versions, machines or precisions are compared."""
    kinds = {
        "commits": "states of the code",
        "torch": "versions of torch",
        "hardware": "machines",
        "device": "devices or precisions",
    }
    lines = [
        f"WARNING   {s.claim.name} compares runs of {len(of)} {kind}: {', '.join(of)}"
        for s in sections
        for key, kind in kinds.items()
        if (of := s.provenance[key])
        if len(of) > 1
    ]
    of = commits(sections)
    if len(of) > 1 and not lines:  # claim by claim one, but not the same one
        lines = [f"WARNING   the claims of this report are of {len(of)} states of the code: {', '.join(of)}"]
    return lines


def commits(sections: Sequence[Section]) -> list[str]:
    """The states of the code that trained and measured the runs of a report: it should be one, without changes."""
    return sorted({commit for s in sections for commit in s.provenance["commits"]})


def _missing_lines(missing: Sequence[Job], settings: Reproduce) -> list[str]:
    return [f"{len(missing)} runs are missing:", train_commands(missing, settings), ""] if missing else []


def sections_of(claims: Sequence[Claim], settings: Reproduce) -> list[Section]:
    """Every claim with its runs; the verdicts are made together, since Holm's correction runs over all of them.

    Raises UserError for runs made with another configuration than the claims have now.
    """
    jobs = {(job.run.name, job.run.seed): job for job in jobs_of(claims, settings)}
    refuse_other_runs(jobs.values())
    chosen = choose(claims, settings)
    tuning = {c.name: [run for *_, run in c.tuning_runs(settings.scale)] for c in claims}
    runs = {c.name: c.runs(settings.scale, settings.seeds) for c in claims}

    def over(those: Sequence[Run]) -> list[Done]:
        found = [(run, jobs[run.name, run.seed]) for run in those]
        return [Done(run, job.directory) for run, job in found if is_over(job)]

    done = {name: over(those) for name, those in runs.items()}
    rows = [row for claim in claims for row in compare(claim, gathered(claim, done[claim.name]))]
    judged = judge(rows)
    return [
        Section(
            claim,
            done[claim.name],
            over(tuning[claim.name]),
            [
                jobs[run.name, run.seed]
                for run in (*tuning[claim.name], *runs[claim.name])
                if jobs[run.name, run.seed].state is not State.finished
            ],
            [row for row in judged if row.claim is claim],
            {key: value for key, value in chosen.items() if key[0] == (claim.uses or claim.name)},
        )
        for claim in claims
    ]


def is_over(job: Job) -> bool:
    return not job.undecided and job.state in (State.finished, State.unmeasured)


def gathered(claim: Claim, done: Sequence[Done]) -> Gathered:
    """What the tables take: evidence per arm and seed; of the claim's tests the values per image.

    Two tests are compared on the same nets: those that have passed all of them (pixels know no net). An ensemble is
    of as many nets as the claim says (`seeds`), however many there are.
    """
    arms: dict[str, dict[int, Evidence]] = {}
    for d in done:
        arms.setdefault(d.run.arm, {})[d.run.seed] = d.evidence
    together = any(test.nets is Nets.all for test in claim.tests.values())
    tests = {}
    wants = {name: want_of(test) for name, test in claim.tests.items()}
    of_nets = set(wants.values()) - {Want.pixels}
    tested = [d for d in done if all(d.has(want) for want in of_nets)]
    for name, test in claim.tests.items():
        directories = [d.directory for d in tested if d.has(wants[name])]
        if len(directories) >= (claim.seeds if together else 1):
            tests[name] = per_image(test, directories[: claim.seeds] if together else directories)
    return Gathered(arms, tests)


# Numbers as data ----------------------------------------------------------------------------------------------------


def results(sections: Sequence[Section], settings: Reproduce) -> dict[str, Any]:
    return {
        "command": command_line(),
        "scale": str(settings.scale),
        "seeds": settings.seeds,
        "overrides": settings.overrides,
        "commits": commits(sections),
        "holm_family": holm_family(sections),
        "claims": {
            s.claim.name: {
                "title": s.claim.title,
                "section": s.claim.section,
                "quote": s.claim.quote,
                "conclusion": "" if s.missing else s.claim.conclusion.get(settings.scale, ""),
                "command": reproduce_command([s.claim.name], settings),
                "rows": as_json(s.rows),
                "tuned": {arm: value for (_, arm), value in s.chosen.items()},
                "probe": probes(s),
                "confounds": s.claim.confounds,
                **s.provenance,
                "runs_missing": len(s.missing),
                "each_run": each_run(s.done),
            }
            for s in sections
        },
        "rendered_with": environment(),
    }


def each_run(done: Sequence[Done]) -> list[dict[str, Any]]:
    """Where the values of the rows come from, run by run; `seconds` on the clock, None of a run that diverged."""
    return [
        {
            "arm": d.run.arm,
            "seed": d.run.seed,
            "seconds": d.record.get("seconds"),
            "cpu_seconds": d.record.get("cpu_seconds"),
            "commits": provenance([d], [])["commits"],
        }
        for d in done
    ]


def holm_family(sections: Sequence[Section]) -> int:
    """How many comparisons Holm's correction runs over: those of this report that have an expectation."""
    return sum(row.expects for s in sections for row in s.rows)


def provenance(done: Sequence[Done], tuning: Sequence[Done]) -> dict[str, Any]:
    """Where the runs were made: everything that is the same for all is there once."""
    records = [d.record for d in (*done, *tuning)]
    hardware = {_machine(h) for r in records for h in (r["hardware"], *r.get("hardware_before", []))}
    measured = [d.measured_by for d in done]
    commits = {_commit(git) for r in records for git in (r["git"], *r.get("git_before", []))}
    commits |= {_commit(git) for git in measured if git}
    return {
        "runs": len(done),
        "tuning_runs": len(tuning),
        "minutes": round(sum(training_seconds(d.record, d.metrics) for d in (*done, *tuning)) / 60, 1),
        "hardware": sorted(hardware),
        "commits": sorted(commits),
        "torch": sorted(
            {v["torch"] for r in records for v in (r["versions"], *r.get("versions_before", []))}
        ),
        "data": sorted({r["config"]["data"]["name"] for r in records}),
        "device": sorted({f"{r['resolved']['device']}, {r['resolved']['precision']}" for r in records}),
    }


def training_seconds(record: Mapping[str, Any], metrics: Metrics) -> float:
    """Of a core, where one thread did it all and its CPU time was kept (its measures are in it). Else of all images at
    the median speed: a clock would count the hours in which a run was suspended as well."""
    if (
        "cpu_seconds" in record
        and record["resolved"]["device"] == "cpu"
        and record["hardware"]["threads"] == 1
    ):
        return float(record["cpu_seconds"])
    images = metrics.steps_done * record["config"]["data"]["batch_size"]
    return images / metrics.images_per_second if metrics.images_per_second else 0.0


def _machine(hardware: Mapping[str, Any]) -> str:
    cpu = f"{hardware['cpu']}, {hardware['threads']} threads"
    return ", ".join([*hardware.get("gpus", []), cpu])


def _commit(git: Mapping[str, Any] | None) -> str:
    return "no checkout" if git is None else git["commit"][:10] + (" with changes" if git["changed"] else "")


def probes(section: Section) -> dict[str, Any]:
    """What the initialisation probe said, per arm: of the first seed."""
    found = {}
    for arm, done in section.by_arm.items():
        files = [d.directory / Want.probe for d in done if d.has(Want.probe)] if section.claim.probe else []
        if files:
            content = json.loads(files[0].read_text())
            found[arm] = {key: content[key] for key in ("logit_signal", "loss", "stalls", "verdict")}
    return found


# The page -----------------------------------------------------------------------------------------------------------


def page_values(sections: Sequence[Section], directory: Path, settings: Reproduce) -> dict[str, Any]:
    done = {(d.run.name, d.run.seed): d for s in sections for d in s.done}
    tuning = {(d.run.name, d.run.seed): d for s in sections for d in s.tuning}
    return {
        "scale": str(settings.scale),
        "seeds": settings.seeds,
        "family": holm_family(sections),
        "missing": len({(job.run.name, job.run.seed) for s in sections for job in s.missing}),
        "conclusions": conclusions(sections, settings),
        "commits": commits(sections),
        "summary": [_summary_line(row) for s in sections for row in s.rows if row.main],
        "sections": [section_values(s, directory, settings) for s in sections],
        "provenance": provenance(list(done.values()), list(tuning.values())),
        "command": reproduce_command(settings.claims, settings),
    }


def conclusions(sections: Sequence[Section], settings: Reproduce) -> list[tuple[str, str, str]]:
    """(name, title, sentence) of every claim that has one and all its runs, the news first."""
    told = [s.claim for s in sections if s.claim.conclusion.get(settings.scale) and not s.missing]
    return [(c.name, c.title, c.conclusion[settings.scale]) for c in sorted(told, key=lambda c: not c.news)]


def _summary_line(row: Row) -> dict[str, Any]:
    word = str(row.verdict.word) if row.verdict else "not measured yet"
    return {"claim": row.claim, "word": word, "kind": _kind(row), **cells(row)}


def _kind(row: Row) -> str:
    """The class of a verdict in the page's style."""
    return row.verdict.word.name.lower() if row.verdict else "missing"


def section_values(section: Section, directory: Path, settings: Reproduce) -> dict[str, Any]:
    claim = section.claim
    return {
        "claim": claim,
        "rows": [{**cells(row), "main": row.main, "kind": _kind(row)} for row in section.rows],
        "figures": [*claim_figures(section, directory), *arms_figures(section, directory)],
        "arms": {arm: list(claim.arm_overrides(settings.scale, arm)) for arm in claim.arms},
        "tuned": rates([claim], section.chosen, settings),
        "probes": probes(section),
        "provenance": section.provenance,
        "command": reproduce_command([claim.name], settings),
        "missing": len(section.missing),
        "commands": train_commands(section.missing, replace(settings, claims=[claim.name])),
    }


# Pictures -----------------------------------------------------------------------------------------------------------


def arms_figures(section: Section, directory: Path) -> list[dict[str, Any]]:
    """Loss and holdout error of every arm; the claim about one arm (ten views, say) has none."""
    by_arm = {arm: curved(done) for arm, done in section.by_arm.items() if curved(done)}
    if len(by_arm) < 2 or section.claim.figure is not None:
        return []
    panels = {
        "training loss (nats)": {
            arm: _band(done, "loss", "train", i) for i, (arm, done) in enumerate(by_arm.items())
        },
        "holdout top-1 error (%)": {
            arm: _band(done, "top1_error", "holdout", i, 100.0)
            for i, (arm, done) in enumerate(by_arm.items())
        },
    }
    path = figures.arms_figure(panels, directory / f"{section.claim.name}.svg")
    return [drawn(path, _seeds_drawn(section, by_arm))]


def curved(done: Sequence[Done]) -> list[Done]:
    """The runs whose curves can be averaged: a diverged one's mean no more than its results do."""
    return [d for d in done if not d.evidence.diverged and d.evidence.curves]


def _seeds_drawn(section: Section, by_arm: Mapping[str, Sequence[Done]]) -> str:
    counts = {len(done) for done in by_arm.values()}
    seeds = f"{min(counts)} to {max(counts)}" if len(counts) > 1 else f"{max(counts)}"
    mean = (
        f"Mean over {seeds} seeds; the bands are one standard deviation." if max(counts) > 1 else "One seed."
    )
    diverged = sum(d.evidence.diverged for d in section.done)
    return mean + (f" {diverged} diverged runs are left out." if diverged else "")


def _band(done: Sequence[Done], metric: str, split: str, place: int = 0, scale: float = 1.0) -> Curve:
    """Mean and standard deviation over runs, as far as all of them go."""
    curves = [figures.run_curves(d.metrics.curves(metric), scale)[split] for d in done]
    shortest = min(len(curve.x) for curve in curves)
    y = np.array([curve.y[:shortest] for curve in curves])
    mean, sd = y.mean(0), y.std(0, ddof=1) if len(y) > 1 else None
    x = np.asarray(curves[0].x[:shortest])
    style = "-" if place < COLOURS_ALIKE else "--"
    return Curve(x, mean, style=style) if sd is None else Curve(x, mean, mean - sd, mean + sd, style)


def claim_figures(section: Section, directory: Path) -> list[dict[str, Any]]:
    """The paper's own figure, as PNG and as SVG."""
    drawing = {Figure.curves: _figure1, Figure.kernels: _figure3, Figure.retrieval: _figure4}
    if section.claim.figure is None or not section.done:
        return []
    return drawing[section.claim.figure](section, directory)


def _figure1(section: Section, directory: Path) -> list[dict[str, Any]]:
    curves = {}
    for arm, style in (("relu", "-"), ("tanh", "--")):  # solid and dashed as in the paper
        if curved(section.by_arm.get(arm, [])):
            band = _band(curved(section.by_arm[arm]), "top1_error", "train", 0, 100.0)
            name = {"relu": "ReLUs", "tanh": "tanh"}[arm]
            curves[name] = Curve(band.x, band.y, band.low, band.high, style)
    if not curves:
        return []
    both = [
        figures.curves_figure(curves, directory / f"figure1{kind}", level=25.0) for kind in (".png", ".svg")
    ]
    return [drawn(both[1], "The dashed level is the 25 % of the paper.")]


def _figure3(section: Section, directory: Path) -> list[dict[str, Any]]:
    found = []
    for arm, towers in (("two_towers", 2), ("dense", 1)):
        runs = [d for d in section.by_arm.get(arm, []) if d.has(Want.kernels)]
        if runs:
            weight = torch.from_numpy(np.load(runs[0].directory / Want.kernels))
            for kind in (".svg", ".png"):
                path = figures.kernels_figure(weight, directory / f"figure3_{arm}{kind}", towers)
            splits = ", ".join(f"{d.evidence.results['conv1/chroma_split']:+.3f}" for d in runs)
            found.append(
                drawn(path, f"{arm}, seed {runs[0].run.seed}. Chroma split beyond chance, by seed: {splits}.")
            )
    return found


def _figure4(section: Section, directory: Path) -> list[dict[str, Any]]:
    files = [d.directory / Want.figure4 for d in section.done if d.has(Want.figure4)]
    if not files:
        return []
    c = dict(np.load(files[0]))
    names = [str(name) for name in c["names"]]
    labels = [int(label) for label in c["labels"]]
    for kind in (".svg", ".png"):
        left = figures.predictions_figure(
            c["images"], c["probabilities"], labels, names, directory / f"figure4_left{kind}"
        )
        right = figures.neighbours_figure(
            c["queries"], c["neighbours"], directory / f"figure4_right{kind}", c["agree"]
        )
    return [
        drawn(left, "Test images of eight classes, with the five classes the net finds most probable."),
        drawn(
            right,
            "Framed green: of the test image's class. The pictures are chosen by their place in the store.",
        ),
    ]


def drawn(path: Path, caption: str) -> dict[str, Any]:
    """A picture as part of the page: SVG as it is, anything else as base64."""
    if path.suffix == ".svg":
        return {"svg": picture(path.read_text(encoding="utf-8")), "caption": caption}
    return {"png": base64.b64encode(path.read_bytes()).decode(), "caption": caption}
