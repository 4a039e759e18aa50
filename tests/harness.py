"""Short training runs on the embedded policy, for all tests."""

import hashlib
import shutil
import subprocess
import sys

import datasets
import torch
from PIL import Image
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PrinterCallback,
    ProgressCallback,
    Qwen2Config,
)

from trl_ext import mix
from trl_ext.tasks import POLICY_PATH, arithmetic, exact_match  # noqa: F401 (for the tests)


SETTINGS = {
    "use_cpu": True,
    "bf16": False,
    "gradient_checkpointing": False,
    "report_to": [],
    "save_strategy": "no",
    "logging_steps": 1,
    "num_generations": 4,
    "per_device_train_batch_size": 8,
    "max_completion_length": 4,
    "max_steps": 3,
    "learning_rate": 1e-3,
    "lr_scheduler_type": "constant",
    "disable_tqdm": True,
    "seed": 3,
}


def launch(worker, processes: int, *arguments, timeout: int = 300) -> None:
    """Run a script in several processes (gloo) and wait for them."""
    command = [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={processes}", "--master_port=0"]
    command += ["--rdzv_backend=c10d", "--rdzv_endpoint=localhost:0", str(worker), *map(str, arguments)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=timeout, check=False)
    assert result.returncode == 0, result.stderr[-4000:]


def parity_reward(completions, **kwargs):
    """1 for about half of all completions, whatever the policy writes: every group has a signal now and then."""
    texts = [c if isinstance(c, str) else c[-1]["content"] for c in completions]
    return [float(sum(map(ord, text)) % 2) for text in texts]


def build(trainer_class, config_class=None, *, data=None, rewards=parity_reward, out="unused", **settings):
    """
    A trainer on the embedded policy. Settings that are arguments of the trainer (`peft_config`, ...) are passed on.
    """
    arguments = ("peft_config", "rollout_func", "eval_dataset", "callbacks", "optimizers", "model")
    extra = {name: settings.pop(name) for name in arguments if name in settings}
    model = extra.pop("model", POLICY_PATH)
    config_class = config_class or trainer_class.config_class
    defaults = {name: value for name, value in SETTINGS.items() if name not in own_defaults(config_class)}
    args = config_class(str(out), **{**defaults, **settings})
    data = arithmetic().select(range(24)) if data is None else data
    trainer = trainer_class(model, rewards, args, data, **extra)
    for callback in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(callback)
    return trainer


def own_defaults(config_class) -> set[str]:
    """Fields whose default a method sets itself, such as SPO's single rollout per prompt."""
    return set().union(*(getattr(base, "_declared", ()) for base in config_class.__mro__))


def train(trainer_class, config_class=None, *, resume=None, **kwargs):
    trainer = build(trainer_class, config_class, **kwargs)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def parameters(trainer) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in trainer.accelerator.unwrap_model(trainer.model).named_parameters()}


def difference(a, b) -> float:
    """Largest difference between the parameters of two trainers."""
    first, second = parameters(a), parameters(b)
    assert first.keys() == second.keys()
    return max((first[name] - second[name]).abs().max().item() for name in first)


def scripted(prompts, trainer):
    """
    A `rollout_func` whose completions depend only on the prompt, the step and the row in the global batch, so that one
    and several processes get the same ones.
    """
    tokenizer, process = trainer.processing_class, trainer.accelerator.process_index
    prompt_ids = tokenizer([p if isinstance(p, str) else p[-1]["content"] for p in prompts])["input_ids"]
    completion_ids = []
    for i, prompt in enumerate(prompts):
        key = f"{prompt}|{trainer.state.global_step}|{process * len(prompts) + i}"
        digest = hashlib.sha256(key.encode()).hexdigest()
        text = str(int(digest[:8], 16) % 10 ** (1 + int(digest[8], 16) % 3))
        completion_ids.append([*tokenizer(text)["input_ids"], tokenizer.eos_token_id])
    return {"prompt_ids": prompt_ids, "completion_ids": completion_ids, "logprobs": None}


def partly_external(prompts, trainer):
    """A `rollout_func` whose second token of every completion counts as written by a tool."""
    output = scripted(prompts, trainer)
    output["env_mask"] = [[int(i != 1) for i in range(len(ids))] for ids in output["completion_ids"]]
    return output


HINTS = {"knowledge": ["carry"], "planning": ["units first"], "solution": ["add"]}
# What makes each method act within two generations of 16 rollouts.
ACTING = {
    "bapo": {"bapo_target": 0.7, "bapo_low_max": 1.0, "bapo_low_step": 0.01, "bapo_high_start": 1.0},
    "clip_cov": {"clip_cov_ratio": 0.2, "clip_cov_low": 1e-3},
    "d3s": {"d3s_n_final": 2, "d3s_k_final": 0.5, "d3s_k_init": 0.5},
    "epo": {"epo_coef": 0.1, "epo_kappa_low": 0.8, "epo_kappa_high": 1.2},
    "gdpo_nvidia": {"gdpo_batch_norm": "token"},  # a single reward is otherwise treated as in GRPO
    "grpo_lambda": {"lambda_top": 1.0},
    "gvm": {"gvm_presamples": 2, "gvm_grad_params": None},  # of which LoRA trains none
    "kdrl": {"kd_beta_init": 0.5},
    "kl_cov": {"kl_cov_ratio": 0.2},
    "knapsack_rl": {"knapsack_min_history": 1, "knapsack_zero_rollouts": 1},
    "llds": {"llds_coef": 2.0},
    # Answers of one line, of which some are good; the battery has rewards that tell no prompts apart.
    "rest_grpo": {"rest_on_empty": "unfiltered", "rest_num_samples": 3},
    "scaf_grpo": {"scaf_exempt_steps": 0},
    "spo": {"spo_offline_n": 0},
    "vas": {"vas_num_rollouts": 5},
    "stratified_grpo": {"stratified_key": "builtins:len"},  # of the completion
}


# What two methods want differently, and a mix of them must be given.
DECIDED = {
    frozenset({"clip_cov", "high_entropy_tokens"}): {"epsilon": 1.0, "epsilon_high": 1.0},
    frozenset({"high_entropy_tokens", "ngrpo"}): {"epsilon": 0.16, "epsilon_high": 0.28},
    frozenset({"clip_cov", "ngrpo"}): {"epsilon": 1.0, "epsilon_high": 1.0},
    frozenset({"epo", "one_shot_rlvr"}): {"entropy_coef": 0.0},
    frozenset({"gppo", "ngrpo"}): {"epsilon": 0.16, "epsilon_high": 0.24},
}


def sparse_reward(completions, **kwargs):
    """1 for a third of all completions."""
    texts = [c if isinstance(c, str) else c[-1]["content"] for c in completions]
    return [float(sum(map(ord, text)) % 3 == 0) for text in texts]


def make_teacher(folder) -> str:
    """A model of the embedded policy's vocabulary with other weights."""
    shutil.copytree(POLICY_PATH, folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    model.save_pretrained(folder)
    return str(folder)


def make_vision_model(folder) -> str:
    """A tiny random vision-language model that has the embedded policy's tokenizer and reads 8 x 8 pixels."""
    tokenizer = AutoTokenizer.from_pretrained(POLICY_PATH)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    size = {"height": 8, "width": 8}
    processor = LlavaProcessor(
        image_processor=CLIPImageProcessorPil(size=size, crop_size=size, do_center_crop=False),
        tokenizer=tokenizer,
        patch_size=4,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template="{% for message in messages %}{% if message.content is string %}{{ message.content }}{% else %}"
        "{% for part in message.content %}{{ '<image>' if part.type == 'image' else part.text }}{% endfor %}"
        "{% endif %}{% endfor %}",
    )
    tiny = {"num_hidden_layers": 2, "num_attention_heads": 2}
    vision = CLIPVisionConfig(
        hidden_size=16, intermediate_size=32, image_size=8, patch_size=4, projection_dim=16, **tiny
    )
    text = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_key_value_heads=2,
        max_position_embeddings=128,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
        **tiny,
    )
    torch.manual_seed(0)
    image_token = tokenizer.convert_tokens_to_ids("<image>")
    config = LlavaConfig(
        vision_config=vision, text_config=text, image_token_index=image_token, vision_feature_layer=-1
    )
    LlavaForConditionalGeneration(config).save_pretrained(folder)
    processor.save_pretrained(folder)
    return str(folder)


def train_mix(names, teacher, wrap=lambda trainer: trainer, blend=None, **settings):
    """Two generations of a mix, under settings with which each method acts; `wrap` may subclass the trainer."""
    trainer, config = mix(*names, blend=blend)
    for name in names:
        settings = ACTING.get(name, {}) | settings
    for pair, decided in DECIDED.items():
        settings = (decided if pair <= set(names) else {}) | settings
    if "kdrl" in names:
        settings["kd_teacher"] = teacher
    data = arithmetic(conversational=settings.pop("conversational", False)).select(range(4))
    for column, hints in HINTS.items():
        data = data.add_column(column, [hints] * 4)
    data = data.add_column("duration", [0.5, 2.0, 1.0, 4.0])
    if settings.pop("images", False):
        shades = [Image.new("RGB", (8, 8), (60 * i, 0, 0)) for i in range(4)]
        data = data.add_column("image", list(map(datasets.Image().encode_example, shades)))
        data = data.cast_column("image", datasets.Image())
    settings = {
        "num_generations": 4,
        "num_iterations": 2,
        "max_steps": 4,
        "per_device_train_batch_size": 16,
        "rewards": sparse_reward,
    } | settings
    return train(wrap(trainer), config, data=data, **settings)
