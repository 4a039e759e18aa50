"""
RiskPO: how much of a batch has a learning signal, in groups and in bundles?

Draws 0/1 rewards and prints the share of groups whose rewards differ, which is what GRPO can learn from, and the share
of bundle sets whose scores differ. Then trains for a few steps with rewards that are 1 at random and prints, of the
groups in which all responses are wrong, the share to which the trainer gives different advantages (GRPO: none).
"""

import json
import os
import statistics
import tempfile
from pathlib import Path

import torch
from transformers import PrinterCallback

from trl_ext import RiskPOConfig, RiskPOTrainer
from trl_ext.core.rollouts import group_advantages, zero_signal
from trl_ext.methods.riskpo import bundle_scores, make_bundles
from trl_ext.tasks import POLICY_PATH, arithmetic


os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
SEEDS = range(5)
GROUP, BUNDLE, RATE, PROMPTS = 8, 5, 0.05, 10_000


def shares(rates: torch.Tensor, generator: torch.Generator) -> tuple[float, float]:
    """Share of groups, and of sets of bundles, with different rewards; `rates` holds a success rate per prompt."""
    groups = torch.arange(len(rates)).repeat_interleave(GROUP)
    rewards = (torch.rand(len(groups), generator=generator) < rates[groups]).double()
    bundles, sets = make_bundles(groups, BUNDLE, generator)
    signal = ~zero_signal(rewards, groups), ~zero_signal(bundle_scores(rewards, bundles), sets)
    return tuple(part.double().mean().item() for part in signal)


class Watching(RiskPOTrainer):
    def observe(self, rollouts):
        super().observe(rollouts)
        plain = group_advantages(rollouts.rewards, rollouts.group_ids)
        for group in rollouts.group_ids.unique():
            mine = rollouts.group_ids == group
            if (rollouts.rewards[mine] == 0).all():
                self.wrong = [*getattr(self, "wrong", []), len(rollouts.advantages[mine].unique()) > 1]
                assert not plain[mine].any()


def signal_of_wrong_groups(seed: int, folder: str) -> float:
    args = RiskPOConfig(
        folder,
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
        num_generations=GROUP,
        per_device_train_batch_size=4 * BUNDLE * GROUP,
        max_completion_length=2,
        max_steps=12,
        seed=seed,
        importance_sampling_level="sequence",
        loss_type="grpo",
    )
    generator = torch.Generator().manual_seed(seed)

    def reward(completions, **kwargs):
        return (torch.rand(len(completions), generator=generator) < RATE).double().tolist()

    trainer = Watching(POLICY_PATH, reward, args, arithmetic())
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    return sum(trainer.wrong) / len(trainer.wrong)


def main():
    torch.set_num_threads(1)
    found = {}
    u_shaped = torch.distributions.Beta(0.3, 0.3)  # most rates lie below 0.1 or above 0.9
    for name, draw in {
        f"success rate {RATE}": lambda: torch.full((PROMPTS,), RATE),
        "success rates ~ Beta(0.3, 0.3)": lambda: u_shaped.sample((PROMPTS,)),
    }.items():
        runs = []
        for seed in SEEDS:
            torch.manual_seed(seed)
            runs.append(shares(draw(), torch.Generator().manual_seed(seed)))
        for part, values in zip(("groups", "bundle sets"), zip(*runs, strict=True), strict=True):
            found[f"{name}: share of {part} with a signal"] = values
    with tempfile.TemporaryDirectory() as folder:
        wrong = [signal_of_wrong_groups(seed, folder) for seed in SEEDS]
    found[f"success rate {RATE}: share of all-wrong groups with different advantages in training"] = wrong
    results = {
        name: {"mean": round(statistics.mean(values), 4), "std": round(statistics.stdev(values), 4)}
        for name, values in found.items()
    }
    for name, result in results.items():
        print(f"{name}: {result['mean']:.3f} +- {result['std']:.3f} ({len(SEEDS)} seeds)")
    path = Path(__file__).parents[1] / "results" / "riskpo.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps({"seeds": len(SEEDS)} | results, indent=2) + "\n")


if __name__ == "__main__":
    main()
