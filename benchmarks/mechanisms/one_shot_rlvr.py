"""
One-shot RLVR: does the variance of a prompt's history find prompts that teach, and does one of them teach the others?

Trains on 48 sums with the embedded policy, each visited 8 times by groups of 8. Prompts are ranked by every other
visit; of the visits in between, the share of groups with a signal of the top tenth and of all prompts, and the
mean success rate of the first. Then two runs from the same start, on the first prompt alone and on a random one that
is not among the top tenth, and the share of 500 other sums that is solved afterwards. The policy is tiny, so the sizes
are not the paper's, nor is the learning rate; the loss is.
"""

import contextlib
import io
import os
import tempfile

import torch
from common import QUIET, over_seeds, report
from transformers import PrinterCallback

from trl_ext import OneShotRLVRConfig, OneShotRLVRTrainer
from trl_ext.methods.one_shot_rlvr import rank_examples, repeat_examples
from trl_ext.tasks import POLICY_PATH, arithmetic, exact_match


os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
POOL, GROUP, GROUPS, STEPS, TOP = 48, 8, 16, 24, 5


def train(data, seed, steps):
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stderr(io.StringIO()):
        args = OneShotRLVRConfig(
            folder,
            **QUIET,
            num_generations=GROUP,
            per_device_train_batch_size=GROUP * GROUPS,
            max_completion_length=4,
            max_steps=steps,
            learning_rate=1e-4,
            lr_scheduler_type="constant",
            seed=seed,
        )
        trainer = OneShotRLVRTrainer(POLICY_PATH, exact_match, args, data)
        trainer.remove_callback(PrinterCallback)
        if steps:
            trainer.train()
    return trainer


def solved(trainer) -> float:
    test = arithmetic("test")
    return trainer.score_prompts(torch.arange(len(test)), 1, dataset=test, seed=0).mean().item()


def measure(generator):
    seed = generator.initial_seed()
    pool = arithmetic(seed=seed).select(range(POOL))
    trainer = train(pool, seed, STEPS)
    histories = trainer.one_shot_histories
    ranked = rank_examples({row: history[::2] for row, history in histories.items()})

    def later(rows):
        rates = torch.tensor([histories[row][1::2] for row in rows], dtype=torch.float64)
        return ((rates > 0) & (rates < 1)).double().mean().item(), rates.mean().item()

    found = {
        "groups with a signal, top tenth": later(ranked[:TOP])[0],
        "groups with a signal, all prompts": later(ranked)[0],
        "success rate, first prompt": later(ranked[:1])[1],
        "success rate, all prompts": later(ranked)[1],
        "other sums solved, before": solved(train(pool, seed, 0)),
        "other sums solved, all prompts": solved(trainer),
    }
    other = ranked[TOP + int(torch.randint(POOL - TOP, (), generator=generator))]
    for name, row in {"first prompt": ranked[0], "random prompt": other}.items():
        alone = train(pool.select(repeat_examples([row], GROUPS)), seed, STEPS)
        found[f"other sums solved, {name}"] = solved(alone)
    return found


if __name__ == "__main__":
    torch.set_num_threads(1)
    solves = "other sums solved, {}"
    report(
        "one_shot_rlvr",
        over_seeds(measure),
        {
            "more groups of the prompts whose success rate varied most have a signal than of all": lambda run: (
                run["groups with a signal, top tenth"] > run["groups with a signal, all prompts"]
            ),
            "the prompt that varied most is solved sometimes and sometimes not (a rate between 0.1 and 0.9)": (
                lambda run: 0.1 < run["success rate, first prompt"] < 0.9
            ),
            "training on the prompt that varied most raises the share of other sums that is solved": (
                lambda run: run[solves.format("first prompt")] > run[solves.format("before")]
            ),
            "training on the prompt that varied most solves more other sums than training on a random one": (
                lambda run: run[solves.format("first prompt")] > run[solves.format("random prompt")]
            ),
        },
        "Qwen2.5-Math-1.5B, MATH500: 36.0 before, 74.8 after training on one example of 1,209.",
    )
