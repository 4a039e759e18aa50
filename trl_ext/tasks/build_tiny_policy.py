"""
Rebuild the tiny policy from scratch: `python -m trl_ext.tasks.build_tiny_policy [--output DIR] [--seed N]`.

A small Qwen2 model with a character tokenizer learns the embedded sums and reasoning_gym's `chain_sum`
(`CHAIN_SUM_CONFIG`) from answers, each as a plain prompt and as a chat. The warm-up stops at a fixed accuracy under
sampling, so that reinforcement learning has something to gain. It takes a few minutes on one core.
"""

import argparse
import json
import random
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from .embedded import CHAIN_SUM_CONFIG, POLICY_PATH, _pairs, _test_pairs


SPECIAL_TOKENS = ["<|pad|>", "<|eos|>", "<|unk|>", "<|system|>", "<|user|>", "<|assistant|>"]
CHAT_TEMPLATE = (
    "{%- for message in messages -%}"
    "{%- if message['role'] not in ['system', 'user', 'assistant'] -%}"
    "{{- raise_exception('The tiny policy knows the roles system, user and assistant, not ' + message['role']) -}}"
    "{%- endif -%}"
    "{{- '<|' + message['role'] + '|>' -}}"
    "{%- if message['role'] == 'assistant' -%}"
    "{%- generation -%}{{- message['content'] + eos_token -}}{%- endgeneration -%}"
    "{%- else -%}"
    "{{- message['content'] -}}"
    "{%- endif -%}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|assistant|>' -}}{%- endif -%}"
)
MAX_LENGTH = 1024
MAX_NEW_TOKENS = 8
# Accuracy under sampling at temperature 1 at which the warm-up leaves each kind of prompt alone.
TARGETS = {"sums": 0.35, "sums, chat": 0.35, "chain_sum": 0.25, "chain_sum, chat": 0.25}


def build_tokenizer():
    """
    The character tokenizer: a Qwen2 tokenizer without merges, so one token per byte of text (one per character of
    ASCII text) and one per special token. No text is unknown to it.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokens = SPECIAL_TOKENS + sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={token: index for index, token in enumerate(tokens)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<|pad|>",
        eos_token="<|eos|>",
        unk_token="<|unk|>",
        padding_side="left",
        clean_up_tokenization_spaces=False,
        model_max_length=MAX_LENGTH,
        chat_template=CHAT_TEMPLATE,
    )


def build_model(tokenizer, seed: int):
    """The untrained policy."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(seed)
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=MAX_LENGTH,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = Qwen2ForCausalLM(config).float()
    model.generation_config.update(
        do_sample=True, bos_token_id=None, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id
    )
    return model


class Examples:
    """Endless examples of one kind, as `(prompt, answer)` texts."""

    def __init__(self, kind: str, seed: int):
        self.rng = random.Random(f"{kind} {seed}")
        self.chat = kind.endswith(", chat")
        if kind.startswith("sums"):
            held_out = set(_test_pairs())
            pairs = [pair for pair in _pairs() if pair not in held_out]
            self.pairs = pairs + [pair[::-1] for pair in pairs]
            self.chain = None
        else:
            import reasoning_gym

            size = 2**31
            self.chain = reasoning_gym.create_dataset("chain_sum", seed=2**32, size=size, **CHAIN_SUM_CONFIG)

    def draw(self, n: int) -> list[tuple[str, str]]:
        if self.chain is None:
            texts = [(f"{a}+{b}=", str(a + b)) for a, b in self.rng.choices(self.pairs, k=n)]
        else:
            entries = [self.chain[self.rng.randrange(len(self.chain))] for _ in range(n)]
            texts = [(entry["question"], entry["answer"]) for entry in entries]
        if self.chat:
            texts = [(f"<|user|>{prompt}<|assistant|>", answer) for prompt, answer in texts]
        return texts


def loss_on_answers(model, tokenizer, texts: list[tuple[str, str]]) -> torch.Tensor:
    """Mean cross entropy of answer and end token. What all prompts share at their start is computed only once."""
    prompts = tokenizer([prompt for prompt, _ in texts])["input_ids"]
    answers = tokenizer([answer + tokenizer.eos_token for _, answer in texts])["input_ids"]
    shared = 0
    while all(len(ids) > shared + 1 and ids[shared] == prompts[0][shared] for ids in prompts):
        shared += 1
    rows = [prompt[shared:] + answer for prompt, answer in zip(prompts, answers, strict=True)]
    width = max(map(len, rows))
    ids = torch.tensor([row + [tokenizer.pad_token_id] * (width - len(row)) for row in rows])
    labels = torch.full_like(ids, -100)
    for i, (row, answer) in enumerate(zip(rows, answers, strict=True)):
        labels[i, len(row) - len(answer) : len(row)] = torch.tensor(answer)
    cache = None
    if shared:
        cache = model(torch.tensor([prompts[0][:shared]]), use_cache=True).past_key_values
        cache.batch_repeat_interleave(len(rows))
    logits = model(ids, past_key_values=cache, use_cache=shared > 0).logits
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())


@torch.no_grad()
def accuracy(model, tokenizer, texts: list[tuple[str, str]]) -> tuple[float, float]:
    """
    How often one sample at temperature 1 is the answer, and how often it ends within `MAX_NEW_TOKENS`.

    Args:
        texts (`list[tuple[str, str]]`):
            Prompts, already in the chat template where they are chats, and answers.
    """
    inputs = tokenizer([prompt for prompt, _ in texts], return_tensors="pt", padding=True)
    output = model.generate(
        input_ids=inputs["input_ids"],
        attention_mask=inputs["attention_mask"],
        max_new_tokens=MAX_NEW_TOKENS,
        do_sample=True,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
    )[:, inputs["input_ids"].shape[1] :]
    completions = tokenizer.batch_decode(output, skip_special_tokens=True)
    right = [completion.strip() == answer for completion, (_, answer) in zip(completions, texts, strict=True)]
    ended = (output == tokenizer.eos_token_id).any(1)
    return sum(right) / len(right), ended.float().mean().item()


def warm_up(model, tokenizer, seed: int, batch_size: int, learning_rate: float, max_steps: int) -> None:
    """Train until every kind of prompt has reached its target; kinds further from theirs are drawn more often."""
    examples = {kind: Examples(kind, seed) for kind in TARGETS}
    probes = {kind: Examples(kind, seed + 1) for kind in TARGETS}
    rng = random.Random(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=0.01, betas=(0.9, 0.98))
    # The average of the last hundred or so steps; it is better and much steadier than any of them.
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.99))
    scores = dict.fromkeys(TARGETS, 0.0)
    start = time.perf_counter()
    for step in range(1, max_steps + 1):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * min(1.0, step / 100)
        gaps = [max(TARGETS[kind] - scores[kind], 0.0) + 0.002 for kind in TARGETS]
        kind = rng.choices(list(TARGETS), weights=gaps)[0]
        loss = loss_on_answers(model, tokenizer, examples[kind].draw(batch_size))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        average.update_parameters(model)
        if step % 50 == 0:
            results = {kind: accuracy(average.module, tokenizer, probes[kind].draw(200)) for kind in TARGETS}
            scores = {kind: score for kind, (score, _) in results.items()}
            shown = ", ".join(f"{kind} {score:.3f} (ends {end:.3f})" for kind, (score, end) in results.items())
            print(f"step {step} ({time.perf_counter() - start:.0f} s): {shown}", flush=True)
            if all(scores[kind] >= TARGETS[kind] for kind in TARGETS):
                break
    model.load_state_dict(average.module.state_dict())


def save(model, tokenizer, output: Path) -> None:
    """Write the policy, over the files of a previous one."""
    model.save_pretrained(output)
    tokenizer.save_pretrained(output)
    # The name of the class under which every version of transformers loads the tokenizer of a Qwen2 model.
    path = output / "tokenizer_config.json"
    config = {**json.loads(path.read_text()), "tokenizer_class": "Qwen2Tokenizer"}
    config.pop("backend", None)
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    (output / "model.safetensors").chmod(0o644)  # written for the owner only


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Rebuild the tiny policy of trl_ext.tasks.")
    parser.add_argument("--output", type=Path, default=Path(POLICY_PATH), help="directory to write")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--batch_size", type=int, default=128)
    parser.add_argument("--learning_rate", type=float, default=1e-3)
    parser.add_argument("--max_steps", type=int, default=20_000)
    arguments = parser.parse_args(argv)

    torch.set_num_threads(1)
    tokenizer = build_tokenizer()
    model = build_model(tokenizer, arguments.seed)
    print(f"{model.num_parameters():,} parameters", flush=True)
    warm_up(model, tokenizer, arguments.seed, arguments.batch_size, arguments.learning_rate, arguments.max_steps)
    save(model, tokenizer, arguments.output)
    size = sum(path.stat().st_size for path in arguments.output.iterdir())
    print(f"{arguments.output}: {size / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
