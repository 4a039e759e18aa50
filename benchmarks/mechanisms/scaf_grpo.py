"""
Scaf-GRPO: do hints give more groups a signal than more rollouts would?

A real training whose outcomes are drawn: an answer to the plain question is right with a probability of 0.01, one with
1, 2, 3 or 4 hints with 0.1, 0.2, 0.3 and 0.4. Groups of 8 rollouts, hints from the first step on: the share of groups
with a non-zero advantage before the search and as they are trained on, and the rollouts that the search takes per
group; and the share of groups with a signal that this many rollouts more would give without hints. Exact values are
0.077, 0.721, 2.88 and 0.104. The paper's figures are of benchmarks.
"""

import os
import tempfile

import torch
from common import QUIET, over_seeds, report
from transformers import PrinterCallback

from trl_ext import ScafGRPOConfig, ScafGRPOTrainer
from trl_ext.core.rollouts import zero_signal
from trl_ext.tasks import POLICY_PATH, arithmetic


os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
GROUP, GROUPS, STEPS, RATES = 8, 40, 5, (0.01, 0.1, 0.2, 0.3, 0.4)


class Counting(ScafGRPOTrainer):
    before, after, asked = 0, 0, 0

    def observe(self, rollouts):
        super().observe(rollouts)
        size = len(rollouts)
        first = rollouts.everything
        self.before += len(
            first.group_ids[:size][~zero_signal(first.raw_rewards[:size], first.group_ids[:size])].unique()
        )
        self.after += len(rollouts.group_ids[rollouts.advantages != 0].unique())
        self.asked += len(first) - size


def measure(generator):
    def drawn(prompts, trainer):
        """Answers that tell whether they are right, by the number of hints."""
        rates = torch.tensor([RATES[prompt.count("hint")] for prompt in prompts])
        prompt_ids = trainer.processing_class(list(prompts))["input_ids"]
        ends = [[trainer.processing_class.eos_token_id] for _ in prompts]
        right = torch.bernoulli(rates, generator=generator).tolist()
        return {"prompt_ids": prompt_ids, "completion_ids": ends, "logprobs": None, "right": right}

    def rewarded(right, **kwargs):
        return right

    data = arithmetic()
    data = data.add_column("solution", [["hint"] * (len(RATES) - 1)] * len(data))
    with tempfile.TemporaryDirectory() as folder:
        args = ScafGRPOConfig(
            folder,
            **QUIET,
            num_generations=GROUP,
            per_device_train_batch_size=GROUP * GROUPS,
            max_completion_length=1,
            max_steps=STEPS,
            seed=generator.initial_seed(),
            scaf_exempt_steps=0,
            scaf_template="{question} {hints}",
        )
        trainer = Counting(POLICY_PATH, rewarded, args, data, rollout_func=drawn)
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    count, p = GROUPS * STEPS, RATES[0]
    more = GROUP + trainer.asked / count
    return {
        "groups with a signal, GRPO": trainer.before / count,
        "groups with a signal, Scaf-GRPO": trainer.after / count,
        "groups with a signal, as many rollouts without hints": 1 - (1 - p) ** more - p**more,
        "rollouts of the search per group": trainer.asked / count,
    }


if __name__ == "__main__":
    torch.set_num_threads(1)
    signal = "groups with a signal, {}"
    report(
        "scaf_grpo",
        over_seeds(measure),
        {
            "more groups have a signal than with GRPO": (
                lambda run: run[signal.format("Scaf-GRPO")] > run[signal.format("GRPO")]
            ),
            "more groups have a signal than if the search's rollouts were ordinary ones": lambda run: (
                run[signal.format("Scaf-GRPO")] > run[signal.format("as many rollouts without hints")]
            ),
        },
        "Average of seven maths sets: Qwen2.5-Math-1.5B 37.6 with GRPO, 41.5 with hints; Qwen2.5-Math-7B 45.2 and "
        "50.9; 17.4 % of the samples got hints.",
    )
