"""
What real runs are made of, for every method: adapters, quantised and half-precision weights, gradient checkpointing, a
KL term, stops, tools, and images. All are slow tests; docs/properties.md has the table.
"""

import pytest
import torch
from harness import difference, make_vision_model, parameters, partly_external, train_mix
from peft import LoraConfig, prepare_model_for_kbit_training
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, BitsAndBytesConfig

from trl_ext.core.mixing import list_methods
from trl_ext.tasks import POLICY_PATH


pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore::UserWarning")]
METHODS = list_methods()
each = pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.xdist_group(f"real-{name}")) for name in METHODS]
)
LORA = LoraConfig(target_modules=["q_proj", "v_proj"])


@pytest.fixture(scope="module")
def start():
    return AutoModelForCausalLM.from_pretrained(POLICY_PATH).state_dict()


@pytest.fixture(scope="module")
def whole(teacher):
    cache = {}

    def get(name):
        if name not in cache:
            cache[name] = train_mix([name], teacher)
        return cache[name]

    return get


def moved(trainer, start) -> None:
    """Every parameter is finite, and some have moved."""
    now = parameters(trainer)
    assert all(p.isfinite().all() for p in now.values())
    assert any((p.float() - start[name]).abs().max() > 1e-5 for name, p in now.items() if name in start)


def adapted(trainer) -> None:
    sizes = [p.abs().max().item() for name, p in parameters(trainer).items() if "lora_B" in name]  # 0 at the start
    assert sizes and all(0 < size < float("inf") for size in sizes)


@pytest.mark.shows("stop and resume inside a generation")
@each
def test_resume(name, teacher, tmp_path):
    whole = train_mix([name], teacher, out=tmp_path, save_strategy="steps", save_steps=3)
    resumed = train_mix([name], teacher, out=tmp_path, resume=str(tmp_path / "checkpoint-3"))
    assert difference(whole, resumed) == 0.0
    assert repr(whole.method_state()) == repr(resumed.method_state())


@pytest.mark.shows("gradient checkpointing")
@each
def test_gradient_checkpointing(name, teacher, whole):
    again = train_mix([name], teacher, gradient_checkpointing=True)
    assert again.model.is_gradient_checkpointing
    assert difference(whole(name), again) < 1e-6


@pytest.mark.shows("bf16")
@each
def test_bf16(name, teacher, start):
    trainer = train_mix([name], teacher, bf16=True, learning_rate=1e-2)
    assert trainer.accelerator.mixed_precision == "bf16"
    moved(trainer, start)


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.shows("KL term, also with LoRA")
@each
def test_kl_term(name, lora, teacher, start, record_property):
    beta = {} if name == "grpo_d" else {"beta": 0.1}  # GRPO-D sets it itself
    adapter = {"peft_config": LORA, "learning_rate": 1e-2} if lora else {}
    if name == "d3s":
        with pytest.raises(ValueError, match=r"D3STrainer masks tokens.*`beta`"):
            train_mix([name], teacher, **beta, **adapter)
        record_property("refused", "it masks tokens, which would mask them in the KL term too")
        return
    trainer = train_mix([name], teacher, **beta, **adapter)
    adapted(trainer) if lora else moved(trainer, start)
    assert any(entry.get("kl", 0.0) > 0 for entry in trainer.state.log_history)


@pytest.mark.shows("QLoRA (nf4)")
@each
def test_qlora(name, teacher):
    quantised = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
    model = AutoModelForCausalLM.from_pretrained(POLICY_PATH, quantization_config=quantised)
    model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    trainer = train_mix([name], teacher, model=model, peft_config=LORA, learning_rate=1e-2)
    assert any(p.dtype == torch.uint8 for p in trainer.model.parameters())
    adapted(trainer)


@pytest.mark.shows("tokens of tools")
@each
def test_tools(name, teacher, start, record_property):
    if name == "rest_grpo":
        with pytest.raises(ValueError, match=r"env_mask.*rest_accept_threshold"):
            train_mix([name], teacher, rollout_func=partly_external)
        record_property("refused", "what a tool wrote cannot be cut into beginnings; filtering prompts works")
    settings = {"rest_accept_threshold": float("inf")} if name == "rest_grpo" else {}
    trainer = train_mix([name], teacher, rollout_func=partly_external, **settings)
    moved(trainer, start)


@pytest.fixture(scope="module")
def vision_model(tmp_path_factory):
    return make_vision_model(tmp_path_factory.mktemp("vision") / "model")


# A further pass over the tokens, which does not see the images, and the setting without it, if there is one.
BLIND = {
    "gtpo": {"gtpo_use_initial_entropy": False},
    "kdrl": None,
    "spo": {"spo_rho_mode": "constant"},
    "tw_grpo": None,
}


@pytest.mark.shows("images")
@each
def test_images(name, vision_model, record_property):
    settings = {"model": vision_model, "conversational": True, "images": True, "learning_rate": 1e-2}
    if name in BLIND:
        with pytest.raises(ValueError, match="does not see the images"):
            train_mix([name], vision_model, **settings)
        other = BLIND[name] or {}
        words = ", ".join(f"`{key}={value!r}`" for key, value in other.items())
        refused = "its extra pass does not see images" + (f"; fine with {words}" if words else "")
        record_property("refused", refused)
        if not other:
            return
        settings |= other
    if name == "gtpo":
        settings["gtpo_entropy_threshold"] = 10.0  # a random policy is beyond the usual one
    trainer = train_mix([name], vision_model, **settings)
    start = AutoModelForImageTextToText.from_pretrained(vision_model).state_dict()
    moved(trainer, start)
    now = parameters(trainer)
    changed = [key for key, p in now.items() if "vision" in key and not torch.equal(p, start[key])]
    assert changed  # so the images were seen in the loss
