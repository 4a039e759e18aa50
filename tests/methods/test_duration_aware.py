import warnings

import numpy as np
import pytest
import torch
from harness import build, difference, partly_external, train
from hypothesis import given, settings
from hypothesis import strategies as st

from trl_ext import DurationAwareConfig, DurationAwareTrainer, MethodTrainer, mix
from trl_ext.core.rollouts import step_numbers
from trl_ext.methods.duration_aware import (
    duration_aware_advantages,
    duration_mean,
    duration_running_mean,
    duration_table,
    duration_token_weights,
    duration_weights,
)


NAN = float("nan")


def f64(*values):
    return torch.tensor(values, dtype=torch.float64)


def padded(weights):
    """Weights of actions with that of no action behind them, as the trainer has them."""
    return torch.nn.functional.pad(weights, (0, 1), value=1.0)


def timed(values):
    """A reward function that logs these durations, over and over."""

    def reward(completions, log_extra, **kwargs):
        log_extra("duration", [values[i % len(values)] for i in range(len(completions))])
        return [float(sum(map(ord, text)) % 2) for text in completions]

    return reward


def test_worked_example_of_one_action():
    weights = duration_weights(f64(2, 8, 1, 5))
    assert weights.tolist() == [0.5, 2, 0.25, 1.25]
    assert duration_aware_advantages(f64(1, -1, 0.5, 0), weights).tolist() == [0.5, -2, 0.125, 0]


def test_worked_example_of_several_actions():
    durations, whole = duration_table([[1, 3], [2]])
    assert not whole.any() and duration_mean(durations) == 2
    weights = duration_weights(durations)
    assert torch.equal(weights[~durations.isnan()], f64(0.5, 1.5, 1))
    mask = torch.tensor([[1, 1, 0, 1, 0, 1], [1, 0, 0, 1, 1, 0]])  # the last tokens answer nothing
    tokens = duration_token_weights(padded(weights), step_numbers(mask), whole)
    expected = f64(0.5, 0.5, 0, 1.5, 0, 1, -1, 0, 0, -1, -1, 0).view(2, 6)
    assert torch.equal(duration_aware_advantages(f64(1, -1), tokens) * mask, expected)


def test_rollouts_with_one_duration_among_those_with_one_per_step():
    durations, whole = duration_table([4.0, [1.0, None], [], None])
    assert whole.tolist() == [True, False, False, True] and duration_mean(durations) == 2.5
    mask = torch.tensor([[1, 0, 1, 1]]).expand(4, 4)
    tokens = duration_token_weights(padded(duration_weights(durations)), step_numbers(mask), whole) * mask
    assert torch.equal(tokens, f64(1.6, 0, 1.6, 1.6, 0.4, 0, 1, 1, 1, 0, 1, 1, 1, 0, 1, 1).view(4, 4))


def test_floor_comes_before_the_mean_and_cap_last():
    durations = f64(0, 1, 3, 12)
    assert duration_weights(durations, floor=2.0).tolist() == pytest.approx([2 / 4.75, 2 / 4.75, 3 / 4.75, 12 / 4.75])
    assert duration_weights(durations, cap=1.5).tolist() == pytest.approx(
        [1e-3 / 4.00025, 1 / 4.00025, 3 / 4.00025, 1.5]
    )
    assert duration_weights(durations, "none", floor=0.0, cap=5.0).tolist() == [0, 1, 3, 5]


def test_missing_durations():
    assert duration_weights(f64(1, NAN, 3)).tolist() == [0.5, 1, 1.5]
    assert duration_weights(f64(1, NAN, 3), "none").tolist() == [1, 2, 3]
    assert duration_weights(f64(1, NAN, 3), "ema", 4.0).tolist() == [0.25, 1, 0.75]
    for normalize in ("batch_mean", "none", "ema"):
        assert duration_weights(f64(NAN, NAN), normalize).tolist() == [1, 1]
    # An unscored rollout gets nothing, but its action took its time.
    assert duration_aware_advantages(f64(NAN, 1), duration_weights(f64(6, 2))).tolist() == [0, 0.5]


def test_durations_of_zero():
    for floor in (1e-3, 0.0):
        assert duration_weights(f64(0, 0, 0), floor=floor).tolist() == [1, 1, 1]
        assert duration_weights(f64(0, 0), "ema", floor, floor).tolist() == [1, 1]


def test_running_mean():
    assert duration_running_mean(None, 4.0) == 4.0
    assert duration_running_mean(4.0, 14.0) == pytest.approx(5.0)
    assert duration_running_mean(4.0, 14.0, decay=0.0) == 14.0
    assert duration_running_mean(4.0, NAN) == 4.0 and duration_running_mean(None, NAN) is None


@settings(max_examples=80, deadline=None)
@given(st.lists(st.floats(0.01, 100), min_size=1, max_size=12), st.floats(0.1, 10))
def test_weights_keep_the_scale_and_ignore_the_unit(values, unit):
    durations = torch.tensor(values, dtype=torch.float64)
    weights = duration_weights(durations)
    assert weights.mean().item() == pytest.approx(1.0)
    assert torch.allclose(weights, duration_weights(durations * unit, floor=1e-3 * unit))
    assert (weights.argsort(stable=True) == durations.argsort(stable=True)).all()
    assert torch.allclose(duration_weights(durations, "none") / weights, duration_mean(durations))


def test_weights_undo_what_a_time_budget_does():
    """Two equally likely actions of 1 and 10 units, 1000 units a batch: 1/11 of the weight becomes one half."""
    torch.manual_seed(0)
    shares = []
    for _ in range(50):
        fast, slow = (int(torch.poisson(torch.tensor(0.5 * 1000 / d))) for d in (1, 10))
        weights = duration_weights(f64(*[1] * fast, *[10] * slow))
        shares.append([slow / (fast + slow), weights[fast:].sum() / weights.sum()])
    assert torch.tensor(shares).mean(0).tolist() == pytest.approx([1 / 11, 0.5], abs=0.02)


def test_it_comes_after_the_other_advantages():
    for other in ("empg", "knapsack_rl", "spo", "bnpo"):
        assert mix("duration_aware", other).Trainer.__bases__[0] is DurationAwareTrainer


class TestRuns:
    def test_one_duration_per_rollout(self):
        class Checking(DurationAwareTrainer):
            def observe(self, rollouts):
                super().observe(rollouts)
                base = MethodTrainer.compute_advantages(self, rollouts)
                assert torch.allclose(rollouts.advantages, base * torch.tensor([3, 12, 6, 7]).repeat(2) / 7)
                assert base.any()

        trainer = train(Checking, rewards=timed([1, 4.0, np.float32(2), None]), max_steps=2)
        log = trainer.state.log_history[0]
        assert log["duration_aware/mean"] == pytest.approx(7 / 3)
        assert log["duration_aware/max_weight"] == pytest.approx(12 / 7)
        assert log["duration_aware/effective_actions"] == pytest.approx(2 * 7**2 / (1 + 16 + 4))

    def test_one_duration_per_step(self):
        class Checking(DurationAwareTrainer):
            def observe(self, rollouts):
                super().observe(rollouts)
                base, mask = MethodTrainer.compute_advantages(self, rollouts).unsqueeze(1), rollouts.mask
                steps = step_numbers(mask)
                weights = torch.where(steps == 0, 1.6, 1.0)  # after the answer there is no duration
                weights[1::2] = 0.4
                assert torch.allclose(rollouts.advantages * mask, base * weights * mask)
                self.duration_steps = int(steps.max()) + 1

        trainer = train(Checking, rewards=timed([[4.0], 1.0, [4], 1]), rollout_func=partly_external, max_steps=2)
        assert trainer.duration_steps == 2

    def test_steps_without_a_duration_are_neutral_and_equal_ones_too(self):
        settings = {"rollout_func": partly_external}
        plain = train(MethodTrainer, rewards=timed([1.0]), **settings)
        for values in ([None], [3.0], [[3.0, 3.0]], [[]]):
            assert difference(train(DurationAwareTrainer, rewards=timed(values), **settings), plain) < 1e-6
        assert difference(train(DurationAwareTrainer, rewards=timed([[9.0, 1.0]]), **settings), plain) > 1e-6

    def test_running_mean_is_of_training_and_survives_a_stop(self, tmp_path):
        seen = []

        def reward(completions, log_extra, **kwargs):
            seen.append(len(seen) + 1.0)
            log_extra("duration", [seen[-1]] * len(completions))
            return [float(i % 2) for i in range(len(completions))]

        class Checking(DurationAwareTrainer):
            def observe(self, rollouts):
                before = self.duration_running
                super().observe(rollouts)
                now = seen[-1] if before is None else 0.5 * before + 0.5 * seen[-1]
                assert self.duration_running == pytest.approx(now)
                base = MethodTrainer.compute_advantages(self, rollouts)
                assert torch.allclose(rollouts.advantages, base * seen[-1] / now)

        settings = {"rewards": reward, "duration_normalize": "ema", "duration_ema_decay": 0.5, "out": tmp_path}
        trainer = train(Checking, save_strategy="steps", save_steps=2, max_steps=2, **settings)
        assert trainer.method_state()["duration_aware"] == {"running_mean": 1.5}
        trainer.evaluate(trainer.train_dataset.select(range(2)))
        assert trainer.duration_running == 1.5
        resumed = train(Checking, resume=str(tmp_path / "checkpoint-2"), max_steps=3, **settings)
        assert resumed.duration_running == pytest.approx(0.75 + seen[-1] / 2)


def test_bad_durations_are_shown():
    for value in (-1.0, float("inf"), "3", [1.0, -2.0], {}):
        with pytest.raises(ValueError, match=r"in the column 'duration' \(`duration_key`\) a duration must be"):
            train(DurationAwareTrainer, rewards=timed([1.0, value]), max_steps=1)
    with pytest.raises(ValueError, match="`duration_key` is 'seconds', but there is no column 'seconds'"):
        train(DurationAwareTrainer, rewards=timed([1.0]), duration_key="seconds", max_steps=1)


def test_settings_out_of_range_are_named():
    for name, value in {
        "duration_key": "",
        "duration_normalize": "typo",
        "duration_ema_decay": 1.0,
        "duration_weight_cap": 1.0,
        "duration_min": -1.0,
    }.items():
        with pytest.raises(ValueError, match=f"`{name}` must be"):
            DurationAwareConfig("unused", use_cpu=True, bf16=False, **{name: value})


def test_synchronous_collection_is_warned_of():
    with pytest.warns(UserWarning, match="favour slow actions instead"):
        build(DurationAwareTrainer)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        build(DurationAwareTrainer, duration_require_async=False)
