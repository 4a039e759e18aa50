import itertools
import math

import pytest
import torch
from harness import train
from hypothesis import given, settings
from hypothesis import strategies as st

from trl_ext import KnapsackRLConfig, KnapsackRLTrainer, mix
from trl_ext.core.rollouts import group_advantages
from trl_ext.methods.knapsack_rl import (
    knapsack_budgets,
    knapsack_gain,
    knapsack_rate,
    knapsack_value,
    mixed_probability,
)


def test_values():
    cases = {(8, 0.1): 0.046132, (8, 0.5): 0.124023, (8, 0.9): 0.005126, (93, 0.02): 0.016274}
    for (n, p), value in cases.items():
        assert knapsack_value(n, p) == pytest.approx(value, abs=1e-6)
    assert mixed_probability(8, 0.1) == pytest.approx(0.569533, abs=1e-6)


@pytest.mark.parametrize(
    ("rates", "expected"),
    [
        ([0.05, 0.5, 0.9, 0.0, 1.0, None], [24, 8, 4, 2, 2, 8]),
        ([0.25, 0.75, 0.125, 0.5], [9, 6, 11, 6]),
        ([0.5, 0.0, 0.0, 1.0], [5, 13, 12, 2]),
        ([0.0, 1.0, 0.0, 1.0, 0.0], [12, 2, 12, 2, 12]),
    ],
)
def test_worked_budgets(rates, expected):
    assert knapsack_budgets(rates, 8) == expected


def test_worked_history():
    visits = [[1, 0, 0, 0, 0, 0, 0, 0], [0, 0], [1, 1, 1, 1]]
    found, earlier = [], []
    for visit in visits:
        found.append(knapsack_rate(visit, earlier))
        earlier = (earlier + visit)[-16:]
    assert found == pytest.approx([0.125, 0.1, 0.357143], abs=1e-6)
    assert knapsack_rate([1] * 16, [0] * 16) == 1.0


def test_worked_advantages():
    rewards = torch.zeros(93, dtype=torch.float64)
    rewards[5] = 1
    advantages = group_advantages(rewards, torch.zeros(93, dtype=torch.long), eps=1e-6)
    assert advantages[5].item() == pytest.approx(9.539864, abs=1e-6)
    assert advantages[0].item() == pytest.approx(-0.103694, abs=1e-6)
    assert advantages.clamp(-5, 5)[5] == 5


@settings(max_examples=60, deadline=None)
@given(st.lists(st.floats(0.02, 0.98), min_size=1, max_size=4), st.integers(2, 5), st.integers(0, 6))
def test_greedy_is_optimal(rates, group, extra):
    high = group + extra
    found = knapsack_budgets(rates, group, low=2, high=high, fallback=False)
    total = group * len(rates)
    assert sum(found) == total and all(2 <= n <= high for n in found)
    best = max(
        sum(map(knapsack_value, budgets, rates))
        for budgets in itertools.product(range(2, high + 1), repeat=len(rates))
        if sum(budgets) == total
    )
    assert sum(map(knapsack_value, found, rates)) == pytest.approx(best, abs=1e-12)


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.one_of(st.none(), st.sampled_from([0.0, 1.0]), st.floats(0.01, 0.99)), min_size=1, max_size=12),
    st.integers(2, 8),
    st.booleans(),
)
def test_the_total_never_changes(rates, group, fallback):
    budgets = knapsack_budgets(rates, group, high=16, fallback=fallback)
    assert sum(budgets) == group * len(rates) and min(budgets) >= 2
    unseen = [n for n, rate in zip(budgets, rates, strict=True) if rate is None]
    if 0.0 in rates:
        assert all(n == group for n in unseen)


def test_gains_do_not_cancel():
    assert knapsack_gain(200, 0.1) > knapsack_gain(201, 0.1) > 0
    assert knapsack_gain(5, 0.3) == pytest.approx(knapsack_value(6, 0.3) - knapsack_value(5, 0.3), abs=1e-15)


def test_impossible_budgets_are_named():
    with pytest.raises(ValueError, match="least budgets of 2 prompts exceed"):
        knapsack_budgets([0.0, 0.0], 2, zero=3)
    with pytest.raises(ValueError, match="`knapsack_zero_rollouts` must be between 0 and num_generations"):
        KnapsackRLConfig("unused", use_cpu=True, bf16=False, num_generations=4, knapsack_zero_rollouts=5)


def test_single_rollouts_cannot_be_divided():
    with pytest.raises(ValueError, match="`num_generations` must be at least 2 for Knapsack RL"):
        mix("knapsack_rl", "spo").Config("unused", use_cpu=True, bf16=False)


def test_share_of_rollouts_with_a_signal_is_the_cards():
    """p ~ Beta(0.3, 0.5), 256 prompts, G = 8: the share of rollouts in mixed groups rises from 0.51 to 0.79."""
    torch.manual_seed(0)
    uniform, allotted = [], []
    for _ in range(10):
        rates = torch.distributions.Beta(0.3, 0.5).sample((256,)).double().clamp(1e-6, 1 - 1e-6).tolist()
        budgets = knapsack_budgets(rates, 8)
        uniform.append(sum(mixed_probability(8, p) for p in rates) / 256)
        allotted.append(sum(n * mixed_probability(n, p) for n, p in zip(budgets, rates, strict=True)) / 2048)
    assert sum(uniform) / 10 == pytest.approx(0.51, abs=0.03)
    assert sum(allotted) / 10 == pytest.approx(0.79, abs=0.03)


def test_the_trainer_keeps_history_and_total():
    class Checking(KnapsackRLTrainer):
        def observe(self, rollouts):
            before = self.knapsack_counts.clone()
            super().observe(rollouts)
            assert len(rollouts) == 16 and len(rollouts.group_ids.unique()) == 4
            added = (self.knapsack_counts - before)[rollouts.prompt_index.unique()]
            assert added.tolist() == torch.bincount(rollouts.prompt_index)[rollouts.prompt_index.unique()].tolist()
            self.sizes = [*getattr(self, "sizes", []), torch.bincount(rollouts.group_ids).tolist()]

    from harness import arithmetic

    trainer = train(
        Checking,
        data=arithmetic().select(range(4)),
        per_device_train_batch_size=16,
        max_steps=8,
        knapsack_min_history=4,
        knapsack_zero_rollouts=1,
        rewards=lambda prompts, completions, **kw: [
            float(sum(map(ord, c)) % 2) * (len(p) > 4) for p, c in zip(prompts, completions, strict=True)
        ],
    )
    assert trainer.sizes[0] == [4, 4, 4, 4]  # nothing seen yet: plain GRPO
    assert any(size != [4, 4, 4, 4] for size in trainer.sizes[1:])
    for row in range(4):
        outcomes, count = trainer.knapsack_outcomes[row], int(trainer.knapsack_counts[row])
        assert 0 <= trainer.knapsack_rates[row] <= 1 and count > 0
        assert not outcomes[: max(0, 16 - count)].any()


def test_rare_successes_are_clipped():
    trainer = train(KnapsackRLTrainer, knapsack_advantage_clip=0.5, max_steps=1)
    assert max(map(abs, trainer._logs["advantages"])) <= 0.5
    assert math.isfinite(trainer.state.log_history[0]["knapsack/clipped_advantage"])


def test_an_answer_that_was_cut_off_is_a_failure():
    settings = {"rewards": lambda completions, **kw: [1.0] * len(completions), "max_completion_length": 1}
    settings |= {"temperature": 3.0, "max_steps": 1}
    trainer = train(KnapsackRLTrainer, **settings)
    seen = trainer.knapsack_counts > 0
    assert seen.any() and (trainer.knapsack_rates[seen] < 0.5).all()
    masked = train(KnapsackRLTrainer, mask_truncated_completions=True, **settings)
    assert masked.knapsack_counts.sum() < 4  # not counted at all


def test_rates_that_are_almost_0_or_1():
    """1 - p is 1 where p is tiny."""
    assert sum(knapsack_budgets([1e-17, 0.5, 1 - 1e-16], 8)) == 24
