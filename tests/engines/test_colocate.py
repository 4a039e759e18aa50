"""Methods on a real vLLM engine in the trainer's own process."""

import json
from collections import Counter
from pathlib import Path

import pytest
import torch
from harness import arithmetic, build, launch, parameters, train_mix
from peft import LoraConfig
from watched import Watched

from trl_ext import SPOTrainer
from trl_ext.core.mixing import list_methods


pytest.importorskip("vllm", reason="`.ci/vllm` runs these tests in an environment with vLLM")

from real_engine import COLOCATE, share_engine


pytestmark = pytest.mark.vllm
RATIO = "sampling/importance_sampling_ratio"
CLOSE = 1e-3  # engine and policy compute in float32; measured: at most 3e-5
LORA = LoraConfig(r=4, lora_alpha=64, target_modules="all-linear")


@pytest.fixture(scope="module")
def engine():
    with pytest.MonkeyPatch.context() as patch:
        share_engine(patch)
        yield


def logged(trainer, name) -> list[float]:
    return [entry[name] for entry in trainer.state.log_history if name in entry]


@pytest.mark.parametrize("lora", [None, LORA], ids=["full", "lora"])
@pytest.mark.parametrize(
    "names",
    [
        ("spo",),  # one rollout per prompt, and rollouts outside a step
        ("clip_cov",),
        ("knapsack_rl",),  # groups of different sizes
        ("scaf_grpo",),  # further rounds, of single rollouts with other prompts
        ("clip_cov", "spo"),
        ("clip_cov", "dynamic_sampling"),  # further rounds of whole groups
        ("knapsack_rl", "scaf_grpo"),
    ],
    ids="+".join,
)
def test_methods_train_on_the_engine(engine, names, lora):
    watched = Watched()
    trainer = watched.run(*names, **COLOCATE, peft_config=lora)
    watched.check(trainer)
    assert all(p.isfinite().all() for p in parameters(trainer).values())
    # The engine has the policy of the moment, and its log-probabilities stay with the rows that they belong to.
    assert max(call.gap for call in watched.calls) < CLOSE
    assert len(logged(trainer, f"{RATIO}/mean")) == 3
    assert min(logged(trainer, f"{RATIO}/min")) > 1 - CLOSE
    assert max(logged(trainer, f"{RATIO}/max")) < 1 + CLOSE
    # Each prompt got the rollouts it was meant to have, and no others were made.
    questions = trainer.train_dataset["prompt"]
    rounds = [[call for call in watched.calls if call.generation == generation] for generation in range(3)]
    if "spo" in names:
        assert Counter(rounds[0].pop(0).prompts) == dict.fromkeys(questions, 2)
    for (rows, budgets), calls in zip(watched.budgets, rounds, strict=True):
        wanted = Counter()
        for row, budget in zip(rows, budgets, strict=True):
            wanted[questions[row]] += budget
        assert Counter(calls[0].prompts) == +wanted
        assert (len(calls) > 1) == bool({"scaf_grpo", "dynamic_sampling"} & set(names))
    assert any(len(set(budgets)) > 1 for _, budgets in watched.budgets) == ("knapsack_rl" in names)
    if "scaf_grpo" in names:
        assert all(rollouts.changed_prompt.any() for rollouts in watched.rollouts)
    assert trainer.rollouts_spent == sum(len(call.prompts) for call in watched.calls)


@pytest.mark.shows("vLLM")
@pytest.mark.parametrize("name", list_methods())
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_every_method_trains_on_the_engine(engine, name, teacher):
    trainer = train_mix([name], teacher, **COLOCATE)
    assert all(p.isfinite().all() for p in parameters(trainer).values())
    ratios = [logged(trainer, f"{RATIO}/{end}") for end in ("min", "max")]
    if trainer.vllm_importance_sampling_correction:
        assert min(ratios[0]) > 1 - CLOSE and max(ratios[1]) < 1 + CLOSE
    else:
        assert ratios == [[], []] and name == "disco"  # it has no weights of tokens


@pytest.mark.parametrize("lora", [None, LORA], ids=["full", "lora"])
def test_an_engine_with_old_weights_would_be_noticed(engine, monkeypatch, lora):
    from trl.generation.vllm_generation import VLLMGeneration

    sync, synced = VLLMGeneration.sync_weights, []
    monkeypatch.setattr(VLLMGeneration, "sync_weights", lambda self: synced or synced.append(sync(self)))
    watched = Watched()
    trainer = watched.run("clip_cov", **COLOCATE, peft_config=lora)
    gaps = [call.gap for call in watched.calls]
    assert gaps[0] < CLOSE
    assert min(gaps[1:]) > 100 * CLOSE
    assert all(abs(mean - 1) > 10 * CLOSE for mean in logged(trainer, f"{RATIO}/mean")[1:])


def test_prompts_are_scored_on_the_engine(engine):
    def digits(prompts, completions, **kwargs):
        return [
            float(prompt == questions[1]) + len(text) / 100 for prompt, text in zip(prompts, completions, strict=True)
        ]

    questions = arithmetic()["prompt"]
    trainer = build(SPOTrainer, rewards=digits, **COLOCATE)
    before, metrics = torch.get_rng_state(), dict(trainer._metrics["train"])
    rows, decode = torch.tensor([5, 1, 2]), trainer.processing_class.decode

    def measure(row, samples):
        for sample in samples:
            assert decode(sample.prompt_ids, skip_special_tokens=True) == questions[row]
            assert decode(sample.completion_ids, skip_special_tokens=True) == sample.completion
        return [sample.completion for sample in samples]

    rewards, found = trainer.score_prompts(rows, 7, measure=measure)
    assert torch.equal(torch.get_rng_state(), before) and trainer._metrics["train"] == metrics
    assert trainer.rollouts_spent == 21
    expected = [
        [[float(row == 1) + len(text) / 100] for text in texts]
        for row, texts in zip(rows.tolist(), found, strict=True)
    ]
    torch.testing.assert_close(rewards, torch.tensor(expected))
    assert len(set(found[0])) > 1  # samples, not one answer seven times
    # What is drawn depends on the seed and on the number of calls before alone.
    torch.rand(10)
    trainer._score_calls = 0
    assert trainer.score_prompts(rows, 7, measure=measure)[1] == found
    assert trainer.score_prompts(rows, 7, measure=measure)[1] != found


@pytest.mark.parametrize("names", [("clip_cov", "spo"), ("knapsack_rl", "scaf_grpo")], ids="+".join)
def test_log_probabilities_that_the_engine_leaves_out(engine, monkeypatch, names):
    from trl.generation.vllm_generation import VLLMGeneration

    generate = VLLMGeneration.generate

    def patchy(self, *args, **kwargs):
        prompt_ids, completion_ids, logprobs, token_ids = generate(self, *args, **kwargs)
        for i, row in enumerate(logprobs):
            row[i % 2 :: 2] = [[None] for _ in row[i % 2 :: 2]]
        return prompt_ids, completion_ids, logprobs, token_ids

    monkeypatch.setattr(VLLMGeneration, "generate", patchy)
    watched = Watched()
    trainer = watched.run(*names, **COLOCATE, vllm_importance_sampling_mode="token_truncate")
    watched.check(trainer)
    assert all(p.isfinite().all() for p in parameters(trainer).values())
    assert min(logged(trainer, f"{RATIO}/min")) > 1 - CLOSE and max(logged(trainer, f"{RATIO}/max")) < 1 + CLOSE
    for batch in trainer._buffered_inputs:
        given = ~batch["sampling_per_token_logps"].isnan()
        model = batch["completion_mask"].bool()
        assert (given & model).any() and (~given & model).any()
        assert (batch["importance_sampling_ratio"][~given & model] == 1).all()
        gap = (batch["sampling_per_token_logps"] - batch["old_per_token_logps"])[given & model]
        assert gap.abs().max() < CLOSE


@pytest.mark.parametrize(
    ("processes", "sharing", "dtype", "close"),
    [
        (2, 1, "float32", CLOSE),  # an engine per process
        (2, 2, "float32", CLOSE),  # one engine of two processes (tensor parallelism): both must draw the same tokens
        (1, 1, "bfloat16", 0.2),  # what vLLM takes by default; measured: 0.92 to 1.05
    ],
)
def test_engines_of_other_processes_and_precisions(tmp_path, processes, sharing, dtype, close):
    launch(Path(__file__).with_name("colocate_worker.py"), processes, tmp_path, processes, sharing, dtype)
    for process in range(processes):
        gaps, ratios = json.loads((tmp_path / f"{process}.json").read_text())
        assert max(gaps) < close
        assert min(ratios) > 1 - close and max(ratios) < 1 + close
