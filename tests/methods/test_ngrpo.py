import pytest
import torch
from harness import train
from hypothesis import given, settings
from hypothesis import strategies as st

from trl_ext import NGRPOConfig, NGRPOTrainer
from trl_ext.core.loss import clipped_loss
from trl_ext.core.rollouts import group_advantages
from trl_ext.methods.ngrpo import all_maximal, ngrpo_advantages


def one_group(*rewards):
    return torch.tensor(rewards, dtype=torch.float64), torch.zeros(len(rewards), dtype=torch.long)


def test_worked_examples():
    assert torch.allclose(ngrpo_advantages(*one_group(*[0] * 8)), torch.tensor(-0.333332).double(), atol=1e-6)
    found = ngrpo_advantages(*one_group(1, 0, 0, 0))
    expected = torch.tensor([1.095443, -0.730295, -0.730295, -0.730295], dtype=torch.float64)
    assert torch.allclose(found, expected, atol=1e-6)


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss"),
    [(1.3, 1, -1.24), (0.8, 1, -0.8), (1.3, -1, 1.3), (0.8, -1, 0.84), (1.0, -0.333332, 0.333332)],
)
def test_worked_losses(ratio, advantage, loss):
    found = clipped_loss(torch.tensor(ratio).double().log(), torch.tensor(advantage).double(), 0.84, 1.24)
    assert found.item() == pytest.approx(loss, abs=1e-6)


def test_groups_of_largest_rewards_and_of_one():
    assert (ngrpo_advantages(*one_group(1, 1, 1)) == 0).all()
    assert ngrpo_advantages(*one_group(0)).item() == pytest.approx(-0.7071, abs=1e-4)
    assert ngrpo_advantages(*one_group(1)).item() == 0
    assert ngrpo_advantages(*one_group(0), num_virtual=0).item() == 0
    nan = float("nan")
    assert ngrpo_advantages(*one_group(nan, 0, nan)).tolist() == pytest.approx([0, -0.7071, 0], abs=1e-4)
    assert ngrpo_advantages(*one_group(nan, nan)).tolist() == [0, 0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("size", "reward"), [(8, 0.7), (8, 0.9), (16, 1.3), (7, 0.1)])
def test_equal_rewards_are_no_signal_whatever_their_rounding(size, reward, dtype):
    rewards, ids = torch.full((size,), reward, dtype=dtype), torch.zeros(size, dtype=torch.long)
    assert (ngrpo_advantages(rewards, ids, reward) == 0).all()
    assert (ngrpo_advantages(rewards, ids, num_virtual=0) == 0).all()
    nearly = rewards + torch.linspace(0, 5e-7, size)  # weighted sums that differ by their rounding
    assert all_maximal(nearly, ids, reward).all() and (ngrpo_advantages(nearly, ids, reward) == 0).all()


@settings(max_examples=60, deadline=None)
@given(st.lists(st.sampled_from([0.0, 0.5, 1.0]), min_size=2, max_size=8))
def test_the_sum_is_never_positive_and_without_imaginary_rollouts_it_is_grpo(rewards):
    found = ngrpo_advantages(*one_group(*rewards))
    assert found.sum() <= 1e-9 and (found.sum() < -1e-9 or all(r == 1 for r in rewards))
    plain = ngrpo_advantages(*one_group(*rewards), num_virtual=0)
    assert torch.allclose(plain, group_advantages(*one_group(*rewards), eps=1e-6), atol=1e-9)


def test_all_maximal():
    nan = float("nan")
    rewards = torch.tensor([1.0, 1.0, 1.0, nan, nan, nan, 0.0, 1.0])
    ids = torch.tensor([0, 0, 1, 1, 2, 2, 3, 3])
    assert all_maximal(rewards, ids).tolist() == [True] * 4 + [False] * 4


def test_share_with_a_signal_is_the_cards():
    """p ~ Beta(0.3, 0.3), G = 8: 0.462 of the prompts have a non-zero advantage with GRPO, 0.734 here."""
    torch.manual_seed(0)
    p = torch.distributions.Beta(0.3, 0.3).sample((4000,)).repeat_interleave(8)
    rewards, ids = (torch.rand(32_000) < p).double(), torch.arange(4000).repeat_interleave(8)
    shares = [
        (advantages.view(-1, 8) != 0).any(1).double().mean().item()
        for advantages in (group_advantages(rewards, ids), ngrpo_advantages(rewards, ids))
    ]
    assert shares == pytest.approx([0.462, 0.734], abs=0.03)


def test_in_a_run():
    right_or_wrong = lambda completions, **kw: [1.0] * 4 + [0.0] * 4  # noqa: E731

    class Checking(NGRPOTrainer):
        def observe(self, rollouts):
            super().observe(rollouts)
            assert (rollouts.advantages[:4] == 0).all() and (rollouts.advantages[4:] < -0.4).all()
            assert rollouts.selected.tolist() == [not self.args.ngrpo_drop_all_max] * 4 + [True] * 4

    for drop in (True, False):
        trainer = train(Checking, rewards=right_or_wrong, ngrpo_drop_all_max=drop)
        assert trainer.state.log_history[0]["ngrpo/all_max"] == 0.5
    assert (trainer.epsilon_low, trainer.epsilon_high) == (0.16, 0.24)
    with pytest.warns(UserWarning, match="exceeds `ngrpo_reward_max`"):
        train(NGRPOTrainer, rewards=right_or_wrong, ngrpo_reward_max=0.5, max_steps=1)


def test_settings_out_of_range_are_named():
    for name, value in {"ngrpo_reward_max": float("inf"), "ngrpo_num_virtual": -1, "ngrpo_eps": 0.0}.items():
        with pytest.raises(ValueError, match=f"`{name}` must be"):
            NGRPOConfig("unused", use_cpu=True, bf16=False, **{name: value})
