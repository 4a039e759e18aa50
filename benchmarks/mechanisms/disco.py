"""
DisCO: do all mixed questions weigh the same, do the most probable wrong answers get most of the push, and does the
constraint keep the policy near the one that generated?

The sum of the sizes of the weights of 8 answers' scores, by the number that is correct (GRPO: of the advantages,
divided by 8). The wrong answers' weights when one of 7 has a score that is larger by 1. Then 256 updates by Adam on
one batch of 32 questions with 8 answers of 16 tokens, rewards at random, of a linear softmax policy: its true
divergence from the policy that generated, and the estimate on the batch that the constraint sees (k1; the paper makes
4 updates). GRPO with a clip of 0.2. The paper's figures are accuracies; these are the properties by which it explains
them.
"""

import torch
from common import beta_rates, over_seeds, report, simulated_groups

from trl_ext.core.loss import clipped_loss
from trl_ext.core.rollouts import group_advantages
from trl_ext.methods.disco import disco_objective, disco_penalty, disco_scores


QUESTIONS, GROUP, LENGTH, HIDDEN, VOCABULARY, RATE = 32, 8, 16, 16, 32, 1e-3
DELTA, UPDATES, CORRECT = 1e-4, (4, 16, 64, 256), (1, 2, 4, 6, 7)
ONE = torch.zeros(GROUP, dtype=torch.long)


def weights(scores, correct, tau=10.0):
    """Gradient of the objective with respect to the scores of one question."""
    scores = scores.clone().requires_grad_()
    good = torch.arange(GROUP) < correct
    disco_objective(scores, good, ~good, ONE, tau=tau).backward()
    return scores.grad


def train(name, generator):
    """Divergence from the policy that generated, true and estimated, after some numbers of updates."""
    states = torch.randn(QUESTIONS * GROUP, LENGTH, HIDDEN, generator=generator, dtype=torch.float64)
    head = torch.randn(HIDDEN, VOCABULARY, generator=generator, dtype=torch.float64) / HIDDEN**0.5
    before = (states @ head).log_softmax(-1)
    ids = torch.multinomial(before.exp().view(-1, VOCABULARY), 1, generator=generator).view(*before.shape[:2], 1)
    rewards, groups = simulated_groups(beta_rates(1.0, 1.0, QUESTIONS, generator), GROUP, generator)
    old, mask = before.gather(2, ids).squeeze(2), torch.ones(ids.shape[:2], dtype=torch.float64)
    advantages = group_advantages(rewards, groups).unsqueeze(1)
    head.requires_grad_()
    optimizer, found = torch.optim.Adam([head], lr=RATE), {}
    for update in range(1, UPDATES[-1] + 1):
        logps = (states @ head).log_softmax(-1).gather(2, ids).squeeze(2)
        if name == "GRPO":
            loss = clipped_loss(logps - old, advantages, 0.8, 1.2).mean()
        else:
            scores = disco_scores(logps, old, mask)
            objective = disco_objective(scores, rewards == 1, rewards == 0, groups)
            beta = 0.0 if name == "DisCO without constraint" else 1e3
            estimator = "low_var_kl" if name == "DisCO with low_var_kl" else "kl"
            loss = disco_penalty(logps, old, mask, beta, DELTA, estimator)[0] - objective
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if update in UPDATES:
            with torch.no_grad():
                after = (states @ head).log_softmax(-1)
                true = (before.exp() * (before - after)).sum(-1).mean().item()
                estimate = disco_penalty(after.gather(2, ids).squeeze(2), old, mask)[1].item()
            found[f"KL, {name}, update {update}"] = true
            found[f"KL estimated on the batch, {name}, update {update}"] = estimate
    return found


def measure(generator):
    found = {}
    for correct in CORRECT:
        rewards = (torch.arange(GROUP) < correct).double()
        found[f"weight of a question, GRPO, correct {correct}"] = group_advantages(rewards, ONE).abs().mean().item()
        scores = torch.randn(GROUP, generator=generator, dtype=torch.float64)
        found[f"weight of a question, DisCO, correct {correct}"] = weights(scores, correct).abs().sum()
    scores = torch.nn.functional.one_hot(ONE[:1] + 1, GROUP).double().squeeze(0)
    for tau in (10.0, 1.0):
        pushed = -weights(scores, 1, tau)
        found[f"push of a wrong answer that scores 1 more relative to the others', tau {tau}"] = pushed[1] / pushed[2]
    state = generator.get_state()
    for name in ("GRPO", "DisCO without constraint", "DisCO", "DisCO with low_var_kl"):
        generator.set_state(state)  # the same batch
        found |= train(name, generator)
    return {name: float(value) for name, value in found.items()}


CLAIMS = {
    "every mixed question weighs the same, while with GRPO the extreme ones weigh less": lambda run: (
        all(abs(run[f"weight of a question, DisCO, correct {correct}"] - 2) < 1e-6 for correct in CORRECT)
        and run["weight of a question, GRPO, correct 1"] < 0.7 * run["weight of a question, GRPO, correct 4"]
    ),
    "after 256 updates on one batch, the constraint holds the estimated divergence below a tenth of what it is "
    "without": lambda run: (
        run["KL estimated on the batch, DisCO, update 256"]
        < 0.1 * run["KL estimated on the batch, DisCO without constraint, update 256"]
    ),
    "after 256 updates on one batch, the constraint holds the true divergence below a tenth, too": lambda run: (
        run["KL, DisCO, update 256"] < 0.1 * run["KL, DisCO without constraint, update 256"]
    ),
    "after 256 updates on one batch, the true divergence is below that of GRPO's clip": lambda run: (
        run["KL, DisCO, update 256"] < run["KL, GRPO, update 256"]
    ),
}
PAPER = "DeepSeek-R1-Distill-Qwen-1.5B, mean of 6 maths sets: GRPO 0.457, DAPO 0.473, Dr. GRPO 0.443, DisCO 0.533."


if __name__ == "__main__":
    report("disco", over_seeds(measure), CLAIMS, PAPER, digits=5)
