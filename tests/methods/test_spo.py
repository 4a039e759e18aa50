import math

import pytest
import torch
from harness import arithmetic, build, parity_reward, train
from hypothesis import given, settings
from hypothesis import strategies as st

from trl_ext import SPOConfig, SPOTrainer
from trl_ext.core import Requests
from trl_ext.methods.spo import (
    spo_advantages,
    spo_drift,
    spo_initial_counts,
    spo_rho,
    spo_update,
    spo_weights,
)


def f64(*values):
    return torch.tensor(values, dtype=torch.float64)


def close(a, b):
    return torch.allclose(torch.as_tensor(a).double(), torch.as_tensor(b).double(), atol=1e-6, rtol=0)


# -------------------------------------------------------------------------------------------- the worked examples


def test_initial_counts():
    alpha, beta = spo_initial_counts(f64(2, 0, 8), f64(8, 8, 8), 0.875)
    assert close(alpha, f64(2.222222, 0.444444, 7.555556)) and close(beta, f64(5.777778, 7.555556, 0.444444))
    alpha, beta = spo_initial_counts(f64(0), f64(0))
    assert close(alpha, f64(0.5)) and close(beta, f64(0.5))


def test_initial_counts_are_exact():
    alpha, beta = spo_initial_counts(f64(0), f64(8), 0.97)
    assert (alpha + beta).item() == pytest.approx(1 / 0.03, abs=1e-12)


@pytest.mark.parametrize("reward", [0.0, 1.0])
@pytest.mark.parametrize("value", [1 / 18, 0.0439, 1 / 6, 0.4424, 0.8333])
def test_equal_distances_are_no_signal_whatever_their_rounding(reward, value):
    for size in (8, 48, 64, 512, 1024):
        rewards = torch.full((size,), reward)
        assert (spo_advantages(rewards, torch.full((size,), value, dtype=torch.float64)) == 0).all()
        assert (spo_advantages(rewards, torch.full((size,), value)) == 0).all()


def test_a_batch_in_which_all_fail_at_equal_odds_changes_nothing():
    trainer = train(
        SPOTrainer, rewards=lambda completions, **kw: [0.0] * len(completions), spo_offline_n=2, max_steps=1
    )
    assert trainer.state.log_history[0]["grad_norm"] == 0


def test_advantages():
    found = spo_advantages(f64(1, 0, 1, 1), f64(0.25, 0.75, 0.5, 0.9))
    assert close(found, f64(0.913223, -1.369835, 0.532714, -0.076102))


def test_drift_and_rho():
    drift = spo_drift(f64(-1, -0.5, -2), f64(-1.005, -0.49, -1.9), torch.tensor([1, 1, 0]))
    assert close(drift, 0.0075) and close(spo_rho(drift), 0.917004)
    drift = spo_drift(f64(-1, -0.5), f64(-1.1, -0.4), torch.ones(2))
    assert close(drift, 0.1) and close(spo_rho(drift), 0.875) and close(spo_rho(drift, rho_min=0.1), 0.314980)
    assert close(spo_rho(f64(0.0)), 0.96)


def test_weights():
    alpha, beta = f64(2.222222, 0.444444, 7.555556, 4), f64(5.777778, 7.555556, 0.444444, 4)
    weights = spo_weights(alpha, beta)
    assert close(weights, f64(0.497903, 0.279061, 0.279061, 0.55))
    assert close(weights / weights.sum(), f64(0.310022, 0.173759, 0.173759, 0.342460))


# ------------------------------------------------------------------------------------------------- edge cases


def test_update_decays_once_for_several_rollouts():
    alpha, beta = spo_update(f64(2.0), f64(6.0), f64(0.9), f64(1.5), f64(3))
    assert close(alpha, 0.9 * 2 + 1.5) and close(beta, 0.9 * 6 + 1.5)
    value, evidence = 0.25, 8.0
    assert close(alpha / (alpha + beta), (0.9 * evidence * value + 1.5) / (0.9 * evidence + 3))


def test_a_masked_stored_rollout_has_no_drift():
    assert spo_drift(f64(-1.0, math.nan), f64(-5.0, 0.0), torch.zeros(2)) == 0


def test_evidence_power():
    assert close(spo_weights(f64(4), f64(4), eps=0, neff_power=0.5), f64(0.5 / math.sqrt(8)))
    assert spo_weights(f64(8), f64(0), eps=0.05) == 0.05


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.one_of(st.sampled_from([0.0, 1.0, math.nan])), st.floats(0, 1)), min_size=1, max_size=12))
def test_advantages_are_standardised_over_the_scored(pairs):
    rewards, values = (f64(*part) for part in zip(*pairs, strict=True))
    found = spo_advantages(rewards, values)
    scored = ~rewards.isnan()
    assert found.isfinite().all() and (found[~scored] == 0).all()
    if scored.sum() < 2:
        assert (found == 0).all()
    else:
        assert abs(found[scored].mean()) < 1e-5
        raw = (rewards - values)[scored]
        assert abs(found[scored].std() - raw.std() / (raw.std() + 1e-8)) < 1e-6  # 1, but for the epsilon
        assert close(spo_advantages(rewards[scored], values[scored]), found[scored])  # the unscored influence nobody
    assert close(spo_advantages(rewards.flip(0), values.flip(0)), found.flip(0))


# ------------------------------------------------------------------------------------------------- in a real run


def test_tracker_follows_the_equations_step_by_step():
    """The trainer's state equals the equations applied to the record of what it saw."""

    class Recording(SPOTrainer):
        def observe(self, rollouts):
            before = self.spo_alpha.clone(), self.spo_beta.clone()
            super().observe(rollouts)
            self.record = [*getattr(self, "record", []), (before, rollouts, self.spo_alpha.clone())]

    trainer = train(Recording, rewards=parity_reward, spo_rho_mode="constant", spo_offline_n=4, max_steps=4)
    for (alpha, beta), rollouts, after in trainer.record:
        rows, rewards = rollouts.prompt_index, rollouts.rewards.double()
        expected = spo_advantages(rewards, (alpha / (alpha + beta))[rows])
        assert torch.allclose(rollouts.advantages.double(), expected, atol=1e-5)
        for row in range(24):
            mine = rewards[rows == row]
            wanted = alpha[row] if len(mine) == 0 else 0.875 * alpha[row] + mine.sum()
            assert close(after[row], wanted)
    assert trainer.state.log_history[0]["num_rollouts"] == 24 * 4 + 8


def test_drift_is_that_of_the_stored_rollouts():
    class Watching(SPOTrainer):
        drifts = None

        def _spo_drift(self, rows):
            drift = super()._spo_drift(rows)
            self.drifts = [*(self.drifts or []), dict(zip(rows.tolist(), drift.tolist(), strict=True))]
            return drift

    frozen = train(Watching, spo_offline_n=0, learning_rate=0.0, max_steps=6)
    assert all(value < 1e-5 for drifts in frozen.drifts for value in drifts.values())
    moving = train(Watching, spo_offline_n=0, learning_rate=1e-2, max_steps=6)
    assert all(value == 0 for value in moving.drifts[0].values())
    visited = set(moving.drifts[0])
    later = {row: value for drifts in moving.drifts[1:] for row, value in drifts.items() if row in visited}
    assert later and max(later.values()) > 0.01


def test_unscored_rollouts_leave_everything_as_it_was():
    def sometimes(completions, **kwargs):
        return [None if i % 2 else 1.0 for i in range(len(completions))]

    class Checking(SPOTrainer):
        def observe(self, rollouts):
            before = self.spo_alpha.clone(), dict(self.spo_stored)
            super().observe(rollouts)
            unscored = rollouts.prompt_index[1::2]
            assert torch.equal(self.spo_alpha[unscored], before[0][unscored])
            assert all(self.spo_stored.get(row) is before[1].get(row) for row in unscored.tolist())
            assert (rollouts.advantages[1::2] == 0).all()

    trainer = train(Checking, rewards=sometimes, spo_offline_n=0)
    assert trainer.state.log_history[0]["spo/rho"] > 0
    nothing = train(SPOTrainer, rewards=lambda completions, **kw: [None] * len(completions), spo_offline_n=0)
    assert "spo/rho" not in nothing.state.log_history[0] and nothing.state.log_history[0]["spo/visited"] == 0


def test_stored_rollouts_are_small():
    trainer = train(SPOTrainer, spo_offline_n=0, max_steps=2)
    for stored in trainer.spo_stored.values():
        for rollout in stored:
            assert rollout["logps"].untyped_storage().nbytes() == 4 * len(rollout["completion_ids"])


def test_answers_to_a_changed_prompt_are_no_evidence():
    class Hinting(SPOTrainer):
        replaces = ("more_rollouts", "pick_rollouts")

        def more_rollouts(self, scored, rounds):
            return Requests(torch.tensor([3]), scored.group_ids[:1], ["1+1="]) if rounds == 1 else None

        def pick_rollouts(self, scored):
            return torch.tensor([8, 1, 2, 3, 4, 5, 6, 7])

    trainer = train(Hinting, spo_offline_n=0, max_steps=1)
    assert trainer.spo_visits.sum() == 8 and not trainer.spo_visits[3]  # the answer in its place counts as well


def test_groups_share_a_baseline():
    trainer = train(SPOTrainer, num_generations=4, spo_offline_n=0, max_steps=2)
    assert trainer.spo_visits.sum() == 4 and max(map(len, trainer.spo_stored.values())) == 4


def test_prioritised_sampling_can_be_switched_off():
    settings = {"spo_offline_n": 0, "max_steps": 3}
    trainer = train(SPOTrainer, spo_prioritize=False, **settings)
    assert trainer.spo_visits.sum() == 24 and (trainer.spo_visits == 1).all()  # TRL's order: one epoch


def test_evaluation_uses_one_half_for_unknown_prompts_and_writes_nothing():
    trainer = build(
        SPOTrainer, eval_dataset=arithmetic("test").select(range(4)), per_device_eval_batch_size=4, spo_offline_n=0
    )
    trainer.evaluate()
    assert trainer.spo_visits.sum() == 0 and not trainer.spo_stored
    assert trainer.state.log_history[-1]["eval_spo/value"] == 0.5


def test_rewards_are_mapped_to_the_unit_interval():
    def signed(completions, **kwargs):
        return [2 * value - 1 for value in parity_reward(completions)]

    plain = train(SPOTrainer, rewards=parity_reward, spo_offline_n=2)
    mapped = train(SPOTrainer, rewards=signed, spo_offline_n=2, spo_reward_min=-1.0)
    assert torch.allclose(plain.spo_alpha, mapped.spo_alpha)
    with pytest.raises(ValueError, match=r"-1.0 lies outside of \[`spo_reward_min`, `spo_reward_max`\]"):
        train(SPOTrainer, rewards=signed)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("spo_rho_mode", "typo"),
        ("spo_rho_min", 0.0),
        ("spo_rho_min", 1.0),
        ("spo_rho_max", 0.5),
        ("spo_d_half", 0.0),
        ("spo_offline_n", -1),
        ("spo_explore_eps", -0.1),
        ("spo_neff_power", 1.5),
        ("spo_adv_eps", 0.0),
        ("spo_reward_max", 0.0),
    ],
)
def test_settings_out_of_range_are_named(field, value):
    with pytest.raises(ValueError, match=f"`{field}` must be .*got {value!r}"):
        SPOConfig("unused", use_cpu=True, bf16=False, **{field: value})


def test_stationary_tracker_error_is_what_the_card_derives():
    """Squared error of the tracker for p ~ U(0, 1): about 0.0033 at rho 0.96 and 0.0108 at 0.875; 0.0208 for a mean
    of 8 rollouts."""
    generator = torch.Generator().manual_seed(0)
    p = torch.rand(4000, generator=generator, dtype=torch.float64)
    for rho, expected in ((0.96, 0.0033), (0.875, 0.0108)):
        alpha = beta = torch.full_like(p, 0.5)
        for _ in range(200):
            reward = (torch.rand(4000, generator=generator, dtype=torch.float64) < p).double()
            alpha, beta = spo_update(alpha, beta, torch.full_like(p, rho), reward, torch.ones_like(p))
        error = ((alpha / (alpha + beta) - p) ** 2).mean().item()
        assert error == pytest.approx(expected, rel=0.15)
