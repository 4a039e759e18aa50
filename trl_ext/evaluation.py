"""
Statistics of sampled evaluations: what a score is worth, and whether two scores differ.

Sources: On Randomness in Agentic Evals (arXiv 2602.07150; power), Quantifying Variance in Evaluation Benchmarks (arXiv
2406.10229; seeds, monotonicity), The Limits of Inference Scaling Through Resampling (arXiv 2411.17501; imperfect
verifiers), Tiny QA Benchmark++ (arXiv 2505.12058; short answers), Chen et al. 2021 (arXiv 2107.03374; pass@k) and
tau-bench (arXiv 2406.12045; pass^k).
"""

import math
import re
import string
import unicodedata
import warnings
from dataclasses import dataclass
from functools import cache
from itertools import combinations
from statistics import NormalDist

import numpy as np


# ---------------------------------------------------------------------------------------------- scores of many samples


def pass_at_k(n, c, k: int):
    """
    Chance that at least one of k samples is correct, without bias from n samples of which c are: `1 - C(n-c, k) /
    C(n, k)` (arXiv 2107.03374).

    Args:
        n (`int` or sequence of `int`):
            Samples per prompt.
        c (`int` or sequence of `int`):
            Correct ones among them, of the same or a broadcastable shape.
        k (`int`):
            Attempts.

    Returns:
        `float` or `np.ndarray`: one value per prompt.

    Raises:
        ValueError: if k exceeds n, which would be an extrapolation.
    """
    n, c = _counts(n, c, k)
    return 1 - _all_of(n, n - c, k)


def pass_hat_k(n, c, k: int):
    """
    Chance that all of k samples are correct (pass^k), without bias: `C(c, k) / C(n, k)` (arXiv 2406.12045).

    Args:
        n (`int` or sequence of `int`), c (`int` or sequence of `int`), k (`int`):
            As in [`pass_at_k`].

    Returns:
        `float` or `np.ndarray`: one value per prompt.

    Raises:
        ValueError: if k exceeds n.
    """
    n, c = _counts(n, c, k)
    return _all_of(n, c, k)


def _counts(n, c, k: int) -> tuple[np.ndarray, np.ndarray]:
    n, c = np.broadcast_arrays(np.asarray(n, dtype=np.float64), np.asarray(c, dtype=np.float64))
    if k < 1 or (n < k).any():
        raise ValueError(f"`k` must be between 1 and the {n.min() if n.size else 0:.0f} samples, got {k}: draw more.")
    if (c < 0).any() or (c > n).any():
        raise ValueError(f"`c` must be between 0 and `n`, got {c.tolist()} of {n.tolist()}.")
    return n, c


def _all_of(n: np.ndarray, c: np.ndarray, k: int):
    """`C(c, k) / C(n, k)` as a product, in which nothing overflows."""
    i = np.arange(k)
    return (np.maximum(c[..., None] - i, 0) / (n[..., None] - i)).prod(-1)[()]


def maj_at_k(answers, gold, k: int, seed=0) -> float:
    """
    Chance that the majority among k of the answers is the right one. Of t answers with the most votes each gets 1/t of
    the credit; None (no answer found) never votes. All subsets are counted if there are at most 20,000 of them, else
    2,000 random ones.

    Args:
        answers (sequence):
            Of the n samples, hashable; None where there is none.
        gold (value or `set`):
            The right answer, or the set of right answers.
        k (`int`):
            Votes.
        seed (`int` or sequence of `int`, *optional*, defaults to `0`):
            Of the random subsets.

    Returns:
        `float`: the chance.

    Raises:
        ValueError: if k exceeds n.
    """
    n = len(answers)
    if not 1 <= k <= n:
        raise ValueError(f"`k` must be between 1 and the {n} answers, got {k}: draw more.")
    gold = gold if isinstance(gold, (set, frozenset)) else {gold}
    kinds = list(dict.fromkeys(answer for answer in answers if answer is not None))
    if not gold.intersection(kinds):
        return 0.0
    if math.comb(n, k) <= 20_000:
        subsets = _all_subsets(n, k)
    else:
        subsets = np.random.default_rng(seed).random((2000, n)).argsort(1)[:, :k]
    is_kind = np.array([[answer == kind for kind in kinds] for answer in answers], dtype=np.int32)
    votes = is_kind[subsets].sum(1)
    leading = (votes == votes.max(1, keepdims=True)) & (votes > 0)
    right = leading & np.array([kind in gold for kind in kinds])
    return float((right.sum(1) / np.maximum(leading.sum(1), 1)).mean())


@cache
def _all_subsets(n: int, k: int) -> np.ndarray:
    return np.array(list(combinations(range(n), k)))


# ----------------------------------------------------------------------------------------------------------- intervals


def clustered_se(values, families=None) -> float:
    """
    Standard error of the mean over prompts: the samples of a prompt are no independent units, the prompts are.

    Args:
        values (sequence of `float`):
            One mean per prompt, shape `(Q,)`.
        families (sequence, *optional*):
            Family of every prompt, if the families are the independent units.

    Returns:
        `float`: `std(values, ddof=1) / sqrt(Q)` without families; NaN if there is only one unit.
    """
    values = np.asarray(values, dtype=np.float64)
    sums = _family_sums(values - values.mean() if len(values) else values, families)[0]
    if len(sums) < 2:
        return math.nan
    if values.min() == values.max():
        return 0.0
    return float(math.sqrt((sums**2).sum() * len(sums) / (len(sums) - 1)) / len(values))


def _family_sums(values: np.ndarray, families) -> tuple[np.ndarray, np.ndarray]:
    """Sum and size of every family; every prompt is one if None."""
    if families is None:
        return values, np.ones_like(values)
    if len(families) != len(values):
        raise ValueError(f"`families` must have one entry per prompt, got {len(families)} for {len(values)} prompts.")
    index = {family: i for i, family in enumerate(dict.fromkeys(families))}
    member = np.array([index[family] for family in families], dtype=int)
    return np.bincount(member, values, len(index)), np.bincount(member, minlength=len(index)).astype(np.float64)


def normal_interval(mean: float, se: float, alpha: float = 0.05) -> tuple[float, float]:
    """
    Normal confidence interval.

    Args:
        mean (`float`), se (`float`):
            Estimate and standard error.
        alpha (`float`, *optional*, defaults to `0.05`):
            Chance of missing the truth.

    Returns:
        `tuple[float, float]`: lower and upper bound, not cut to any range.
    """
    width = NormalDist().inv_cdf(1 - alpha / 2) * se
    return mean - width, mean + width


@cache
def student_quantile(confidence: float, freedom: int) -> float:
    """Half the width, in standard errors, of the two-sided interval of Student's t; infinite without freedom."""
    if freedom < 1:
        return math.inf
    if freedom > 200:  # the next term of this expansion is below 1e-6
        z = NormalDist().inv_cdf((1 + confidence) / 2)
        first, second = (z**3 + z) / 4, (5 * z**5 + 16 * z**3 + 3 * z) / 96
        return z + first / freedom + second / freedom**2

    def inside(t):  # probability of (-t, t): a finite series for whole degrees of freedom
        angle = math.atan(t / math.sqrt(freedom))
        odd = freedom % 2
        term = total = math.cos(angle) if odd else 1.0
        for k in range(2 + odd, freedom - 1, 2):
            term *= math.cos(angle) ** 2 * (k - 1) / k
            total += term
        if not odd:
            return math.sin(angle) * total
        return 2 / math.pi * (angle + (math.sin(angle) * total if freedom > 1 else 0.0))

    low, high = 0.0, 1.0
    while inside(high) < confidence:
        high *= 2
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if inside(middle) < confidence else (low, middle)
    return high


def bootstrap_interval(values, alpha: float = 0.05, draws: int = 1000, seed=0, families=None) -> tuple[float, float]:
    """
    Percentile interval of the mean over prompts, which are resampled whole and with replacement.

    Args:
        values (sequence of `float`):
            One mean per prompt, shape `(Q,)`.
        alpha (`float`, *optional*, defaults to `0.05`):
            Chance of missing the truth.
        draws (`int`, *optional*, defaults to `1000`):
            Resamples.
        seed (`int` or sequence of `int`, *optional*, defaults to `0`):
            Of the resamples.
        families (sequence, *optional*):
            Family of every prompt: then families are resampled.

    Returns:
        `tuple[float, float]`: lower and upper bound; NaN if there is only one unit.
    """
    sums, sizes = _family_sums(np.asarray(values, dtype=np.float64), families)
    if len(sums) < 2:
        return math.nan, math.nan
    generator = np.random.default_rng(seed)
    means = np.empty(draws)
    for i in range(draws):  # one at a time: all of them could be gigabytes
        chosen = generator.integers(len(sums), size=len(sums))
        means[i] = sums[chosen].sum() / sizes[chosen].sum()
    low, high = np.quantile(means, [alpha / 2, 1 - alpha / 2])
    return float(low), float(high)


@dataclass(frozen=True)
class VarianceSplit:
    """
    Where the variance of a mean score comes from.

    Attributes:
        total (`float`):
            The squared clustered standard error; NaN with one prompt.
        sampling (`float`):
            What more samples per prompt would reduce; NaN unless a prompt has two samples.
        prompt (`float`):
            The rest, which only more prompts reduce. An estimate, so it may be negative.
    """

    total: float
    sampling: float
    prompt: float


def variance_split(scores) -> VarianceSplit:
    """
    Split the variance of the mean over prompts: the part of sampling is `mean_q[var(x_q, ddof=1) / n_q] / Q`.

    Args:
        scores (sequence of sequences of `float`):
            Scores of every prompt's samples, shape `(Q, n)` or of different lengths. A prompt with a single sample has
            no part in the mean of variances.

    Returns:
        [`VarianceSplit`]: the parts.
    """
    rows = [np.asarray(row, dtype=np.float64) for row in scores]
    total = clustered_se([row.mean() for row in rows]) ** 2
    parts = [row.var(ddof=1) / len(row) for row in rows if len(row) > 1]
    sampling = float(np.mean(parts)) / len(rows) if parts else math.nan
    return VarianceSplit(total, sampling, total - sampling)


# --------------------------------------------------------------------------------------------------- seeds and history


@dataclass(frozen=True)
class SeedStatistics:
    """
    Scores of independent runs.

    Attributes:
        runs (`int`):
            Number of runs J.
        mean (`float`):
            Their mean.
        std (`float`):
            Standard deviation with `ddof=1`; NaN for a single run.
        range (`float`):
            Largest minus smallest.
        snr (`float`):
            `mean / std`; NaN for a single run or constant scores.
    """

    runs: int
    mean: float
    std: float
    range: float
    snr: float


def seed_statistics(scores) -> SeedStatistics:
    """
    Mean and spread of the scores of independent runs (arXiv 2406.10229).

    Args:
        scores (sequence of `float`):
            Shape `(J,)`, at least one.

    Returns:
        [`SeedStatistics`]: the numbers.
    """
    scores = np.asarray(scores, dtype=np.float64)
    if not len(scores):
        raise ValueError("`scores` is empty: give the score of at least one run.")
    mean, spread = float(scores.mean()), float(scores.max() - scores.min())
    std = math.nan if len(scores) < 2 else float(scores.std(ddof=1)) if spread else 0.0
    return SeedStatistics(len(scores), mean, std, spread, mean / std if std > 0 else math.nan)


def monotonicity(scores) -> float:
    """
    How steadily a score rises over training: Kendall's tau-b with the order of the steps.

    Args:
        scores (sequence of `float`):
            In the order of their steps, which are distinct; NaN is left out.

    Returns:
        `float`: between -1 and 1; 0 if all scores are equal.
    """
    scores = np.asarray(scores, dtype=np.float64)
    scores = scores[~np.isnan(scores)]
    first, later = np.triu_indices(len(scores), 1)
    signs = np.sign(scores[later] - scores[first])
    untied = np.count_nonzero(signs)
    return float(signs.sum() / math.sqrt(len(signs) * untied)) if untied else 0.0


# ------------------------------------------------------------------------------------------------ comparison and power


@dataclass(frozen=True)
class PairedComparison:
    """
    Difference of two models on the same prompts.

    Attributes:
        difference (`float`):
            Mean of A minus mean of B.
        se (`float`):
            Its clustered standard error; NaN with one prompt.
        low (`float`), high (`float`):
            Normal interval.
        bootstrap (`tuple[float, float]`):
            Interval by resampling prompts.
    """

    difference: float
    se: float
    low: float
    high: float
    bootstrap: tuple[float, float]

    @property
    def real(self) -> bool:
        """Whether the normal interval leaves out 0; False where it is undefined."""
        return self.low > 0 or self.high < 0


def paired_comparison(a, b, alpha: float = 0.05, draws: int = 1000, seed=0, families=None) -> PairedComparison:
    """
    Compare two models prompt by prompt.

    Args:
        a (sequence of `float`), b (sequence of `float`):
            One mean per prompt, in the same order, shape `(Q,)`.
        alpha (`float`, *optional*, defaults to `0.05`):
            Chance of finding a difference where there is none.
        draws (`int`), seed (`int` or sequence of `int`), families (sequence):
            As in [`bootstrap_interval`].

    Returns:
        [`PairedComparison`]: the difference with its intervals.

    Raises:
        ValueError: if the numbers of prompts differ, or there are none.
    """
    a, b = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    if a.shape != b.shape or not len(a):
        raise ValueError(f"`a` and `b` must score the same prompts, got {len(a)} and {len(b)} of them.")
    d = a - b
    mean, se = float(d.mean()), clustered_se(d, families)
    return PairedComparison(
        mean, se, *normal_interval(mean, se, alpha), bootstrap_interval(d, alpha, draws, seed, families)
    )


def sign_test(b: int, c: int) -> float:
    """
    Exact two-sided sign (McNemar) test for one sample per prompt.

    Args:
        b (`int`), c (`int`):
            Prompts that only A, and that only B answered correctly.

    Returns:
        `float`: p-value `min(1, 2 P[Bin(b+c, 1/2) <= min(b, c)])`; 1 if b + c = 0.
    """
    n = b + c
    return min(1.0, 2 * sum(math.comb(n, i) for i in range(min(b, c) + 1)) / 2**n)


def z_sum(alpha: float = 0.05, power: float = 0.8) -> float:
    """
    Standard errors that a difference must measure to be found with the given power in a two-sided test.

    Raises:
        ValueError: if a probability is not between 0 and 1.
    """
    for name, value in (("alpha", alpha), ("power", power)):
        if not 0 < value < 1:
            raise ValueError(f"`{name}` must be between 0 and 1, got {value}.")
    return NormalDist().inv_cdf(1 - alpha / 2) + NormalDist().inv_cdf(power)


def runs_needed(sigma: float, delta: float, alpha: float = 0.05, power: float = 0.8) -> int:
    """
    Runs per arm that find a difference: `ceil(z_sum^2 * 2 sigma^2 / delta^2)` (arXiv 2602.07150).

    Args:
        sigma (`float`):
            Standard deviation of a run's score.
        delta (`float`):
            Difference to find, in the same unit.
        alpha (`float`, *optional*, defaults to `0.05`), power (`float`, *optional*, defaults to `0.8`):
            Chance of finding a difference where there is none, and of finding one of this size.

    Returns:
        `int`: at least 1.

    Raises:
        ValueError: if `delta` is not positive or `sigma` is negative.
    """
    if not delta > 0:
        raise ValueError(f"`delta` must be positive, got {delta}: no number of runs shows a difference of 0.")
    _check_sigma(sigma)
    if sigma == 0:
        warnings.warn("`sigma` is 0: one run per arm is enough only if runs truly do not differ.", stacklevel=2)
    return max(1, math.ceil(z_sum(alpha, power) ** 2 * 2 * sigma**2 / delta**2))


def detectable_difference(sigma: float, runs: float = 1, alpha: float = 0.05, power: float = 0.8) -> float:
    """
    Smallest difference that a number of runs per arm finds: `z_sum * sqrt(2 sigma^2 / runs)`.

    Args:
        sigma (`float`):
            Standard deviation of a run's score; NaN gives NaN.
        runs (`float`, *optional*, defaults to `1`):
            Runs per arm (the harmonic mean if the arms differ).
        alpha (`float`, *optional*, defaults to `0.05`), power (`float`, *optional*, defaults to `0.8`):
            As in [`runs_needed`].

    Returns:
        `float`: in the unit of `sigma`.

    Raises:
        ValueError: if `runs` is not positive or `sigma` is negative.
    """
    if not runs > 0:
        raise ValueError(f"`runs` must be positive, got {runs}.")
    if not math.isnan(sigma):
        _check_sigma(sigma)
    return z_sum(alpha, power) * math.sqrt(2 * sigma**2 / runs)


def _check_sigma(sigma: float) -> None:
    if not 0 <= sigma < math.inf:
        raise ValueError(f"`sigma` must be a standard deviation, at least 0, got {sigma}.")


# ------------------------------------------------------------------------------------------------- imperfect verifiers


def verifier_values(
    success, prior, completeness: float, soundness: float, gain: float = 1.0, loss: float = -1.0, attempts: int = 10
) -> np.ndarray:
    """
    Expected value of sampling until a verifier accepts, at most K times (arXiv 2411.17501): the sum over k <= K of
    `sum_i prior_i reject_i^(k-1) [gain c r_i + loss (1-s)(1-r_i)]` with `reject_i = (1-c) r_i + s (1-r_i)`.

    Args:
        success (sequence of `float`):
            Success rate r of every type of prompt.
        prior (sequence of `float`):
            Share of every type.
        completeness (`float`):
            Chance c that a correct answer is accepted.
        soundness (`float`):
            Chance s that a wrong answer is rejected.
        gain (`float`, *optional*, defaults to `1.0`), loss (`float`, *optional*, defaults to `-1.0`):
            Value of an accepted correct answer, and of an accepted wrong one (negative).
        attempts (`int`, *optional*, defaults to `10`):
            Largest K.

    Returns:
        `np.ndarray`: values for K = 1, ..., `attempts`.
    """
    r, prior = np.asarray(success, dtype=np.float64), np.asarray(prior, dtype=np.float64)
    if r.shape != prior.shape:
        raise ValueError(f"`prior` must have one share per success rate, got {prior.shape} for {r.shape}.")
    reject = (1 - completeness) * r + soundness * (1 - r)
    value = gain * completeness * r + loss * (1 - soundness) * (1 - r)
    powers = reject ** np.arange(attempts)[:, None]
    return (powers * (prior * value)).sum(1).cumsum()


def best_attempts(values) -> int:
    """
    Number of attempts K* with the highest value.

    Args:
        values (sequence of `float`):
            For K = 1, 2, ..., from [`verifier_values`] or [`simulate_verifier`].

    Returns:
        `int`: the first one that attains the maximum; 0 (do not try at all) if the maximum is negative.
    """
    values = np.asarray(values, dtype=np.float64)
    return 0 if values.max() < 0 else int(values.argmax()) + 1


def accepted_accuracy(success, completeness: float, soundness: float):
    """
    Share of correct answers among those that a verifier accepts: `c r / (c r + (1-s)(1-r))`.

    Args:
        success (`float` or sequence of `float`):
            Success rate r.
        completeness (`float`), soundness (`float`):
            As in [`verifier_values`].

    Returns:
        `float` or `np.ndarray`: NaN where nothing is accepted.
    """
    r = np.asarray(success, dtype=np.float64)
    right, wrong = completeness * r, (1 - soundness) * (1 - r)
    accepted = right + wrong
    return np.divide(right, accepted, out=np.full_like(accepted, math.nan), where=accepted > 0)[()]


def simulate_verifier(
    correct, accepted, gain: float = 1.0, loss=-1.0, permutations: int = 1000, seed=0
) -> tuple[np.ndarray, np.ndarray]:
    """
    The same from samples: the n samples of every prompt come in random orders, and the first one that a weak check
    accepts is taken.

    Args:
        correct (array of `bool`), accepted (array of `bool`):
            Whether a sample is truly correct, and whether the weak check accepts it, shape `(Q, n)`.
        gain (`float`, *optional*, defaults to `1.0`), loss (`float` or sequence, *optional*, defaults to `-1.0`):
            Value of an accepted correct answer, and of an accepted wrong one (of several, one row of values each).
        permutations (`int`, *optional*, defaults to `1000`):
            Orders per prompt.
        seed (`int` or sequence of `int`, *optional*, defaults to `0`):
            Of the orders.

    Returns:
        `tuple[np.ndarray, np.ndarray]`: the value for K = 1, ..., n (nothing accepted within K counts 0), and the
        share of wrong answers among those taken at position 1, ..., n: first per prompt, then their mean over the
        prompts that have any (NaN if none has).
    """
    correct, accepted = np.asarray(correct, dtype=bool), np.asarray(accepted, dtype=bool)
    if correct.shape != accepted.shape or correct.ndim != 2 or not correct.size:
        raise ValueError(
            f"`correct` and `accepted` must have the same shape (Q, n), got {correct.shape} and {accepted.shape}."
        )
    generator, n = np.random.default_rng(seed), correct.shape[1]
    taken = np.zeros((2, len(correct), n))  # wrong and correct ones by position, as shares of the orders
    for q in range(len(correct)):
        order = generator.random((permutations, n)).argsort(1)
        passes = accepted[q][order]
        first = passes.argmax(1)
        right = correct[q][order[np.arange(permutations), first]]
        some = passes.any(1)
        for kind in (0, 1):
            taken[kind, q] = np.bincount(first[some & (right == kind)], minlength=n) / permutations
    wrong, right = taken.mean(1)
    values = (gain * right + np.asarray(loss, dtype=np.float64)[..., None] * wrong).cumsum(-1)
    both = taken.sum(0)
    rate = np.divide(taken[0], both, out=np.full_like(both, math.nan), where=both > 0)
    seen = (both > 0).sum(0)
    return values, np.divide(np.nansum(rate, 0), seen, out=np.full(n, math.nan), where=seen > 0)


# ------------------------------------------------------------------------------------------------------- short answers


_PUNCTUATION = str.maketrans(dict.fromkeys(set(string.punctuation) - {"-"}, " "))


def normalise_answer(text: str) -> str:
    """
    Normalise a short answer (arXiv 2505.12058): NFKC, lower case, no articles, no ASCII punctuation but the hyphen,
    single spaces.

    Args:
        text (`str`):
            The answer.

    Returns:
        `str`: the normalised answer.
    """
    text = re.sub(r"\b(a|an|the)\b", " ", unicodedata.normalize("NFKC", str(text)).lower())
    return " ".join(text.translate(_PUNCTUATION).split())


def exact_match(answer: str, gold: str) -> bool:
    """Whether two short answers are the same after [`normalise_answer`]."""
    return normalise_answer(answer) == normalise_answer(gold)


def levenshtein(a: str, b: str) -> int:
    """Insertions, deletions and replacements of characters that turn one text into the other."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        diagonal, row[0] = row[0], i
        for j, y in enumerate(b, 1):
            diagonal, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, diagonal + (x != y))
    return row[-1]


def levenshtein_ratio(answer: str, gold: str) -> float:
    """
    Similarity of two short answers after [`normalise_answer`]: `1 - levenshtein / max(length)`.

    Args:
        answer (`str`), gold (`str`):
            The texts.

    Returns:
        `float`: between 0 and 1; 0 if one of them, or both, are empty.
    """
    a, b = normalise_answer(answer), normalise_answer(gold)
    return 1 - levenshtein(a, b) / max(len(a), len(b)) if a and b else 0.0


def levenshtein_accuracy(answers, golds, threshold: float = 0.75) -> float:
    """
    Share of short answers that are similar enough to the right one.

    Args:
        answers (sequence of `str`), golds (sequence of `str`):
            The texts, of the same number.
        threshold (`float`, *optional*, defaults to `0.75`):
            Smallest [`levenshtein_ratio`] that counts.

    Returns:
        `float`: the share; NaN of none.
    """
    ratios = [levenshtein_ratio(*pair) for pair in zip(answers, golds, strict=True)]
    return sum(ratio >= threshold for ratio in ratios) / len(ratios) if ratios else math.nan
