import pytest
import torch
from harness import arithmetic, build, difference, scripted, train
from trl import GRPOConfig, GRPOTrainer

from trl_ext import DynamicSamplingConfig, DynamicSamplingTrainer
from trl_ext.core.rollouts import group_advantages, zero_signal
from trl_ext.methods.dynamic_sampling import pick_groups, valid_groups


FIRST = [[1, 1, 1, 1], [1, 0, 0, 1], [0, 0, 0, 0]]
SECOND = [[0, 1, 0, 0], [0.95, 0.95, 0.95, 0.95], [1, 1, 1, 0]]


def flat(groups):
    scores = torch.tensor(groups, dtype=torch.float32).flatten()
    return scores, torch.arange(len(groups)).repeat_interleave(4)


def test_example_of_two_rounds():
    scores, ids = flat(FIRST + SECOND)
    groups = pick_groups(valid_groups(scores, ids), 3)
    assert groups.tolist() == [1, 3, 5]
    kept = torch.isin(ids, groups)
    expected = [0.865875, -0.865875, -0.865875, 0.865875, -0.4999, 1.4997, -0.4999, -0.4999]
    expected += [0.4999, 0.4999, 0.4999, -1.4997]
    advantages = group_advantages(scores[kept].double(), ids[kept])
    assert torch.allclose(advantages, torch.tensor(expected, dtype=torch.float64), atol=1e-6)


def test_example_of_one_round():
    valid = valid_groups(*flat(FIRST))
    assert valid.tolist() == [False, True, False]
    assert pick_groups(valid, 3, "fill").tolist() == pick_groups(valid, 3, "first").tolist() == [0, 1, 2]
    with pytest.raises(RuntimeError, match="only 1 of 3 groups with a signal"):
        pick_groups(valid, 3, "error")


def test_fill_takes_the_earliest_and_first_takes_the_first():
    valid = torch.tensor([False, False, False, True, False, True])
    assert pick_groups(valid, 3, "fill").tolist() == [0, 3, 5]
    assert pick_groups(valid, 3, "first").tolist() == [0, 1, 2]


def test_validity():
    nan = float("nan")
    scores, ids = flat([[1, nan, nan, nan], [nan] * 4, [1, nan, 0, nan], [0.5, 0.5 + 5e-7, 0.5, 0.5]])
    assert valid_groups(scores, ids).tolist() == [False, False, True, False]
    assert valid_groups(scores, ids, tol=0.0).tolist() == [False, False, True, True]


def test_one_round_is_trl_exactly():
    trainer = train(DynamicSamplingTrainer, ds_max_num_gen_batches=1, max_steps=4, num_iterations=2)
    assert difference(trainer, train(GRPOTrainer, GRPOConfig, max_steps=4, num_iterations=2)) == 0.0


def rare(prompts, completions, **kwargs):
    """Only some prompts give groups with a signal."""
    return [float(sum(map(ord, c)) % 2) * (len(p) % 2) for p, c in zip(prompts, completions, strict=True)]


class Checking(DynamicSamplingTrainer):
    def observe(self, rollouts):
        super().observe(rollouts)
        self.seen = [*getattr(self, "seen", []), rollouts]


def test_no_group_without_a_signal_is_trained_on():
    trainer = train(Checking, rewards=rare, rollout_func=scripted, max_steps=4)
    spent = 0
    for rollouts in trainer.seen:
        assert not zero_signal(rollouts.rewards, rollouts.group_ids).any()
        prompts = rollouts.everything.prompt_index.view(-1, 4)[:, 0].tolist()
        assert len(set(prompts)) == len(prompts)
        spent += len(rollouts.everything)
    logged = trainer.state.log_history[:-1]
    assert logged[-1]["num_rollouts"] == spent > 4 * 8
    assert sum(log["ds/num_gen_batches"] for log in logged) == spent / 8
    assert all(log["ds/filler_groups"] == 0 and log["frac_reward_zero_std"] == 0 for log in logged)


def test_the_bound_ends_a_hopeless_search():
    def hopeless(completions, **kwargs):
        return [1.0] * len(completions)

    trainer = train(Checking, rewards=hopeless, ds_max_num_gen_batches=3, max_steps=2)
    assert [len(rollouts.everything) for rollouts in trainer.seen] == [24, 24]
    assert trainer.state.log_history[0]["ds/filler_groups"] == 2
    assert all((rollouts.group_ids == torch.arange(2).repeat_interleave(4)).all() for rollouts in trainer.seen)
    with pytest.raises(RuntimeError, match="ds_max_num_gen_batches"):
        train(DynamicSamplingTrainer, rewards=hopeless, ds_max_num_gen_batches=2, ds_on_exhausted="error")


def test_signals_of_cut_off_answers_are_valid_and_logged():
    """One rollout of each group is cut off, and is the only one without a success."""

    def cut(prompts, trainer):
        output = scripted(prompts, trainer)
        output["completion_ids"] = [ids[:-1] if i % 4 == 0 else ids for i, ids in enumerate(output["completion_ids"])]
        return output

    def uncut(completions, **kwargs):
        return [float(i % 4 > 0) for i in range(len(completions))]

    trainer = train(Checking, rewards=uncut, rollout_func=cut, mask_truncated_completions=True, max_steps=1)
    log = trainer.state.log_history[0]
    assert log["ds/valid_share"] == log["ds/valid_by_masked"] == 1 and log["ds/filler_groups"] == 0
    trainer = train(Checking, rewards=rare, rollout_func=scripted, mask_truncated_completions=True, max_steps=1)
    assert trainer.state.log_history[0]["ds/valid_by_masked"] == 0


def test_oversampling():
    trainer = train(Checking, rewards=rare, rollout_func=scripted, ds_gen_batch_multiplier=3, max_steps=2)
    assert all(len(rollouts.everything) % 24 == 0 for rollouts in trainer.seen)
    assert trainer.state.log_history[0]["ds/num_gen_batches"] == len(trainer.seen[0].everything) / 24


def test_small_data_sets_repeat_prompts_rather_than_stop():
    trainer = train(
        Checking,
        rewards=lambda completions, **kw: [0.0] * len(completions),
        ds_max_num_gen_batches=4,
        data=arithmetic().select(range(3)),
        max_steps=1,
    )
    assert len(trainer.seen[0].everything) == 32


def test_the_named_score_decides():
    def shaped(completions, **kwargs):
        return [float(i) for i in range(len(completions))]

    def correct(completions, **kwargs):
        return [1.0] * len(completions)

    settings = {"rewards": [shaped, correct], "max_steps": 1, "ds_max_num_gen_batches": 2}
    assert len(train(Checking, **settings).seen[0].everything) == 8
    assert len(train(Checking, ds_metric="correct", **settings).seen[0].everything) == 16
    with pytest.raises(ValueError, match="`ds_metric` names the reward function 'typo'"):
        build(DynamicSamplingTrainer, ds_metric="typo")


def test_the_stream_is_a_permutation_per_epoch_that_skips_used_prompts():
    trainer = build(DynamicSamplingTrainer)
    drawn = trainer._ds_fresh(10, {0, 1}) + trainer._ds_fresh(12, {0, 1})
    assert sorted(drawn) == list(range(2, 24)) and trainer.ds_cursor in range(22, 25)
    again = build(DynamicSamplingTrainer)
    assert again._ds_fresh(22, {0, 1}) == drawn


@pytest.mark.parametrize(
    ("field", "value"),
    [("ds_max_num_gen_batches", 0), ("ds_gen_batch_multiplier", 0), ("ds_tol", -1.0), ("ds_on_exhausted", "typo")],
)
def test_settings_out_of_range_are_named(field, value):
    with pytest.raises(ValueError, match=f"`{field}` must be"):
        DynamicSamplingConfig("unused", use_cpu=True, bf16=False, **{field: value})
