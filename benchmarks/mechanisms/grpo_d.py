"""
GRPO-D: does the KL divergence to the initial policy follow the weight: far while the weight is small, back afterwards?

Trains the embedded policy for 40 steps on sums, 12 of which explore, with the paper's range of weights for counting
(0.04 to 0.1) and one ten times as large, where the KL term is a force at this tiny scale: GRPO-D, and plain GRPO with
either end of the range, from the same start, with the same prompts and at a constant learning rate. KL is TRL's
metric, averaged over the run and over its quarters, of which the second has the smallest weights. The paper gives
accuracies; the divergence is what its schedule acts on.
"""

import os
import tempfile

import torch
from common import QUIET, over_seeds, report
from transformers import PrinterCallback

from trl_ext import GRPODConfig, GRPODTrainer, MethodConfig, MethodTrainer
from trl_ext.tasks import POLICY_PATH, arithmetic, exact_match


os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
STEPS = 40
RANGES = {"0.04 to 0.1": (0.04, 0.1), "0.4 to 1": (0.4, 1.0)}


def divergences(trainer_class, config_class, seed, **settings) -> torch.Tensor:
    """KL to the initial policy at every step."""
    with tempfile.TemporaryDirectory() as folder:
        args = config_class(
            folder,
            **QUIET,
            logging_steps=1,
            num_generations=8,
            per_device_train_batch_size=32,
            max_completion_length=4,
            max_steps=STEPS,
            learning_rate=1e-4,
            lr_scheduler_type="constant",
            loss_type="grpo",
            seed=seed,
            **settings,
        )
        trainer = trainer_class(POLICY_PATH, exact_match, args, arithmetic())
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    return torch.tensor([entry["kl"] for entry in trainer.state.log_history if "kl" in entry])


def measure(generator):
    seed, found = generator.initial_seed(), {}
    for name, (low, high) in RANGES.items():
        runs = {
            "constant smallest weight": divergences(MethodTrainer, MethodConfig, seed, beta=low),
            "GRPO-D": divergences(GRPODTrainer, GRPODConfig, seed, kl_beta_min=low, kl_beta_max=high),
            "constant largest weight": divergences(MethodTrainer, MethodConfig, seed, beta=high),
        }
        found |= {f"{name}: mean KL, {run}": kl.mean().item() for run, kl in runs.items()}
        for run, kl in runs.items():
            for quarter, values in enumerate(kl.chunk(4), start=1):
                found[f"{name}: KL, {run}, quarter {quarter}"] = values.mean().item()
    return found


def excess(run, name, quarter):
    """KL of GRPO-D relative to that of the constant largest weight."""
    mine, largest = (run[f"{name}: KL, {kind}, quarter {quarter}"] for kind in ("GRPO-D", "constant largest weight"))
    return mine / largest


CLAIMS = {}
for name in RANGES:
    CLAIMS[f"{name}: the mean KL lies between those of the constant weights"] = lambda run, name=name: (
        run[f"{name}: mean KL, constant largest weight"]
        < run[f"{name}: mean KL, GRPO-D"]
        < run[f"{name}: mean KL, constant smallest weight"]
    )
    CLAIMS[f"{name}: KL is nearer to that of the largest weight in the last quarter than in the second"] = (
        lambda run, name=name: abs(excess(run, name, 4) - 1) < abs(excess(run, name, 2) - 1)
    )
PAPER = (
    "Qwen2-VL-2B-Instruct, counting and geometry: 42.50 and 15.52 untrained, GRPO with a constant weight 64.50 and "
    "30.24, GRPO-D 76.50 and 34.35; no KL is given."
)


if __name__ == "__main__":
    torch.set_num_threads(1)
    report("grpo_d", over_seeds(measure), CLAIMS, PAPER, digits=4)
