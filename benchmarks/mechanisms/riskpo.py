"""
RiskPO: does more of a batch have a learning signal in bundles of prompts than in groups, also where all fail?

0/1 rewards of prompts with a success rate of 0.05, and of prompts with rates from Beta(0.3, 0.3), most of which lie
below 0.1 or above 0.9: the share of groups of 8 whose rewards differ, all that GRPO can learn from, and of sets of
bundles of 5 prompts whose scores differ. Then a short training with rewards that are 1 at random: of the groups in
which all responses are wrong, the share to which the trainer gives different advantages (GRPO: none). The paper's
figures are of benchmarks; this is what it explains them by.
"""

import os
import tempfile

import torch
from common import QUIET, beta_rates, over_seeds, report, simulated_groups
from transformers import PrinterCallback

from trl_ext import RiskPOConfig, RiskPOTrainer
from trl_ext.core.rollouts import group_advantages, zero_signal
from trl_ext.methods.riskpo import bundle_scores, make_bundles
from trl_ext.tasks import POLICY_PATH, arithmetic


os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
GROUP, BUNDLE, RATE, PROMPTS = 8, 5, 0.05, 10_000
SPREADS = {f"success rate {RATE}": lambda _: torch.full((PROMPTS,), RATE, dtype=torch.float64)}
SPREADS["success rates ~ Beta(0.3, 0.3)"] = lambda generator: beta_rates(0.3, 0.3, PROMPTS, generator)


class Watching(RiskPOTrainer):
    wrong = ()

    def observe(self, rollouts):
        super().observe(rollouts)
        plain = group_advantages(rollouts.rewards, rollouts.group_ids)
        for group in rollouts.group_ids.unique():
            mine = rollouts.group_ids == group
            if (rollouts.rewards[mine] == 0).all():
                self.wrong += (len(rollouts.advantages[mine].unique()) > 1,)
                assert not plain[mine].any()


def signal_of_wrong_groups(generator) -> float:
    """Share of the all-wrong groups of a training that get different advantages."""

    def reward(completions, **kwargs):
        return (torch.rand(len(completions), generator=generator) < RATE).double().tolist()

    with tempfile.TemporaryDirectory() as folder:
        args = RiskPOConfig(
            folder,
            **QUIET,
            num_generations=GROUP,
            per_device_train_batch_size=4 * BUNDLE * GROUP,
            max_completion_length=2,
            max_steps=12,
            seed=generator.initial_seed(),
            importance_sampling_level="sequence",
            loss_type="grpo",
        )
        trainer = Watching(POLICY_PATH, reward, args, arithmetic())
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    return sum(trainer.wrong) / len(trainer.wrong)


def measure(generator):
    found = {}
    for name, draw in SPREADS.items():
        rewards, groups = simulated_groups(draw(generator), GROUP, generator)
        bundles, sets = make_bundles(groups, BUNDLE, generator)
        for part, constant in {
            "groups": zero_signal(rewards, groups),
            "bundle sets": zero_signal(bundle_scores(rewards, bundles), sets),
        }.items():
            found[f"{name}: share of {part} with a signal"] = (~constant).double().mean().item()
    wrong = f"success rate {RATE}: share of all-wrong groups with different advantages in training"
    return found | {wrong: signal_of_wrong_groups(generator)}


if __name__ == "__main__":
    report(
        "riskpo",
        over_seeds(measure),
        {
            f"more bundle sets than groups have a signal, {name}": lambda run, name=name: (
                run[f"{name}: share of bundle sets with a signal"] > run[f"{name}: share of groups with a signal"]
            )
            for name in SPREADS
        }
        | {
            "most groups in which all are wrong get different advantages in training": lambda run: (
                run[f"success rate {RATE}: share of all-wrong groups with different advantages in training"] > 0.5
            )
        },
        "DeepSeek-R1-Distill-Qwen-1.5B, hard maths, average Pass@1: GRPO 40.41, DAPO 43.87, RiskPO 46.65.",
    )
