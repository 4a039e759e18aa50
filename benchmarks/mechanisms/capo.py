"""
CAPO: does the sum of the predicted shifts of the policy tell how far a batch moves it, is it the dropped tokens that
move it, and does the mask drop more tokens at a larger learning rate?

Random features, heads and advantages of unit variance, tokens drawn from the policy; steps of gradient ascent on the
head alone, so the prediction's own premise holds. The divergence is the mean over the batch's states. The first
question is also asked of batches whose learning rates differ, the second of a random mask that drops as many tokens.
"""

import itertools
import math

import torch
from common import over_seeds, report

from trl_ext.methods.capo import accepted, predicted_shifts, sgd_moves, softmax_errors


HIDDEN, VOCABULARY, BATCHES, TOKENS = 8, 20, 200, 16
RATES = (0.003, 0.01, 0.03, 0.1)


def draw(generator, tokens=TOKENS):
    normal = torch.randn(tokens + VOCABULARY, HIDDEN, generator=generator, dtype=torch.float64)
    hidden, head = normal[:tokens], normal[tokens:]
    logits = hidden @ head.T
    ids = torch.multinomial(logits.softmax(1), 1, generator=generator).squeeze(1)
    return hidden, logits, ids, torch.randn(tokens, generator=generator, dtype=torch.float64)


def policy_shifts(hidden, logits, ids, advantages, lr):
    probs, errors, _ = softmax_errors(logits, ids)
    return predicted_shifts(probs, errors, sgd_moves(errors, hidden, advantages), advantages, lr)


def divergence(hidden, logits, ids, advantages, lr, kept):
    """Mean KL of a step on the sum of the kept tokens' gradients."""
    errors = softmax_errors(logits, ids)[1]
    gradient = (errors * (advantages * kept).unsqueeze(1)).T @ hidden
    before, after = logits.log_softmax(1), (logits + lr * hidden @ gradient.T).log_softmax(1)
    return (before.exp() * (before - after)).sum(1).mean()


def spearman(first, second):
    ranks = [values.argsort().argsort().double() for values in (first, second)]
    return torch.corrcoef(torch.stack(ranks))[0, 1].item()


def measure(generator):
    found, everything = {}, torch.ones(TOKENS, dtype=torch.float64)
    batches = [draw(generator) for _ in range(BATCHES)]
    spread = torch.rand(BATCHES, generator=generator, dtype=torch.float64) * math.log(RATES[-1] / RATES[0])
    for name, rates in (("one learning rate", [RATES[0]] * BATCHES), ("many", (RATES[0] * spread.exp()).tolist())):
        pairs = list(zip(batches, rates, strict=True))
        predicted = torch.stack([policy_shifts(*batch, lr)[1].sum() for batch, lr in pairs])
        moved = torch.stack([divergence(*batch, lr, everything) for batch, lr in pairs])
        found[f"Spearman correlation of the predicted and the true shift, {name}"] = spearman(predicted, moved)
    lr = RATES[1]
    after = {"all": 0.0, "CAPO's": 0.0, "as many random": 0.0}
    for batch in batches:
        kept = accepted(*policy_shifts(*batch, lr), tau_hessian=0, tau_fisher=1e-4).double()
        random = kept[torch.randperm(TOKENS, generator=generator)]
        for name, mask in zip(after, (everything, kept, random), strict=True):
            after[name] += divergence(*batch, lr, mask).item() / BATCHES
    found |= {f"KL after a step on {name} tokens, learning rate {lr}": value for name, value in after.items()}
    many = draw(generator, 4000)
    for lr in RATES:
        kept = accepted(*policy_shifts(*many, lr), tau_hessian=0, tau_fisher=1e-4)
        found[f"kept share, learning rate {lr}"] = kept.double().mean().item()
    return found


if __name__ == "__main__":
    after, lr = "KL after a step on {} tokens, learning rate 0.01", "kept share, learning rate {}"
    correlation = "Spearman correlation of the predicted and the true shift, {}"
    report(
        "capo",
        over_seeds(measure),
        {
            "predicted and true shift agree over batches whose learning rates differ (rank correlation above 0.9)": (
                lambda run: run[correlation.format("many")] > 0.9
            ),
            "predicted and true shift agree as well over batches of one learning rate": lambda run: (
                run[correlation.format("one learning rate")] > 0.9
            ),
            "a step on the kept tokens moves the policy less than one on as many random tokens": (
                lambda run: run[after.format("CAPO's")] < run[after.format("as many random")]
            ),
            "the share of kept tokens falls with the learning rate": (
                lambda run: all(run[lr.format(a)] > run[lr.format(b)] for a, b in itertools.pairwise(RATES))
            ),
        },
        "Qwen2.5-Math-7B on MATH: at five times the learning rate and a twelfth of the batch GRPO collapses and "
        "CAPO does not, dropping less than 8 % of the tokens.",
        digits=5,
    )
