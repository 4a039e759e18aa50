"""
LLDS: do responses of positive advantage become less likely during GRPO's updates, and does the regularizer stop it?

A softmax policy whose logits are linear in 16 random features stands in for a language model: what one response
teaches moves the others. 15 phases of 8 updates, GRPO's clip range of 0.2, a response is one action of 6 tokens. The
share of responses whose log-likelihood falls in a phase's updates, and how far, stand in for the paper's collapse.
"""

from itertools import pairwise
from statistics import fmean

from common import over_seeds, report
from softmax_policy import train

from trl_ext.core.loss import clipped_loss
from trl_ext.methods.llds import llds_loss


COEFS = (0.0, 0.2, 1.0)


def llds(coef):
    def loss(batch):
        preserved = batch.advantages[:, 0] >= -1e-9  # 0 up to rounding where a group's rewards are equal
        policy = clipped_loss(batch.log_ratio, batch.advantages, 0.8, 1.2).mean()
        return policy + coef * llds_loss(batch.logps, batch.old_logps, batch.mask, preserved)

    return loss


def measure(generator):
    found = {}
    for coef in COEFS:
        phases, name = train(llds(coef), generator, phases=15, features=16), f"coefficient {coef}"
        falls = [-batch.log_ratio.sum(1)[batch.advantages[:, 0] > 0] for batch in phases]
        found[f"share of good responses that became less likely, {name}"] = fmean(
            (fall > 0).double().mean().item() for fall in falls
        )
        found[f"fall of a good response's log-likelihood, {name}"] = fmean(
            fall.clamp(min=0).mean().item() for fall in falls
        )
        found[f"reward after 15 phases, {name}"] = phases[-1].success.mean().item()
    return found


def falling(quantity):
    def holds(run):
        values = [run[f"{quantity}, coefficient {coef}"] for coef in COEFS]
        return all(first > second for first, second in pairwise(values))

    return holds


if __name__ == "__main__":
    claims = {
        "without the regularizer a quarter or more of the responses of positive advantage become less likely": (
            lambda run: run["share of good responses that became less likely, coefficient 0.0"] >= 0.25
        ),
        "the larger its coefficient, the fewer become less likely": falling(
            "share of good responses that became less likely"
        ),
        "the larger its coefficient, the less their log-likelihood falls": falling(
            "fall of a good response's log-likelihood"
        ),
        "the larger its coefficient, the slower the learning": falling("reward after 15 phases"),
    }
    paper = (
        "Average exact match on 7 question-answering sets: Qwen2.5-3B 0.312, with LLDS 0.360; 3B-Instruct 0.336 and "
        "0.441; 7B 0.350 and 0.480; before GRPO collapses, within 300 steps, more than half of the samples become "
        "less likely."
    )
    report("llds", over_seeds(measure), claims, paper)
