"""Runs under torchrun: trains every case and lets every process save what it saw."""

import os
import sys
from pathlib import Path


sys.path.insert(0, str(Path(__file__).parents[1]))
os.environ |= {"HF_HUB_OFFLINE": "1", "TRL_EXPERIMENTAL_SILENCE": "1", "TOKENIZERS_PARALLELISM": "false"}

import torch
from harness import POLICY_PATH, arithmetic, parameters, scripted, train
from transformers import AutoModelForCausalLM

from trl_ext import MethodTrainer, mix
from trl_ext.core import Requests


torch.set_num_threads(1)


def digit_reward(completions, **kwargs):
    return [float(text[:1] in "13579") for text in completions]


def recording(base):
    """The trainer class with a record of what its hooks saw."""

    class Recording(base):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            self.seen = []

        def observe(self, rollouts):
            super().observe(rollouts)
            self.seen.append(
                {
                    "prompts": rollouts.prompt_index.tolist(),
                    "groups": rollouts.group_ids.tolist(),
                    "rewards": rollouts.rewards.tolist(),
                    "lengths": rollouts.lengths.tolist(),
                    "advantages": rollouts.advantages.tolist() if rollouts.advantages.dim() == 1 else None,
                }
            )

    return Recording


class DroppingTrainer(MethodTrainer):
    """Keeps rows so unevenly that the second of two processes has none left."""

    def select_rollouts(self, rollouts):
        return super().select_rollouts(rollouts) & (torch.arange(len(rollouts)) < len(rollouts) // 2)


class RoundsTrainer(MethodTrainer):
    """Asks for an odd number of further rollouts and trains on some of them."""

    replaces = ("more_rollouts", "pick_rollouts")

    def more_rollouts(self, scored, rounds):
        return Requests(torch.tensor([1, 2, 3]), torch.tensor([90, 90, 91])) if rounds < 3 else None

    def pick_rollouts(self, scored):
        return torch.arange(self.args.generation_batch_size) + 3


class BudgetTrainer(MethodTrainer):
    replaces = ("prompt_budgets",)

    def prompt_budgets(self, rows):
        return torch.tensor([7, 3, 5, 1])[: len(rows)]


# name: (trainer class, settings)
CASES = {
    "neutral": (MethodTrainer, {}),
    "grpo loss": (MethodTrainer, {"loss_type": "grpo"}),
    "budgets": (BudgetTrainer, {}),
    "dropping": (DroppingTrainer, {"loss_type": "grpo"}),
    "dropping, dapo": (DroppingTrainer, {}),
    "rounds": (RoundsTrainer, {}),
    "spo": (mix("spo").Trainer, {"spo_offline_n": 1}),
    "spo constant": (mix("spo").Trainer, {"spo_offline_n": 0, "spo_rho_mode": "constant"}),
    "clip_cov global": (
        mix("clip_cov").Trainer,
        {"clip_cov_scope": "global", "clip_cov_ratio": 0.2, "clip_cov_low": 0.01},
    ),
    "kl_cov global": (mix("kl_cov").Trainer, {"kl_cov_scope": "global", "kl_cov_ratio": 0.2}),
    "clip_cov + spo": (
        mix("clip_cov", "spo").Trainer,
        {"clip_cov_scope": "global", "clip_cov_ratio": 0.2, "clip_cov_low": 0.01, "spo_offline_n": 0},
    ),
}


def main(folder: str) -> None:
    processes = int(os.environ["WORLD_SIZE"])
    for name, (cls, settings) in CASES.items():
        trainer = train(
            recording(cls),
            cls.config_class,
            # In double precision, so that a difference is an error and not the order of a sum.
            model=AutoModelForCausalLM.from_pretrained(POLICY_PATH, dtype=torch.float64),
            data=arithmetic().select(range(24)),
            rewards=digit_reward,
            rollout_func=scripted,
            optim="sgd",
            learning_rate=0.05,
            max_steps=4,
            per_device_train_batch_size=16 // processes,
            **settings,
        )
        assert trainer.accelerator.num_processes == processes, "the launcher started another number of processes"
        result = {"seen": trainer.seen, "state": trainer.method_state(), "parameters": parameters(trainer)}
        result["logged"] = list(trainer._logs["advantages"])
        torch.save(result, f"{folder}/{name}_{processes}_{trainer.accelerator.process_index}.pt")


if __name__ == "__main__":
    main(sys.argv[1])
