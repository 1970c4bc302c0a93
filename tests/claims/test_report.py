"""One page that shows everything and needs nothing."""

import dataclasses
import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from tests.claims.conftest import directory, reduced

from alexnet.claims.claims import Nets, Test
from alexnet.claims.config import Reproduce
from alexnet.claims.jobs import claims_of
from alexnet.claims.report import _band, _mixed, conclusions, curved, gathered, sections_of, write_report
from alexnet.claims.runner import reproduce


class Page(HTMLParser):
    """What a page refers to, and its text."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.references: list[str] = []
        self.text: list[str] = []
        self.tags: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.references += [
            v for k, v in attributes if k in ("src", "href", "xlink:href", "action", "srcset") and v
        ]

    def handle_data(self, data):
        self.text.append(data)


@pytest.fixture(scope="module")
def page(finished: Reproduce) -> Page:
    return Page((finished.report_directory / "report.html").read_text())


def test_the_page_needs_no_network(page: Page):
    assert page.references
    assert all(r.startswith(("#", "data:image/png;base64,")) for r in page.references)
    assert not {"script", "link", "iframe"} & set(page.tags)
    assert not re.search(r"url\((?!#)|@import", "".join(page.text))


def test_the_page_says_what_is_claimed_found_and_doubted(page: Page):
    text = " ".join(" ".join(page.text).split())
    for claim in claims_of(Reproduce(claims=["s4_2_dropout", "s4_1_ten_views", "figure4"])):
        assert claim.quote in text
        assert all(confound in text for confound in claim.confounds)
        assert f"conf/claim/{claim.name}.yaml" in text
    for part in ("not resolved at this scale", "expected lower", "images, nets fixed", "minutes of training"):
        assert part in text
    assert "python scripts/reproduce.py claim=s4_2_dropout scale=smoke seeds=2" in text
    assert "commit" in text


def test_figures_are_pictures_and_files(finished: Reproduce, page: Page):
    assert page.tags.count("figure") == 3  # curves of dropout, both halves of Figure 4
    assert page.tags.count("img") + page.tags.count("svg") >= 3
    for name in ("figure4_left", "figure4_right"):
        for suffix in (".png", ".svg"):
            assert (finished.report_directory / f"{name}{suffix}").stat().st_size > 1000


def test_the_numbers_are_written_as_data(finished: Reproduce):
    content = json.loads((finished.report_directory / "results.json").read_text())
    assert list(content["claims"]) == ["s4_2_dropout", "s4_1_ten_views", "figure4"]
    dropout = content["claims"]["s4_2_dropout"]
    assert dropout["runs"] == 4
    assert dropout["runs_missing"] == 0
    assert dropout["rows"][0]["effect"]["n"] == 2
    assert dropout["hardware"]
    assert content["holm_family"] == 5  # three comparisons of dropout, ten views, Figure 4
    assert dropout["data"] == ["synthetic"]
    views = content["claims"]["s4_1_ten_views"]["rows"][0]
    assert views["effect"]["source"] == "images, nets fixed"
    assert views["effect"]["n"] == 40
    assert [(run["arm"], run["seed"]) for run in dropout["each_run"]] == [
        ("dropout", 1),
        *(("none", 1), ("dropout", 2), ("none", 2)),
    ]
    assert all(run["seconds"] > 0 and len(run["commits"]) == 1 for run in dropout["each_run"])
    assert content["commits"] == dropout["commits"]


@pytest.mark.usefixtures("undrawn")
def test_conclusions_stand_at_the_top_the_news_first(copied: Reproduce):
    claims = claims_of(copied)
    told = [
        dataclasses.replace(c, conclusion={"smoke": f"so much of {c.name}"}, news=c.name == "figure4")
        for c in claims
    ]
    sections = sections_of(told, copied)
    assert [name for name, *_ in conclusions(sections, copied)] == [
        "figure4",
        "s4_2_dropout",
        "s4_1_ten_views",
    ]
    write_report(told, copied)
    text = (copied.report_directory / "report.html").read_text()
    assert text.index("so much of figure4") < text.index("so much of s4_1_ten_views") < text.index("<table>")
    assert conclusions(sections_of(claims, copied), copied) == []
    more = dataclasses.replace(copied, seeds=3)  # what was concluded from other runs is not said of a part
    assert conclusions(sections_of(told, more), more) == []


def test_claims_of_several_states_of_the_code_are_a_warning_also_where_each_is_of_one():
    one = {"torch": ["2"], "hardware": ["cpu"], "device": ["cpu"]}
    sections = [
        SimpleNamespace(claim=SimpleNamespace(name=c), provenance={**one, "commits": [c]}) for c in "ab"
    ]
    assert _mixed(sections) == ["WARNING   the claims of this report are of 2 states of the code: a, b"]
    assert _mixed(sections[:1]) == []


def test_what_is_missing_is_listed_with_its_command(finished: Reproduce, capsys):
    more = reduced(
        Path(finished.data_dir),
        Path(finished.output_dir),
        "s4_2_dropout",
        "s6_ensemble",
        seeds=3,
        report=True,
    )
    reproduce(more)
    out = capsys.readouterr().out
    assert "4 runs are missing:" in out  # base 3, 4, 5 and the arm without dropout, seed 3
    assert out.count("python scripts/train.py") == 4
    assert "name=smoke/s4_2_dropout/none seed=3" in out
    assert "no results of ensemble, single yet" in out
    text = (more.report_directory / "report.html").read_text()
    assert "1 runs are missing" not in text
    assert "2 runs are missing" in text


@pytest.mark.usefixtures("undrawn")
def test_a_report_of_nothing_is_a_list_of_commands(data_dir, tmp_path, capsys):
    reproduce(reduced(data_dir, tmp_path, "s3_3_lrn", "s3_1_relu", "figure1", "figure3", report=True))
    out = capsys.readouterr().out
    assert "runs are missing:" in out
    assert not (tmp_path / "train").exists()
    (page,) = tmp_path.rglob("report.html")
    for text in (out, page.read_text()):  # tuning runs, but no arm at a rate that is not chosen yet
        assert "name=smoke/s3_1_relu/relu_tune_0.003" in text
        assert "name=smoke/s3_1_relu/relu " not in text
        assert "2 runs whose rate the tuning runs above decide" in text


@pytest.mark.slow
@pytest.mark.usefixtures("undrawn")
def test_runs_of_several_states_of_the_code_are_marked(copied: Reproduce, capsys):
    reproduce(copied)
    assert "WARNING" not in capsys.readouterr().out
    record = json.loads((path := directory(copied, "s4_2_dropout/none") / "run.json").read_text())
    del record["self"]
    resumed = {**record, "git_before": [{"commit": "f" * 40, "changed": True}]}
    path.write_text(json.dumps({**resumed, "resolved": {**record["resolved"], "precision": "bf16-mixed"}}))
    reproduce(copied)
    out = capsys.readouterr().out
    assert "WARNING   s4_2_dropout compares runs of 2 states of the code" in out
    assert "WARNING   s4_2_dropout compares runs of 2 devices or precisions: cpu, 32-true, cpu, bf16" in out
    assert "Runs of 2 states of the code" in (copied.report_directory / "report.html").read_text()


def test_an_ensemble_is_of_five_however_many_there_are(finished: Reproduce):
    (views, _) = sections_of(claims_of(finished), finished)[1:]
    one = gathered(views.claim, views.done)
    assert one.tests["ten_views"]["val/top1_error"].shape == (2, 40)
    pair = dataclasses.replace(
        views.claim, tests={"single": Test(), "ensemble": Test(nets=Nets.all)}, seeds=1
    )
    first_only = gathered(pair, views.done).tests
    assert first_only["single"]["val/top1_error"].shape == (1, 40)
    np.testing.assert_array_equal(
        first_only["single"]["val/top1_error"], first_only["ensemble"]["val/top1_error"]
    )


def test_two_tests_are_compared_on_the_same_nets(copied: Reproduce):
    (directory(copied, "base", 2) / "val_10view.npz").unlink()
    views = next(s for s in sections_of(claims_of(copied), copied) if s.claim.name == "s4_1_ten_views")
    tests = gathered(views.claim, views.done).tests
    assert {test["val/top1_error"].shape for test in tests.values()} == {(1, 40)}


@pytest.mark.slow
@pytest.mark.usefixtures("undrawn")
def test_a_diverged_run_is_in_no_curve_and_one_without_an_epoch_stops_no_page(copied: Reproduce):
    for seed, rows_left in ((1, 1), (2, 3)):  # only the header; some steps
        run = directory(copied, "s4_2_dropout/none", seed)
        lines = (run / "metrics.csv").read_text().splitlines()
        (run / "metrics.csv").write_text("\n".join(lines[:rows_left]) + "\n")
        (run / "measures.json").write_text(json.dumps({"failed": "the loss ended in NaN or infinity"}))
    reproduce(copied)
    section = sections_of(claims_of(copied), copied)[0]
    assert curved(section.by_arm["none"]) == []
    text = (copied.report_directory / "report.html").read_text()
    assert "diverged: no pair of runs is left to compare</b>; 2 of 2 pairs diverged" in text


@pytest.mark.usefixtures("undrawn")
def test_a_page_says_at_its_top_what_is_missing(finished: Reproduce, copied: Reproduce):
    said = "missing: what stands here"
    assert said not in (finished.report_directory / "report.html").read_text()
    shutil.rmtree(directory(copied, "s4_2_dropout/none", 2))
    reproduce(copied)
    assert f"1 run is {said}" in (copied.report_directory / "report.html").read_text()


def test_bands_are_one_standard_deviation_around_the_mean(finished: Reproduce):
    dropout = sections_of(claims_of(finished), finished)[0]
    band = _band(dropout.by_arm["none"], "loss", "train")
    values = np.array([[row.train["loss"] for row in d.metrics.steps] for d in dropout.by_arm["none"]])
    np.testing.assert_allclose(band.y, values.mean(0))
    np.testing.assert_allclose(band.high - band.y, values.std(0, ddof=1))
    assert _band(dropout.by_arm["none"][:1], "loss", "train").low is None
