"""From finished runs to one page, <output_dir>/reproduce/<scale>/report.html, and the same numbers as results.json.

    runs on disk -> Gathered, claim by claim -> compare() and judge() -> the page, its pictures, JSON, Markdown

Nothing is computed from images or networks here: every number comes from the files that a run and its measures left,
so that the page can be rendered again anywhere, from whatever is finished.
"""

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from alexnet.claims import jobs, tables
from alexnet.claims.claims import Claim, Figure, Nets, Run
from alexnet.claims.config import Reproduce
from alexnet.claims.measures import Want, evidence, per_image, want_of
from alexnet.pages import figures
from alexnet.pages.figures import Curve
from alexnet.pages.html import picture, render
from alexnet.system import command_line, environment, read_json, write_json
from alexnet.training.metrics import Metrics, read_metrics

COLOURS_ALIKE = 5  # pages.figures has so many colours; later arms are dashed


@dataclass(frozen=True)
class Done:
    """One run of a claim that is over, as its files tell it."""

    run: Run
    directory: Path

    @cached_property
    def record(self) -> dict[str, Any]:
        return read_json(self.directory / "run.json")

    @cached_property
    def evidence(self) -> tables.Evidence:
        found = evidence(self.directory)
        assert found is not None  # it is over
        return found

    @cached_property
    def metrics(self) -> Metrics:
        return read_metrics(self.directory / "metrics.csv")

    def has(self, want: Want) -> bool:
        return (self.directory / want).exists()


@dataclass(frozen=True)
class Section:
    """What the page says of one claim."""

    claim: Claim
    done: list[Done]
    tuning: list[Done]
    missing: list[jobs.Job]
    rows: list[tables.Row]
    chosen: dict[str, float]  # {arm: its tuned rate}

    @property
    def provenance(self) -> dict[str, Any]:
        return provenance(self.done, self.tuning)

    @property
    def by_arm(self) -> dict[str, list[Done]]:
        return {arm: [d for d in self.done if d.run.arm == arm] for arm in self.claim.arms}

    @property
    def probes(self) -> dict[str, Any]:
        """What the initialisation probe said, per arm: of the first seed."""
        seen = [d for d in reversed(self.done) if self.claim.probe and d.has(Want.probe)]
        first = {d.run.arm: read_json(d.directory / Want.probe) for d in seen}
        keys = ("logit_signal", "loss", "stalls", "verdict")
        return {arm: {key: first[arm][key] for key in keys} for arm in self.claim.arms if arm in first}


def write_report(claims: Sequence[Claim], settings: Reproduce) -> str:
    """Writes the page, its pictures, results.json and table.md; returns the tables as text, and where all that lies."""
    directory = settings.report_directory
    directory.mkdir(parents=True, exist_ok=True)
    sections = sections_of(claims, settings)
    rows = [row for section in sections for row in section.rows]
    family = sum(row.expects for row in rows)
    write_json(directory / "results.json", results(sections, settings, family))
    (directory / "table.md").write_text(tables.as_markdown(rows), encoding="utf-8")
    # Claims share runs: each counts once.
    missing = list({job.run.key: job for s in sections for job in s.missing}.values())
    done = {d.run.key: d for s in sections for d in s.done}
    tuning = {d.run.key: d for s in sections for d in s.tuning}
    page = render(
        "claims/claims.html",
        settings=settings,
        family=family,
        missing=len(missing),
        conclusions=conclusions(sections, settings),
        commits=commits(sections),
        sections=[{**vars(s), **section_values(s, directory, settings)} for s in sections],
        provenance=provenance(list(done.values()), list(tuning.values())),
        command=jobs.reproduce_command(settings.claims, settings),
    )
    (directory / "report.html").write_text(page, encoding="utf-8")
    lines = [tables.as_text(rows), "", *_mixed(sections)]
    if missing:
        lines += [f"{len(missing)} runs are missing:", jobs.train_commands(missing, settings), ""]
    return "\n".join(
        [
            *lines,
            f"Holm      comparisons of this report with an expectation: {family}",
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
    lines = []
    for s in sections:
        of = {kind: s.provenance[key] for key, kind in kinds.items()}
        several = {kind: names for kind, names in of.items() if len(names) > 1}
        lines += [
            f"WARNING   {s.claim.name} compares runs of {len(names)} {kind}: {', '.join(names)}"
            for kind, names in several.items()
        ]
    states = commits(sections)
    if len(states) > 1 and not lines:  # claim by claim one, but not the same one
        said = f"the claims of this report are of {len(states)} states of the code: {', '.join(states)}"
        lines = [f"WARNING   {said}"]
    return lines


def commits(sections: Sequence[Section]) -> list[str]:
    """The states of the code that trained and measured the runs of a report: it should be one, without changes."""
    return sorted({commit for s in sections for commit in s.provenance["commits"]})


def sections_of(claims: Sequence[Claim], settings: Reproduce) -> list[Section]:
    """Every claim with its runs; the verdicts are made together, since Holm's correction runs over all of them.

    Raises UserError for runs made with another configuration than the claims have now.
    """
    by_key = {job.run.key: job for job in jobs.jobs_of(claims, settings)}
    jobs.refuse_other_runs(by_key.values())

    def over(runs: Sequence[Run]) -> list[Done]:
        states = {run.key: by_key[run.key].state for run in runs}
        those = [run for run in runs if states[run.key] in (jobs.State.finished, jobs.State.unmeasured)]
        return [Done(run, by_key[run.key].directory) for run in those]

    sections = []
    for claim in claims:
        tuning = [run for *_, run in claim.tuning_runs(settings.scale)]
        runs = claim.runs(settings.scale, settings.seeds)
        done, of_claim = over(runs), [by_key[run.key] for run in (*tuning, *runs)]
        missing = [job for job in of_claim if job.state is not jobs.State.finished]
        rows = tables.compare(claim, gathered(claim, done))
        chosen = jobs.choose(claim, settings)
        sections.append(Section(claim, done, over(tuning), missing, rows, chosen))
    judged = tables.judge([row for s in sections for row in s.rows])
    return [replace(s, rows=[row for row in judged if row.claim is s.claim]) for s in sections]


def gathered(claim: Claim, done: Sequence[Done]) -> tables.Gathered:
    """What the tables take: evidence per arm and seed; of the claim's tests the values per image.

    Two tests are compared on the same nets: those that have passed all of them (pixels know no net). An ensemble is
    of as many nets as the claim says (`seeds`), however many there are.
    """
    arms: dict[str, dict[int, tables.Evidence]] = {}
    for d in done:
        arms.setdefault(d.run.arm, {})[d.run.seed] = d.evidence
    together = any(test.nets is Nets.all for test in claim.tests.values())
    wants = {name: want_of(test) for name, test in claim.tests.items()}
    tested = [d for d in done if all(d.has(want) for want in wants.values() if want != Want.pixels)]
    tests = {}
    for name, test in claim.tests.items():
        directories = [d.directory for d in tested if d.has(wants[name])]
        if len(directories) >= (claim.seeds if together else 1):
            tests[name] = per_image(test, directories[: claim.seeds] if together else directories)
    return tables.Gathered(arms, tests)


# Numbers as data ----------------------------------------------------------------------------------------------------


def results(sections: Sequence[Section], settings: Reproduce, family: int) -> dict[str, Any]:
    return {
        "command": command_line(),
        "scale": str(settings.scale),
        "seeds": settings.seeds,
        "overrides": settings.overrides,
        "commits": commits(sections),
        "holm_family": family,  # comparisons of this report that have an expectation
        "claims": {
            s.claim.name: {
                "title": s.claim.title,
                "section": s.claim.section,
                "quote": s.claim.quote,
                "conclusion": "" if s.missing else s.claim.conclusion.get(settings.scale, ""),
                "command": jobs.reproduce_command([s.claim.name], settings),
                "rows": tables.as_json(s.rows),
                "tuned": s.chosen,
                "probe": s.probes,
                "confounds": s.claim.confounds,
                **s.provenance,
                "runs_missing": len(s.missing),
                # Where the values come from; `seconds` on the clock, None of a run that diverged.
                "each_run": [
                    {
                        "arm": d.run.arm,
                        "seed": d.run.seed,
                        "seconds": d.record.get("seconds"),
                        "cpu_seconds": d.record.get("cpu_seconds"),
                        "commits": provenance([d], [])["commits"],
                    }
                    for d in s.done
                ],
            }
            for s in sections
        },
        "rendered_with": environment(),
    }


def provenance(done: Sequence[Done], tuning: Sequence[Done]) -> dict[str, Any]:
    """Where the runs were made: everything that is the same for all is there once."""
    every = [*done, *tuning]
    records = [d.record for d in every]

    def ever(key: str) -> list[Any]:
        """A run that was resumed elsewhere has been on several machines."""
        return [value for r in records for value in (r[key], *r.get(f"{key}_before", []))]

    machines = [[*h.get("gpus", []), f"{h['cpu']}, {h['threads']} threads"] for h in ever("hardware")]
    measured = [read_json(d.directory / Want.basic).get("git") for d in done if d.has(Want.basic)]
    states = [*ever("git"), *(git for git in measured if git)]
    changed = {True: " with changes", False: ""}
    return {
        "runs": len(done),
        "tuning_runs": len(tuning),
        "minutes": round(sum(training_seconds(d.record, d.metrics) for d in every) / 60, 1),
        "hardware": sorted({", ".join(machine) for machine in machines}),
        "commits": sorted({g["commit"][:10] + changed[g["changed"]] if g else "no checkout" for g in states}),
        "torch": sorted({versions["torch"] for versions in ever("versions")}),
        "data": sorted({r["config"]["data"]["name"] for r in records}),
        "device": sorted({f"{r['resolved']['device']}, {r['resolved']['precision']}" for r in records}),
    }


def training_seconds(record: Mapping[str, Any], metrics: Metrics) -> float:
    """Of a core, where one thread did it all and its CPU time was kept (its measures are in it). Else of all images at
    the median speed: a clock would count the hours in which a run was suspended as well."""
    where = record.get("resolved", {}).get("device"), record.get("hardware", {}).get("threads")
    if "cpu_seconds" in record and where == ("cpu", 1):
        return float(record["cpu_seconds"])
    images = metrics.steps_done * record["config"]["data"]["batch_size"]
    return images / metrics.images_per_second if metrics.images_per_second else 0.0


# The page -----------------------------------------------------------------------------------------------------------


def conclusions(sections: Sequence[Section], settings: Reproduce) -> list[tuple[str, str, str]]:
    """(name, title, sentence) of every claim that has one and all its runs, the news first."""
    told = [s.claim for s in sections if s.claim.conclusion.get(settings.scale) and not s.missing]
    return [(c.name, c.title, c.conclusion[settings.scale]) for c in sorted(told, key=lambda c: not c.news)]


def section_values(section: Section, directory: Path, settings: Reproduce) -> dict[str, Any]:
    """What the page shows of a claim besides the section itself."""
    claim = section.claim
    figures_of = {Figure.curves: _figure1, Figure.kernels: _figure3, Figure.retrieval: _figure4, None: _arms}
    return {
        "rows": [{**tables.cells(row), "main": row.main} for row in section.rows],
        "figures": figures_of[claim.figure](section, directory) if section.done else [],
        "arms": {arm: claim.arm_overrides(settings.scale, arm) for arm in claim.arms},
        "tuned": jobs.rates(claim, section.chosen, settings),
        "probes": section.probes,
        "provenance": section.provenance,
        "command": jobs.reproduce_command([claim.name], settings),
        "commands": jobs.train_commands(section.missing, replace(settings, claims=[claim.name])),
    }


# Pictures -----------------------------------------------------------------------------------------------------------


def _arms(section: Section, directory: Path) -> list[dict[str, Any]]:
    """Loss and holdout error of every arm; a claim about one arm (ten views, say) has none."""
    by_arm = {arm: runs for arm, done in section.by_arm.items() if (runs := curved(done))}
    if len(by_arm) < 2:
        return []
    loss, error = {}, {}
    for i, (arm, done) in enumerate(by_arm.items()):
        style = "-" if i < COLOURS_ALIKE else "--"
        loss[arm] = _band(done, "loss", "train", style=style)
        error[arm] = _band(done, "top1_error", "holdout", 100.0, style)
    panels = {"training loss (nats)": loss, "holdout top-1 error (%)": error}
    path = figures.arms_figure(panels, directory / f"{section.claim.name}.svg")
    few, many = (extreme(len(done) for done in by_arm.values()) for extreme in (min, max))
    seeds = f"{few} to {many}" if few < many else f"{many}"
    said = f"Mean over {seeds} seeds; the bands are one standard deviation." if many > 1 else "One seed."
    diverged = sum(d.evidence.diverged for d in section.done)
    return [drawn(path, said + (f" {diverged} diverged runs are left out." if diverged else ""))]


def curved(done: Sequence[Done]) -> list[Done]:
    """The runs whose curves can be averaged: a diverged one's mean no more than its results do."""
    return [d for d in done if not d.evidence.diverged and d.evidence.curves]


def _band(done: Sequence[Done], metric: str, split: str, scale: float = 1.0, style: str = "-") -> Curve:
    """Mean and standard deviation over runs, as far as all of them go."""
    curves = [d.metrics.curves(metric)[split] for d in done]
    shortest = min(len(x) for x, _ in curves)
    x = np.asarray(curves[0][0][:shortest])
    y = scale * np.array([values[:shortest] for _, values in curves])
    mean = y.mean(0)
    if len(y) == 1:
        return Curve(x, mean, style=style)
    sd = y.std(0, ddof=1)
    return Curve(x, mean, mean - sd, mean + sd, style)


# The paper's own figures, each as PNG and as SVG.


def _figure1(section: Section, directory: Path) -> list[dict[str, Any]]:
    curves = {}
    # Solid and dashed as in the paper.
    for arm, name, style in (("relu", "ReLUs", "-"), ("tanh", "tanh", "--")):
        if runs := curved(section.by_arm.get(arm, [])):
            curves[name] = _band(runs, "top1_error", "train", 100.0, style)
    if not curves:
        return []
    for kind in (".png", ".svg"):
        path = figures.curves_figure(curves, directory / f"figure1{kind}", level=25.0)
    return [drawn(path, "The dashed level is the 25 % of the paper.")]


def _figure3(section: Section, directory: Path) -> list[dict[str, Any]]:
    found = []
    for arm, towers in (("two_towers", 2), ("dense", 1)):
        runs = [d for d in section.by_arm.get(arm, []) if d.has(Want.kernels)]
        if runs:
            weight = torch.from_numpy(np.load(runs[0].directory / Want.kernels))
            for kind in (".svg", ".png"):
                path = figures.kernels_figure(weight, directory / f"figure3_{arm}{kind}", towers)
            splits = ", ".join(f"{d.evidence.results['conv1/chroma_split']:+.3f}" for d in runs)
            said = f"{arm}, seed {runs[0].run.seed}. Chroma split beyond chance, by seed: {splits}."
            found.append(drawn(path, said))
    return found


def _figure4(section: Section, directory: Path) -> list[dict[str, Any]]:
    files = [d.directory / Want.figure4 for d in section.done if d.has(Want.figure4)]
    if not files:
        return []
    c = dict(np.load(files[0]))
    names, labels = c["names"].tolist(), c["labels"].tolist()
    for kind in (".svg", ".png"):
        left, right = (directory / f"figure4_{half}{kind}" for half in ("left", "right"))
        figures.predictions_figure(c["images"], c["probabilities"], labels, names, left)
        figures.neighbours_figure(c["queries"], c["neighbours"], right, c["agree"])
    chosen = "The pictures are chosen by their place in the store."
    return [
        drawn(left, "Test images of eight classes, with the five classes the net finds most probable."),
        drawn(right, f"Framed green: of the test image's class. {chosen}"),
    ]


def drawn(path: Path, caption: str) -> dict[str, Any]:
    """A picture as part of the page: SVG as it is, anything else as base64."""
    if path.suffix == ".svg":
        return {"svg": picture(path.read_text(encoding="utf-8")), "caption": caption}
    return {"png": base64.b64encode(path.read_bytes()).decode(), "caption": caption}
