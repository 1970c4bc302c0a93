"""Claim files: the ones we ship say what they should, and a wrong one is refused in one line."""

import dataclasses
import itertools
from functools import cache
from pathlib import Path

import hydra
import pytest
import yaml
from omegaconf import OmegaConf

from alexnet.claims.claims import SCALES, Claim, load_claim, load_claims, select
from alexnet.claims.statistics import Direction
from alexnet.cli import CONF
from alexnet.errors import UserError
from alexnet.model import Row, layer_table
from alexnet.training.config import Train

CLAIMS = load_claims(CONF / "claim")
ARMS = [(claim, arm) for claim in CLAIMS.values() if claim.uses is None for arm in claim.arms]

GOOD = {
    "title": "Norms",
    "section": "3.3",
    "quote": "reduces our error rates",
    "arms": {"all": [], "none": ["model.norm1=false"]},
    "comparisons": [
        {
            "treatment": "all",
            "control": "none",
            "metric": "val/top1_error",
            "direction": "lower",
            "paper": [{"value": -1.4, "unit": "points", "metric": "val/top1_error", "source": "section 3.3"}],
        }
    ],
}


def written(tmp_path: Path, change=None, **keys) -> Path:
    content = yaml.safe_load(yaml.safe_dump({**GOOD, **keys}))
    if change:
        change(content)
    path = tmp_path / "s3_3_norms.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


@cache
def composed(*overrides: str, recipe: str = "claims_cpu") -> Train:
    """To be read only: composing an arm takes longer than all that is asked of it."""
    with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
        config = hydra.compose("train", [f"experiment={recipe}", *overrides])
    return OmegaConf.to_object(config)


def test_the_claims_are_those_of_the_paper():
    assert list(CLAIMS) == [
        *(
            "s3_1_relu",
            "s3_1_relu_he",
            "s3_2_towers",
            "s3_3_lrn",
            "s3_4_overlap",
            "s4_1_colour",
            "s4_1_crops",
        ),
        *("s4_1_ten_views", "s4_2_dropout", "s5_bias", "s5_decay", "s5_init", "s6_ensemble", "s7_depth"),
        *("figure1", "figure3", "figure4"),
    ]
    for claim in CLAIMS.values():
        assert len(claim.quote.split()) <= 25, f"{claim.name}: keep the quote short"
        assert claim.confounds
        assert claim.comparisons or claim.figure


@pytest.mark.parametrize(("claim", "arm"), ARMS, ids=lambda x: x if isinstance(x, str) else x.name)
def test_every_arm_is_a_valid_configuration(claim: Claim, arm: str):
    config = composed(*claim.arm_overrides("cpu", arm))
    assert layer_table(config.model)


@pytest.mark.parametrize("claim", [c for c in CLAIMS.values() if len(c.arms) > 1], ids=lambda c: c.name)
def test_no_two_arms_of_a_claim_are_the_same_network_and_training(claim: Claim):
    configs = {arm: composed(*claim.arm_overrides("cpu", arm)) for arm in claim.arms}
    for a, b in itertools.combinations(configs, 2):
        assert configs[a] != configs[b], f"{a} and {b}"


@pytest.mark.parametrize(("scale", "classes"), [("smoke", 10), ("cpu", 20), ("gpu", 200)])
def test_the_arms_about_towers_cost_what_they_should_in_the_network_of_every_scale(scale, classes):
    def table(arm: str) -> dict[str, Row]:
        overrides = CLAIMS["s3_2_towers"].arm_overrides(scale, arm)
        config = composed(*overrides, f"model.num_classes={classes}", recipe=f"claims_{scale}").model
        return {row.name: row for row in layer_table(config)}

    def macs(arm: str) -> int:
        return sum(row.macs for name, row in table(arm).items() if name.startswith("conv"))

    two, half = table("two_towers"), table("half_column")
    for name in ("conv1", "conv2", "conv3", "conv4"):
        assert 2 * half[name].channels == pytest.approx(two[name].channels, rel=0.02)
    assert [half[name] for name in ("conv5", "fc6", "fc7", "fc8")] == [
        two[name] for name in ("conv5", "fc6", "fc7", "fc8")
    ]
    assert macs("half_column") < 0.65 * macs("two_towers")
    # A net of eight channels can only be narrowed by whole ones.
    assert macs("dense_equal_macs") == pytest.approx(
        macs("two_towers"), rel=0.07 if scale == "smoke" else 0.05
    )


def test_the_clean_pooling_pair_keeps_every_shape_and_that_of_2012_does_not():
    def shapes(arm: str) -> list[int]:
        overrides = CLAIMS["s3_4_overlap"].arm_overrides("gpu", arm)
        return [row.px for row in layer_table(composed(*overrides, recipe="claims_gpu").model)][:8]

    assert shapes("separate_clean") == shapes("overlapping") == [55, 27, 27, 13, 13, 13, 13, 6]
    assert shapes("separate_2012") == [55, 28, 26, 13, 13, 13, 11, 6]


def test_an_unknown_override_is_found_by_composing():
    with pytest.raises(hydra.errors.ConfigCompositionException):
        composed("model.nrom1=false")


def test_runs_are_ordinary_runs_named_by_scale_claim_and_arm(tmp_path):
    runs = load_claim(written(tmp_path, overrides=["watchdog=warn"])).runs("cpu", 2)
    assert [(r.name, r.seed) for r in runs] == [
        ("cpu/s3_3_norms/all", 1),
        ("cpu/s3_3_norms/none", 1),
        ("cpu/s3_3_norms/all", 2),
        ("cpu/s3_3_norms/none", 2),
    ]
    assert runs[1].arguments == [
        "experiment=claims_cpu",
        "name=cpu/s3_3_norms/none",
        "seed=1",
        "watchdog=warn",
        "model.norm1=false",
    ]


def test_arms_without_overrides_share_the_runs_of_the_recipe():
    assert {r.name for r in CLAIMS["s4_1_ten_views"].runs("gpu", 3)} == {"gpu/base"}
    assert CLAIMS["s3_3_lrn"].runs("gpu", 1)[0].name == "gpu/base"
    assert len(CLAIMS["s6_ensemble"].runs("gpu", 3)) == 5


def test_a_tuned_claim_searches_on_a_seed_of_its_own_and_a_figure_borrows_its_runs():
    relu, figure = CLAIMS["s3_1_relu"], CLAIMS["figure1"]
    tuning, rates = relu.tuning_runs("cpu"), relu.tune.values["cpu"]
    assert [(arm, value) for arm, value, _ in tuning] == [(arm, rate) for arm in relu.arms for rate in rates]
    _, rate, run = tuning[0]
    assert run.name == f"cpu/s3_1_relu/relu_tune_{rate}"
    assert run.overrides[-1] == f"optim.lr={rate}"
    assert run.seed not in range(100)
    assert {run.seed for c in CLAIMS.values() for run in c.runs("cpu", 5)} == {
        1,
        2,
        3,
        4,
        5,
    }  # 0 is for trials
    assert figure.runs("cpu", 3) == relu.runs("cpu", 3)
    assert figure.tuning_runs("cpu") == tuning


@pytest.mark.slow
@pytest.mark.parametrize("scale", ["smoke", "cpu", "gpu"])
def test_no_arm_spells_out_the_recipe(scale):
    """It would be trained under a second name."""
    recipe = composed(recipe=f"claims_{scale}")
    for claim in CLAIMS.values():
        for arm in claim.arms:
            overrides = claim.arm_overrides(scale, arm)
            if overrides and claim.tune is None and claim.recipe[scale] == f"claims_{scale}":
                assert composed(*overrides, recipe=f"claims_{scale}") != recipe, (claim.name, arm)


@pytest.mark.parametrize(
    ("name", "start"), [("s3_1_relu", ("mean_image", "fan_in")), ("s3_1_relu_he", ("normalised", "he"))]
)
def test_relu_and_tanh_differ_in_nothing_else(name, start):
    """Asked twice: with the start of 2012, which saturates conv1's tanh, and with one that does not."""
    relu = CLAIMS[name]
    for scale in ("cpu", "gpu"):
        arms = [composed(*relu.arm_overrides(scale, arm), recipe=f"claims_{scale}") for arm in relu.arms]
        for config in arms:
            assert (config.augment.input, config.model.init) == start
            assert config.model.init_bias == [0.0] * 8
        one, other = (dataclasses.replace(c.model, activation="relu") for c in arms)
        assert one == other
        assert dataclasses.replace(arms[0], model=one) == dataclasses.replace(arms[1], model=other)
        assert len(relu.tune.values[scale]) >= 5


def test_the_null_about_norms_has_no_gain():
    norms = CLAIMS["s3_3_lrn"]
    assert composed(*norms.arm_overrides("cpu", "normalised_all")).model.lrn_k == 1
    assert composed(*norms.arm_overrides("cpu", "all")).model.lrn_k == 2


def test_a_run_of_its_own_is_needed_where_the_rate_is_tuned(tmp_path):
    sooner = comparison(statistic="time_ratio", metric="train/loss", threshold=1.0, also=[], paper=[])
    path = written(tmp_path, sooner, tune={"key": "optim.lr", "values": {scale: [0.1] for scale in SCALES}})
    assert load_claim(path).runs("cpu", 1)[0].name == "cpu/s3_3_norms/all"


def comparison(**keys):
    return lambda content: content["comparisons"][0].update(keys)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.update(qoute="x"), "unknown key qoute: did you mean quote\\?"),
        (lambda c: c.pop("quote"), "quote: .* has missing mandatory value"),
        (lambda c: c.update(arms={}), "arms is empty"),
        (lambda c: c.update(arms=["all"]), "Cannot merge DictConfig with ListConfig"),
        (
            lambda c: c.update(seeds="three"),
            "seeds: Value 'three' of type 'str' could not be converted to Integer",
        ),
        (lambda c: c["arms"].update(none=["model.norm1"]), "must be an override, key=value"),
        (lambda c: c["arms"].update(none=["seed=3"]), "seed=3 is set by the runner"),
        (lambda c: c.update(recipe={"cup": "x"}), r"scale cup is unknown: did you mean cpu\?"),
        (lambda c: c.update(scale_overrides={"cup": []}), r"scale cup is unknown: did you mean cpu\?"),
        (lambda c: c.update(arms_at={"cup": {}}), r"scale cup is unknown: did you mean cpu\?"),
        (lambda c: c.update(arms_at={"cpu": {"nine": []}}), r"arms_at.cpu: arm nine is unknown"),
        (lambda c: c.update(arms_at={"cpu": {"all": ["seed=1"]}}), "seed=1 is set by the runner"),
        (comparison(control="nnone"), r"arm nnone is unknown: did you mean none\?"),
        (comparison(metric="val/top1"), r"metric val/top1 is unknown: did you mean val/top1_error\?"),
        (comparison(also=["val/loss"]), "metric val/loss is unknown"),
        (
            comparison(direction="down"),
            r"direction: Invalid value 'down', expected one of \[lower, higher, same, report\]",
        ),
        (comparison(direction="same"), "margin belongs to direction=same"),
        (comparison(threshold=0.25), "threshold belongs to statistic=time_ratio"),
        (comparison(statistic="time_ratio"), "threshold belongs to statistic=time_ratio"),
        (comparison(statistic="within_net"), "arm all is unknown"),
        (comparison(metric="train/loss"), "metric of a difference, train/loss, must be one of val, "),
        (comparison(also=["train/top1_error"]), "metric of a difference, train/top1_error, must be"),
        (
            comparison(statistic="time_ratio", threshold=0.2, paper=[]),
            "metric of a time_ratio, val/top1_error, must be one of train/...",
        ),
        (lambda c: c.update(tune={"key": "k", "values": {"cpu": [1.0]}}), "tune.values.smoke is empty"),
        (
            lambda c: c.update(tune={"key": "k", "values": {scale: [1.0] for scale in SCALES}}),
            "make the first comparison a time_ratio",
        ),
        (lambda c: c["comparisons"][0]["paper"][0].update(unit="nats"), "should be in points"),
        (
            lambda c: c["comparisons"][0]["paper"][0].pop("source"),
            r"paper\[0\].source: .* missing mandatory value",
        ),
    ],
)
def test_a_wrong_claim_file_is_refused_in_one_line_that_names_the_file(tmp_path, change, message):
    with pytest.raises(UserError, match=message) as caught:
        load_claim(written(tmp_path, change))
    assert str(caught.value).startswith("s3_3_norms.yaml: ")
    assert "\n" not in str(caught.value)


def test_text_that_is_no_claim_is_refused(tmp_path):
    path = tmp_path / "s1.yaml"
    for text in ("[", "- a\n- b\n", ""):
        path.write_text(text)
        with pytest.raises(UserError, match=r"s1\.yaml: "):
            load_claim(path)
    with pytest.raises(UserError, match="no claim files"):
        load_claims(tmp_path / "nowhere")


def test_a_figure_can_only_use_a_claim_that_has_runs(tmp_path):
    written(tmp_path)
    figure = {"title": "F", "section": "1", "quote": "q", "uses": "s3_3_lrm"}
    (tmp_path / "figure9.yaml").write_text(yaml.safe_dump(figure))
    with pytest.raises(UserError, match="uses=s3_3_lrm must be a claim"):
        load_claims(tmp_path)


def test_claims_are_chosen_by_name():
    assert select(CLAIMS, "all") == list(CLAIMS.values())
    assert [c.name for c in select(CLAIMS, "s7_depth, s5_init")] == ["s7_depth", "s5_init"]
    with pytest.raises(UserError, match=r"claim=s3_3_lnr is unknown: did you mean s3_3_lrn\?"):
        select(CLAIMS, "s3_3_lnr")


def test_a_printed_number_is_found_by_its_quantity():
    c = CLAIMS["s3_3_lrn"].comparisons[0]
    assert c.printed(c.paper, "val/top1_error").value == -1.4
    assert c.printed(c.notes_2012, "holdout/cross_entropy").value == -0.081
    assert c.printed(c.paper, "val/cross_entropy") is None
    assert c.printed(c.paper, "gap/top1_error") is None  # a gap of ours is not the paper's val error
    assert c.printed(c.paper, "train_eval/top1_error") is None


EXPECTED = [
    "s3_1_relu: tanh / relu, train/top1_error to 0.25: higher",
    "s3_2_towers: two_towers - half_column, val/top1_error: lower",
    "s3_3_lrn: all - none, val/top1_error: lower",
    "s3_3_lrn: all - gain_only, val/top1_error: lower",
    "s3_3_lrn: normalised_all - normalised_none, val/top1_error: same",
    "s3_4_overlap: overlapping - separate_2012, val/top1_error: lower",
    "s3_4_overlap: overlapping - separate_clean, val/top1_error: lower",
    "s4_1_colour: code - none, val/top1_error: lower",
    "s4_1_colour: paper - none, val/top1_error: lower",
    "s4_1_crops: crops_and_flips - none, val/top1_error: lower",
    "s4_1_crops: crops_and_flips - none, gap/top1_error: lower",
    "s4_1_ten_views: ten_views - one_view, val/top1_error: lower",
    "s4_2_dropout: dropout - none, gap/top1_error: lower",
    "s4_2_dropout: dropout - none, val/top1_error: lower",
    "s4_2_dropout: dropout / none, train/loss to 0.5: higher",
    "s5_bias: one / zero, train/loss to 0.9: lower",
    "s5_decay: decay - none, train_eval/top1_error: lower",
    "s5_init: paper_normalised / he_normalised, train/loss to 0.95: higher",
    "s5_init: paper_normalised / code145_raw, train/loss to 0.95: higher",
    "s5_init: paper_raw / code145_raw, train/loss to 0.95: higher",
    "s6_ensemble: ensemble - single, val/top1_error: lower",
    "s7_depth: without_conv3 - full, val/top1_error: higher",
    "s7_depth: without_conv4 - full, val/top1_error: higher",
    "s7_depth: without_conv5 - full, val/top1_error: higher",
    "figure3: two_towers - dense, conv1/chroma_split: higher",
    "figure4: last_hidden - raw_pixels, retrieval/precision_at_6: higher",
]


def test_no_expectation_changes_unnoticed():
    """What is expected was written down before the runs; whoever changes it changes it here too, and says why."""
    assert [
        f"{claim.name}: {c.name}, {c.metric}{f' to {c.threshold:g}' if c.threshold else ''}: {c.direction}"
        for claim in CLAIMS.values()
        for c in claim.comparisons
        if c.direction is not Direction.report
    ] == EXPECTED
