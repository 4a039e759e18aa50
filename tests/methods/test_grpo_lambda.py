import pytest
import torch
from harness import build, train

from trl_ext import GRPOLambdaConfig, GRPOLambdaTrainer
from trl_ext.core.rollouts import group_advantages
from trl_ext.methods.grpo_lambda import grpo_lambda_rewards, grpo_lambda_top_groups


def groups(m, g):
    return torch.arange(m).repeat_interleave(g)


def test_example_a():
    correct = torch.tensor([1, 1, 1, 0, 1, 0, 0, 0, 1, 1, 0, 0], dtype=torch.bool)
    lengths = torch.tensor([100, 200, 300, 50, 80, 60, 70, 90, 120, 40, 30, 20])
    ids = groups(3, 4)
    assert grpo_lambda_top_groups(correct, ids, 0.2).tolist() == [True] * 4 + [False] * 8
    rewards = grpo_lambda_rewards(correct, lengths, ids, 0.2, 0.6)
    expected = torch.tensor([0.863738, 0.7, 0.536262, 0, 1, 0, 0, 0, 1, 1, 0, 0], dtype=torch.float64)
    assert torch.allclose(rewards, expected, atol=1e-6)
    expected = [0.903870, 0.466960, 0.030050, -1.400880, 1.499700, -0.499900, -0.499900, -0.499900]
    expected += [0.865875, 0.865875, -0.865875, -0.865875]
    assert torch.allclose(group_advantages(rewards, ids), torch.tensor(expected, dtype=torch.float64), atol=1e-6)


def test_example_b():
    correct = torch.tensor([1, 0, 0, 0, 1, 1, 1, 1], dtype=torch.bool)
    lengths = torch.tensor([10, 20, 30, 40, 50, 50, 50, 50])
    rewards = grpo_lambda_rewards(correct, lengths, groups(2, 4), 0.5, 0.2)
    expected = torch.tensor([1, 0, 0, 0, 0.9, 0.9, 0.9, 0.9], dtype=torch.float64)
    assert torch.allclose(rewards, expected, atol=1e-6)
    assert (group_advantages(rewards, groups(2, 4))[4:] == 0).all()


def test_quota():
    correct = torch.ones(100, dtype=torch.bool)
    assert grpo_lambda_top_groups(correct, groups(100, 1), 0.07).sum() == 7  # not 8, though 0.07 * 100 exceeds 7
    assert grpo_lambda_top_groups(correct, groups(100, 1), 0.001).sum() == 1
    assert grpo_lambda_top_groups(correct, groups(100, 1), 0.0).sum() == 0
    ids = torch.tensor([9, 9, 4, 4])  # at a tie the group that comes first, whatever its id
    assert grpo_lambda_top_groups(torch.ones(4, dtype=torch.bool), ids, 0.5).tolist() == [True, True, False, False]


def test_lengths():
    correct = torch.tensor([1, 1, 1], dtype=torch.bool)
    sample = grpo_lambda_rewards(correct, torch.tensor([1, 2, 3]), groups(1, 3), 1.0, 0.6, "sample")
    assert torch.allclose(sample, 1 - 0.6 * torch.sigmoid(torch.tensor([-1.0, 0, 1], dtype=torch.float64)))
    one = grpo_lambda_rewards(correct[:1], torch.tensor([7]), groups(1, 1), 1.0, 0.6, "sample")
    assert one.tolist() == [0.7]


def test_correlation_with_length_where_the_card_finds_it():
    """Among correct answers length and advantage go together only in the groups that answer well."""
    generator = torch.Generator().manual_seed(0)
    ids, well, badly = groups(64, 8), [], []
    for _ in range(10):
        rates = torch.rand(64, generator=generator).repeat_interleave(8)
        correct = torch.rand(512, generator=generator) < rates
        lengths = torch.exp(torch.randn(512, generator=generator))
        advantages = group_advantages(grpo_lambda_rewards(correct, lengths, ids), ids)
        for rows in correct.view(64, 8).nonzero()[:, 0].unique():
            mine = (ids == rows) & correct
            if mine.sum() > 2:
                pair = torch.stack([lengths[mine].log().double(), advantages[mine]])
                value = 0.0 if pair[1].std() < 1e-9 else torch.corrcoef(pair)[0, 1].item()
                (well if mine.sum() > 4 else badly).append(value)
    assert sum(badly) / len(badly) == pytest.approx(0.0, abs=0.02)
    assert sum(well) / len(well) == pytest.approx(-0.37, abs=0.12)


def test_unknown_correctness_makes_a_rollout_unscorable():
    def correctness(completions, **kwargs):
        return [None if i == 0 else float(i % 2) for i in range(len(completions))]

    def format(completions, **kwargs):
        return [0.5] * len(completions)

    class Checking(GRPOLambdaTrainer):
        def observe(self, rollouts):
            super().observe(rollouts)
            assert rollouts.rewards.isnan().tolist() == [True] + [False] * 7
            assert rollouts.advantages[0] == 0 and rollouts.rewards[2] == 0.5 and rollouts.rewards[1] <= 1.5

    train(Checking, rewards=[correctness, format])


def test_bad_input():
    with pytest.raises(ValueError, match=r"`lambda_correctness_reward` names the reward function 'typo'.*parity"):
        build(GRPOLambdaTrainer, lambda_correctness_reward="typo")
    with pytest.warns(UserWarning, match="single group"):
        build(GRPOLambdaTrainer, num_generations=8)
    for name, value in {"lambda_top": 1.5, "lambda_length_alpha": 1.0, "lambda_length_std": "typo"}.items():
        with pytest.raises(ValueError, match=f"`{name}` must be"):
            GRPOLambdaConfig("unused", use_cpu=True, bf16=False, **{name: value})
