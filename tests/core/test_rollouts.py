import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from trl.trainer.utils import nanstd

from trl_ext.core.rollouts import (
    Scored,
    group_advantages,
    group_table,
    nonzero,
    normalized_sum_advantages,
    prompt_visits,
    weighted_sum,
    zero_signal,
)


NAN = float("nan")
rewards_of_groups = st.lists(
    st.lists(st.one_of(st.floats(-5, 5, width=32), st.just(NAN)), min_size=1, max_size=6), min_size=1, max_size=5
)


def flatten(groups):
    rewards = torch.tensor([r for group in groups for r in group])
    ids = torch.tensor([i for i, group in enumerate(groups) for _ in group])
    return rewards, ids


def test_group_table_of_unequal_groups():
    values = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0])
    table, row, column = group_table(values, torch.tensor([7, 2, 7, 7, 2]))
    assert torch.equal(table.nan_to_num(-1), torch.tensor([[2.0, 5.0, -1.0], [1.0, 3.0, 4.0]]))
    assert torch.equal(table[row, column], values)


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 4), st.integers(2, 6), st.integers(0, 10_000), st.sampled_from(["group", "batch", "none"]))
def test_equal_groups_give_trls_numbers_exactly(m, g, seed, scale):
    generator = torch.Generator().manual_seed(seed)
    rewards = torch.randn(m * g, generator=generator).round(decimals=1)
    rewards[torch.rand(m * g, generator=generator) < 0.2] = NAN
    mean = torch.nanmean(rewards.view(-1, g), dim=1).repeat_interleave(g)
    expected = rewards - mean
    if scale == "group":
        expected = expected / (nanstd(rewards.view(-1, g), dim=1).repeat_interleave(g) + 1e-4)
    elif scale == "batch":
        expected = expected / (nanstd(rewards) + 1e-4)
    ids = torch.arange(m).repeat_interleave(g)
    assert torch.equal(group_advantages(rewards, ids, scale), expected.nan_to_num(nan=0.0))


@settings(max_examples=100, deadline=None)
@given(rewards_of_groups, st.randoms(use_true_random=False))
def test_order_and_neighbours_do_not_matter(groups, rng):
    rewards, ids = flatten(groups)
    advantages = group_advantages(rewards, ids)
    assert advantages.isfinite().all() and (advantages[rewards.isnan()] == 0).all()
    order = list(range(len(rewards)))
    rng.shuffle(order)
    assert torch.allclose(group_advantages(rewards[order], ids[order]), advantages[order], atol=1e-4)
    for i in range(len(groups)):
        alone = group_advantages(rewards[ids == i], ids[ids == i])
        assert torch.allclose(alone, advantages[ids == i], atol=1e-6)


@settings(max_examples=100, deadline=None)
@given(rewards_of_groups)
def test_zero_signal_is_equality(groups):
    rewards, ids = flatten(groups)
    flags = zero_signal(rewards, ids)
    for i, group in enumerate(groups):
        known = {r for r in group if r == r}
        assert flags[ids == i].unique().tolist() == [len(known) < 2]


def test_zero_signal_where_a_float_deviation_is_not_zero():
    rewards = torch.full((8,), 0.95)
    assert rewards.std() > 0 and zero_signal(rewards, torch.zeros(8, dtype=torch.long)).all()


def test_weighted_sum_of_partly_and_wholly_unscored_rows():
    matrix = torch.tensor([[1.0, NAN], [NAN, NAN], [2.0, 3.0]])
    total = weighted_sum(matrix, torch.tensor([1.0, 10.0]))
    assert total[0] == 1 and total[1].isnan() and total[2] == 32


def test_normalized_sum_with_unequal_groups():
    matrix = torch.tensor([[1.0, 0.0], [0.0, 2.0], [1.0, 1.0], [3.0, 1.0], [2.0, 4.0]])
    ids = torch.tensor([0, 0, 1, 1, 1])
    parts = []
    for i in (0, 1):
        group = matrix[ids == i]
        parts.append((group - group.mean(0)) / (group.std(0) + 1e-4))
    total = torch.cat(parts).sum(1)
    expected = (total - total.mean()) / (total.std() + 1e-4)
    assert torch.allclose(normalized_sum_advantages(matrix, torch.ones(2), ids), expected, atol=1e-6)


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 4), st.integers(2, 5), st.integers(1, 3), st.integers(0, 10_000))
def test_normalized_sum_of_partly_unscored_rows_is_trls(m, g, k, seed):
    """A lone score of its group has no standard deviation, and its rollout counts in the batch with 0."""
    generator = torch.Generator().manual_seed(seed)
    rewards = torch.randn(m * g, k, generator=generator, dtype=torch.float64)
    rewards[torch.rand(m * g, k, generator=generator) < 0.5] = NAN
    weights = torch.rand(k, generator=generator, dtype=torch.float64)
    table = rewards.view(m, g, k)
    scaled = (table - torch.nanmean(table, dim=1, keepdim=True)) / (nanstd(table, dim=1, keepdim=True) + 1e-4)
    total = (scaled.view(-1, k) * weights).nansum(dim=1)
    total[rewards.isnan().all(dim=1)] = NAN
    expected = ((total - torch.nanmean(total)) / (nanstd(total) + 1e-4)).nan_to_num(nan=0.0)
    ids = torch.arange(m).repeat_interleave(g)
    assert torch.equal(normalized_sum_advantages(rewards, weights, ids), expected)


def test_without_rollouts():
    none, ids = torch.zeros(0), torch.zeros(0, dtype=torch.long)
    assert zero_signal(none, ids).shape == group_advantages(none, ids).shape == (0,)


def test_shares_below_one_are_divisors():
    assert nonzero(torch.tensor([0.0, 0.25, 3.0])).tolist() == [1, 0.25, 3] and nonzero(0) == 1


def test_one_rollout_per_group_gives_zero():
    assert group_advantages(torch.tensor([1.0, 5.0]), torch.tensor([0, 1])).tolist() == [0.0, 0.0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_dtype_is_kept(dtype):
    assert group_advantages(torch.tensor([1.0, 0.0], dtype=dtype), torch.zeros(2, dtype=torch.long)).dtype == dtype


def test_visits_of_prompts():
    """Groups of one prompt are joined; unscored rollouts and answers to a changed prompt are left out."""
    nan = float("nan")
    scored = Scored(
        prompt_index=torch.tensor([7, 7, 3, 3, 7, 7, 9]),
        group_ids=torch.tensor([0, 0, 1, 1, 2, 2, 3]),
        reward_matrix=torch.tensor([[1.0, 2], [nan, nan], [0, nan], [1, 0], [3, 0], [0, 0], [nan, nan]]),
        reward_weights=torch.tensor([1.0, 0.5]),
        lengths=torch.ones(7),
        truncated=torch.zeros(7, dtype=torch.bool),
        changed_prompt=torch.tensor([False] * 3 + [True] + [False] * 3),
    )
    rows, rewards = prompt_visits(scored)
    assert rows.tolist() == [3, 7] and rewards.dtype == torch.float64
    assert rewards[1].tolist() == [2, 3, 0] and rewards[0, 0] == 0 and rewards[0, 1:].isnan().all()
    rows, rewards = prompt_visits(scored, torch.full((7,), nan))
    assert len(rows) == 0 and rewards.shape[0] == 0
