"""
What samplers of prompts and budgets of rollouts do for the learning signal, at what cost: a simulation.

2,000 prompts with success log-odds from N(-1, 2.5). Every generation has 64 prompts of 8 rollouts (or 512 dealt by a
method), chosen by the method's own hooks and shown to its own `observe`; outcomes are Bernoulli draws. A prompt with a
signal gains 0.25 in its log-odds, and every prompt 0.002. No model is trained: only who is asked how often is looked
at. Printed over 5 seeds, for uniform sampling (TRL's order) and each method: the share of rollouts with a non-zero
advantage, in the first 50 generations and afterwards; such rollouts over all that were spent, those of estimates
included, by which methods compare at equal rollouts; mean success of all prompts at the end; distinct prompts seen.

```bash
python benchmarks/mechanisms/samplers.py [method ...]
```
"""

import argparse
import contextlib
import io
import math
import os
import tempfile

import torch
from common import over_seeds, report
from datasets import Dataset
from transformers import logging

from trl_ext import MethodConfig, MethodTrainer, mix
from trl_ext.core.rollouts import Rollouts, Sample, Scored, group_advantages
from trl_ext.tasks import POLICY_PATH


os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
PROMPTS, GROUPS, GROUP, GENERATIONS = 2000, 64, 8, 200
# Settings that belong to the sizes of this simulation.
SETTINGS = {
    # No model, no gradients: budgets by acceptance rates alone.
    "gvm": {"gvm_grad_params": None, "gvm_max_accept": 0.99},
    "knapsack_rl": {"knapsack_max_rollouts": 64},
    # A prompt has no beginnings of solutions here: the filter alone, renewed as long as there are generations.
    "rest_grpo": {"rest_accept_threshold": math.inf, "rest_iterations": GENERATIONS},
    # One rollout per prompt in its paper; here its sampling of prompts is compared, in groups as the others'.
    "spo": {"spo_rho_mode": "constant", "spo_offline_n": 8},
    # There are no answers here whose diversity could be looked at.
    "vas": {"vas_tds_weight": 0.0},
    "vas online": {"vas_tds_weight": 0.0, "vas_scoring": "online"},
}
METHODS = ["uniform", "deficit_sampler", "gvm", "knapsack_rl", "rest_grpo", "spo", "vade", "vas", "vas online"]


class World:
    """Success rates that training raises, in place of a model."""

    def __init__(self, generator: torch.Generator):
        self.generator, self.spent = generator, 0
        self.logits = -1 + 2.5 * torch.randn(PROMPTS, generator=generator, dtype=torch.float64)

    def outcomes(self, rows: torch.Tensor) -> torch.Tensor:
        self.spent += len(rows)
        return torch.bernoulli(self.logits[rows].sigmoid(), generator=self.generator)


def simulated(base: type, world: World) -> type:
    """The method's trainer, which asks the world where it would generate outside a step."""

    class Simulated(base):
        config_class = base.config_class

        def score_prompts(self, rows, n, dataset=None, measure=None):
            rewards = world.outcomes(rows.repeat_interleave(n)).view(len(rows), n, 1)
            if measure is None:
                return rewards
            samples = torch.randint(10, 200, (len(rows), n, 12), generator=world.generator).tolist()
            found = [
                measure(
                    row, [Sample([1], ids, "", False, None, [score]) for ids, score in zip(part, scores, strict=True)]
                )
                for row, part, scores in zip(rows.tolist(), samples, rewards[:, :, 0].tolist(), strict=True)
            ]
            return rewards, found

    return Simulated


def seen_by(trainer, rows, group_ids, rewards) -> Rollouts:
    """A scored generation without tokens."""
    size = len(rows)
    scored = Scored(
        prompt_index=rows,
        group_ids=group_ids,
        reward_matrix=rewards.unsqueeze(1),
        reward_weights=torch.ones(1),
        lengths=torch.full((size,), 12),
        truncated=torch.zeros(size, dtype=torch.bool),
        changed_prompt=torch.zeros(size, dtype=torch.bool),
    )
    tokens = torch.ones(size, 1, dtype=torch.long)
    fields = dict.fromkeys(("prompt_ids", "prompt_mask", "completion_ids", "completion_mask", "mask"), tokens)
    return Rollouts(
        **vars(scored),
        **fields,
        everything=scored,
        local=slice(0, size),
        completions=[""] * size,
        examples=[{}] * size,
        logged={},
        training=True,
        generation=trainer._generation,
        step=trainer._generation,
        max_steps=GENERATIONS,
        advantages=group_advantages(rewards, group_ids),
    )


def run(name: str, generator: torch.Generator) -> dict[str, float]:
    trainer_class, config_class = (MethodTrainer, MethodConfig) if name == "uniform" else mix(name.split()[0])
    world = World(generator)
    settings = {"num_generations": GROUP} | SETTINGS.get(name, {})
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stderr(io.StringIO()):
        args = config_class(
            folder,
            use_cpu=True,
            bf16=False,
            report_to=[],
            disable_tqdm=True,
            per_device_train_batch_size=GROUPS * GROUP,
            seed=int(torch.randint(2**31, (), generator=generator)),
            **settings,
        )
        data = Dataset.from_dict({"prompt": [f"{i}+1=" for i in range(PROMPTS)]})
        trainer = simulated(trainer_class, world)(POLICY_PATH, lambda completions, **kw: [0.0], args, data)
        trainer.model.train()
        trainer.prepare()
        shares, seen = [], torch.zeros(PROMPTS, dtype=torch.bool)
        for _ in range(GENERATIONS):
            rows, group_ids = trainer._plan()
            rewards = world.outcomes(rows)
            rollouts = seen_by(trainer, rows, group_ids, rewards)
            trainer.observe(rollouts)
            trainer._generation += 1
            signal = rollouts.advantages != 0
            shares.append(signal.double().mean().item())
            world.logits[rows[signal].unique()] += 0.25
            world.logits += 0.002
            seen[rows] = True
    return {
        "signal, first 50 generations": sum(shares[:50]) / 50,
        "signal, afterwards": sum(shares[50:]) / (GENERATIONS - 50),
        "rollouts with a signal per rollout spent": sum(shares) * GROUPS * GROUP / world.spent,
        "success at the end": world.logits.sigmoid().mean().item(),
        "distinct prompts seen": seen.double().mean().item(),
        "rollouts spent": world.spent,
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("methods", nargs="*", default=METHODS)
    logging.set_verbosity_error()
    torch.set_num_threads(1)
    for name in parser.parse_args().methods:
        print(f"== {name}")
        report(f"samplers_{name.replace(' ', '_')}", over_seeds(lambda generator, name=name: run(name, generator)))


if __name__ == "__main__":
    main()
