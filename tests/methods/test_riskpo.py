import math

import pytest
import torch
from harness import arithmetic, build, train
from hypothesis import given, settings
from hypothesis import strategies as st

from trl_ext import MixingError, RiskPOConfig, RiskPOTrainer, mix
from trl_ext.core.prompts import make_generator
from trl_ext.core.rollouts import zero_signal
from trl_ext.methods.riskpo import (
    assign_credit,
    bundle_quantiles,
    bundle_scores,
    divide_by_std,
    empirical_quantiles,
    make_bundles,
    risk_advantages,
    track_quantiles,
)


NAN = math.nan


def f64(*values):
    return torch.tensor(values, dtype=torch.float64)


def close(a, b):
    return torch.allclose(torch.as_tensor(a).double(), torch.as_tensor(b).double(), atol=1e-6, rtol=0, equal_nan=True)


REWARDS = f64(0, 1, 0, 1, 0, 0, 1, 1, 1, 1, 0, 1)
GROUPS = torch.arange(3).repeat_interleave(4)


# -------------------------------------------------------------------------------------------- the worked examples


def test_the_papers_advantages():
    bundles, sets = make_bundles(GROUPS, 3)
    assert bundles.tolist() == [0, 1, 2, 3] * 3 and sets.tolist() == [0] * 4
    scores = bundle_scores(REWARDS, bundles)
    assert scores.tolist() == [1, 2, 1, 3]
    advantages = risk_advantages(scores, 1.0, 2.5, 0.5)
    assert close(advantages, f64(-1.5, -0.5, -1.5, 0))
    assert close(assign_credit(advantages, REWARDS, GROUPS, bundles), advantages.repeat(3))


def test_the_codes_advantages():
    bundles, sets = make_bundles(GROUPS, 3)
    scores = bundle_scores(REWARDS, bundles)
    found = risk_advantages(scores, 1.0, 2.5, 0.5, "code")
    assert close(found, f64(-0.999998, -0.333333, -0.999998, 0))
    found = divide_by_std(risk_advantages(scores, 1.0, 2.5, 0.5, "code", natural_baseline=False), scores, sets)
    assert close(found, f64(0, 0.696309, 0, 1.044463))
    credited = assign_credit(found, REWARDS, GROUPS, bundles, "sum-mean")
    expected = [0, 1.392618, 0, 0.417785, 0, -1.392618, 0, 0.417785, 0, 0.696309, 0, 0.208893]
    assert close(credited, expected)


def test_the_tracker():
    quantiles = f64(NAN, NAN)
    for scores, expected in (([0, 1, 2, 3], (0.6, 2.4)), ([1, 1, 2, 4], (0.62, 2.405)), ([5] * 4, (0.64, 2.485))):
        quantiles = track_quantiles(quantiles, f64(*scores), (0.2, 0.8), 0.1)
        assert close(quantiles, expected)


# ------------------------------------------------------------------------------------------------- edge cases


def test_the_last_set_may_be_smaller_and_groups_unequal():
    groups = torch.tensor([3, 0, 0, 0, 3, 7, 7, 7])
    bundles, sets = make_bundles(groups, 2)
    assert bundles.tolist() == [0, 0, 1, -1, 1, 2, 3, 4] and sets.tolist() == [0, 0, 1, 1, 1]
    credited = assign_credit(torch.ones(5), torch.ones(8), groups, bundles)
    assert credited.tolist() == [1, 1, 1, 0, 1, 1, 1, 1]


def test_bundles_of_one_prompt_are_single_rewards():
    bundles, _ = make_bundles(GROUPS, 1)
    assert torch.equal(bundle_scores(REWARDS, bundles), REWARDS)


def test_an_unscored_response_drops_its_bundle():
    rewards = REWARDS.clone()
    rewards[1] = NAN
    bundles, sets = make_bundles(GROUPS, 3)
    scores = bundle_scores(rewards, bundles)
    assert scores.isnan().tolist() == [False, True, False, False]
    kept = scores[~scores.isnan()]
    assert close(empirical_quantiles(scores, (0.2, 0.8)), empirical_quantiles(kept, (0.2, 0.8)))
    assert close(track_quantiles(f64(1, 2), scores), track_quantiles(f64(1, 2), kept))
    assert torch.equal(track_quantiles(f64(1, 2), f64(NAN)), f64(1, 2))
    assert track_quantiles(f64(NAN, NAN), f64(NAN)).isnan().all()
    divided = divide_by_std(torch.ones(4), scores, sets)
    assert close(divided[[0, 2, 3]], 1 / (kept.std() + 1e-6))
    for credit in ("uniform", "std", "score", "sum-mean"):
        credited = assign_credit(risk_advantages(scores, 1.0, 2.5), rewards, GROUPS, bundles, credit)
        assert (
            credited.isfinite().all() and (credited[bundles == 1] == 0).all() and (credited[bundles == 0] != 0).any()
        )


def test_no_spread_divides_by_one():
    equal = divide_by_std(f64(2, 2, 2, 3), f64(3, 3, 3, 5), torch.tensor([0, 0, 0, 1]))  # one bundle in the second set
    assert close(equal, f64(2, 2, 2, 3) / (1 + 1e-6))
    rounded = divide_by_std(f64(2, 2), f64(0.3, 0.1 + 0.2), torch.zeros(2, dtype=torch.long))
    assert close(rounded, f64(2, 2) / (1 + 1e-6))
    nearly = assign_credit(f64(-2, -2), f64(0, 1e-3), torch.zeros(2, dtype=torch.long), torch.arange(2), "std")
    assert close(nearly, f64(-2, -2) / (1 + 1e-6))
    credited = assign_credit(f64(-2), f64(1, 1, 0, 1), torch.tensor([0, 0, 1, 1]), torch.tensor([0, -1, 0, -1]), "std")
    assert close(credited, [-2 / (1 + 1e-6), 0, -2 / (0.5**0.5 + 1e-6), 0])


def test_credit_by_score_and_of_a_bundle_without_a_difference():
    bundles, _ = make_bundles(GROUPS, 3)
    found = assign_credit(f64(-1, -1, -1, -1), REWARDS, GROUPS, bundles, "score")
    assert torch.equal(found, torch.where(REWARDS > 0, -0.5, -1.5).double())
    same = assign_credit(
        f64(-3, -3), f64(1, 1, 0, 0), torch.tensor([0, 0, 1, 1]), torch.tensor([0, 1, 0, 1]), "sum-mean"
    )
    assert close(same, [-1.5] * 4)  # 0 above the mean in all: in equal parts


def test_ties_at_the_quantile_are_not_below():
    assert close(track_quantiles(f64(1, 2), f64(1, 1, 2, 3), (0.2, 0.8), 0.1), f64(1 + 0.02, 2 + 0.1 * (0.8 - 0.5)))


def test_sources_of_quantiles():
    scores, sets, levels = f64(0, 1, 2, 3, 10, 11, 12, NAN), torch.arange(2).repeat_interleave(4), (0.25, 0.75)
    own = torch.stack([f64(0.75, 2.25).expand(4, 2), f64(10.5, 11.5).expand(4, 2)]).flatten(0, 1)
    assert close(bundle_quantiles(scores, sets, f64(1, 2), levels, "track"), f64(1, 2).expand(8, 2))
    assert close(bundle_quantiles(scores, sets, f64(1, 2), levels, "batch"), own)
    assert close(bundle_quantiles(scores, sets, f64(1, 2), levels, "mix"), (own + f64(1, 2)) / 2)
    first = bundle_quantiles(scores, sets, f64(NAN, NAN), levels, "mix")
    assert close(first, (own + empirical_quantiles(scores, levels)) / 2)


# --------------------------------------------------------------------------------------------------- properties


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 7), st.integers(1, 6), st.integers(1, 8), st.integers(0, 99))
def test_every_response_is_used_once(prompts, responses, size, seed):
    order = torch.randperm(prompts * responses, generator=make_generator(seed, "test"))
    groups = torch.arange(prompts).repeat_interleave(responses)[order]
    bundles, sets = make_bundles(groups, size, make_generator(seed, "riskpo"))
    assert len(sets) == responses * -(-prompts // size) and (bundles >= 0).all()
    for bundle, number in enumerate(sets.tolist()):
        expected = list(range(number * size, min((number + 1) * size, prompts)))
        assert sorted(groups[bundles == bundle].tolist()) == expected
    again, _ = make_bundles(groups, size, make_generator(seed, "riskpo"))
    assert torch.equal(bundles, again)


def test_permutations_are_independent_of_each_other():
    bundles, _ = make_bundles(torch.arange(2).repeat_interleave(100), 2, make_generator(0, "riskpo"))
    assert (bundles[:100] == bundles[100:]).sum() < 10 and (bundles[:100] == torch.arange(100)).sum() < 10


@settings(max_examples=100, deadline=None)
@given(st.floats(-2, 5), st.floats(0.01, 3), st.floats(0, 2), st.sampled_from(["paper", "code"]))
def test_shape_of_the_advantage(low, width, omega, form):
    high = low + width
    scores = torch.linspace(low - 2, high + 2, 401, dtype=torch.float64)
    found = risk_advantages(scores, low, high, omega, form)
    assert (found <= 1e-9).all() and (found.diff() >= -1e-9).all() and (found[scores >= high].abs() < 1e-9).all()
    tail, middle = (
        (1 + omega, 1.0) if form == "paper" else (s / (2 + omega) for s in ((1 + omega) / 0.200001, 1 / 0.600001))
    )
    for begin, end, slope in ((low - 2, low, tail), (low, high, middle)):
        a, b = risk_advantages(f64(begin, end), low, high, omega, form)
        assert (b - a).item() == pytest.approx(slope * (end - begin), abs=1e-6)
    shifted = risk_advantages(scores, low, high, omega, form, natural_baseline=False) - found
    assert close(shifted, shifted[0].expand(401))


@settings(max_examples=60, deadline=None)
@given(st.lists(st.sampled_from([0.0, 0.5, 1.0]), min_size=12, max_size=12), st.integers(1, 3))
def test_sum_mean_shares_out_the_bundles_advantage(rewards, size):
    rewards = f64(*rewards)
    bundles, sets = make_bundles(GROUPS, size)
    advantages = -torch.arange(1, len(sets) + 1).double()
    assert close(bundle_scores(assign_credit(advantages, rewards, GROUPS, bundles, "sum-mean"), bundles), advantages)


def test_tracked_quantiles_find_those_of_the_distribution():
    generator, quantiles = torch.Generator().manual_seed(0), f64(NAN, NAN)
    for step in range(2000):
        scores = torch.rand(32, generator=generator, dtype=torch.float64)
        quantiles = track_quantiles(quantiles, scores if step else scores + 3, lr=0.02)  # the first batch misleads
    assert quantiles.tolist() == pytest.approx([0.2, 0.8], abs=0.05)


def test_share_with_a_signal():
    """Success rate 0.05, 8 responses: 34 % of the groups differ, 87 % of the sets of 5 groups."""
    generator = torch.Generator().manual_seed(0)
    groups = torch.arange(20_000).repeat_interleave(8)
    rewards = (torch.rand(len(groups), generator=generator) < 0.05).double()
    bundles, sets = make_bundles(groups, 5, generator)
    assert (~zero_signal(rewards, groups)).double().mean().item() == pytest.approx(1 - 0.95**8 - 0.05**8, abs=0.01)
    found = (~zero_signal(bundle_scores(rewards, bundles), sets)).double().mean().item()
    equal = sum((math.comb(5, k) * 0.05**k * 0.95 ** (5 - k)) ** 8 for k in range(6))
    assert found == pytest.approx(1 - equal, abs=0.02) and found > 0.85


# ------------------------------------------------------------------------------------------------- in a real run


def rare(completions, **kwargs):
    texts = [c if isinstance(c, str) else c[-1]["content"] for c in completions]
    return [float(sum(map(ord, text)) % 7 == 0) for text in texts]


class Recording(RiskPOTrainer):
    def observe(self, rollouts):
        before = self.riskpo_quantiles.clone()
        super().observe(rollouts)
        self.record = [*getattr(self, "record", []), (before, rollouts, self.riskpo_quantiles.clone())]


@pytest.mark.parametrize("permute", [True, False])
def test_the_run_follows_the_equations_step_by_step(permute):
    options = {"riskpo_bundle_size": 3, "riskpo_permute": permute, "riskpo_omega": 1.0}
    trainer = train(Recording, rewards=rare, per_device_train_batch_size=24, max_steps=4, **options)
    assert trainer.record[0][0].isnan().all()
    for generation, (before, rollouts, after) in enumerate(trainer.record):
        generator = make_generator(3, "riskpo", generation) if permute else None
        bundles, _ = make_bundles(rollouts.group_ids, 3, generator)
        scores = bundle_scores(rollouts.rewards.double(), bundles)
        used = empirical_quantiles(scores, (0.2, 0.8)) if generation == 0 else before
        assert close(rollouts.advantages, risk_advantages(scores, *used, 1.0)[bundles])
        assert close(after, track_quantiles(before, scores))
        logged = trainer.state.log_history[generation]
        assert logged["riskpo/quantile_low"] == pytest.approx(used[0].item(), abs=1e-6)
        assert logged["riskpo/quantile_high"] == pytest.approx(used[1].item(), abs=1e-6)
        nonzero = (rollouts.advantages != 0).float().mean().item()
        assert logged["riskpo/nonzero_advantage"] == pytest.approx(nonzero, abs=1e-6)
    assert not torch.equal(trainer.record[1][0], trainer.record[1][2])


def test_groups_in_which_all_fail_have_a_signal():
    trainer = train(Recording, rewards=rare, per_device_train_batch_size=24, max_steps=4, riskpo_bundle_size=3)
    differ = 0
    for _, rollouts, _ in trainer.record:
        for group in rollouts.group_ids.unique():
            mine = rollouts.group_ids == group
            differ += bool((rollouts.rewards[mine] == 0).all() and len(rollouts.advantages[mine].unique()) > 1)
    assert differ > 0


def test_evaluation_reads_but_does_not_write():
    trainer = build(RiskPOTrainer, eval_dataset=arithmetic("test").select(range(4)), per_device_eval_batch_size=4)
    trainer.evaluate()
    assert trainer.riskpo_quantiles.isnan().all() and "eval_riskpo/quantile_low" in trainer.state.log_history[-1]


def test_the_codes_settings_reach_the_loss():
    options = {"riskpo_form": "code", "riskpo_norm_by_std": True, "riskpo_natural_baseline": False}
    options |= {"riskpo_credit": "sum-mean", "riskpo_quantile_source": "batch", "riskpo_permute": False}
    trainer = train(Recording, max_steps=1, riskpo_bundle_size=2, **options)
    (_, rollouts, _), rewards = trainer.record[0], trainer.record[0][1].rewards.double()
    bundles, sets = make_bundles(rollouts.group_ids, 2)
    scores = bundle_scores(rewards, bundles)
    low, high = bundle_quantiles(scores, sets, f64(NAN, NAN), source="batch").unbind(1)
    found = divide_by_std(risk_advantages(scores, low, high, 0.5, "code", False), scores, sets)
    assert close(rollouts.advantages, assign_credit(found, rewards, rollouts.group_ids, bundles, "sum-mean"))
    assert (rollouts.advantages > 0).any()


def test_what_it_cannot_be_mixed_with():
    with pytest.raises(MixingError, match="all-wrong"):
        mix("riskpo", "dynamic_sampling")
    with pytest.raises(MixingError, match="both replace `compute_advantages`"):
        mix("riskpo", "ngrpo")


def test_a_smaller_last_set_is_announced():
    with pytest.warns(UserWarning, match=r"`riskpo_bundle_size` \(2\): the last 1 make"):
        build(RiskPOTrainer, per_device_train_batch_size=12, riskpo_bundle_size=2)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("riskpo_alpha", 0.0),
        ("riskpo_alpha", 1.0),
        ("riskpo_beta", 0.2),
        ("riskpo_beta", 1.0),
        ("riskpo_omega", -0.1),
        ("riskpo_bundle_size", 0),
        ("riskpo_lr_q", 0.0),
        ("riskpo_form", "typo"),
        ("riskpo_credit", "typo"),
        ("riskpo_quantile_source", "typo"),
    ],
)
def test_settings_out_of_range_are_named(field, value):
    with pytest.raises(ValueError, match=f"`{field}` must be .*got {value!r}"):
        RiskPOConfig("unused", use_cpu=True, bf16=False, **{field: value})
