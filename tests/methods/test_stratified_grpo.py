import json
import math
import pickle

import pytest
import torch
from harness import build, difference, parity_reward, scripted, train
from hypothesis import given, settings
from hypothesis import strategies as st

from trl_ext import MethodTrainer, StratifiedGRPOConfig, StratifiedGRPOTrainer
from trl_ext.core.rollouts import group_advantages
from trl_ext.methods.stratified_grpo import (
    normalized,
    number_labels,
    stratified_advantages,
    stratum_ids,
    tool_calls,
)


NAN = math.nan


def f64(*values):
    return torch.tensor(values, dtype=torch.float64)


def close(a, b):
    return torch.allclose(torch.as_tensor(a).double(), torch.as_tensor(b).double(), atol=1e-6, rtol=0)


def one_group(rewards):
    return torch.zeros(len(rewards), dtype=torch.long)


# -------------------------------------------------------------------------------------------- the worked examples


def test_two_strata():
    rewards, labels = f64(1, 0, 0, 0, 1, 1, 0, 1), torch.tensor([0, 0, 0, 0, 2, 2, 2, 2])
    within = stratified_advantages(rewards, one_group(rewards), labels, 1.0)
    high, low = 1.499700, 0.499900
    assert close(within, [high, -low, -low, -low, low, low, -high, low])
    assert close(stratified_advantages(rewards, one_group(rewards), labels, 0.0), 0.935239 * (2 * rewards - 1))
    high, low = 1.386808, 0.586968
    found = stratified_advantages(rewards, one_group(rewards), labels, 0.8)
    assert close(found, [high, -low, -low, -low, low, low, -high, low])


def test_strata_of_three_sizes():
    rewards, labels = f64(1, 0, 0.5, 0, 1, 1), torch.tensor([0, 1, 1, 2, 2, 2])
    within = stratified_advantages(rewards, one_group(rewards), labels, 1.0)
    assert close(within, [0, -0.706907, 0.706907, -1.154501, 0.577250, 0.577250])
    found = stratified_advantages(rewards, one_group(rewards), labels, 0.6)
    assert close(found, [0.338963, -0.898692, 0.356352, -1.167248, 0.685313, 0.685313])


# ------------------------------------------------------------------------------------------------- edge cases


def test_degenerate_strata():
    rewards = f64(0, 1, 1, 0)
    plain = group_advantages(rewards, one_group(rewards))
    alone = stratified_advantages(rewards, one_group(rewards), torch.arange(4), 0.8)
    assert close(alone, 0.2 * plain)
    constant = stratified_advantages(rewards, one_group(rewards), torch.tensor([0, 1, 1, 0]), 0.8)
    assert close(constant, 0.2 * plain)
    tenths = f64(0.1, 0.1, 0.1, 0.1, 0.1, 0.1)  # whose mean is not 0.1
    for scale in (True, False):
        found = stratified_advantages(
            tenths, one_group(tenths), torch.tensor([0, 0, 0, 1, 1, 2]), 0.5, eps=0.0, scale=scale
        )
        assert (found == 0).all()


def test_two_members_are_told_apart_whatever_the_gap():
    for gap in (1.0, 1e-3):
        rewards, ids = f64(0.2, 0.2 + gap), torch.zeros(2, dtype=torch.long)
        assert close(normalized(rewards, ids, eps=0.0), [-(0.5**0.5), 0.5**0.5])
        assert close(normalized(rewards, ids, "population", eps=0.0), [-1, 1])
    assert normalized(f64(0, 1e-6), torch.zeros(2, dtype=torch.long)).abs().max() < 0.01  # below eps


def test_unscored_rollouts_leave_stratum_and_group():
    rewards, labels = f64(1, NAN, 0, 0, NAN, 1), torch.tensor([0, 0, 0, 1, 1, 1])
    scored = ~rewards.isnan()
    found = stratified_advantages(rewards, one_group(rewards), labels, 0.7)
    assert (found[~scored] == 0).all()
    assert close(
        found[scored], stratified_advantages(rewards[scored], one_group(rewards)[scored], labels[scored], 0.7)
    )
    shrunk = stratified_advantages(f64(1, NAN, 0), torch.zeros(3, dtype=torch.long), torch.tensor([0, 0, 1]), 1.0)
    assert (shrunk == 0).all()  # a singleton now
    assert (stratified_advantages(f64(1, NAN), torch.zeros(2, dtype=torch.long), torch.zeros(2), 0.5) == 0).all()


def test_tool_calls_are_runs_of_outside_tokens():
    completion = torch.tensor([[1, 1, 1, 1, 1, 1, 1, 0], [1, 1, 1, 1, 0, 0, 0, 0], [1, 1, 1, 1, 1, 1, 0, 0]])
    mask = torch.tensor([[1, 0, 0, 1, 0, 1, 1, 0], [1, 1, 1, 1, 0, 0, 0, 0], [0, 0, 1, 1, 1, 0, 0, 0]])
    assert tool_calls(completion, mask).tolist() == [2, 0, 2]


def test_labels():
    assert number_labels(["b", ("a", 1), "b", None]).tolist() == [0, 1, 0, 2]
    assert number_labels([0, 5, 2, 3], 2).tolist() == [0, 1, 1, 1]
    with pytest.raises(ValueError, match=r"`stratified_max_stratum` .* 'b'"):
        number_labels([1, "b"], 2)
    with pytest.raises(ValueError, match=r"`stratified_key` .*unhashable"):
        number_labels([["a"]])
    assert stratum_ids(torch.tensor([0, 0, 1, 1]), torch.tensor([0, 1, 0, 0])).tolist() == [0, 1, 2, 2]


# --------------------------------------------------------------------------------------------------- properties

rollouts = st.lists(
    st.tuples(st.sampled_from([0.0, 0.25, 1.0, NAN]), st.integers(0, 2), st.integers(0, 2)), min_size=1, max_size=16
)


@settings(max_examples=100, deadline=None)
@given(rollouts, st.floats(0, 1), st.sampled_from(["sample", "population"]), st.booleans())
def test_a_stratum_is_centred_and_one_stratum_is_grpo(rows, blend, std, scale):
    rewards, groups, labels = (torch.tensor(part) for part in zip(*rows, strict=True))
    rewards = rewards.double()
    strata = stratum_ids(groups, labels)
    within = stratified_advantages(rewards, groups, labels, 1.0, std, scale=scale)
    for stratum in strata.unique():
        assert abs(within[strata == stratum].sum()) < 1e-9
    single = stratified_advantages(rewards, groups, torch.zeros_like(labels), blend, scale=scale)
    assert torch.equal(single, group_advantages(rewards, groups, "group" if scale else "none"))
    blended = stratified_advantages(rewards, groups, labels, blend, std, scale=scale)
    assert blended.isfinite().all()
    moved = stratified_advantages(3 * rewards - 1, groups, labels, blend, std, eps=0.0)
    assert close(moved, stratified_advantages(rewards, groups, labels, blend, std, eps=0.0))


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.floats(0, 1), st.integers(0, 3)), min_size=2, max_size=12))
def test_decomposition_of_the_variance(rows):
    rewards, labels = (torch.tensor(part) for part in zip(*rows, strict=True))
    rewards = rewards.double()
    everywhere, within = (normalized(rewards, ids, scale=False) for ids in (one_group(rewards), labels))
    offset = everywhere - within  # stratum mean minus group mean
    for label in labels.unique():
        assert close(offset[labels == label], rewards[labels == label].mean() - rewards.mean())
    assert close((everywhere**2).mean() - (within**2).mean(), (offset**2).mean())


def test_the_offset_between_strata_is_gone():
    """Strata of success 0.1, 0.4 and 0.7, groups of 8: GRPO's mean advantages are -0.53, 0, 0.53, those within 0."""
    generator = torch.Generator().manual_seed(0)
    groups = torch.arange(4000).repeat_interleave(8)
    labels = torch.randint(3, groups.shape, generator=generator)
    rewards = (torch.rand(len(groups), generator=generator) < 0.1 + 0.3 * labels).double()
    plain, within = (stratified_advantages(rewards, groups, labels, blend) for blend in (0.0, 1.0))
    assert [plain[labels == k].mean().item() for k in range(3)] == pytest.approx([-0.53, 0, 0.53], abs=0.02)
    assert [within[labels == k].mean().item() for k in range(3)] == pytest.approx([0, 0, 0], abs=1e-9)
    raw = [normalized(rewards, ids, scale=False).square().mean() for ids in (groups, stratum_ids(groups, labels))]
    assert [value.item() for value in raw] == pytest.approx([0.210, 0.115], abs=0.005)


# ------------------------------------------------------------------------------------------------- in a real run


def answered(prompts, trainer):
    """A `rollout_func` in which an environment answered every second rollout once, after its first token."""
    output = scripted(prompts, trainer)
    output["env_mask"] = [
        [int(j != 1 or i % 2) for j in range(len(ids))] for i, ids in enumerate(output["completion_ids"])
    ]
    output["parity"] = [i % 2 for i in range(len(prompts))]
    return output


class Recording(StratifiedGRPOTrainer):
    def observe(self, rollouts):
        super().observe(rollouts)
        self.record = [*getattr(self, "record", []), rollouts]


def check_parity_strata(trainer, blend=0.8, **options):
    for rollouts in trainer.record:
        labels = torch.arange(len(rollouts)) % 2
        expected = stratified_advantages(rollouts.rewards, rollouts.group_ids, labels, blend, **options)
        assert close(rollouts.advantages, expected)
    plain = torch.cat([group_advantages(r.rewards, r.group_ids) for r in trainer.record])
    assert not close(torch.cat([r.advantages for r in trainer.record]), plain)
    assert all(log["stratified/strata"] == 2 for log in trainer.state.log_history[:-1])


@pytest.mark.parametrize("key", ["tool_calls", "column:parity"])
def test_strata_of_a_run(key):
    check_parity_strata(train(Recording, rollout_func=answered, stratified_key=key))


def test_what_a_reward_function_says_of_a_rollout():
    def rewards(completions, log_extra, **kwargs):
        log_extra("kind", ["even", "odd"] * (len(completions) // 2))
        return parity_reward(completions)

    check_parity_strata(train(Recording, rewards=rewards, stratified_key="column:kind"))


def test_plain_differences():
    trainer = train(Recording, rollout_func=answered, scale_rewards="none")
    check_parity_strata(trainer, scale=False)


def test_without_tools_it_is_plain_grpo():
    assert difference(train(StratifiedGRPOTrainer), train(MethodTrainer)) == 0


def test_the_share_of_lonely_rollouts_is_logged():
    def rewards(completions, log_extra, **kwargs):
        log_extra("kind", [0, 1, 1, 2] * (len(completions) // 4))
        return [None if i % 4 == 1 else float(i % 2) for i in range(len(completions))]

    trainer = train(StratifiedGRPOTrainer, rewards=rewards, stratified_key="column:kind", max_steps=1)
    assert trainer.state.log_history[0]["stratified/alone"] == 1.0
    assert trainer.state.log_history[0]["stratified/strata"] == 3
    capped = train(
        StratifiedGRPOTrainer, rewards=rewards, stratified_key="column:kind", stratified_max_stratum=1, max_steps=1
    )
    assert capped.state.log_history[0]["stratified/alone"] == pytest.approx(1 / 3)


def test_truncated_rollouts_without_tokens_have_a_stratum_of_their_own():
    def cut_off(prompts, trainer):
        output = answered(prompts, trainer)
        output["completion_ids"] = [ids[:-1] if i % 4 == 0 else ids for i, ids in enumerate(output["completion_ids"])]
        output["env_mask"] = [
            mask[: len(ids)] for mask, ids in zip(output["env_mask"], output["completion_ids"], strict=True)
        ]
        return output

    trainer = train(Recording, rollout_func=cut_off, mask_truncated_completions=True, max_steps=1)
    (rollouts,) = trainer.record
    assert rollouts.truncated.tolist() == [True, False, False, False] * 2
    expected = stratified_advantages(rollouts.rewards, rollouts.group_ids, torch.tensor([-1, 0, 1, 0] * 2))
    assert close(rollouts.advantages, expected)


def length(completion):
    return len(completion if isinstance(completion, str) else completion[-1]["content"])


def config(**options):
    return StratifiedGRPOConfig("unused", use_cpu=True, bf16=False, **options)


def test_a_function_survives_logs_and_files():
    args = config(stratified_key=length)
    assert json.loads(args.to_json_string())["stratified_key"] == f"{__name__}:length"
    restored = pickle.loads(pickle.dumps(args))
    assert restored.stratified_function() is length and args.stratified_function() is length
    assert config(stratified_key=f"{__name__}:length").stratified_function() is length
    assert config(stratified_key="column:length").stratified_function() is None
    assert config().stratified_function() is None


def test_a_function_inside_another_works_until_it_must_be_found_by_name(tmp_path):
    seen = []

    def inner(completion):
        seen.append(completion)
        return length(completion)

    trainer = train(
        Recording, stratified_key=inner, out=tmp_path, save_strategy="steps", save_steps=2, max_steps=2
    )  # the checkpoint pickles the settings
    labels = number_labels([length(completion) for completion in seen]).view(2, -1)
    assert labels.unique().numel() > 1
    for rollouts, mine in zip(trainer.record, labels, strict=True):
        assert close(rollouts.advantages, stratified_advantages(rollouts.rewards, rollouts.group_ids, mine))
    restored = torch.load(tmp_path / "checkpoint-2" / "training_args.bin", weights_only=False)
    with pytest.raises(ValueError, match=r"`stratified_key` is '.*inner', but the module .* has no function"):
        restored.stratified_function()


def test_bad_input():
    for name, value in {
        "num_generations": 1,
        "stratified_blend": 1.1,
        "stratified_key": "tool_call",
        "stratified_max_stratum": 0,
        "stratified_std": "typo",
        "stratified_eps": -1.0,
        "scale_rewards": "batch",
    }.items():
        with pytest.raises(ValueError, match=f"`{name}` must be"):
            config(**{name: value})
    for key in ("column:", ":name", 3):
        with pytest.raises(ValueError, match="`stratified_key` must be"):
            config(stratified_key=key)
    with pytest.raises(ValueError, match=r"`stratified_key` is 'no_such_module:f', but .* could not be imported"):
        build(StratifiedGRPOTrainer, stratified_key="no_such_module:f")
    with pytest.raises(ValueError, match=r"`stratified_key` is .* has no function"):
        build(StratifiedGRPOTrainer, stratified_key="math:pi")
    with pytest.raises(ValueError, match="no column 'depth'"):
        train(StratifiedGRPOTrainer, stratified_key="column:depth")
