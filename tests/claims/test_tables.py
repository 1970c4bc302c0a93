"""Canned runs in, rows out."""

import dataclasses
import json
import math
from types import SimpleNamespace

import numpy as np
import pytest

from alexnet.claims.claims import Claim, Comparison, Number, Statistic, Test, Unit, load_claims
from alexnet.claims.statistics import Direction, Word, paired_difference, seeds_needed
from alexnet.claims.tables import (
    TEXT_WIDTHS,
    Evidence,
    Gathered,
    Row,
    _label,
    as_json,
    as_markdown,
    as_text,
    compare,
    judge,
)
from alexnet.cli import CONF, WIDTH
from alexnet.training import metrics

PAPER = [Number(-1.4, Unit.points, "val/top1_error", "section 3.3")]
NOTES = [Number(-0.081, Unit.nats, "val/cross_entropy", "layer-params-148.cfg:148")]
NORMS = Comparison(
    treatment="with",
    control="without",
    metric="val/top1_error",
    direction=Direction.lower,
    also=["val/cross_entropy"],
    paper=PAPER,
    notes_2012=NOTES,
)


def claim(*comparisons: Comparison, **keys) -> Claim:
    arms = {c: [] for comparison in comparisons for c in (comparison.treatment, comparison.control)}
    return Claim("s3_3_norms", "Norms", "3.3", "reduces our error", arms, list(comparisons), ["x"], **keys)


def runs(errors: list[float], losses: list[float] | None = None) -> dict[int, Evidence]:
    losses = losses or [1.0] * len(errors)
    return {
        seed: Evidence({"val/top1_error": e, "val/cross_entropy": loss})
        for seed, (e, loss) in enumerate(zip(errors, losses, strict=True))
    }


def judged(claim: Claim, gathered: Gathered) -> list[Row]:
    return judge(compare(claim, gathered))


def first(comparison: Comparison, arms: dict[str, dict[int, Evidence]]) -> Row:
    return judged(claim(comparison), Gathered(arms))[0]


RUNS = Gathered(
    {"with": runs([0.400, 0.410, 0.420], [1.5, 1.6, 1.7]), "without": runs([0.415, 0.424, 0.436])}
)


def test_a_row_has_the_papers_number_ours_and_a_verdict():
    main, beside = judged(claim(NORMS), RUNS)
    assert main.paper.value == -1.4
    assert main.notes_2012 is None
    assert main.effect.estimate == pytest.approx(-0.015)
    assert main.effect.n == 3
    assert main.treatment.mean == pytest.approx(0.41)
    assert main.verdict.word is Word.HOLDS
    assert beside.metric == "val/cross_entropy"
    assert beside.notes_2012.value == -0.081
    assert beside.verdict is None


def test_evidence_is_read_from_the_runs_record_and_its_metrics():
    record = {
        "results": {
            "val": {"split": "val", "n": 100, "top1_error": 0.4, "top5_error": None, "cross_entropy": 1.5},
            "train": {"top1_error": 0.1},
        }
    }
    columns = ("step", "epoch", "train/loss", "train/top1_error", "holdout/loss")
    lines = ["10,0,2.2,0.8,", "20,0,2.0,0.7,", "20,0,2.1,0.75,2.05", "30,1,1.5,0.6,", "40,1,1.0,0.5,1.2"]
    rows = [metrics.Row.of(dict(zip(columns, line.split(","), strict=True))) for line in lines]
    evidence = Evidence.of_run(record, metrics.Metrics(rows), classes=10)
    assert evidence.results["val/top1_error"] == 0.4
    assert evidence.results["train_eval/top1_error"] == 0.1
    assert "val/top5_error" not in evidence.results
    assert evidence.curves["train/loss"] == [(0.5, 2.2), (1.0, 2.0), (1.5, 1.5)]
    assert Evidence.of_run({"state": "running"}, metrics.Metrics(), classes=10).curves == {}


def test_only_seeds_that_both_arms_have_are_paired():
    with_gap = {0: RUNS.arms["with"][0], 2: RUNS.arms["with"][2], 7: Evidence({"val/top1_error": 0.9})}
    row = first(NORMS, {"with": with_gap, "without": RUNS.arms["without"]})
    assert row.effect.n == 2
    assert row.effect.estimate == pytest.approx((-0.015 - 0.016) / 2)


def test_what_is_missing_or_diverged_is_said():
    row = first(NORMS, {"with": RUNS.arms["with"]})
    assert row.effect is None
    assert row.note == "no finished runs of without yet"
    diverged = {**RUNS.arms["without"], 1: Evidence({"val/top1_error": math.nan})}
    row = first(NORMS, {"with": RUNS.arms["with"], "without": diverged})
    assert row.effect.n == 2
    assert row.note == "1 of 3 pairs diverged"


def lost(n: int) -> dict[int, Evidence]:
    return {s: Evidence({"val/top1_error": math.nan}, diverged=True) for s in range(n)}


def test_an_arm_that_diverges_on_every_seed_is_a_result_and_not_missing():
    row = first(NORMS, {"with": RUNS.arms["with"], "without": lost(3)})
    assert row.verdict.word is Word.DIVERGED
    assert row.note == "3 of 3 pairs diverged"
    assert "-> diverged: no pair of runs is left" in as_text([row])
    row = first(TIMES, {"tanh": lost(2), "relu": lost(2)})
    assert row.verdict.word is Word.DIVERGED


def test_a_diverged_run_is_marked_where_curves_or_images_are_compared():
    tanh = {**curves([6.0, 6.5]), 2: Evidence(classes=10, diverged=True)}
    row = first(TIMES, {"tanh": tanh, "relu": curves([1.5, 1.5, 1.0])})
    assert row.effect.n == 2
    assert row.effect.bound == ""
    assert row.note == "1 of 3 pairs diverged"
    late = {**curves([6.0, 6.5]), 2: dataclasses.replace(curves([1.0])[0], diverged=True)}
    row = first(TIMES, {"tanh": late, "relu": curves([1.5, 1.5, 1.0])})
    assert row.note == "1 of 3 pairs diverged"  # though it had arrived
    c = Comparison("ten", "one", "val/top1_error", Direction.lower, Statistic.within_net)
    nets = {"net": {0: Evidence(), **lost(3)}}
    that = claim(c, tests={"one": Test(), "ten": Test(views=10)})
    tests = {name: {"val/top1_error": np.arange(10) % 2} for name in ("one", "ten")}
    assert judged(that, Gathered(nets, tests))[0].note == "images, nets fixed (1 net); 3 of 3 nets diverged"
    row = judged(that, Gathered(nets))[0]
    assert row.note == "no results of ten, one yet; 3 of 3 nets diverged"
    assert row.verdict.word is Word.DIVERGED


def test_the_gap_is_val_minus_training_images_in_evaluation_mode():
    def arm(gap: float) -> dict[int, Evidence]:
        return {
            s: Evidence(
                {"val/top1_error": 0.5 + s / 100, "train_eval/top1_error": 0.5 + s / 100 - gap - s / 1000}
            )
            for s in range(3)
        }

    c = Comparison("with", "without", "gap/top1_error", Direction.lower)
    row = first(c, {"with": arm(0.1), "without": arm(0.3)})
    assert row.effect.estimate == pytest.approx(-0.2)


def curves(times: list[float | None], classes: int = 10) -> dict[int, Evidence]:
    """Training losses that fall below half of ln(classes) at these epochs, within 8."""
    low, high = 0.3 * math.log(classes), 0.6 * math.log(classes)
    return {
        seed: Evidence(
            curves={
                "train/loss": [(e, high if t is None or e < t else low) for e in np.arange(0.5, 8.5, 0.5)]
            },
            classes=classes,
        )
        for seed, t in enumerate(times)
    }


TIMES = Comparison(
    "tanh",
    "relu",
    "train/loss",
    Direction.higher,
    Statistic.time_ratio,
    threshold=0.5,
    threshold_of_chance=True,
    paper=[Number(6.0, Unit.times, "train/loss", "Figure 1")],
)


def test_times_are_compared_by_their_ratio_and_a_fraction_of_chance_is_one_of_ln_classes():
    row = first(TIMES, {"tanh": curves([6.0, 6.5, 6.0]), "relu": curves([1.5, 1.5, 1.0])})
    # Two rows an epoch: their mean falls from .6 to .45 in the half epoch before, and stands half an epoch earlier.
    assert row.treatment.mean == pytest.approx(np.mean([6.0, 6.5, 6.0]) - 0.5 / 3 - 0.5)
    # The last of ReLU arrives while its first epoch is not over: half-way from .25 to .5, two thirds of it.
    assert row.effect.estimate == pytest.approx((6.4 * 7.0 * (16 / 3) / (0.25 + 1 / 6)) ** (1 / 3))
    assert row.verdict.word is Word.HOLDS


def test_runs_that_never_arrive_give_a_bound_and_a_note():
    row = first(TIMES, {"tanh": curves([None, None, 7.0]), "relu": curves([1.0, 1.0, 1.5])})
    assert row.effect.bound == ">="
    assert row.note == "tanh did not arrive in 2 of 3 runs"
    assert ">=" in as_text([row])


def test_a_net_compared_with_itself_is_bootstrapped_over_images():
    c = Comparison("ten", "one", "val/top1_error", Direction.lower, Statistic.within_net)
    one = np.zeros((2, 500))
    one[:, :200] = 1
    ten = one.copy()
    ten[:, :25] = 0
    tests = {"one": {"val/top1_error": one}, "ten": {"val/top1_error": ten}}
    that = claim(c, tests={"one": Test(), "ten": Test(views=10)})
    row = judged(that, Gathered(tests=tests))[0]
    assert row.effect.estimate == pytest.approx(-0.05)
    assert row.effect.n == 500
    assert row.treatment.n == 2
    assert "nets fixed" in row.note
    assert row.verdict.word is Word.HOLDS
    assert judged(that, Gathered())[0].note == "no results of ten, one yet"


def test_holm_runs_over_expectations_and_leaves_what_is_only_reported_out():
    reported = Comparison("with", "without", "val/cross_entropy", Direction.report)
    rows = judged(claim(NORMS, NORMS, NORMS, reported), RUNS)
    main = [r for r in rows if r.main]
    assert main[0].p_holm == pytest.approx(3 * main[0].effect.p)
    assert main[3].p_holm is None
    assert main[3].verdict.word is Word.REPORTED


def test_what_holm_does_not_confirm_says_so_in_every_table():
    weak = Gathered({"with": runs([0.400, 0.410, 0.420]), "without": runs([0.408, 0.424, 0.434])})
    those = claim(*[NORMS] * 9)
    rows = judged(those, weak)
    assert rows[0].effect.p < 0.05 < rows[0].p_holm
    alone = "holds (alone; not after Holm)"
    assert f"-> {alone} (p " in as_text(rows)
    assert f"| {alone} |" in as_markdown(rows)
    assert as_json(rows)[0]["verdict"] == alone


def test_the_claim_file_decides_how_many_seeds_are_enough():
    row = judged(claim(NORMS, min_seeds=6), RUNS)[0]
    assert row.verdict.sentence == "not resolved at this scale (would need 6 seeds, has 3)"


def test_the_papers_points_are_compared_with_our_fractions():
    noisy = Gathered({"with": runs([0.40, 0.42, 0.41]), "without": runs([0.41, 0.40, 0.42])})
    row = judged(claim(NORMS), noisy)[0]
    needed = seeds_needed(0.014, row.effect.sd)
    assert needed > 3
    assert f"would need {needed} seeds for the paper's effect" in row.verdict.sentence


def test_the_text_is_readable_and_fits_100_columns():
    those = claim(NORMS)
    text = as_text(judged(those, RUNS))
    assert max(map(len, text.splitlines())) <= WIDTH == 100
    assert "-1.50 ± 0.10" in text  # points, from fractions
    assert "with 41.00 ± 1.00 %, without 42.50 ± 1.05 %" in text
    assert "-1.4 " in text
    assert "-> holds (p .001; Holm .001; detectable at this n: 0.33)" in text


def test_markdown_has_one_line_per_row_and_equal_columns():
    those = claim(NORMS)
    lines = as_markdown(judged(those, RUNS)).splitlines()
    assert len(lines) == 4
    assert {line.count("|") for line in lines} == {11}
    start = (
        "| Norms | with - without | 41.00 ± 1.00 % / 42.50 ± 1.05 % | val top-1 | -1.4 | - | -1.50 ± 0.10 |"
    )
    assert lines[2].startswith(start)


def test_json_keeps_fractions_and_has_no_nan():
    those = claim(NORMS)
    one_seed = Gathered({arm: {0: by_seed[0]} for arm, by_seed in RUNS.arms.items()})
    content = as_json(judged(those, one_seed))
    text = json.dumps(content, allow_nan=False)
    assert json.loads(text)[0]["effect"]["estimate"] == pytest.approx(-0.015)
    assert content[0]["effect"]["sd"] is None
    assert content[0]["expected"] == "lower"
    assert content[0]["paper"]["source"] == "section 3.3"


def test_json_is_enough_to_compute_an_effect_again():
    those = claim(NORMS)
    arms = {
        "with": dict(zip((4, 2, 1, 3), runs([0.40, math.nan, 0.42, 0.41]).values(), strict=True)),
        "without": dict(zip((1, 2, 4), runs([0.44, 0.41, 0.41]).values(), strict=True)),
    }
    row = json.loads(json.dumps(as_json(judged(those, Gathered(arms)))))[0]
    assert row["seeds"] == [1, 4]  # 2 diverged in one arm, 3 is missing in the other
    assert row["arms"]["with"]["values"] == [0.42, 0.40]
    again = paired_difference(row["arms"]["with"]["values"], row["arms"]["without"]["values"])
    assert [again.estimate, again.low, again.p] == [row["effect"][key] for key in ("estimate", "low", "p")]


def test_every_shipped_claim_makes_rows_from_nothing_and_fits_the_table():
    claims = load_claims(CONF / "claim")
    rows = judge([row for c in claims.values() for row in compare(c, Gathered())])
    assert all(row.effect is None and row.note for row in rows)
    assert max(map(len, as_text(rows).splitlines())) <= WIDTH
    json.dumps(as_json(rows), allow_nan=False)


def test_every_metric_of_the_claims_fits_its_column():
    comparisons = [c for claim in load_claims(CONF / "claim").values() for c in claim.comparisons]
    for c in comparisons:
        timed = c.statistic is Statistic.time_ratio
        for metric in (c.metric, *c.also):
            row = SimpleNamespace(metric=metric, comparison=c, unit=Unit.times if timed else Unit.points)
            assert len(_label(row)) <= TEXT_WIDTHS[1]
    assert sum(TEXT_WIDTHS) + len(TEXT_WIDTHS) <= WIDTH + 1


def test_an_unmeasured_comparison_is_in_holms_family():
    """Else a verdict would weaken when the runs of others arrive."""
    both = {"a": claim(NORMS), "b": claim(NORMS)}
    both = {name: dataclasses.replace(c, name=name) for name, c in both.items()}
    rows = [*compare(both["a"], RUNS), *compare(both["b"], Gathered())]
    alone = judge(compare(both["a"], RUNS))[0]
    beside = next(row for row in judge(rows) if row.claim is both["a"] and row.main)
    assert beside.p_holm == pytest.approx(2 * alone.p_holm)
    assert all(row.p_holm is None and row.verdict is None for row in judge(rows) if row.claim is both["b"])


def test_a_run_that_never_arrives_is_entered_no_later_than_one_that_might():
    """Cut after 8 epochs the ratio is at least 1.9, say; the same curves seen for longer must not show less."""
    short = first(TIMES, {"tanh": curves([None] * 3), "relu": curves([4.0, 4.5, 5.0])})
    ends = curves([1.0])[0].curves["train/loss"][-1][0]
    assert short.treatment.mean == pytest.approx(ends - 0.5)  # dated as an arrival in the last row would be
    assert short.effect.bound == ">="
