"""Methods on the continuous batching of Transformers."""

import pytest
from harness import arithmetic, difference, parameters
from watched import Watched

from trl_ext import MethodTrainer


# A cache that fits the embedded policy; by default it takes half of the memory.
CACHE = {"num_blocks": 64, "max_batch_tokens": 256, "use_cuda_graph": False}
BATCHING = {"use_transformers_continuous_batching": True, "transformers_continuous_batching_config": CACHE}


def test_a_mix_trains_on_it():
    watched = Watched()
    trainer = watched.run("clip_cov", "spo", max_steps=2, **BATCHING)
    watched.check(trainer)
    assert all(p.isfinite().all() for p in parameters(trainer).values())
    assert trainer.rollouts_spent == sum(len(call.prompts) for call in watched.calls) == 24


@pytest.mark.slow
def test_greedy_answers_are_those_of_generate():
    runs = []
    for settings in (BATCHING, {}):
        watched = Watched()
        trainer = watched.run("knapsack_rl", "scaf_grpo", top_k=1, **settings)
        watched.check(trainer)
        runs.append((trainer, [(call.prompts, call.completions) for call in watched.calls]))
    (batched, answers), (plain, expected) = runs
    assert answers == expected
    assert len({text for _, texts in expected for text in texts}) > 4
    assert difference(batched, plain) < 1e-4


def test_an_evaluation_stays_one():
    watched, questions = Watched(), arithmetic()["prompt"][4:10]
    data = arithmetic().select(range(4, 10))
    trainer = watched.run(MethodTrainer, max_steps=2, eval_dataset=data, per_device_eval_batch_size=8, **BATCHING)
    before = trainer.rollouts_spent, trainer._generation, len(watched.rollouts)
    trainer.evaluate()
    assert {prompt for call in watched.calls[1:] for prompt in call.prompts} == set(questions)
    assert (trainer.rollouts_spent, trainer._generation, len(watched.rollouts)) == before
