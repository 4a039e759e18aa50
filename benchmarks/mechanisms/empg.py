"""
EMPG: do confident steps get a larger share of the gradient, although the policy gradient itself gives them a smaller?

Steps with entropies from Gamma(2, rate 2): the gain of the most and the least confident tenth, and the same when one
step comes from a policy that is uniform over a vocabulary of 151,936. Then steps of 4 tokens from softmax policies of
different temperatures, 4 steps a rollout, whose advantage is +1 or -1: the mean norm of the gradient with respect to a
step's logits, of the most confident tenth of the steps relative to the least confident one. The paper's figures are
benchmarks; this is the coupling of gradient and entropy by which it explains them.
"""

import math

import torch
from common import over_seeds, report

from trl_ext.methods.empg import empg_advantages


ROLLOUTS, STEPS, LENGTH, VOCABULARY = 1024, 4, 4, 20


def gain(entropy):
    """Of single-step rollouts with an advantage of 1, without bonus and centring."""
    ones = torch.ones_like(entropy)
    return empg_advantages(entropy.unsqueeze(1), ones.unsqueeze(1), ones, zeta=0.0, center=False).squeeze(1)


def tenths(values, entropy):
    """Mean over the most and over the least confident tenth."""
    order, count = entropy.argsort(), len(entropy) // 10
    return values[order[:count]].mean().item(), values[order[-count:]].mean().item()


def measure(generator):
    found = {}
    entropy = torch._standard_gamma(torch.full((4096,), 2.0, dtype=torch.float64), generator=generator) / 2
    for name, extra in (("", []), (", one step of a uniform policy among them", [math.log(151_936)])):
        values = gain(torch.cat([entropy, entropy.new_tensor(extra)]))
        found[f"mean gain{name}"] = values.mean().item()
        first, last = tenths(values[: len(entropy)], entropy)
        found[f"gain of the most confident tenth{name}"], found[f"gain of the least confident tenth{name}"] = (
            first,
            last,
        )
    shape = (ROLLOUTS, STEPS, 1, 1)
    temperatures = (0.2 + 2.8 * torch.rand(shape, generator=generator, dtype=torch.float64)) ** -1
    logits = torch.randn(ROLLOUTS, STEPS, LENGTH, VOCABULARY, generator=generator, dtype=torch.float64)
    logits = 2 * logits * temperatures
    probabilities = logits.softmax(-1)
    ids = torch.multinomial(probabilities.view(-1, VOCABULARY), 1, generator=generator).view(ROLLOUTS, STEPS, LENGTH)
    entropies = -(probabilities * logits.log_softmax(-1)).sum(-1)
    scores = torch.nn.functional.one_hot(ids, VOCABULARY) - probabilities
    norms = scores.flatten(2).norm(dim=2).flatten()
    # A tool's token after every step.
    padded, mask = (torch.nn.functional.pad(x, (0, 1)).flatten(1) for x in (entropies, torch.ones_like(entropies)))
    base = 2.0 * torch.randint(2, (ROLLOUTS,), generator=generator) - 1
    step_entropy = entropies.mean(2).flatten()
    for name, settings in {"GRPO": {"k": 0.0, "zeta": 0.0, "center": False}, "EMPG": {}}.items():
        advantages = empg_advantages(padded, mask, base.double(), **settings)
        per_step = advantages.view(ROLLOUTS, STEPS, LENGTH + 1)[..., 0].abs().flatten()
        first, last = tenths(norms * per_step, step_entropy)
        found[f"gradient norm of confident steps relative to uncertain ones, {name}"] = first / last
    return found


PLAIN, MIXED = "", ", one step of a uniform policy among them"
RATIO = "gradient norm of confident steps relative to uncertain ones"


def difference(run, name):
    return run[f"gain of the most confident tenth{name}"] - run[f"gain of the least confident tenth{name}"]


CLAIMS = {
    "the mean gain is 1, and confident steps have more": lambda run: (
        abs(run["mean gain"] - 1) < 1e-6 and difference(run, PLAIN) > 0
    ),
    "confident steps have a smaller gradient than uncertain ones with GRPO": lambda run: run[f"{RATIO}, GRPO"] < 1,
    "EMPG raises the share of confident steps": lambda run: run[f"{RATIO}, EMPG"] > run[f"{RATIO}, GRPO"],
    "a single step of a uniform policy takes away at least half of the difference in gain": lambda run: (
        difference(run, MIXED) <= difference(run, PLAIN) / 2
    ),
}
PAPER = (
    "Qwen2.5-7B, success on ALFWorld and WebShop: GRPO 74.8 and 65.6, with EMPG 78.5 and 69.3; DAPO 90.0 and 79.6, "
    "with EMPG 91.6 and 82.7."
)


if __name__ == "__main__":
    report("empg", over_seeds(measure), CLAIMS, PAPER)
