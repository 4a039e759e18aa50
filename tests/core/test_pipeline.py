"""The seam's own loss pipeline gives TRL's loss and gradients under every option that it accepts."""

import itertools

import pytest
import torch
from harness import POLICY_PATH, build, difference, scripted, train
from transformers import AutoTokenizer, Qwen2MoeConfig, Qwen2MoeForCausalLM
from trl import GRPOConfig, GRPOTrainer

from trl_ext import MethodConfig, MethodTrainer


class PipelineTrainer(MethodTrainer):
    """Changes nothing, but overrides a hook that makes the seam use its own pipeline."""

    config_class = MethodConfig

    def log_ratio(self, tokens):
        return super().log_ratio(tokens)


@pytest.fixture(scope="module")
def trainers():
    pair = [build(cls, config) for cls, config in ((GRPOTrainer, GRPOConfig), (PipelineTrainer, MethodConfig))]
    for trainer in pair:
        trainer.model.double().train()  # so that float noise cannot hide behind the tolerance
        trainer.current_gradient_accumulation_steps = 2
        trainer.args.steps_per_generation = 2
        trainer.accelerator.gradient_state._set_sync_gradients(True)
    return pair


def make_inputs(trainer, generator, tool_mask, off_policy):
    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    rows, length = 6, 5
    ids = torch.randint(5, 60, (rows, 4 + length), generator=generator)
    lengths = torch.tensor([5, 3, 1, 5, 2, 4])
    completion_mask = (torch.arange(length) < lengths[:, None]).long()
    prompt_mask = torch.ones(rows, 4, dtype=torch.long)
    prompt_mask[2, :2] = 0
    inputs = {
        "prompt_ids": ids[:, :4],
        "prompt_mask": prompt_mask,
        "completion_ids": ids[:, 4:],
        "completion_mask": completion_mask,
        "advantages": draw(rows),
        "num_items_in_batch": torch.tensor(37.0),
        "group_ids": torch.arange(rows) // 2,
        "prompt_index": torch.arange(rows),
        "rewards": draw(rows),
        "row_ids": torch.arange(rows),
    }
    with torch.no_grad():
        full = torch.cat([inputs["prompt_mask"], completion_mask], dim=1)
        logps = trainer._get_per_token_logps_and_entropies(trainer.model, ids, full, length)[0]
    inputs["ref_per_token_logps"] = logps + 0.3 * draw(rows, length)
    if off_policy:
        inputs["old_per_token_logps"] = logps + 0.3 * draw(rows, length)
        inputs["sampling_per_token_logps"] = inputs["old_per_token_logps"] + 0.1 * draw(rows, length)
        inputs["importance_sampling_ratio"] = 1 + 0.1 * draw(rows, length)
    if tool_mask:
        inputs["tool_mask"] = torch.ones_like(completion_mask)
        inputs["tool_mask"][:, 1] = 0
    return inputs


def loss_and_gradients(trainer, inputs):
    trainer.model.zero_grad()
    loss = trainer._compute_loss(trainer.model, dict(inputs))
    loss.backward()
    return loss.item(), [p.grad.clone() for p in trainer.model.parameters() if p.grad is not None]


OPTIONS = {
    "loss_type": ["grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo", "luspo"],
    "importance_sampling_level": ["token", "sequence"],
    "beta": [0.0, 0.3],
    "delta": [None, 1.3],
    "top_entropy_quantile": [1.0, 0.5],
    "entropy_coef": [0.0, 0.1],
    "off_policy_mask_threshold": [None, 0.01],
    "vllm": [False, True],
    "tool_mask": [False, True],
    "use_bias_correction_kl": [False, True],
}


@pytest.mark.conformance
@pytest.mark.parametrize("loss_type", OPTIONS["loss_type"])
def test_equals_trl(trainers, loss_type):
    generator = torch.Generator().manual_seed(0)
    names = [name for name in OPTIONS if name != "loss_type"]
    combinations = list(itertools.product(*(OPTIONS[name] for name in names)))
    # Every pair of option values is in the sample many times over; the full product is the slow test's.
    sample = combinations[:: max(1, len(combinations) // 48)] + combinations[-1:]
    worst = compare(trainers, generator, loss_type, names, sample)
    assert worst < 1e-6


@pytest.mark.slow
@pytest.mark.conformance
@pytest.mark.parametrize("loss_type", OPTIONS["loss_type"])
def test_equals_trl_everywhere(trainers, loss_type):
    generator = torch.Generator().manual_seed(1)
    names = [name for name in OPTIONS if name != "loss_type"]
    assert compare(trainers, generator, loss_type, names, itertools.product(*(OPTIONS[n] for n in names))) < 1e-6


def compare(trainers, generator, loss_type, names, combinations) -> float:
    worst, off_policy = 0.0, True
    for values in combinations:
        options = dict(zip(names, values, strict=True))
        off_policy = options["vllm"] or not off_policy  # TRL always has old log-probabilities with vLLM
        inputs = make_inputs(trainers[0], generator, options["tool_mask"], off_policy)
        results = []
        for trainer in trainers:
            trainer.loss_type = loss_type
            for name in ("importance_sampling_level", "beta", "top_entropy_quantile", "entropy_coef"):
                setattr(trainer, name, options[name])
            trainer.off_policy_mask_threshold = options["off_policy_mask_threshold"]
            trainer._entropy_bonus_enabled = options["entropy_coef"] != 0
            trainer.args.delta = options["delta"]
            trainer.args.use_bias_correction_kl = options["use_bias_correction_kl"]
            trainer.use_vllm = trainer.vllm_importance_sampling_correction = options["vllm"]
            results.append(loss_and_gradients(trainer, inputs))
        (loss, gradients), (our_loss, our_gradients) = results
        assert any(g.abs().max() > 0 for g in gradients)
        worst = max(worst, abs(loss - our_loss))
        for a, b in zip(gradients, our_gradients, strict=True):
            worst = max(worst, ((a - b).abs().max() / max(1.0, a.abs().max().item())).item())
        last = [{k: v[-1] for k, v in t._metrics["train"].items() if v} for t in trainers]
        for name in ("kl", "entropy", "policy_loss"):
            assert last[0].get(name) == pytest.approx(last[1].get(name), abs=1e-6), (name, options)
        for trainer in trainers:
            trainer._metrics["train"].clear()
    return worst


@pytest.mark.conformance
def test_auxiliary_loss_of_a_mixture_of_experts(tmp_path):
    """TRL adds it, next to a surrogate of ours."""
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(POLICY_PATH)
    config = Qwen2MoeConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=32,
        moe_intermediate_size=16,
        shared_expert_intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        num_experts=4,
        num_experts_per_tok=2,
        output_router_logits=True,
        router_aux_loss_coef=0.5,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    Qwen2MoeForCausalLM(config).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    settings = {"model": str(tmp_path), "rollout_func": scripted, "num_iterations": 2, "max_steps": 4}
    settings |= {"optim": "sgd", "learning_rate": 0.1}
    theirs = train(GRPOTrainer, GRPOConfig, **settings)
    assert theirs.state.log_history[0]["aux_loss"] > 0
    assert difference(theirs, train(PipelineTrainer, MethodConfig, **settings)) < 1e-6
    without = train(PipelineTrainer, MethodConfig, router_aux_loss_coef=0.0, **settings)
    assert difference(theirs, without) > 1e-6


class LossTrainer(MethodTrainer):
    config_class = MethodConfig

    def policy_loss(self, tokens):
        return super().policy_loss(tokens)


class RangeTrainer(MethodTrainer):
    config_class = MethodConfig

    def clip_range(self, tokens):
        return super().clip_range(tokens)


@pytest.mark.parametrize(
    ("trainer", "settings", "named"),
    [
        (PipelineTrainer, {"loss_type": "vespo"}, "vespo"),
        (LossTrainer, {"loss_type": "vespo"}, "vespo"),
        (LossTrainer, {"loss_type": "cispo"}, "cispo"),
        (LossTrainer, {"loss_type": "sapo"}, "sapo"),
        (LossTrainer, {"delta": 2.0}, "delta"),
        (RangeTrainer, {"loss_type": "sapo"}, "sapo"),
        (RangeTrainer, {"loss_type": "vespo"}, "vespo"),
    ],
)
def test_refuses_by_name(trainer, settings, named):
    with pytest.raises(ValueError, match=named):
        build(trainer, MethodConfig, **settings)
