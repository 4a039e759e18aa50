"""
What do samplers of prompts and budgets of rollouts do for the learning signal, and at what cost?

A simulation of 2,000 prompts with success log-odds from N(-1, 2.5). Every generation has 64 prompts of 8 rollouts (or
512 dealt by a method), chosen by the method's own hooks and shown to its own `observe`; outcomes are Bernoulli draws.
A prompt with a signal gains 0.25 in its log-odds, and every prompt 0.002. No model is trained: only who is asked how
often is looked at, where the papers compare benchmarks. Counted are rollouts with a non-zero advantage, in the first
50 of 200 generations and afterwards; such rollouts over all that were spent, those of estimates included, by which
methods compare at equal rollouts; mean success of all prompts at the end. Uniform sampling is TRL's order, in the same
world.

```bash
python benchmarks/mechanisms/samplers.py [method ...]
```
"""

import argparse
import contextlib
import functools
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
# What is set because of the sizes of this simulation, by the name of the variant.
SETTINGS = {
    # No model, no gradients: budgets by acceptance rates alone.
    "gvm": {"GVM": {"gvm_grad_params": None, "gvm_max_accept": 0.99}},
    "knapsack_rl": {"Knapsack RL": {"knapsack_max_rollouts": 64}},
    # A prompt has no beginnings of solutions here: the filter alone, renewed as long as there are generations.
    "rest_grpo": {"ReST-GRPO": {"rest_accept_threshold": math.inf, "rest_iterations": GENERATIONS}},
    # One rollout per prompt in its paper; here its sampling of prompts is compared, in groups as the others'.
    "spo": {"SPO": {"spo_rho_mode": "constant", "spo_offline_n": 8}},
    "vade": {"VADE": {}},
    # There are no answers here whose diversity could be looked at.
    "vas": {"VAS": {"vas_tds_weight": 0.0}, "VAS online": {"vas_tds_weight": 0.0, "vas_scoring": "online"}},
}
PAPERS = {
    "gvm": "Qwen2.5-Math-1.5B, average of five maths sets: GRPO 38.11, GVM-GRPO 40.42; 2 to 4 times faster.",
    "knapsack_rl": "The share of rollouts with a gradient rises by 20 to 40 points during training, the results of "
    "maths benchmarks by 2 to 4 points on average.",
    "rest_grpo": "Qwen3-8B, average of the code benchmarks after the second iteration: GRPO 0.590, ReST-GRPO 0.655.",
    "spo": "Qwen3-8B, average maj@32 of five maths sets: GRPO 60.4, SPO 63.8; late in training over 80 % of GRPO's "
    "samples are in groups without a signal.",
    "vade": "Qwen2.5-VL-7B, average of five benchmarks: GRPO 61.82, VADE 64.75; the share of groups with different "
    "outcomes is 0.60 against 0.16 after 100 steps.",
    "vas": "Qwen2.5-VL-3B, average of five benchmarks: GRPO 51.8, with VAS 52.9.",
}
# In what a method is to exceed uniform sampling.
CLAIMS = {
    "signal, first 50 generations": "more rollouts have a signal than with uniform sampling, first 50 generations",
    "signal, afterwards": "more rollouts have a signal than with uniform sampling, afterwards",
    "signal per rollout spent": "more rollouts have a signal than with uniform sampling, estimates counted",
    "success at the end": "the mean success of all prompts is higher at the end than with uniform sampling",
}


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

        def score_prompts(self, rows, n, dataset=None, measure=None, seed=None):
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


def run(name: str, settings: dict, generator: torch.Generator) -> dict[str, float]:
    trainer_class, config_class = (MethodTrainer, MethodConfig) if name == "uniform" else mix(name)
    world = World(generator)
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stderr(io.StringIO()):
        args = config_class(
            folder,
            use_cpu=True,
            bf16=False,
            report_to=[],
            disable_tqdm=True,
            num_generations=GROUP,
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
        "signal per rollout spent": sum(shares) * GROUPS * GROUP / world.spent,
        "success at the end": world.logits.sigmoid().mean().item(),
        "distinct prompts seen": seen.double().mean().item(),
        "rollouts spent": world.spent,
    }


@functools.cache
def uniform(seed: int) -> dict[str, float]:
    return run("uniform", {}, torch.Generator().manual_seed(seed))


def measure(name: str, generator: torch.Generator) -> dict[str, float]:
    """The numbers of uniform sampling and of the method, in its variants, in the same world."""
    found = {"uniform": uniform(generator.initial_seed())}
    for variant, settings in SETTINGS[name].items():
        found[variant] = run(name, settings, generator.manual_seed(generator.initial_seed()))
    return {f"{quantity}, {who}": numbers[quantity] for quantity in found["uniform"] for who, numbers in found.items()}


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("methods", nargs="*", default=[*SETTINGS])
    logging.set_verbosity_error()
    torch.set_num_threads(1)
    for name in parser.parse_args().methods:
        print(f"== {name}")
        claims = {
            f"{who}: {claim}": lambda run, who=who, quantity=quantity: (
                run[f"{quantity}, {who}"] > run[f"{quantity}, uniform"]
            )
            for who in SETTINGS[name]
            for quantity, claim in CLAIMS.items()
        }
        report(f"samplers_{name}", over_seeds(functools.partial(measure, name)), claims, PAPERS[name])


if __name__ == "__main__":
    main()
