"""
What the engine relies on in TRL. Each test names the seam; `CONTRIBUTING.md` says what to do when one fails after a
TRL release.
"""

import inspect
from importlib.metadata import version

import pytest
import torch
import trl
from harness import arithmetic, build, scripted
from trl import GRPOConfig, GRPOTrainer
from trl.trainer import grpo_trainer, utils

import trl_ext


pytestmark = pytest.mark.conformance

# name: (the parameters that the engine passes or receives, whether others may follow)
SIGNATURES = {
    "_generate_and_score_completions": ["self", "inputs"],
    "_generate": ["self", "prompts"],
    "_generate_single_turn": ["self", "prompt_ids", "images", "multimodal_fields", "num_generations"],
    "_calculate_rewards": ["self", "inputs", "prompts", "completions", "completion_ids_list"],
    "_get_per_token_logps_and_entropies": [
        "self",
        "model",
        "input_ids",
        "attention_mask",
        "logits_to_keep",
        "batch_size",
        "compute_entropy",
    ],
    "_compute_loss": ["self", "model", "inputs"],
    "_prepare_inputs": ["self", "generation_batch"],
    "_tokenize_prompts": ["self", "prompts"],
    "get_high_entropy_mask": ["self", "entropies", "mask", "threshold"],
    "get_off_policy_mask": [
        "advantages",
        "per_token_logps",
        "sampling_per_token_logps",
        "mask",
        "off_policy_threshold",
    ],
    "get_train_dataloader": ["self"],
    "_save_checkpoint": ["self", "model", "trial"],
    "_save_rng_state": ["self", "output_dir"],
    "train": ["self", "resume_from_checkpoint"],
    "_load_optimizer_and_scheduler": ["self", "checkpoint"],
    "create_model_card": ["self", "model_name", "dataset_name", "tags"],
}


@pytest.mark.parametrize("name", SIGNATURES)
def test_signature(name):
    found = list(inspect.signature(getattr(GRPOTrainer, name)).parameters)
    assert found[: len(SIGNATURES[name])] == SIGNATURES[name]
    # New parameters are passed on by name; a new one without a default would have to be given.
    for parameter in list(inspect.signature(getattr(GRPOTrainer, name)).parameters.values())[len(SIGNATURES[name]) :]:
        assert parameter.default is not inspect.Parameter.empty, parameter


def test_helpers():
    for name in (
        "nanstd",
        "pad",
        "split_pixel_values_by_grid",
        "unsplit_pixel_values_by_grid",
        "create_model_from_path",
        "add_fused_lm_head",
    ):
        assert callable(getattr(utils, name)), name
    for name in ("prepare_deepspeed", "prepare_fsdp"):
        assert callable(getattr(trl.models, name)), name


@pytest.fixture(scope="module")
def trainer():
    class Spying(GRPOTrainer):
        events = ()

        def note(self, name, *details):
            self.events = (*self.events, (name, *details))

        def _generate_and_score_completions(self, inputs):
            self.rows = [dict(row) for row in inputs]
            self.note("generate and score")
            self.output = super()._generate_and_score_completions(inputs)
            return self.output

        def _generate(self, prompts):
            self.note("generate")
            self.generated = super()._generate(prompts)
            return self.generated

        def _calculate_rewards(self, *args):
            self.note("score")
            self.matrix = super()._calculate_rewards(*args)
            return self.matrix

        def _get_per_token_logps_and_entropies(self, *args, **kwargs):
            self.note("forward", torch.is_grad_enabled())
            result = super()._get_per_token_logps_and_entropies(*args, **kwargs)
            if not torch.is_grad_enabled():
                self.old = result[0]
            return result

        def _compute_loss(self, model, inputs):
            self.note("loss")
            self.loss_inputs = inputs
            return super()._compute_loss(model, inputs)

    trainer = build(
        Spying,
        GRPOConfig,
        num_iterations=2,
        max_steps=2,
        rollout_func=scripted,
        rewards=lambda completions, **kw: [None if i == 0 else 1.0 for i in range(len(completions))],
    )
    trainer.train()
    return trainer


def test_order_of_a_step(trainer):
    expected = ["generate and score", "generate", "forward", "score", "loss", "forward", "loss", "forward"]
    assert [event[0] for event in trainer.events] == expected
    assert [event[1] for event in trainer.events if event[0] == "forward"] == [False, True, True]


def test_what_a_generation_holds(trainer):
    output = trainer.output
    required = {"prompt_ids", "prompt_mask", "completion_ids", "completion_mask", "advantages", "num_items_in_batch"}
    assert required <= output.keys()
    assert output["old_per_token_logps"] is trainer.old, "the pass is found again by identity"
    assert output["advantages"].shape == (8,) and output["num_items_in_batch"].ndim == 0
    assert trainer.matrix.shape == (8, 1) and trainer.matrix[0].isnan()
    assert len(trainer.generated) == 8 and len(trainer.generated[0]) == 8


def test_rows_and_buffer(trainer):
    prompts = [row["prompt"] for row in trainer.rows]
    assert prompts[:4] == prompts[:1] * 4 and prompts[4:] == prompts[4:5] * 4
    assert trainer._step == 2 and len(trainer._buffered_inputs) == trainer.args.steps_per_generation
    assert trainer.loss_inputs is trainer._buffered_inputs[0]


def test_logs(trainer):
    assert len(trainer._logs["advantages"]) == 8
    assert {"prompt", "completion", "rewards", "advantages", "extra"} <= trainer._logs.keys()
    assert set(trainer._metrics) == {"train", "eval"}
    logged = trainer.state.log_history[0]
    assert {"reward", "reward_std", "frac_reward_zero_std", "entropy", "step_time"} <= logged.keys()


def test_loss_reads_advantages_and_bounds_after_its_forward():
    class Late(GRPOTrainer):
        def _get_per_token_logps_and_entropies(self, *args, **kwargs):
            result = super()._get_per_token_logps_and_entropies(*args, **kwargs)
            if torch.is_grad_enabled():
                self.current["advantages"] = torch.zeros_like(result[0])
                self.epsilon_low = torch.full_like(result[0], 0.2)
                self.epsilon_high = torch.full_like(result[0], 0.2)
            return result

        def _compute_loss(self, model, inputs):
            self.current = dict(inputs)
            loss = super()._compute_loss(model, self.current)
            assert loss.item() == 0.0
            return loss

    build(Late, GRPOConfig, max_steps=1).train()


def test_the_loss_is_divided_by_the_trainer_and_not_once_more():
    assert GRPOTrainer.loss_is_scaled_for_ga is True


def test_the_train_loader_reads_the_train_dataset():
    trainer = build(GRPOTrainer, GRPOConfig)
    trainer.train_dataset = arithmetic("test").select(range(24))
    batch = next(iter(trainer.get_train_dataloader()))
    assert {row["prompt"] for row in batch} <= set(arithmetic("test")["prompt"])


def test_the_supported_range_is_the_packages():
    from packaging.requirements import Requirement

    (wanted,) = [Requirement(r) for r in requires("trl-ext") if Requirement(r).name == "trl" and "extra" not in r]
    assert set(map(str, wanted.specifier)) == {f">={trl_ext.SUPPORTED_TRL[0]}", f"<{trl_ext.SUPPORTED_TRL[1]}"}
    assert version("trl") in wanted.specifier


def requires(name):
    from importlib.metadata import requires

    return requires(name)


@pytest.mark.parametrize(
    ("installed", "works"), [("1.14.2", False), ("1.15.0", True), ("1.16.3", True), ("1.17.0", False)]
)
def test_another_trl_is_named(installed, works):
    if works:
        trl_ext._check_trl(installed)
    else:
        with pytest.raises(ImportError, match=rf"trl {installed} is installed. Run: pip install"):
            trl_ext._check_trl(installed)


def test_source_of_the_loss_has_the_known_loss_types():
    source = inspect.getsource(grpo_trainer.GRPOTrainer._compute_loss)
    for name in ("grpo", "bnpo", "dr_grpo", "dapo", "luspo", "cispo", "sapo", "vespo"):
        assert f'"{name}"' in source
