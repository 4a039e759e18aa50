"""TRL's environments: rollouts of several turns in which a tool answers, through the methods that look at turns."""

import hashlib
from pathlib import Path

import pytest
import torch
import trl
from datasets import Dataset
from harness import SETTINGS, parameters
from transformers import AutoTokenizer, Qwen2Config, Qwen2ForCausalLM
from trl import GRPOTrainer

from trl_ext import mix
from trl_ext.core.rollouts import step_numbers
from trl_ext.tasks import POLICY_PATH


TURN = '<tool_call>\n{{"name": "add", "arguments": {{"a": {}, "b": {}}}}}\n</tool_call>'


class Adder:
    """Adds; knows what it was asked since its last reset."""

    resets = 0

    def reset(self, **kwargs):
        Adder.resets += 1
        self.results = []

    def add(self, a: int, b: int) -> int:
        """
        Add two numbers.

        Args:
            a: The first number.
            b: The second number.

        Returns:
            Their sum.
        """
        self.results.append(a + b)
        return a + b


def used_the_tool(environments, completions, **kwargs):
    """1 for the right use: every answer of the tool was asked for by an even first number."""
    return [float(bool(e.results) and e.results[-1] % 2 == 0) for e in environments]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A random policy with room for a chat template with tools."""
    folder = tmp_path_factory.mktemp("policy")
    tokenizer = AutoTokenizer.from_pretrained(POLICY_PATH)
    tokenizer.add_special_tokens({"eos_token": "<|im_end|>"})
    tokenizer.chat_template = (Path(trl.__file__).parent / "chat_templates" / "qwen3.jinja").read_text()
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=4096,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
        pad_token_id=tokenizer.pad_token_id,
    )
    Qwen2ForCausalLM(config).save_pretrained(folder)
    return str(folder)


def scripted_turns(self, prompt_ids, images, multimodal_fields, num_generations, *args, **kwargs):
    """In place of the policy: none to two calls of the tool, then an answer."""
    completions = []
    for i, ids in enumerate(prompt_ids):
        text = self._tokenizer.decode(ids)
        asked = text.rpartition("<|im_start|>user")[2].count("<tool_response>")
        digest = hashlib.sha256(f"{self.state.global_step} {i} {len(ids)}".encode()).digest()
        said = TURN.format(digest[0], digest[1]) if digest[2] % 3 > asked else f"It is {digest[0]}."
        completions.append(self._tokenizer(f"{said}<|im_end|>")["input_ids"])
    return completions, None


def trained(names, model, monkeypatch, watch=None, **settings):
    monkeypatch.setattr(GRPOTrainer, "_generate_single_turn", scripted_turns)
    trainer_class, config_class = mix(*names)

    class Watching(trainer_class):
        def observe(self, rollouts):
            super().observe(rollouts)
            seen.append(rollouts)

    Watching.config_class, seen = config_class, []
    own = {"num_generations", "learning_rate"} if "spo" in names else {"learning_rate"}
    settings = {name: value for name, value in SETTINGS.items() if name not in own} | {
        "max_completion_length": 400,
        "learning_rate": 1e-2,
        "max_steps": 2,
        **settings,
    }
    data = Dataset.from_list([{"prompt": [{"role": "user", "content": f"{i}+1="}]} for i in range(8)])
    if "scaf_grpo" in names:
        data = data.add_column("solution", [["add"]] * 8)
    trainer = Watching(model, used_the_tool, config_class("run", **settings), data, environment_factory=Adder)
    before = {name: p.clone() for name, p in parameters(trainer).items()}
    trainer.train()
    now = parameters(trainer)
    assert all(p.isfinite().all() for p in now.values())
    assert any(not torch.equal(p, before[name]) for name, p in now.items())
    return trainer, seen


def answers(rollouts) -> list[int]:
    """How often the tool answered in every rollout."""
    return [sum(message["role"] == "tool" for message in completion) for completion in rollouts.completions]


@pytest.mark.parametrize(
    ("names", "settings"),
    [
        (["spo"], {"spo_offline_n": 1}),
        (["empg"], {}),
        (["stratified_grpo"], {}),
        (["stratified_grpo", "empg", "clip_cov"], {"clip_cov_ratio": 0.2, "clip_cov_low": 1e-3}),
    ],
    ids=lambda part: "+".join(part) if isinstance(part, list) else "",
)
def test_several_turns(names, settings, model, monkeypatch):
    Adder.resets = 0
    trainer, seen = trained(names, model, monkeypatch, **settings)
    assert len(seen) == 2
    for rollouts in seen:
        turns = answers(rollouts)
        assert len(set(turns)) == 3  # none, one and two calls
        # What the tool wrote is in the completion, and not in the mask of the loss.
        lengths, own = rollouts.completion_mask.sum(1), rollouts.mask.sum(1)
        assert [bool(n) for n in turns] == (own < lengths).tolist()
        text = trainer._tokenizer.batch_decode(
            [ids[mask.bool()].tolist() for ids, mask in zip(rollouts.completion_ids, rollouts.mask, strict=True)]
        )
        assert not any("tool_response" in part for part in text)
        assert [part.count("<|im_end|>") for part in text] == [n + 1 for n in turns]
        if "stratified_grpo" in names:  # alone in its stratum: nothing to compare with but the group's mean
            labels = torch.tensor(turns)
            same = (rollouts.group_ids[:, None] == rollouts.group_ids) & (labels[:, None] == labels)
            assert same.sum(1).max() > 1
    if "spo" in names:
        assert (trainer.spo_visits > 0).any()
    assert Adder.resets >= 16


def test_steps_are_the_turns(model, monkeypatch):
    """EMPG's steps are what the policy wrote between the tool's answers."""
    _, seen = trained(["empg"], model, monkeypatch)
    for rollouts in seen:
        assert step_numbers(rollouts.mask).max(1).values.tolist() == answers(rollouts)


def test_hints_have_no_environment(model, monkeypatch):
    with pytest.raises(ValueError, match="`environment_factory` is set, but Scaf-GRPO"):
        trained(["scaf_grpo"], model, monkeypatch)
