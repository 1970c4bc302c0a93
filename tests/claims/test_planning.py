"""What more seeds could find, and whether two results agree: from results.json alone."""

import copy
import json
import shutil

import pytest

from alexnet.claims import planning
from alexnet.claims.config import Reproduce, Scale
from alexnet.claims.jobs import claims_of
from alexnet.claims.statistics import minimum_detectable_effect
from alexnet.errors import UserError

PUBLISHED = planning.PUBLISHED / "claims_cpu_2026-11-26" / "results.json"


@pytest.fixture
def published(tmp_path, monkeypatch):
    """Only those results, as earlier ones."""
    monkeypatch.setattr(planning, "PUBLISHED", tmp_path)
    shutil.copytree(PUBLISHED.parent, tmp_path / "claims_cpu_1")
    return tmp_path


def test_the_plan_is_the_published_spread_at_the_seeds_that_are_asked_for(published, tmp_path):
    settings = Reproduce(claims=["s3_3_lrn"], scale=Scale.cpu, seeds=6, output_dir=str(tmp_path / "runs"))
    said = planning.plan(claims_of(settings), settings)
    assert max(map(len, said.splitlines()[:7])) <= 100
    rows = planning.rows_of(planning.read_results(PUBLISHED))
    _, effect = rows["s3_3_lrn", "all", "none", "val/top1_error"]
    finds = 100 * minimum_detectable_effect(effect.sd, 6)
    (row,) = (line for line in said.splitlines() if "all - none" in line)
    assert row.split()[4:7] == ["6", f"{100 * effect.sd:.2f}", f"{finds:.2f}"]
    assert "42 runs, " in said  # seven arms of six seeds
    minutes = 42 * 86.8 / 21
    assert f"{minutes:.0f} minutes" in said
    assert list(tmp_path.iterdir()) == [tmp_path / "claims_cpu_1"]


def test_the_plan_takes_what_was_measured_last_and_else_what_was_measured_before(published, tmp_path):
    settings = Reproduce(claims=["s3_3_lrn"], scale=Scale.cpu, output_dir=str(tmp_path / "runs"))
    before = planning.plan(claims_of(settings), settings)
    content = json.loads(PUBLISHED.read_text())
    claim = content["claims"]["s3_3_lrn"]
    claim["minutes"] /= 2
    first, *others = claim["rows"]
    first["effect"]["sd"], others[-1]["effect"] = 0.0123, None
    (published / "claims_cpu").mkdir()
    (published / "claims_cpu" / "results.json").write_text(json.dumps(content))
    after = planning.plan(claims_of(settings), settings)
    assert f"{21 * 86.8 / 21 / 2:.0f} minutes" in after
    assert next(line.split()[5] for line in after.splitlines() if "all - none" in line) == "1.23"
    assert before.splitlines()[-4].split()[:5] == after.splitlines()[-4].split()[:5]  # the last comparison


def test_a_claim_that_was_never_measured_has_no_spread(published, tmp_path):
    settings = Reproduce(claims=["s5_decay"], scale=Scale.cpu, output_dir=str(tmp_path))
    assert " ? " in planning.plan(claims_of(settings), settings)


def test_results_agree_with_themselves_and_differences_are_named(tmp_path):
    content = json.loads(PUBLISHED.read_text())
    other = copy.deepcopy(content)
    row = other["claims"]["s3_3_lrn"]["rows"][0]
    row["effect"] |= {"estimate": 0.1, "low": 0.05, "high": 0.15}
    row["verdict"] = "does not hold"
    there = tmp_path / "results.json"
    there.write_text(json.dumps(other))
    same, changed = (planning.compare_results(PUBLISHED, path) for path in (PUBLISHED, there))
    assert "agree" in same
    assert "verdict" not in same
    (line,) = (line for line in changed.splitlines() if line.endswith("sign, intervals apart, verdict"))
    assert "val/top1_error" in line


def test_what_is_no_result_is_named(tmp_path):
    path = tmp_path / "results.json"
    with pytest.raises(UserError, match="does not exist: render it with report=true"):
        planning.compare_results(path, path)
    for content in ("", "[1]", '{"claims": {"a": 3}}'):
        path.write_text(content)
        with pytest.raises(UserError, match=r"results.json must be a results.json of"):
            planning.read_results(path)
