"""Without a method, `MethodTrainer` is TRL's trainer, bit for bit."""

import pytest
from harness import arithmetic, difference, parameters, partly_external, train
from peft import LoraConfig
from trl import GRPOConfig, GRPOTrainer

from trl_ext import MethodConfig, MethodTrainer


CASES = {
    "plain": {},
    "kl": {"beta": 0.1},
    "iterations": {"num_iterations": 2},
    "long generation": {"steps_per_generation": 4},
    "accumulation": {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 4},
    "several epochs": {"max_steps": 14, "data": 9},
    "conversational": {"conversational": True},
    "tool mask": {"rollout_func": partly_external},
    "lora": {"peft_config": LoraConfig(target_modules=["q_proj", "v_proj"], init_lora_weights="gaussian")},
    "lora and kl": {"peft_config": LoraConfig(target_modules=["q_proj", "v_proj"]), "beta": 0.1, "num_iterations": 2},
    "batch scale": {"scale_rewards": "batch"},
    "no scale": {"scale_rewards": "none", "loss_type": "grpo"},
    "normalize then sum": {"multi_objective_aggregation": "normalize_then_sum"},
    "unscored": {"unscored": True},
    "data order": {"shuffle_dataset": False},
    "all": {
        "beta": 0.1,
        "num_iterations": 2,
        "steps_per_generation": 2,
        "conversational": True,
        "loss_type": "cispo",
        "epsilon_high": 2.0,
    },
}


def partly_unscored(completions, **kwargs):
    return [None if i % 3 == 0 else float(i % 2) for i in range(len(completions))]


@pytest.mark.conformance
@pytest.mark.parametrize("name", CASES)
def test_equals_trl(name):
    case = {"max_steps": 5, **CASES[name]}
    rows = case.pop("data", 24)
    data = arithmetic(conversational=case.pop("conversational", False)).select(range(rows))
    if case.pop("unscored", False):
        case["rewards"] = partly_unscored
    theirs = train(GRPOTrainer, GRPOConfig, data=data, **case)
    ours = train(MethodTrainer, MethodConfig, data=data, **case)
    assert difference(theirs, ours) == 0.0
    for a, b in zip(theirs.state.log_history[:-1], ours.state.log_history[:-1], strict=True):
        # TRL's `frac_reward_zero_std` speaks of the whole batch where the scale is the batch's; ours always of groups.
        drop = {"step_time"} | ({"frac_reward_zero_std"} if "batch" in name or "normalize" in name else set())
        shared = {key: value for key, value in a.items() if key not in drop}
        assert shared == {key: b.get(key) for key in shared}


@pytest.mark.conformance
def test_evaluation_equals_trl():
    case = {
        "eval_dataset": arithmetic("test").select(range(6)),
        "eval_strategy": "steps",
        "eval_steps": 1,
        "per_device_eval_batch_size": 8,
        "num_generations_eval": 2,
    }
    theirs, ours = train(GRPOTrainer, GRPOConfig, **case), train(MethodTrainer, MethodConfig, **case)
    assert difference(theirs, ours) == 0.0
    keep = ("eval_loss", "eval_reward", "eval_reward_std", "eval_entropy")
    pick = lambda t: [{k: log[k] for k in keep} for log in t.state.log_history if "eval_loss" in log]  # noqa: E731
    assert pick(theirs) == pick(ours) and pick(ours)


def test_training_changes_parameters():
    before = train(MethodTrainer, max_steps=1, learning_rate=0.0)
    after = train(MethodTrainer, max_steps=1)
    assert difference(before, after) > 1e-4
    assert parameters(after)
