"""What a few seeds can say, and what they cannot.

A claim compares two arms, a treatment and a control. Seed i gives one run of each, with the same data order and,
where shapes allow, the same initial weights: the *difference of the pair* d_i = treatment_i - control_i is the
datum, and n seeds give n data. With mean m and standard deviation s of the d_i, and t the 97.5 % point of
Student's t with n-1 degrees of freedom,

    m +- t s / sqrt(n)                                the 95 % interval,
    P(|T| > t),  T ~ noncentral t(n-1, D sqrt(n)/s)   the power against a true difference D.

Solving the second line for D at power 0.8 gives the *minimum detectable effect*; solving it for n, the seeds needed.

Times (epochs until the mean over an epoch is at a fixed training error) are compared by their ratio: the same
arithmetic on log(time), taken back by exp. A run that never arrives is *censored*: it enters with the latest time
that could have been seen, and the ratio becomes a bound.

All seeds are judged by the same test images, so an interval over seeds speaks of other training runs and of these
images. What the choice of the images adds is common to all pairs and does not shrink with their number.

Only where one net is compared with itself (ten views against one) do images, not seeds, carry the interval:
a bootstrap over images, which says nothing about another training run and is labelled so.

Units: errors are fractions and cross-entropies nats here; tables.py multiplies by 100.
"""

from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from enum import Enum, StrEnum
from functools import lru_cache

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import optimize, special, stats

LEVEL = 0.95  # of every interval; two-sided
POWER = 0.80
SIGN_FLIP_SEEDS = range(6, 25)  # below 6 the smallest p, 2/2**n, exceeds 5 %; above 24 we stop listing
QUANTILES = (np.arange(2000) + 0.5) / 2000
NO_SPREAD = 1e-12  # below it differences are equal but for rounding: errors go in steps of an image
MOST_SEEDS = 100_000  # nobody will run more: answered with None

Array = NDArray[np.float64]


class Direction(Enum):  # no StrEnum: a string has a method `lower`
    """What is expected of treatment - control (or of the ratio), written down before the runs."""

    def __str__(self) -> str:
        return self.name

    lower = "lower"
    higher = "higher"
    same = "same"  # within a margin stated beforehand
    report = "report"  # no expectation: the number is reported without a verdict


class Source(StrEnum):
    """What varies behind an interval."""

    SEEDS = "seeds"
    IMAGES = "images, nets fixed"


@dataclass(frozen=True)
class Summary:
    """One arm: mean, standard deviation (nan for one run), number of runs, and what each of them gave."""

    mean: float
    sd: float
    n: int
    values: tuple[float, ...]


@dataclass(frozen=True)
class Effect:
    """Treatment against control.

    `ratio`: estimate, low, high and detectable are ratios (1 = no difference); `sd` is that of log(ratio).
    `bound`: with censored runs ">=" or "<=" (the true ratio is at least, at most the estimate), "?" for neither.
    """

    estimate: float
    low: float
    high: float
    sd: float
    n: int
    p: float  # two-sided; nan below two seeds
    p_sign_flip: float | None = None
    detectable: float | None = None  # smallest true effect found with POWER at this n
    ratio: bool = False
    bound: str = ""
    source: Source = Source.SEEDS


def summarise(values: ArrayLike) -> Summary:
    """Mean, standard deviation (n-1 in the denominator), n, and the values (n,) themselves."""
    x = _finite(values)
    sd = float(x.std(ddof=1)) if x.size > 1 else np.nan
    return Summary(float(x.mean()), sd, x.size, tuple(x.tolist()))


def paired_difference(treatment: ArrayLike, control: ArrayLike) -> Effect:
    """Both (n,), entry i from seed i -> the mean difference with its t interval over seeds."""
    a, b = _finite(treatment), _finite(control)
    if a.shape != b.shape:
        raise ValueError(f"pairs need equal numbers of runs: {a.size} and {b.size}")
    d = a - b
    mean, n = float(d.mean()), d.size
    if n < 2:
        return Effect(mean, -np.inf, np.inf, np.nan, n, np.nan)
    sd = float(d.std(ddof=1))
    if sd < NO_SPREAD:
        return Effect(mean, mean, mean, sd, n, np.nan)
    half = float(stats.t.ppf((1 + LEVEL) / 2, n - 1)) * sd / np.sqrt(n)
    p = float(2 * stats.t.sf(abs(mean) / (sd / np.sqrt(n)), n - 1))
    flip = sign_flip_p(d) if n in SIGN_FLIP_SEEDS else None
    return Effect(mean, mean - half, mean + half, sd, n, p, flip, minimum_detectable_effect(sd, n))


def time_ratio(treatment: Sequence[float | None], control: Sequence[float | None], budget: float) -> Effect:
    """Times (n,), None for a run that did not arrive within `budget` -> the ratio treatment / control.

    The geometric mean of the ratios with a t interval on the log scale. Censored runs count as `budget`:
    where only treatments are, each ratio is at least what enters, so the lower limit stands and the upper is open.
    """
    late_a, late_b = (any(t is None for t in times) for times in (treatment, control))
    logs = [np.log([budget if t is None else t for t in times]) for times in (treatment, control)]
    e = paired_difference(*logs)
    bound = {(False, False): "", (True, False): ">=", (False, True): "<=", (True, True): "?"}[late_a, late_b]
    informative = bound == "" or (bound == ">=" and e.estimate > 0) or (bound == "<=" and e.estimate < 0)
    return replace(
        e,
        estimate=float(np.exp(e.estimate)),
        low=0.0 if late_b else float(np.exp(e.low)),
        high=np.inf if late_a else float(np.exp(e.high)),
        p=e.p if informative else 1.0,
        p_sign_flip=e.p_sign_flip if informative else None,
        detectable=None if bound or e.detectable is None else float(np.exp(e.detectable)),
        ratio=True,
        bound=bound,
    )


def time_to(curve: Sequence[tuple[float, float]], threshold: float) -> float | None:
    """Points (time, value), times rising -> when the value first is at or below threshold, None if never.

    Between two points the curve is taken as straight. A nan (a diverged run) is never below.
    """
    before: tuple[float, float] | None = None
    for time, value in curve:
        if value <= threshold:
            if before is None or not np.isfinite(before[1]):
                return time
            share = (before[1] - threshold) / (before[1] - value)
            return before[0] + share * (time - before[0])
        before = (time, value)
    return None


def running_mean(curve: Sequence[tuple[float, float]], span: float = 1.0) -> list[tuple[float, float]]:
    """Points (epoch, value) -> (middle of the `span` epochs that end there, mean of their values).

    A row of metrics.csv is the mean over a few hundred images; the first of them that happens to lie below a
    threshold says little of the network. Before `span` has passed the mean is over what there is. Dated at its end,
    a mean would be late by half a span, which pulls a ratio of short times towards 1.
    """
    times, values = (np.array(column) for column in zip(*curve, strict=True)) if curve else (np.zeros(0),) * 2
    first = np.searchsorted(times, times - span + 1e-9)  # the row that ends `span` ago is not in it
    return [
        (float(t - min(t, span) / 2), float(values[a : i + 1].mean()))
        for i, (t, a) in enumerate(zip(times, first, strict=True))
    ]


def bootstrap_images(
    treatment: ArrayLike, control: ArrayLike, resamples: int = 2000, seed: int = 0
) -> Effect:
    """Per-image values of the same nets under two tests, (images,) or (nets, images) -> the mean difference.

    Nets are averaged first; images are drawn with replacement; 95 % between the percentiles of the means.
    The interval speaks of other images for these very nets, never of other training runs.
    """
    d = np.atleast_2d(_finite(treatment)).mean(0) - np.atleast_2d(_finite(control)).mean(0)
    rng = np.random.default_rng(seed)
    means = np.array([d[rng.integers(d.size, size=d.size)].mean() for _ in range(resamples)])
    low, high = np.quantile(means, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    tail = min(np.sum(means <= 0), np.sum(means >= 0))
    p = min(1.0, 2 * (1 + float(tail)) / (1 + resamples))
    sd = float(d.std(ddof=1)) if d.size > 1 else np.nan
    return Effect(float(d.mean()), float(low), float(high), sd, d.size, p, source=Source.IMAGES)


def sign_flip_p(differences: ArrayLike) -> float:
    """Two-sided p of the mean of n paired differences against all 2**n assignments of their signs.

    Under the null the labels of a pair can be exchanged, so each sign is a fair coin, whatever the distribution.
    """
    d = np.abs(_finite(differences))
    sums = np.zeros(1)
    for x in d:  # doubles the list: every sum of the first i differences under every choice of signs
        sums = np.concatenate([sums + x, sums - x])
    observed = abs(float(np.sum(differences)))
    return float(np.mean(np.abs(sums) >= observed - 1e-9 * float(d.sum())))  # ties in spite of rounding


def holm(p_values: ArrayLike) -> Array:
    """Adjusted p of m tests (m,): keeps the chance of any false rejection at the level (Holm 1979).

    The i-th smallest p (from 0) is multiplied by m - i; then no adjusted value may be below an earlier one.
    """
    p = _finite(p_values)
    order = np.argsort(p)
    rising = np.maximum.accumulate(p[order] * (p.size - np.arange(p.size)))
    adjusted = np.empty_like(p)
    adjusted[order] = np.minimum(rising, 1.0)
    return adjusted


def power(effect: float, sd: float, n: int) -> float:
    """Chance that the 95 % interval of n pairs excludes zero when the true mean difference is `effect`.

    The two tails of the noncentral t, as an average over the n-1 degrees of freedom of the estimated variance:
    given s, the mean is normal. (scipy's own noncentral t gives nan for few degrees of freedom.)
    """
    shift, limit = abs(effect) * np.sqrt(n) / sd, _limits(n)
    return float(np.mean(special.ndtr(shift - limit) + special.ndtr(-shift - limit)))


@lru_cache(maxsize=256)
def _limits(n: int) -> Array:
    """t s, in units of the true sd, at evenly spread quantiles of the estimated s."""
    t = float(stats.t.ppf((1 + LEVEL) / 2, n - 1))
    return t * np.sqrt(stats.chi2.ppf(QUANTILES, n - 1) / (n - 1))


def minimum_detectable_effect(sd: float, n: int) -> float:
    """The true difference that n pairs find with 80 % power, given the sd of the differences."""
    return sd * _detectable_in_sd(n)


@lru_cache(maxsize=256)
def _detectable_in_sd(n: int) -> float:
    top = 3.0 * float(stats.t.ppf((1 + LEVEL) / 2, n - 1)) / np.sqrt(n)  # power is above 0.8 there
    return float(optimize.brentq(lambda d: power(d, 1.0, n) - POWER, 0.0, top))


def power_of_equivalence(margin: float, sd: float, n: int) -> float:
    """Chance that the 95 % interval of n pairs lies within +-margin when there is no difference."""
    return float(np.mean(np.maximum(2 * special.ndtr(margin * np.sqrt(n) / sd - _limits(n)) - 1, 0)))


def seeds_needed(effect: float, sd: float, power: Callable[[float, float, int], float] = power) -> int | None:
    """Fewest pairs that find `effect` with 80 % power; None above MOST_SEEDS (and for no effect at all)."""
    sd = max(sd, 1e-300)
    if not np.isfinite(sd) or effect == 0 or power(effect, sd, MOST_SEEDS) < POWER:
        return None
    return 2 + bisect_left(range(2, MOST_SEEDS), True, key=lambda n: power(effect, sd, n) >= POWER)


def split_excess(first: ArrayLike, second: ArrayLike, permutations: int = 2000, seed: int = 0) -> float:
    """How far two groups of kernels differ beyond chance (Figure 3): values (k1,), (k2,) of one net -> a number.

    |difference of means| minus its average over random reassignments of the kernels to the two towers. Which of
    the two specialises is arbitrary, hence the absolute value; without specialisation the expectation is zero.
    """
    a, b = _finite(first), _finite(second)
    both, rng = np.concatenate([a, b]), np.random.default_rng(seed)
    shuffled = rng.permuted(np.broadcast_to(both, (permutations, both.size)), axis=1)
    chance = np.abs(shuffled[:, : a.size].mean(1) - shuffled[:, a.size :].mean(1)).mean()
    return float(abs(a.mean() - b.mean()) - chance)


class Word(StrEnum):
    """What a verdict can say. `alone`: so says its own interval, but not the p corrected for all that was tested."""

    HOLDS = "holds"
    HOLDS_ALONE = "holds (alone; not after Holm)"
    FAILS = "does not hold"
    FAILS_ALONE = "does not hold (alone; not after Holm)"
    OPEN = "not resolved at this scale"
    REPORTED = "reported"
    DIVERGED = "diverged"  # there is nothing to compare


@dataclass(frozen=True)
class Verdict:
    """A word, and the sentence a table prints (it begins with the word)."""

    word: Word
    sentence: str


def verdict(
    effect: Effect,
    direction: Direction,
    *,
    margin: float = 0.0,
    paper: float | None = None,
    min_n: int = 2,
    p_holm: float | None = None,
) -> Verdict:
    """What the 95 % interval says of an expectation that was fixed before the runs.

    `margin` belongs to Direction.same; `paper` is the paper's effect in the unit of `effect` (a ratio for ratios);
    below `min_n` seeds nothing is resolved. `p_holm`: the p adjusted for all claims tested together.
    """
    low, high, _ = _linear(effect)
    below, above = high < -margin, low > margin
    if direction is Direction.report:
        seen = "lower" if below else "higher" if above else "no difference resolved"
        return Verdict(Word.REPORTED, f"reported: {seen}")
    if effect.source is Source.SEEDS and effect.n < min_n:
        return Verdict(Word.OPEN, f"{Word.OPEN} (would need {min_n} seeds, has {effect.n})")
    if effect.bound != "?" and effect.sd < NO_SPREAD:
        equal = "all differences are equal: nothing tells how much they vary"
        return Verdict(Word.OPEN, f"{Word.OPEN} ({equal})")
    right, wrong = {
        Direction.lower: (below, above),
        Direction.higher: (above, below),
        Direction.same: (-margin < low and high < margin, below or above),
    }[direction]
    if not right and not wrong:
        return Verdict(Word.OPEN, f"{Word.OPEN} ({_would_need(effect, direction, margin, paper)})")
    confirmed = p_holm is None or p_holm <= 1 - LEVEL
    words = (Word.HOLDS, Word.FAILS) if confirmed else (Word.HOLDS_ALONE, Word.FAILS_ALONE)
    word = words[0] if right else words[1]
    return Verdict(word, str(word))


def tested_p(effect: Effect, direction: Direction, margin: float) -> float:
    """The p that enters Holm's correction: of "no difference", or for `same` of what the interval says of a margin.

    Within +-margin, p of "the difference is at least the margin", else p of "it is at most the margin": below 5 %
    where the interval lies within +-margin, or wholly outside; nan below two seeds.
    """
    if direction is not Direction.same:
        return effect.p
    if effect.n < 2:
        return np.nan
    low, high, estimate = _linear(effect)
    error = (high - low) / 2 / stats.t.ppf((1 + LEVEL) / 2, effect.n - 1)
    if error == 0:
        return np.nan
    return float(min(1.0, 2 * stats.t.sf(abs(margin - abs(estimate)) / error, effect.n - 1)))


def _would_need(effect: Effect, direction: Direction, margin: float, paper: float | None) -> str:
    """Seeds (images) for the paper's effect where that is more than we had, else for the one observed."""
    if effect.bound:
        return "censored runs: would need a larger budget"
    unit = "seeds" if effect.source is Source.SEEDS else "images"

    def count(needed: int | None) -> str:
        return f"over {MOST_SEEDS:,} {unit}" if needed is None else f"{needed:,} {unit}"

    if direction is Direction.same:
        needed = seeds_needed(margin, effect.sd, power_of_equivalence)
        if needed is None or needed > effect.n:
            return f"would need {count(needed)} to show a difference of 0 to be within the margin"
        return f"the margin is within the interval; {count(needed)} would do if the difference were 0"
    if paper is not None:
        needed = seeds_needed(float(np.log(paper)) if effect.ratio else paper, effect.sd)
        if needed is None or needed > effect.n:
            return f"would need {count(needed)} for the paper's effect"
    return f"would need {count(seeds_needed(_linear(effect)[2], effect.sd))} for the effect observed"


def _linear(effect: Effect) -> tuple[float, float, float]:
    """low, high, estimate on the scale where no difference is 0."""
    three = np.array([effect.low, effect.high, effect.estimate])
    with np.errstate(divide="ignore"):  # the open interval of a single run: log(0) = -inf
        low, high, estimate = np.log(three) if effect.ratio else three
    return float(low), float(high), float(estimate)


def _finite(values: ArrayLike) -> Array:
    x = np.asarray(values, dtype=np.float64)
    if x.size == 0 or not np.isfinite(x).all():
        raise ValueError(f"statistics need finite numbers, and at least one: {x.ravel()[:8].tolist()}")
    return x
