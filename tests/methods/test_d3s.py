import itertools

import pytest
import torch
from harness import build, train
from hypothesis import given, settings
from hypothesis import strategies as st

from trl_ext import D3SConfig, D3STrainer, mix
from trl_ext.core.rollouts import group_advantages
from trl_ext.methods.d3s import d3s_schedule, d3s_select, d3s_tokens, max_variance_subset


REWARDS = torch.tensor([1, 0, 0, 0, 1, 1, 1, 0, 1, 1, 1, 1, 0, 0, 1, 1], dtype=torch.float64)
IDS = torch.arange(4).repeat_interleave(4)
ADVANTAGES = group_advantages(REWARDS, IDS)
ALL = torch.ones(16, dtype=torch.bool)


def rows(mask):
    return mask.nonzero().squeeze(1).tolist()


@pytest.mark.parametrize(
    ("size", "expected", "variance"),
    [
        (4, [0, 7, 12, 15], 1.499420),
        (6, [0, 7, 12, 13, 14, 15], 1.249527),
        (8, [0, 1, 6, 7, 12, 13, 14, 15], 0.999620),
    ],
)
def test_worked_selection_over_the_batch(size, expected, variance):
    chosen = d3s_select(ADVANTAGES, IDS, ALL, 2, size)
    assert rows(chosen) == expected
    assert ADVANTAGES[chosen].var(unbiased=False).item() == pytest.approx(variance, abs=1e-6)


def test_worked_selection_inside_groups():
    assert rows(d3s_select(ADVANTAGES, IDS, ALL, 2, 8, "within")) == [0, 3, 6, 7, 10, 11, 12, 15]
    found = d3s_select(ADVANTAGES, IDS, ALL, 2, 8, "within_then_cross", 3)
    assert rows(found) == [0, 2, 3, 6, 7, 13, 14, 15]
    some = ALL.clone()
    some[[0, 7]] = False
    assert rows(d3s_select(ADVANTAGES, IDS, some, 2, 4)) == [12, 13, 14, 15]


def test_worked_tokens():
    advantages = torch.tensor([1.5, -0.5, 0.5])
    entropies = torch.tensor([[0.1, 2, 0.5, 1], [1.5, 0.2, 0, 0.9], [0.7, 0.7, 0.7, 0]])
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0], [1, 1, 0, 0]], dtype=torch.bool)
    keys = advantages.abs().unsqueeze(1) * entropies
    kept = d3s_tokens(keys, mask, 0.4)
    assert kept.int().tolist() == [[0, 1, 1, 1], [1, 0, 0, 0], [0, 0, 0, 0]]
    assert d3s_tokens(keys, mask, 0.4, "response").int().tolist() == [[0, 1, 0, 1], [1, 1, 0, 0], [1, 0, 0, 0]]
    losses = torch.arange(1, 13).view(3, 4) / 10
    assert losses[kept].mean().item() == pytest.approx(0.35, abs=1e-6)
    per_row = (losses * kept).sum(1)[:2] / kept.sum(1)[:2]
    assert per_row.mean().item() == pytest.approx(0.4, abs=1e-6)


def test_worked_schedule():
    assert d3s_schedule(0.25, 4, 16, 0.2, 1.0) == (7, pytest.approx(0.4))
    assert d3s_schedule(-1, 4, 16, 0.2, 1.0) == (4, 0.2) and d3s_schedule(2, 4, 16, 0.2, 1.0) == (16, 1.0)
    assert d3s_schedule(0.5, 2, 3, 0.2, 1.0)[0] == 2  # half to even


def test_float_excess_and_ties():
    assert d3s_tokens(torch.rand(1, 20), torch.ones(1, 20, dtype=torch.bool), 0.55).sum() == 11
    kept = d3s_tokens(torch.zeros(2, 3), torch.ones(2, 3, dtype=torch.bool), 0.5)
    assert kept.tolist() == [[True, True, True], [False, False, False]]
    assert rows(max_variance_subset(torch.zeros(5), torch.ones(5, dtype=torch.bool), 2)) == [3, 4]


@settings(max_examples=80, deadline=None)
@given(st.lists(st.sampled_from([-1.5, -0.5, 0.0, 0.3, 1.0, 2.0]), min_size=2, max_size=8), st.integers(2, 7))
def test_the_subset_has_the_largest_variance(values, size):
    advantages = torch.tensor(values, dtype=torch.float64)
    chosen = max_variance_subset(advantages, torch.ones(len(values), dtype=torch.bool), size)
    assert chosen.sum() == min(size, len(values))
    best = max(
        advantages[list(subset)].var(unbiased=False)
        for subset in itertools.combinations(range(len(values)), int(chosen.sum()))
    )
    assert advantages[chosen].var(unbiased=False) == pytest.approx(best.item(), abs=1e-9)


def test_useful_share_is_the_cards():
    """64 prompts x 16, p ~ Beta(0.5, 0.5): share of non-zero advantages 0.72 of all, 1.00 of a half, 0.95 of 3/4."""
    torch.manual_seed(0)
    ids, shares = torch.arange(64).repeat_interleave(16), torch.zeros(3)
    for _ in range(10):
        p = torch.distributions.Beta(0.5, 0.5).sample((64,)).repeat_interleave(16)
        advantages = group_advantages((torch.rand(1024) < p).double(), ids)
        every = torch.ones(1024, dtype=torch.bool)
        for i, size in enumerate((1024, 512, 768)):
            shares[i] += (advantages[max_variance_subset(advantages, every, size)] != 0).double().mean() / 10
    assert shares.tolist() == pytest.approx([0.72, 1.0, 0.95], abs=0.05)


def test_in_a_run():
    class Checking(D3STrainer):
        def select_rollouts(self, rollouts):
            self.chosen, (n_keep, _) = super().select_rollouts(rollouts), self._d3s_now(rollouts)
            expected = d3s_select(rollouts.advantages, rollouts.group_ids, rollouts.scored, n_keep, max(2, 2 * n_keep))
            assert torch.equal(self.chosen, expected)
            self.kept = [*getattr(self, "kept", []), int(self.chosen.sum())]
            return self.chosen

        def token_mask(self, rollouts):
            self.left = super().token_mask(rollouts)
            return self.left

        def observe(self, rollouts):
            super().observe(rollouts)
            assert torch.equal(rollouts.selected, self.left.any(1))  # of some chosen ones no token is
            assert not (rollouts.selected & ~self.chosen).any()

        def _compute_loss(self, model, inputs):
            self.tokens = [*getattr(self, "tokens", []), int((inputs["completion_mask"] * inputs["tool_mask"]).sum())]
            assert self.tokens[-1] == inputs["num_items_in_batch"]
            return super()._compute_loss(model, inputs)

    trainer = train(Checking, max_steps=4, d3s_n_init=2, d3s_n_final=4)
    assert trainer.kept == [4, 4, 6, 8]  # of 8; 2.5 rounds to 2
    assert trainer.tokens[0] < trainer.tokens[-1]


@pytest.mark.parametrize("scale", [1.0, 1499.7, 1e12])
def test_ties_are_those_of_the_rule_at_any_scale(scale):
    equal, every = torch.full((3,), scale, dtype=torch.float64), torch.ones(3, dtype=torch.bool)
    assert max_variance_subset(equal, every, 2).tolist() == [False, True, True]  # none of the lower ones


def test_unscored_rollouts_are_never_kept():
    class Checking(D3STrainer):
        def select_rollouts(self, rollouts):
            selected = super().select_rollouts(rollouts)
            assert not selected[::2].any() and selected[1::2].all()
            return selected

    train(
        Checking, d3s_n_init=4, rewards=lambda completions, **kw: [None if i % 2 == 0 else float(i) for i in range(8)]
    )


def test_defaults_fit_a_single_rollout_per_prompt():
    args = mix("d3s", "spo").Config("unused", use_cpu=True, bf16=False)
    assert (args.num_generations, args.d3s_n_init, args.d3s_n_final) == (1, 1, 1)


def test_bad_input():
    for name, value in {
        "d3s_n_init": 0,
        "d3s_n_final": 9,
        "d3s_k_init": 0.0,
        "d3s_k_final": 0.1,
        "d3s_level": "typo",
        "d3s_schedule": "typo",
        "d3s_token_scope": "typo",
    }.items():
        with pytest.raises(ValueError, match=f"`{name}` must be"):
            D3SConfig("unused", use_cpu=True, bf16=False, num_generations=8, **{name: value})
    with pytest.raises(ValueError, match="`top_entropy_quantile`"):
        build(D3STrainer, top_entropy_quantile=0.5)
