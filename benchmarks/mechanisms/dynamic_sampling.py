"""
Dynamic sampling: does every group that is trained on have a signal, at what cost, and does the policy learn more?

Trains the embedded policy on sums for 40 steps of 4 prompts with 8 rollouts, with dynamic sampling and as plain GRPO,
which then goes on until it has spent as many rollouts. The share of groups without a signal among those trained on,
the rounds of generation per step, the norm of the gradient before it is clipped, and the accuracy on 200 held-out sums
with 4 samples each, after as many steps and after as many rollouts. The sums stand in for the paper's mathematics.
"""

import os
import statistics
import tempfile

import torch
from common import QUIET, over_seeds, report
from transformers import PrinterCallback, TrainerCallback

from trl_ext import DynamicSamplingConfig, DynamicSamplingTrainer, MethodConfig, MethodTrainer
from trl_ext.tasks import POLICY_PATH, arithmetic, exact_match


os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
STEPS, BATCH, SUMS = 40, 32, 200


class Held(TrainerCallback):
    """Rollouts spent and held-out accuracy, at the same step for all and at the end."""

    def __init__(self, trainer):
        self.trainer, self.spent, self.accuracy = trainer, {}, {}

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step in (STEPS, args.max_steps):
            self.spent[state.global_step] = self.trainer.rollouts_spent
            rewards = self.trainer.score_prompts(torch.arange(SUMS), 4, dataset=arithmetic("test"), seed=0)
            self.accuracy[state.global_step] = rewards.nanmean().item()


def run(trainer_class, config_class, seed, steps):
    """The logged metrics of the first steps, and the callback."""
    with tempfile.TemporaryDirectory() as folder:
        args = config_class(
            folder,
            **QUIET,
            logging_steps=1,
            num_generations=8,
            per_device_train_batch_size=BATCH,
            max_completion_length=4,
            max_steps=steps,
            learning_rate=1e-4,
            lr_scheduler_type="constant",
            seed=seed,
        )
        trainer = trainer_class(POLICY_PATH, exact_match, args, arithmetic())
        trainer.remove_callback(PrinterCallback)
        held = Held(trainer)
        trainer.add_callback(held)
        trainer.train()
    return [entry for entry in trainer.state.log_history if "loss" in entry][:STEPS], held


def measure(generator):
    seed = generator.initial_seed()
    logs, held = run(DynamicSamplingTrainer, DynamicSamplingConfig, seed, STEPS)
    spent = held.spent[STEPS]
    more = max(round(spent / BATCH), STEPS)
    plain_logs, plain = run(MethodTrainer, MethodConfig, seed, more)
    found = {"rounds of generation per step, dynamic sampling": spent / BATCH / STEPS}
    for name, entries in {"GRPO": plain_logs, "dynamic sampling": logs}.items():
        for label, key in {
            "share of trained groups without a signal": "frac_reward_zero_std",
            "norm of the gradient": "grad_norm",
        }.items():
            found[f"{label}, {name}"] = statistics.fmean(entry[key] for entry in entries)
    found["groups that only fill up, dynamic sampling"] = statistics.fmean(x["ds/filler_groups"] for x in logs)
    found["accuracy, dynamic sampling"] = held.accuracy[STEPS]
    found["accuracy, GRPO after as many steps"] = plain.accuracy[STEPS]
    found["accuracy, GRPO after as many rollouts"] = plain.accuracy[more]
    return found


CLAIMS = {
    "every group that is trained on has a signal, of GRPO's at least a tenth has none": lambda run: (
        run["share of trained groups without a signal, dynamic sampling"] == 0
        and run["share of trained groups without a signal, GRPO"] >= 0.1
    ),
    "the gradient is larger than GRPO's": lambda run: (
        run["norm of the gradient, dynamic sampling"] > run["norm of the gradient, GRPO"]
    ),
    "more accurate than GRPO after as many steps": lambda run: (
        run["accuracy, dynamic sampling"] > run["accuracy, GRPO after as many steps"]
    ),
    "more accurate than GRPO after as many rollouts": lambda run: (
        run["accuracy, dynamic sampling"] > run["accuracy, GRPO after as many rollouts"]
    ),
}
PAPER = (
    "Qwen2.5-32B, AIME 2024, added to the other parts of DAPO: 42 without, 50 with; a reproduction in verl: 50 and 52."
)


if __name__ == "__main__":
    torch.set_num_threads(1)
    report("dynamic_sampling", over_seeds(measure), CLAIMS, PAPER)
