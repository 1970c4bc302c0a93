"""The statistics against data whose truth is known."""

import numpy as np
import pytest
from scipy import stats

from alexnet.claims import statistics as st
from alexnet.claims.statistics import Direction, Word

SIMULATIONS = 1000


def simulated(n: int, effect: float, sd: float = 1.0, seed: int = 0) -> np.ndarray:
    """(simulations, 2, n): treatment and control, which share a large effect of the seed."""
    rng = np.random.default_rng(seed)
    shared = rng.normal(0, 5 * sd, (SIMULATIONS, 1, n))
    noise = rng.normal(0, sd / np.sqrt(2), (SIMULATIONS, 2, n))
    return shared + noise + np.array([effect, 0.0])[None, :, None]


@pytest.mark.parametrize("n", [3, 5])
@pytest.mark.parametrize("effect", [0.0, -1.4])
def test_the_paired_interval_covers_the_true_difference_in_95_percent_of_experiments(n, effect):
    effects = [st.paired_difference(*arms) for arms in simulated(n, effect)]
    coverage = np.mean([e.low <= effect <= e.high for e in effects])
    assert 0.92 <= coverage <= 0.98
    # Able to fail: a normal quantile at these n, or arms that are not paired, would miss.
    too_narrow = np.mean([abs(e.estimate - effect) <= 1.96 * e.sd / np.sqrt(n) for e in effects])
    assert too_narrow < 0.92


@pytest.mark.parametrize("n", [3, 5])
def test_the_ratio_interval_covers_the_true_ratio(n):
    logs = simulated(n, np.log(6.0), sd=0.3)
    effects = [st.time_ratio(list(np.exp(a)), list(np.exp(b)), budget=1e9) for a, b in logs]
    assert 0.92 <= np.mean([e.low <= 6.0 <= e.high for e in effects]) <= 0.98
    assert np.median([e.estimate for e in effects]) == pytest.approx(6.0, rel=0.05)


def test_without_an_effect_the_t_test_and_the_sign_flips_reject_at_their_level():
    effects = [st.paired_difference(*arms) for arms in simulated(6, 0.0, seed=1)]
    assert 0.03 <= np.mean([e.p <= 0.05 for e in effects]) <= 0.07
    # 2 / 64 is the only attainable level of 6 signs at or below 5 %.
    assert 0.018 <= np.mean([e.p_sign_flip <= 0.05 for e in effects]) <= 0.045


def test_sign_flips_keep_their_level_where_the_distribution_is_skewed_in_its_scale_only():
    rng = np.random.default_rng(2)
    d = rng.standard_t(2, (SIMULATIONS, 8)) * np.exp(rng.normal(0, 1, (SIMULATIONS, 1)))
    assert 0.03 <= np.mean([st.sign_flip_p(x) <= 0.05 for x in d]) <= 0.07


def test_sign_flip_p_counts_every_assignment():
    d = np.array([1.0, 2.0, 3.0, -0.5, 0.7, 1.1])
    signs = np.array(np.meshgrid(*[[-1, 1]] * 6)).reshape(6, -1)
    expected = np.mean(np.abs(signs.T @ d) >= abs(d.sum()) - 1e-12)
    assert st.sign_flip_p(d) == pytest.approx(expected)
    assert st.sign_flip_p(np.full(6, 0.1)) == pytest.approx(2 / 64)


def test_sign_flips_begin_at_six_seeds():
    assert st.paired_difference(np.arange(5.0), np.zeros(5)).p_sign_flip is None
    assert st.paired_difference(np.arange(6.0), np.zeros(6)).p_sign_flip is not None


def test_holm_keeps_the_chance_of_any_false_rejection_at_the_level():
    rng = np.random.default_rng(3)
    p = rng.uniform(size=(SIMULATIONS, 12))
    p[:, 0] = 1e-6  # one true effect among eleven nulls
    adjusted = np.array([st.holm(row) for row in p])
    assert np.mean((adjusted[:, 1:] <= 0.05).any(1)) <= 0.07
    assert np.mean((p[:, 1:] <= 0.05).any(1)) > 0.3  # what happens without the correction
    assert (adjusted[:, 0] <= 0.05).all()


def test_holm_multiplies_steps_down_and_never_falls():
    assert st.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert st.holm([0.9, 0.8]) == pytest.approx([1.0, 1.0])


def test_the_bootstrap_covers_and_says_that_it_varies_images():
    rng = np.random.default_rng(4)
    hits = 0
    for i in range(200):
        wrong = rng.uniform(size=(2, 300)) < np.array([[0.30], [0.36]])
        e = st.bootstrap_images(wrong[0], wrong[1], resamples=200, seed=i)
        hits += e.low <= -0.06 <= e.high
    assert 0.91 <= hits / 200 <= 0.99
    assert e.source is st.Source.IMAGES
    assert "images" in e.source


def test_the_bootstrap_averages_nets_before_it_draws_images():
    nets = np.array([[1.0, 0.0, 1.0, 0.0], [0.0, 1.0, 0.0, 1.0]])  # their mean is 0.5 on every image
    e = st.bootstrap_images(nets, np.zeros(4))
    assert (e.low, e.estimate, e.high) == (0.5, 0.5, 0.5)


def test_power_is_that_of_the_noncentral_t_and_that_of_simulated_experiments():
    t = stats.t.ppf(0.975, 4)
    exact = stats.nct.sf(t, 4, 1.5 * np.sqrt(5)) + stats.nct.cdf(-t, 4, 1.5 * np.sqrt(5))
    assert st.power(1.5, 1.0, 5) == pytest.approx(exact, abs=1e-4)
    found = [not (e.low <= 0 <= e.high) for e in map(lambda a: st.paired_difference(*a), simulated(5, 1.5))]
    assert np.mean(found) == pytest.approx(exact, abs=0.04)


@pytest.mark.parametrize("n", [2, 3, 5, 20])
def test_the_minimum_detectable_effect_is_found_with_80_percent_power_by_just_these_seeds(n):
    effect = st.minimum_detectable_effect(0.4, n)
    assert st.power(effect, 0.4, n) == pytest.approx(0.8, abs=1e-4)
    assert st.seeds_needed(effect * 1.001, 0.4) == n
    assert st.seeds_needed(effect * 0.9, 0.4) > n


def test_no_number_of_seeds_resolves_nothing():
    assert st.seeds_needed(0.0, 1.0) is None
    assert st.seeds_needed(1e-4, 1.0) is None
    assert st.seeds_needed(1e-4, 0.0) == 2


def test_time_to_interpolates_the_first_crossing_and_knows_never():
    curve = [(1.0, 0.9), (2.0, 0.5), (3.0, 0.1), (4.0, 0.6)]
    assert st.time_to(curve, 0.3) == pytest.approx(2.5)
    assert st.time_to(curve, 0.05) is None
    assert st.time_to([(1.0, 0.2)], 0.3) == 1.0
    assert st.time_to([(1.0, float("nan")), (2.0, 0.2)], 0.3) == 2.0
    assert st.time_to([(1.0, float("nan"))], 0.3) is None


def test_one_lucky_row_is_no_arrival():
    """Four rows an epoch: one touches the threshold, the mean of an epoch reaches it at the end only."""
    rows = [0.9, 0.5, 0.3, 0.4, 0.4, 0.2, 0.4, 0.4, 0.2, 0.2, 0.2, 0.2]
    curve = [((i + 1) / 4, value) for i, value in enumerate(rows)]
    assert st.time_to(curve, 0.25) == pytest.approx(1.4375)
    means = st.running_mean(curve)
    # in the middle of what it is the mean of: half of all before an epoch is over, then half an epoch ago
    np.testing.assert_allclose([t for t, _ in means], [min(t, 1) / 2 + max(t - 1, 0) for t, _ in curve])
    expected = [np.mean(rows[max(0, i - 3) : i + 1]) for i in range(12)]
    np.testing.assert_allclose([value for _, value in means], expected)
    assert st.time_to(means, 0.25) == pytest.approx(2.25)
    assert st.running_mean([]) == []
    assert np.isnan(st.running_mean([(1.0, 0.1), (1.5, float("nan"))])[-1][1])


def test_a_censored_run_makes_the_ratio_a_bound_that_only_speaks_for_its_side():
    never = st.time_ratio([None, None, 9.0], [2.0, 2.1, 1.9], budget=10.0)
    assert never.bound == ">="
    assert never.high == float("inf")
    assert 1 < never.low < never.estimate
    assert st.verdict(never, Direction.higher).word is Word.HOLDS
    inverse = st.time_ratio([2.0, 2.1, 1.9], [None, None, 9.0], budget=10.0)
    assert inverse.bound == "<="
    assert st.verdict(inverse, Direction.lower).word is Word.HOLDS
    # The treatment never arrived, although all that did arrive later: nothing is known of "lower".
    slow = st.time_ratio([None, None, None], [30.0, 31.0, 29.0], budget=10.0)
    assert st.verdict(slow, Direction.lower).word is Word.OPEN
    assert slow.p == 1.0
    fast = st.time_ratio([30.0, 31.0, 29.0], [None, None, None], budget=10.0)
    assert st.verdict(fast, Direction.higher).word is Word.OPEN
    both = st.time_ratio([None, 1.0, 1.0], [5.0, None, 5.0], budget=10.0)
    assert both.bound == "?"
    assert "larger budget" in st.verdict(both, Direction.lower).sentence
    # Equal to the last digit, as when all controls arrive in the first row: nothing tells how much they vary.
    equal = st.time_ratio([None, None, None], [2.0, 2.0, 2.0], budget=10.0)
    assert st.verdict(equal, Direction.higher).word is Word.OPEN
    neither = st.time_ratio([None, None], [None, None], budget=10.0)
    assert "larger budget" in st.verdict(neither, Direction.higher).sentence


BELOW = st.paired_difference([-1.0, -1.1, -0.9], [0.0, 0.0, 0.0])
NOISE = st.paired_difference([-1.0, 1.2, 0.1], [0.0, 0.0, 0.0])


@pytest.mark.parametrize(
    ("effect", "direction", "word"),
    [
        (BELOW, Direction.lower, Word.HOLDS),
        (BELOW, Direction.higher, Word.FAILS),
        (BELOW, Direction.report, Word.REPORTED),
        (NOISE, Direction.lower, Word.OPEN),
        (NOISE, Direction.higher, Word.OPEN),
    ],
)
def test_the_verdict_compares_the_interval_with_the_expectation(effect, direction, word):
    said = st.verdict(effect, direction)
    assert said.word is word
    assert said.sentence.startswith(word)


def test_sameness_needs_an_interval_inside_the_margin():
    assert st.verdict(BELOW, Direction.same, margin=1.5).word is Word.HOLDS
    assert st.verdict(BELOW, Direction.same, margin=1.1).word is Word.OPEN
    assert st.verdict(BELOW, Direction.same, margin=0.5).word is Word.FAILS
    # and its p agrees with its interval
    half = (BELOW.high - BELOW.low) / 2
    assert st.tested_p(BELOW, Direction.same, 1.0 + half) == pytest.approx(0.05, abs=1e-6)
    # on either side: what lies outside the margin can be confirmed as well
    assert st.tested_p(BELOW, Direction.same, 1.0 - half) == pytest.approx(0.05, abs=1e-6)
    assert st.tested_p(BELOW, Direction.same, 0.5 * (1.0 - half)) < 0.05
    p_holm = st.tested_p(BELOW, Direction.same, 0.5)
    assert st.verdict(BELOW, Direction.same, margin=0.5, p_holm=p_holm).word is Word.FAILS
    assert np.isnan(st.tested_p(st.paired_difference([1.0], [2.0]), Direction.same, 0.5))


def test_the_seeds_for_sameness_are_those_that_show_it():
    """Power by simulation: no difference, sd 1; 80 % of the intervals lie within the margin."""
    margin, n = 1.0, st.seeds_needed(1.0, 1.0, st.power_of_equivalence)
    d = np.random.default_rng(0).normal(size=(4000, n))
    half = stats.t.ppf(0.975, n - 1) * d.std(1, ddof=1) / np.sqrt(n)
    within = (np.abs(d.mean(1)) + half < margin).mean()
    assert within == pytest.approx(
        st.power_of_equivalence(margin, 1.0, n), abs=0.02
    )  # 3 x sqrt(.8 x .2 / 4000)
    assert st.power_of_equivalence(margin, 1.0, n - 1) < 0.8 <= st.power_of_equivalence(margin, 1.0, n)


def test_equal_differences_decide_nothing():
    """A val of 1,000 images gives errors in steps of .1 point: three equal differences are no certainty."""
    equal = st.paired_difference([0.5, 0.6, 0.7], [0.504, 0.604, 0.704])
    assert np.isnan(equal.p)
    assert st.verdict(equal, Direction.lower).word is Word.OPEN
    assert equal.detectable is None
    nobody = st.time_ratio([None] * 3, [None] * 3, budget=20.0)
    assert "larger budget" in st.verdict(nobody, Direction.higher).sentence


def test_an_open_verdict_says_how_many_seeds_the_papers_effect_needs():
    d = np.array([0.5, -0.5, 0.0])
    said = st.verdict(st.paired_difference(d, np.zeros(3)), Direction.lower, paper=-0.4)
    assert said.sentence == (
        f"not resolved at this scale (would need {st.seeds_needed(0.4, 0.5)} seeds for the paper's effect)"
    )
    said = st.verdict(st.paired_difference(d + 0.1, np.zeros(3)), Direction.lower, paper=-40.0)
    assert f"would need {st.seeds_needed(0.1, 0.5)} seeds for the effect observed" in said.sentence


def test_one_seed_and_fewer_than_the_claim_asks_for_resolve_nothing():
    one = st.paired_difference([1.0], [0.0])
    assert st.verdict(one, Direction.higher).word is Word.OPEN
    assert st.time_ratio([2.0], [1.0], 9.0).low == 0.0
    assert "would need 6 seeds, has 3" in st.verdict(BELOW, Direction.lower, min_n=6).sentence


def test_a_verdict_that_holm_does_not_confirm_says_so():
    """The word itself, which every table prints, and not only its fine print."""
    assert st.verdict(BELOW, Direction.lower, p_holm=0.2).word == "holds (alone; not after Holm)"
    assert st.verdict(BELOW, Direction.higher, p_holm=0.2).word == "does not hold (alone; not after Holm)"
    assert st.verdict(BELOW, Direction.lower, p_holm=0.01).word == "holds"
    assert st.verdict(BELOW, Direction.higher, p_holm=0.01).word == "does not hold"


def test_the_split_of_kernels_is_zero_by_chance_and_positive_for_specialised_towers():
    rng = np.random.default_rng(5)
    chance = [st.split_excess(*rng.uniform(size=(2, 48)), permutations=200, seed=i) for i in range(200)]
    assert abs(np.mean(chance)) < 3 * np.std(chance) / np.sqrt(200)
    assert st.split_excess(rng.uniform(0, 0.1, 48), rng.uniform(0.5, 1, 48)) > 0.4


def test_numbers_that_are_not_finite_are_refused():
    with pytest.raises(ValueError, match="finite"):
        st.paired_difference([1.0, float("nan")], [0.0, 0.0])
    with pytest.raises(ValueError, match="equal numbers"):
        st.paired_difference([1.0, 2.0], [0.0])
