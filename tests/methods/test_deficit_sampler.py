from fractions import Fraction

import pytest
import torch
from harness import arithmetic, train, train_mix
from hypothesis import given, settings
from hypothesis import strategies as st

from trl_ext import DeficitSamplerTrainer, MethodTrainer, MixingError, mix
from trl_ext.core.prompts import draw_by_deficit
from trl_ext.core.rollouts import positive_variance


def test_worked_sequence():
    zero, target = torch.zeros(2, dtype=torch.float64), torch.tensor([0.6, 0.4], dtype=torch.float64)
    rows, deficits = draw_by_deficit(zero, target, 5)
    assert rows.tolist() == [0, 1, 0, 1, 0] and deficits.abs().max() < 1e-12
    first, deficits = draw_by_deficit(zero, target, 2)
    second, _ = draw_by_deficit(deficits, target, 3)
    assert first.tolist() + second.tolist() == [0, 1, 0, 1, 0]


@pytest.mark.parametrize("weights", [[1, 1, 1], [7, 2, 1], [2, 2, 1], [1] * 24, [1] * 1000])
@pytest.mark.parametrize("size", [1, 2, 7])
def test_equal_deficits_go_to_the_lower_row_whatever_their_rounding(weights, size):
    target = torch.tensor(weights, dtype=torch.float64) / sum(weights)
    deficits, drawn = torch.zeros_like(target), []
    exact, expected = [Fraction(0)] * len(weights), []
    for _ in range(2 * len(weights)):
        rows, deficits = draw_by_deficit(deficits, target, size)
        drawn += rows.tolist()
        for _ in range(size if len(weights) < 1000 else 0):
            exact = [deficit + Fraction(weight, sum(weights)) for deficit, weight in zip(exact, weights, strict=True)]
            expected.append(exact.index(max(exact)))
            exact[expected[-1]] -= 1
    if len(weights) < 1000:
        assert drawn == expected
    else:  # one after another
        assert drawn == [i % 1000 for i in range(len(drawn))]


def test_worked_positive_variances():
    table = torch.tensor([[1, 1, 0, 0, 0], [0.5, 1, 0, torch.nan, torch.nan], [torch.nan] * 5], dtype=torch.float64)
    found = positive_variance(table)
    assert found[:2].tolist() == pytest.approx([0.144, 0.083333], abs=1e-6) and found[2].isnan()
    rates = torch.tensor([1, 1, 0, 0, 0], dtype=torch.float64).mean()
    assert found[0].item() == pytest.approx((rates * (1 - rates) ** 2).item())


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.one_of(st.sampled_from([0.0, 0.5, 1.0]), st.floats(0, 1)), min_size=1, max_size=12),
    st.lists(st.integers(1, 9), min_size=1, max_size=5),
    st.data(),
)
def test_draws_are_those_of_the_plain_rule(weights, sizes, data):
    """Against the rule as it is written, over several generations and with targets that change."""
    deficits = mine = torch.zeros(len(weights), dtype=torch.float64)
    drawn = []
    for size in sizes:
        target = torch.tensor(data.draw(st.permutations(weights)), dtype=torch.float64) + 1e-3
        target /= target.sum()
        rows, mine = draw_by_deficit(mine, target, size)
        drawn += rows.tolist()
        for row in rows.tolist():
            deficits = deficits + target
            assert deficits[row] >= deficits.max() - 1e-9
            deficits[row] -= 1
        assert torch.allclose(mine, deficits, atol=1e-9)
    assert mine.sum().abs() < 1e-9 and mine.abs().max() < len(weights)


def test_it_is_closer_to_the_target_than_independent_draws():
    """50 prompts with Dirichlet(1) targets, 200 draws: about 0.06 against 0.34."""
    distances = []
    for seed in range(20):
        generator = torch.Generator().manual_seed(seed)
        target = -torch.rand(50, generator=generator, dtype=torch.float64).log()
        target /= target.sum()
        ours, _ = draw_by_deficit(torch.zeros(50, dtype=torch.float64), target, 200)
        independent = torch.multinomial(target, 200, replacement=True, generator=generator)
        counts = [torch.bincount(rows, minlength=50) / 200 for rows in (ours, independent)]
        distances.append([(count - target).abs().sum().item() for count in counts])
    ours, independent = torch.tensor(distances).mean(0).tolist()
    assert ours == pytest.approx(0.06, abs=0.02) and independent == pytest.approx(0.34, abs=0.04)


def test_without_weights_every_prompt_comes_equally_often():
    trainer = train(DeficitSamplerTrainer, data=arithmetic().select(range(6)), max_steps=9)
    assert trainer.deficit_counts.tolist() == [3] * 6 and trainer.deficit_deficits.abs().max() < 1e-12
    assert trainer.prompt_table()["deficit/draws"].tolist() == [3] * 6


def test_the_weights_of_a_mixed_method_are_followed():
    weights = torch.tensor([5.0, 1.0, 1.0, 1.0])

    class Weighing(MethodTrainer):
        replaces = ("prompt_weights",)

        def prompt_weights(self):
            return weights

    trainer, config = mix("deficit_sampler", Weighing)
    trained = train(trainer, config, data=arithmetic().select(range(4)), max_steps=8)
    assert trained.deficit_counts.tolist() == [10, 2, 2, 2]


def test_weights_that_are_none_are_named():
    class Weighing(MethodTrainer):
        replaces = ("prompt_weights",)

        def prompt_weights(self):
            return torch.zeros(24)

    trainer, config = mix("deficit_sampler", Weighing)
    with pytest.raises(ValueError, match="prompt weights must be finite, at least 0 and not all 0"):
        train(trainer, config)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_with_spo():
    trainer = train_mix(["deficit_sampler", "spo"], None)
    assert trainer.deficit_counts.sum() == trainer.spo_visits.sum() > 0


def test_methods_that_choose_themselves_are_refused():
    with pytest.raises(MixingError, match="both replace `choose_prompts`"):
        mix("deficit_sampler", "vade")
