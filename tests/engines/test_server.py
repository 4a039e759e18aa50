"""
Methods that generate on a vLLM server: what they ask it for, and whether each answer reaches the row it belongs to.
The server is scripted, and weights do not travel, since TRL sends them from GPU to GPU.
"""

import json
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch
from harness import build, launch
from watched import Watched

from trl_ext import MethodConfig, MethodTrainer


pytest.importorskip("requests", reason="TRL's client of a vLLM server needs it")

from scripted_server import TOKENIZER, answer, logprobs_of, serve, without_gpu


class EditingTrainer(MethodTrainer):
    """The rollouts of a prompt start from different states."""

    config_class = MethodConfig

    def edit_examples(self, examples, group_ids):
        examples = super().edit_examples(examples, group_ids)
        for i, example in enumerate(examples):
            example["prompt"] = f"{i}+{example['prompt']}"
        return examples


CASES = {
    "clip_cov": ("clip_cov",),
    "spo": ("spo",),
    "knapsack_rl": ("knapsack_rl",),
    "scaf_grpo": ("scaf_grpo",),
    "clip_cov+dynamic_sampling": ("clip_cov", "dynamic_sampling"),
    "knapsack_rl+scaf_grpo": ("knapsack_rl", "scaf_grpo"),
    "editing": (EditingTrainer,),
}
# Only equal groups with one prompt each can be asked for as several answers to one prompt.
GROUPED = {"clip_cov", "scaf_grpo", "clip_cov+dynamic_sampling"}
SERVER = {"use_vllm": True, "vllm_mode": "server", "temperature": 0.7, "top_p": 0.9}


def check_requests(name, requests, asked):
    """Compare what was posted with the prompts of all rollouts, call by call."""
    posted = [request for path, request in requests if path == "/v1/completions"]
    for request, prompts in zip(posted, asked, strict=True):
        texts = TOKENIZER.batch_decode(request["prompt"], skip_special_tokens=True)
        assert [text for text in texts for _ in range(request["n"])] == prompts
        settings = {key: request[key] for key in ("temperature", "top_p", "max_tokens", "logprobs")}
        assert settings == {"temperature": 0.7, "top_p": 0.9, "max_tokens": 4, "logprobs": 0}
    sizes = [(len(request["prompt"]), request["n"]) for request in posted]
    first = (4, 4) if name in GROUPED else (16, 1)
    if name == "spo":
        assert sizes.pop(0) == (8, 1)  # two rollouts of each prompt before the first step
    assert sizes.count(first) == 3 and sizes[0] == first
    others = [size for size in sizes if size != first]
    assert all(n == 1 for _, n in others)
    assert bool(others) == bool({"scaf_grpo", "dynamic_sampling"} & set(CASES[name]))


@pytest.mark.parametrize("name", CASES)
def test_requests_and_answers(name, monkeypatch):
    with serve() as server:
        without_gpu(monkeypatch, server.requests)
        watched = Watched()
        trainer = watched.run(*CASES[name], **SERVER, vllm_server_base_url=server.url)
    watched.check(trainer)
    check_requests(name, server.requests, [call.prompts for call in watched.calls])
    # The server gets the policy once per generation, before anything is asked of it.
    order = [path for path, _ in server.requests]
    starts = [i for i, path in enumerate(order) if path == "weights"]
    assert len(starts) == 3 and starts[0] == 0
    assert all(order[i + 1 : i + 3] == ["/reset_prefix_cache", "/v1/completions"] for i in starts)
    assert order.count("/v1/completions") == len(order) - 6
    # Tokens and log-probabilities of one answer stay together and with the prompt that was asked.
    for batch in trainer._buffered_inputs:
        for row in range(len(batch["prompt_ids"])):
            prompt, completion = (
                batch[f"{part}_ids"][row][batch[f"{part}_mask"][row].bool()].tolist()
                for part in ("prompt", "completion")
            )
            assert completion[:-1] == answer(prompt, 0)[:-1]
            logprobs = batch["sampling_per_token_logps"][row, : len(completion)]
            torch.testing.assert_close(logprobs, torch.tensor(logprobs_of(completion)))


def test_prompts_are_scored_on_the_server(monkeypatch):
    with serve() as server:
        without_gpu(monkeypatch, server.requests)
        trainer = build(MethodTrainer, **SERVER, vllm_server_base_url=server.url)
        rewards, found = trainer.score_prompts(torch.tensor([5, 1, 2]), 3, measure=lambda row, samples: samples)
    posted = [request for path, request in server.requests if path == "/v1/completions"]
    assert [request["n"] for request in posted] == [1] * len(posted)
    prompts = [prompt for request in posted for prompt in request["prompt"]]
    assert TOKENIZER.batch_decode(prompts)[:9] == [
        trainer.train_dataset["prompt"][row] for row in [5] * 3 + [1] * 3 + [2] * 3
    ]
    for samples in found:
        for sample in samples:
            assert sample.completion_ids[:-1] == answer(sample.prompt_ids, 0)[:-1]
    expected = [[[float(sum(map(ord, sample.completion)) % 2)] for sample in samples] for samples in found]
    assert rewards.tolist() == expected


@pytest.mark.slow
def test_two_processes_share_a_server(tmp_path):
    with ExitStack() as stack:
        servers = [stack.enter_context(serve()) for _ in CASES]
        launch(Path(__file__).with_name("server_worker.py"), 2, tmp_path, *(server.url for server in servers))
    for name, server in zip(CASES, servers, strict=True):
        shares = [json.loads((tmp_path / f"{name}_{process}.json").read_text()) for process in range(2)]
        check_requests(name, server.requests, [a + b for a, b in zip(*shares, strict=True)])
