import math
import string
from collections import Counter
from itertools import combinations, permutations
from statistics import NormalDist

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from trl_ext.evaluation import (
    accepted_accuracy,
    best_attempts,
    bootstrap_interval,
    clustered_se,
    detectable_difference,
    exact_match,
    levenshtein,
    levenshtein_accuracy,
    levenshtein_ratio,
    maj_at_k,
    monotonicity,
    normal_interval,
    normalise_answer,
    paired_comparison,
    pass_at_k,
    pass_hat_k,
    runs_needed,
    seed_statistics,
    sign_test,
    simulate_verifier,
    variance_split,
    verifier_values,
    z_sum,
)


ANSWERS = ["a", "a", "b", "b", "c", None]


def close(value, abs=1e-6):
    return pytest.approx(value, abs=abs)


# -------------------------------------------------------------------------------------------------------- many samples


def test_worked_scores_of_many_samples():
    assert [pass_at_k(10, 3, k) for k in (1, 2, 5, 8)] == close([0.3, 0.533333, 0.916667, 1.0])
    assert [pass_hat_k(10, 3, k) for k in (1, 2, 3, 4)] == close([0.3, 0.066667, 0.008333, 0.0])
    assert [maj_at_k(ANSWERS, "a", k) for k in (1, 2, 3, 5, 6)] == close([0.333333, 0.4, 0.416667, 0.5, 0.5])


@pytest.mark.parametrize("n", [1, 2, 5])
def test_pass_at_k_counts_subsets(n):
    for c in range(n + 1):
        samples = [1] * c + [0] * (n - c)
        for k in range(1, n + 1):
            subsets = list(combinations(samples, k))
            assert pass_at_k(n, c, k) == close(np.mean([any(s) for s in subsets]), 1e-12)
            assert pass_hat_k(n, c, k) == close(np.mean([all(s) for s in subsets]), 1e-12)


def test_scores_of_many_prompts_and_samples():
    assert pass_at_k([10, 4], [3, 0], 2) == close([0.533333, 0.0])
    assert pass_hat_k(5, [5, 4, 1], 2) == close([1.0, 0.6, 0.0])
    assert pass_at_k(1000, 1, 500) == close(0.5, 1e-12)  # factorials of these overflow
    exact = 1 - math.comb(100_000 - 7, 300) / math.comb(100_000, 300)
    assert pass_at_k(100_000, 7, 300) == close(exact, 1e-12)


@given(st.integers(1, 30).flatmap(lambda n: st.tuples(st.just(n), st.integers(0, n), st.integers(1, n))))
def test_pass_at_k_and_pass_hat_k_mirror_each_other(case):
    n, c, k = case
    assert pass_at_k(n, c, k) == close(1 - pass_hat_k(n, n - c, k), 1e-12)
    assert pass_hat_k(n, c, k) <= c / n + 1e-12 <= pass_at_k(n, c, k) + 2e-12
    if k < n:
        assert pass_at_k(n, c, k) <= pass_at_k(n, c, k + 1) + 1e-12


def test_pass_at_k_has_no_bias():
    p, n, k = 0.3, 6, 3
    weights = [math.comb(n, c) * p**c * (1 - p) ** (n - c) for c in range(n + 1)]
    assert np.dot(weights, pass_at_k(n, range(n + 1), k)) == close(1 - (1 - p) ** k, 1e-12)
    assert np.dot(weights, pass_hat_k(n, range(n + 1), k)) == close(p**k, 1e-12)


@pytest.mark.parametrize("score", [pass_at_k, pass_hat_k])
def test_no_extrapolation(score):
    with pytest.raises(ValueError, match="`k` must be between 1 and the 4 samples, got 5"):
        score([10, 4], [3, 2], 5)
    with pytest.raises(ValueError, match="`k`"):
        score(4, 2, 0)
    with pytest.raises(ValueError, match="`c` must be"):
        score(4, 5, 2)


def majority_by_hand(answers, gold, k):
    total = []
    for subset in combinations(answers, k):
        votes = Counter(answer for answer in subset if answer is not None)
        top = [answer for answer, count in votes.items() if count == max(votes.values())]
        total.append(sum(answer in gold for answer in top) / len(top) if top else 0.0)
    return np.mean(total)


@given(st.lists(st.sampled_from(["a", "b", "c", None]), min_size=1, max_size=7), st.data())
def test_majorities_by_enumeration(answers, data):
    k = data.draw(st.integers(1, len(answers)))
    assert maj_at_k(answers, "a", k) == close(majority_by_hand(answers, {"a"}, k), 1e-12)
    assert maj_at_k(answers, {"a", "c"}, k) == close(majority_by_hand(answers, {"a", "c"}, k), 1e-12)


def test_majorities_at_the_edges():
    assert maj_at_k([None, None], "a", 2) == 0.0
    assert maj_at_k([None, "a"], "a", 2) == 1.0
    assert maj_at_k(["b"] * 3, "a", 3) == 0.0
    assert maj_at_k([None] * 3, None, 2) == 0.0  # "no answer" is no answer
    with pytest.raises(ValueError, match="`k` must be between 1 and the 2 answers, got 3"):
        maj_at_k(["a", "b"], "a", 3)


def test_majorities_of_random_subsets():
    answers = ["a"] * 11 + ["b"] * 9
    assert math.comb(20, 9) > 20_000
    # 9 votes have no tie: hypergeometric
    exact = sum(math.comb(11, i) * math.comb(9, 9 - i) for i in range(5, 10)) / math.comb(20, 9)
    estimate = maj_at_k(answers, "a", 9)
    assert estimate == close(exact, 4 * math.sqrt(exact * (1 - exact) / 2000))
    assert maj_at_k(answers, "a", 9) == estimate
    assert len({maj_at_k(answers, "a", 9, seed) for seed in ([0, 1], [0, 2], [0, 3])}) > 1


# ----------------------------------------------------------------------------------------------------------- intervals


SAMPLES = [[1, 1, 0, 1], [0, 0, 0, 0], [1, 0, 1, 0]]


def test_worked_variance():
    rates = np.mean(SAMPLES, axis=1)
    assert rates.mean() == close(0.416667)
    assert clustered_se(rates) == close(0.220479)
    split = variance_split(SAMPLES)
    assert (split.total, split.sampling) == close((0.048611, 0.016204))
    assert split.prompt == split.total - split.sampling


def test_undefined_variances():
    assert math.isnan(clustered_se([0.5]))
    assert math.isnan(clustered_se([0.5, 0.7], ["x", "x"]))
    assert all(math.isnan(bound) for bound in bootstrap_interval([0.5]))
    assert clustered_se([0.1, 0.1, 0.1]) == 0.0
    one = variance_split([[1, 0, 1]])
    assert math.isnan(one.total)
    assert one.sampling == close(1 / 9, 1e-12)
    assert math.isnan(variance_split([[1], [0]]).sampling)
    assert variance_split([[1], [0]]).total == close(0.25, 1e-12)


def test_variance_of_prompts_with_different_numbers_of_samples():
    split = variance_split([[1, 0], [1, 1, 0, 0], [1]])
    assert split.sampling == close((0.5 / 2 + (1 / 3) / 4) / 2 / 3, 1e-12)
    assert split.total == close(np.var([0.5, 0.5, 1.0], ddof=1) / 3, 1e-12)


def test_the_prompt_part_may_be_negative():
    assert variance_split([[1, 0], [0, 1], [1, 0]]).prompt < 0


def test_families_are_the_units():
    values, families = [0.0, 0.2, 1.0, 0.8, 0.6], ["x", "x", "y", "y", "z"]
    middle = np.mean(values)
    sums = [0.2 - 2 * middle, 1.8 - 2 * middle, 0.6 - middle]
    assert clustered_se(values, families) == close(math.sqrt(np.square(sums).sum() * 3 / 2) / 5, 1e-12)
    assert clustered_se(values, range(5)) == close(clustered_se(values), 1e-12)
    whole = [0.0] * 10 + [1.0] * 10
    low, high = bootstrap_interval(whole, families=[0] * 10 + [1] * 10)
    assert (low, high) == (0.0, 1.0)  # a quarter of the resamples has one family only
    low, high = bootstrap_interval(whole)
    assert 0.2 < low < 0.4 < 0.6 < high < 0.8
    with pytest.raises(ValueError, match="`families` must have one entry per prompt, got 2 for 3"):
        clustered_se([1, 2, 3], [0, 1])


def test_normal_interval():
    assert normal_interval(0.5, 0.1) == close((0.5 - 0.1959964, 0.5 + 0.1959964), 1e-7)
    assert normal_interval(0.5, 0.1, 0.1) == close((0.5 - 0.1644854, 0.5 + 0.1644854), 1e-7)


def test_bootstrap_is_seeded_and_follows_its_definition():
    values = np.random.default_rng(1).random(40)
    generator = np.random.default_rng(5)
    means = [values[generator.integers(40, size=40)].mean() for _ in range(1000)]
    assert bootstrap_interval(values, seed=5) == close(tuple(np.quantile(means, [0.025, 0.975])), 1e-12)
    assert bootstrap_interval(values, seed=[5, 1]) != bootstrap_interval(values, seed=[5, 2])


def test_coverage_of_the_intervals():
    # Prompts of very different difficulty, where samples are far from independent.
    generator, hits, repeats = np.random.default_rng(0), np.zeros(3), 500
    for _ in range(repeats):
        rates = generator.binomial(4, generator.beta(0.5, 0.5, 60)) / 4
        naive = math.sqrt(rates.mean() * (1 - rates.mean()) / 240)
        for i, (low, high) in enumerate(
            (
                normal_interval(rates.mean(), clustered_se(rates)),
                bootstrap_interval(rates, draws=200, seed=0),
                normal_interval(rates.mean(), naive),
            )
        ):
            hits[i] += low <= 0.5 <= high
    assert 0.91 < hits[0] / repeats < 0.98
    assert 0.89 < hits[1] / repeats < 0.98
    assert hits[2] / repeats < 0.85  # independent samples would promise too much


# ---------------------------------------------------------------------------------------------- seeds and monotonicity


def test_worked_seeds_and_monotonicity():
    found = seed_statistics([0.31, 0.34, 0.29, 0.33, 0.32])
    assert (found.std, found.snr, found.range, found.runs) == (close(0.019235), close(16.532033), close(0.05), 5)
    assert monotonicity([0.1, 0.3, 0.2, 0.4]) == close(0.666667)
    assert monotonicity([0.2, 0.2, 0.3, 0.1]) == close(-0.182574)


def test_seeds_and_monotonicity_at_the_edges():
    single, constant = seed_statistics([0.3]), seed_statistics([0.1] * 3)
    assert math.isnan(single.std) and math.isnan(single.snr) and single.range == 0.0
    assert constant.std == 0.0 and math.isnan(constant.snr)
    with pytest.raises(ValueError, match="`scores` is empty"):
        seed_statistics([])
    assert monotonicity([0.5] * 4) == monotonicity([0.5]) == monotonicity([]) == 0.0
    assert monotonicity([0.1, math.nan, 0.2]) == 1.0


@given(st.lists(st.integers(0, 4), min_size=2, max_size=8))
def test_monotonicity_by_pairs(scores):
    pairs = list(combinations(scores, 2))
    up, down, ties = (sum(test(x, y) for x, y in pairs) for test in (int.__lt__, int.__gt__, int.__eq__))
    expected = (up - down) / math.sqrt(len(pairs) * (len(pairs) - ties)) if ties < len(pairs) else 0.0
    assert monotonicity(scores) == close(expected, 1e-12)
    assert monotonicity(scores[::-1]) == close(-expected, 1e-12)


# ------------------------------------------------------------------------------------------------ comparison and power


def test_paired_comparison_by_hand():
    a, b = [0.5, 0.75, 1.0, 0.25], [0.25, 0.75, 0.5, 0.0]
    found = paired_comparison(a, b)
    d = np.array([0.25, 0.0, 0.5, 0.25])
    assert found.difference == 0.25
    assert found.se == close(d.std(ddof=1) / 2, 1e-12)
    assert (found.low, found.high) == normal_interval(0.25, found.se)
    assert found.bootstrap == bootstrap_interval(d)
    assert found.real
    other = paired_comparison(b, a)
    assert (other.difference, other.low, other.high) == (-0.25, -found.high, -found.low)
    assert other.real
    assert not paired_comparison([1.0], [0.0]).real  # nothing is known of one prompt
    assert not paired_comparison([0.5, 0.5], [0.5, 0.5]).real
    with pytest.raises(ValueError, match="same prompts, got 1 and 2"):
        paired_comparison([1], [1, 0])


def test_false_differences_are_as_frequent_as_alpha():
    generator, repeats = np.random.default_rng(3), 4000
    wrong = {"paired": 0, "sign": 0, "two points": 0}
    for _ in range(repeats):  # two identical policies, one sample of 100 prompts
        a, b = generator.integers(2, size=(2, 100))
        d = a - b
        wrong["paired"] += paired_comparison(a, b, draws=1).real
        wrong["sign"] += sign_test(int((d > 0).sum()), int((d < 0).sum())) < 0.05
        wrong["two points"] += abs(d.sum()) > 2
    assert 0.035 < wrong["paired"] / repeats < 0.065
    assert 0.025 < wrong["sign"] / repeats < 0.055  # exact, so on the safe side
    assert 0.65 < wrong["two points"] / repeats < 0.8  # what believing two points would get wrong


def test_false_differences_with_several_samples():
    generator, repeats = np.random.default_rng(4), 3000
    rates = generator.beta(0.5, 0.5, (repeats, 100))
    a, b = (generator.binomial(8, rates) / 8 for _ in range(2))
    wrong = sum(paired_comparison(x, y, draws=1).real for x, y in zip(a, b, strict=True))
    assert 0.035 < wrong / repeats < 0.065


def test_sign_test_by_enumeration():
    assert sign_test(0, 0) == 1.0
    assert sign_test(5, 5) == 1.0
    assert sign_test(0, 5) == sign_test(5, 0) == 2 / 32
    assert sign_test(1, 5) == close(2 * 7 / 64, 1e-12)
    assert 0 < sign_test(900, 1100) < 1e-4  # numbers that floats cannot hold
    for n in range(1, 8):
        outcomes = [sum(signs) for signs in np.ndindex(*[2] * n)]
        for b in range(n + 1):
            as_extreme = np.mean([abs(o - n / 2) >= abs(b - n / 2) for o in outcomes])
            assert sign_test(b, n - b) == close(as_extreme, 1e-12)


def test_worked_power():
    assert z_sum() == close(2.801585)
    worked = [runs_needed(*case) for case in ((1.5, 2), (1.5, 1), (0.7, 1), (1.8, 2))]
    assert worked == [9, 36, 8, 13]
    assert detectable_difference(1.5, 10) == close(1.879360)


def test_power_is_met_in_simulations():
    generator, sigma, delta, repeats = np.random.default_rng(0), 1.5, 2.0, 20_000
    runs = runs_needed(sigma, delta)
    z = NormalDist().inv_cdf(0.975)

    def found(difference, count):
        a, b = generator.normal(0, sigma, (2, repeats, count)).mean(2)
        return np.mean(np.abs(a + difference - b) > z * sigma * math.sqrt(2 / count))

    assert 0.8 <= found(delta, runs) + 0.01 < 0.86
    assert found(delta, runs - 1) < 0.8
    assert found(detectable_difference(sigma, 5), 5) == close(0.8, 0.015)
    assert found(0.0, runs) == close(0.05, 0.008)


@given(st.floats(0.1, 5), st.floats(0.1, 5), st.floats(0.01, 0.2), st.floats(0.5, 0.95))
def test_runs_and_detectable_difference_agree(sigma, delta, alpha, power):
    runs = runs_needed(sigma, delta, alpha, power)
    assert detectable_difference(sigma, runs, alpha, power) <= delta * (1 + 1e-12)
    if runs > 1:
        assert detectable_difference(sigma, runs - 1, alpha, power) > delta * (1 - 1e-12)


def test_power_at_the_edges():
    with pytest.warns(UserWarning, match="`sigma` is 0"):
        assert runs_needed(0.0, 1.0) == 1
    assert math.isnan(detectable_difference(math.nan))
    for delta in (0.0, -1.0, math.nan):
        with pytest.raises(ValueError, match="`delta` must be positive"):
            runs_needed(1.0, delta)
    with pytest.raises(ValueError, match="`sigma`"):
        runs_needed(-1.0, 1.0)
    with pytest.raises(ValueError, match="`runs`"):
        detectable_difference(1.0, 0)
    with pytest.raises(ValueError, match="`power` must be between 0 and 1, got 1"):
        runs_needed(1.0, 1.0, power=1)
    with pytest.raises(ValueError, match="`alpha` must be between 0 and 1, got 0"):
        detectable_difference(1.0, alpha=0)


# ------------------------------------------------------------------------------------------------- imperfect verifiers


def test_worked_verifier():
    types = ((0.87, 0.13), (0.58, 0.42), 1.0, 0.75)
    dear = verifier_values(*types, gain=1.0, loss=-2.0, attempts=4)
    assert dear == close([0.3388, 0.300737, 0.250637, 0.215482])
    assert best_attempts(dear) == 1
    cheap = verifier_values(*types, gain=1.0, loss=-0.7, attempts=4)
    assert cheap == close([0.48206, 0.523874, 0.524567, 0.522426])
    assert best_attempts(cheap) == 3
    assert accepted_accuracy((0.87, 0.13), 1.0, 0.75) == close([0.963989, 0.374101])


def test_best_attempts_at_the_edges():
    assert best_attempts([-0.1, -0.2]) == 0
    assert best_attempts([0.0, 0.0]) == 1
    assert best_attempts([0.1, 0.3, 0.3]) == 2
    assert math.isnan(accepted_accuracy(0.0, 1.0, 1.0))
    assert verifier_values([0.3], [1.0], 1.0, 1.0, attempts=50)[-1] == close(1 - 0.7**50, 1e-12)  # a perfect one
    with pytest.raises(ValueError, match="`prior` must have one share"):
        verifier_values([0.1, 0.2], [1.0], 1, 1)


def test_simulated_verifier_by_enumeration():
    correct, accepted = [[1, 0, 0], [0, 0, 1]], [[1, 1, 0], [0, 0, 0]]
    expected, free = np.zeros(3), np.zeros(3)
    wrong = [[], [], []]
    for order in permutations(range(3)):  # the second prompt never has anything accepted
        first = next(i for i, sample in enumerate(order) if accepted[0][sample])
        right = correct[0][order[first]]
        expected[first:] += (1.0 if right else -2.0) / 6 / 2
        free[first:] += right / 6 / 2
        wrong[first].append(not right)
    values, rates = simulate_verifier(correct, accepted, loss=-2.0, permutations=20_000)
    assert values == close(expected, 0.02)
    assert values[-1] == values[-2]  # one of two accepted samples comes before the third position
    assert rates[:2] == close([np.mean(part) for part in wrong[:2]], 0.02)
    assert math.isnan(rates[2])
    again, _ = simulate_verifier(correct, accepted, loss=[-2.0, 0.0], permutations=20_000)
    assert (again[0] == values).all()
    assert again[1] == close(free, 0.02)


def test_simulated_verifier_follows_the_formula():
    generator = np.random.default_rng(0)
    rates = generator.permutation(np.repeat([0.87, 0.13], [580, 420]))
    correct = generator.random((1000, 40)) < rates[:, None]
    accepted = correct | (generator.random((1000, 40)) < 0.25)
    values, wrong = simulate_verifier(correct, accepted, loss=-0.7, permutations=50)
    formula = verifier_values((0.87, 0.13), (0.58, 0.42), 1.0, 0.75, loss=-0.7, attempts=40)
    assert values[:6] == close(formula[:6], 0.03)
    assert best_attempts(values) < 10
    assert wrong[5] > wrong[0]  # what is still open after five attempts is hard


def test_simulated_false_accepts_are_averaged_over_prompts_first():
    # Half of the first prompt's accepted samples are wrong, and the second one's only accepted sample is right.
    correct, accepted = [[1, 0], [1, 0]], [[1, 1], [1, 0]]
    _, rates = simulate_verifier(correct, accepted, permutations=10_000)
    assert rates[0] == close(0.25, 0.02)  # over all that was accepted at position 1 it would be a third
    assert rates[1] == 0.0
    with pytest.raises(ValueError, match="same shape"):
        simulate_verifier([[1, 0]], [[1, 0, 0]])


# ------------------------------------------------------------------------------------------------------- short answers


@pytest.mark.parametrize(
    ("text", "normal"),
    [
        ("The, Eiffel   Tower!", "eiffel tower"),
        ("a-b", "-b"),
        ("an apple; the pear.", "apple pear"),
        ("theatre an_d", "theatre an d"),
        ("1,000.5", "1 000 5"),
        ("ﬁnal\u00a0Answer", "final answer"),
        ("C++ (x^2) [y] {z} \\ a/b 'q'", "c x 2 y z b q"),
        ("well-known \u2013 yes", "well-known \u2013 yes"),  # a dash is not ASCII
        ("the", ""),
    ],
)
def test_normalised_answers(text, normal):
    assert normalise_answer(text) == normal


@given(st.text(max_size=20))
def test_normalising_is_stable(text):
    once = normalise_answer(text)
    assert "  " not in once and once == once.strip()
    assert not set(once) & (set(string.punctuation) - {"-"})


def test_worked_short_answers():
    assert levenshtein_ratio("paris", "pari") == close(0.8)
    assert levenshtein_ratio("kitten", "sitting") == close(0.571429)
    assert levenshtein_ratio("", "x") == levenshtein_ratio("the", "") == levenshtein_ratio("", "") == 0.0
    assert levenshtein_ratio("The Paris.", "paris") == 1.0
    assert exact_match("The Paris.", "paris") and not exact_match("paris", "pari")
    golds = ["pari", "sitting", "Rome"]
    assert levenshtein_accuracy(["paris", "kitten", "rome!"], golds) == close(2 / 3)
    assert levenshtein_accuracy(["paris", "kitten", "rome!"], golds, 0.95) == close(1 / 3)
    assert levenshtein_accuracy(["abcd"], ["abce"]) == 1.0  # at the threshold


def distance_by_definition(a, b):
    if not a or not b:
        return len(a) + len(b)
    options = [distance_by_definition(a[1:], b) + 1, distance_by_definition(a, b[1:]) + 1]
    return min(*options, distance_by_definition(a[1:], b[1:]) + (a[0] != b[0]))


@given(st.text("ab-", max_size=5), st.text("ab-", max_size=5))
def test_levenshtein_by_definition(a, b):
    assert levenshtein(a, b) == distance_by_definition(a, b)
