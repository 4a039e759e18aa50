"""
Every option that `GRPOConfig` adds is inert for the engine (and why), honoured (with a test) or refused (with a test).
A new field of a later TRL fails here until somebody has decided.
"""

import dataclasses

import pytest
from harness import arithmetic, build, difference, scripted, train
from transformers import TrainingArguments
from trl import GRPOConfig, GRPOTrainer

from trl_ext import MethodConfig, MethodTrainer


class HookedTrainer(MethodTrainer):
    """Overrides the hooks that read options, each with TRL's own answer."""

    config_class = MethodConfig

    def choose_prompts(self, n, generator):
        return super().choose_prompts(n, generator)

    def compute_advantages(self, rollouts):
        return super().compute_advantages(rollouts)

    def log_ratio(self, tokens):
        return super().log_ratio(tokens)

    def regularizers(self, tokens):
        return super().regularizers(tokens)


def odd(completions, **kwargs):
    return [float(sum(map(ord, text)) % 2) for text in completions]


def without_columns(completions, **kwargs):
    assert "answer" not in kwargs, "`remove_unused_columns` leaves the prompt alone"
    return odd(completions)


def length(completions, **kwargs):
    return [float(len(text)) for text in completions]


GENERATION = "read by TRL's generation, which the engine calls and does not look into"
MODEL = "read by TRL when the model is made"
VLLM = "read by TRL's vLLM client or engine"
LOGGING = "read by TRL's logging, which the engine only corrects for advantages"
INERT = {
    "model_init_kwargs": MODEL,
    "trust_remote_code": MODEL,
    "disable_dropout": MODEL,
    "cast_lm_head_to_fp32": MODEL,
    "router_aux_loss_coef": "added by TRL's loss, which supplies everything but the surrogate",
    "chat_template_kwargs": GENERATION,
    "generation_kwargs": GENERATION,
    "cache_implementation": GENERATION,
    "pad_to_multiple_of": GENERATION,
    "repetition_penalty": GENERATION,
    "top_p": GENERATION,
    "top_k": GENERATION,
    "min_p": GENERATION,
    "max_tool_calling_iterations": GENERATION,
    "ds3_gather_for_generation": GENERATION,
    "use_transformers_continuous_batching": GENERATION,
    "transformers_continuous_batching_config": GENERATION,
    "use_transformers_paged": GENERATION,
    "use_vllm": VLLM,
    "vllm_mode": VLLM,
    "vllm_model_impl": VLLM,
    "vllm_enable_sleep_mode": VLLM,
    "vllm_structured_outputs_regex": VLLM,
    "vllm_server_base_url": VLLM,
    "vllm_server_host": VLLM,
    "vllm_server_port": VLLM,
    "vllm_server_timeout": VLLM,
    "vllm_group_port": VLLM,
    "vllm_gpu_memory_utilization": VLLM,
    "vllm_max_model_length": VLLM,
    "vllm_tensor_parallel_size": VLLM,
    "vllm_importance_sampling_mode": VLLM,
    "vllm_importance_sampling_clip_max": VLLM,
    "vllm_importance_sampling_clip_min": VLLM,
    "vllm_importance_sampling_cap": VLLM,
    "log_completions": LOGGING,
    "log_multimodal": LOGGING,
    "num_completions_to_print": LOGGING,
    "log_unique_prompts": LOGGING,
    "log_completions_hub_repo": LOGGING,
    "ref_model_mixup_alpha": "read by TRL's callback that moves the reference model",
    "ref_model_sync_steps": "read by TRL's callback that moves the reference model",
    "entropy_coef_min": "read by TRL's entropy controller",
    "entropy_coef_max": "read by TRL's entropy controller",
    "entropy_coef_delta": "read by TRL's entropy controller",
    "entropy_target": "read by TRL's entropy controller",
    "num_generations_eval": "tested in test_neutral.test_evaluation_equals_trl",
    "vespo_k_pos": "of a loss type that the pipeline refuses, and that TRL computes otherwise",
    "vespo_lambda_pos": "of a loss type that the pipeline refuses, and that TRL computes otherwise",
    "vespo_k_neg": "of a loss type that the pipeline refuses, and that TRL computes otherwise",
    "vespo_lambda_neg": "of a loss type that the pipeline refuses, and that TRL computes otherwise",
}

OFF_POLICY = {"num_iterations": 2, "max_steps": 4, "learning_rate": 0.1}
# Changing the option changes what it changes in TRL: option -> (value, further settings).
HONOURED = {
    "beta": (0.5, {}),
    "num_iterations": (2, {"max_steps": 4}),
    "epsilon": (1e-6, OFF_POLICY),
    "epsilon_high": (1e-6, OFF_POLICY),
    "delta": (1.0, OFF_POLICY),
    "importance_sampling_level": ("sequence", OFF_POLICY),
    "loss_type": ("grpo", {}),
    "scale_rewards": ("none", {}),
    "reward_weights": ([3.0], {"scale_rewards": "none", "max_grad_norm": 0.0, "learning_rate": 1e-3}),
    "multi_objective_aggregation": ("normalize_then_sum", {"rewards": [odd, length]}),
    "num_generations": (2, {}),
    "max_completion_length": (2, {}),
    "shuffle_dataset": (False, {}),
    "generation_batch_size": (16, {"max_steps": 4}),
    "steps_per_generation": (2, {"max_steps": 4}),
    "temperature": (0.5, {}),
    "mask_truncated_completions": (True, {"max_completion_length": 1}),
    "top_entropy_quantile": (0.5, {}),
    "entropy_coef": (0.5, {}),
    "use_adaptive_entropy": (True, {"entropy_coef": 0.1, "entropy_target": 10.0, "max_steps": 4}),
    "off_policy_mask_threshold": (0.0, OFF_POLICY),
    "use_bias_correction_kl": (False, OFF_POLICY | {"beta": 50.0}),
    "sync_ref_model": (True, {"beta": 0.5, "max_steps": 5, "ref_model_sync_steps": 1, "learning_rate": 0.1}),
    "sapo_temperature_pos": (3.0, OFF_POLICY | {"loss_type": "sapo"}),
    "sapo_temperature_neg": (3.0, OFF_POLICY | {"loss_type": "sapo"}),
    "remove_unused_columns": (True, {}),
}
# Options that are honoured although a run of these few steps does not show it by its parameters.
NO_VISIBLE_CHANGE = {"remove_unused_columns"}
REFUSED = {
    "vllm_importance_sampling_correction": "honoured; test_pipeline compares it with TRL's for every loss type",
}


def added_fields():
    inherited = {field.name for field in dataclasses.fields(TrainingArguments)}
    return {field.name for field in dataclasses.fields(GRPOConfig)} - inherited


@pytest.mark.conformance
def test_every_option_is_decided():
    decided = INERT.keys() | HONOURED.keys() | REFUSED.keys()
    missing = added_fields() - decided
    assert not missing, f"decide about TRL's new options {sorted(missing)}, in this file"
    assert not (INERT.keys() & HONOURED.keys())


@pytest.mark.conformance
@pytest.mark.parametrize("name", HONOURED)
def test_option_changes_what_it_changes_in_trl(name):
    if name not in {field.name for field in dataclasses.fields(GRPOConfig)}:
        pytest.skip(f"this TRL has no `{name}`")
    value, settings = HONOURED[name]
    data = arithmetic().select(range(24))
    reward = without_columns if name == "remove_unused_columns" else odd
    # Adam would blow up what only differs by rounding.
    case = {"data": data, "rewards": reward, "optim": "sgd", "learning_rate": 0.1, **settings}
    if name not in ("temperature", "max_completion_length", "mask_truncated_completions"):
        case["rollout_func"] = scripted
    theirs = train(GRPOTrainer, GRPOConfig, **case, **{name: value})
    ours = train(HookedTrainer, MethodConfig, **case, **{name: value})
    change = 0.0 if name in NO_VISIBLE_CHANGE else difference(ours, train(HookedTrainer, MethodConfig, **case))
    assert difference(theirs, ours) < max(1e-6, 0.01 * change)
    if name not in NO_VISIBLE_CHANGE:
        assert change > 1e-6


@pytest.mark.parametrize("name", ["vespo"])
def test_refused_loss_types(name):
    with pytest.raises(ValueError, match=name):
        build(HookedTrainer, loss_type=name)
