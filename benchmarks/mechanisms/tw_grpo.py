"""
TW-GRPO: does partial credit give more groups a signal, and do positions weigh more where the rollouts disagree?

Questions with 4 options, 2 of them right; 8 rollouts choose each right option with a probability of 0.6 and each wrong
one with 0.15: the share of groups with different rewards, for an exact match and for the soft reward. Then groups of 8
rollouts of 20 positions and 50 tokens, whose distributions are the same but for a little noise at every other position
and their own elsewhere; half of the rollouts end after 15 positions. The mean weight of either kind of position, and
where those that go on agree after the first end; an ended rollout counts as uniform (the authors' way) or not at all.
The paper's figures are of benchmarks.
"""

import torch
from common import over_seeds, report

from trl_ext.core.rollouts import zero_signal
from trl_ext.methods.tw_grpo import position_divergence, position_weights, soft_choice


OPTIONS, CHANCES, QUESTIONS, GROUP = "ABCD", (0.6, 0.6, 0.15, 0.15), 2000, 8
GROUPS, LENGTH, SHORT, VOCABULARY = 200, 20, 15, 50


def answers(generator):
    chosen = torch.rand(QUESTIONS * GROUP, len(OPTIONS), generator=generator) < torch.tensor(CHANCES)
    return [",".join(option for option, taken in zip(OPTIONS, row, strict=True) if taken) for row in chosen.tolist()]


def mean_weights(generator, ended):
    """Where the rollouts agree and disagree before the first end, and where those that go on agree after it."""
    agree, written = torch.arange(LENGTH) % 2 == 0, torch.arange(LENGTH) < SHORT
    mask = torch.ones(GROUP, LENGTH)
    mask[::2, SHORT:] = 0
    found = torch.zeros(LENGTH, dtype=torch.float64)
    for _ in range(GROUPS):
        common = torch.randn(1, LENGTH, VOCABULARY, generator=generator, dtype=torch.float64)
        own = torch.randn(GROUP, LENGTH, VOCABULARY, generator=generator, dtype=torch.float64)
        own[:, ::2] *= 0.1
        logps = torch.where(agree[:, None], common + own, own).log_softmax(2)
        found += position_weights(position_divergence(logps, mask, ended=ended)) / GROUPS
    return [found[where].mean().item() for where in (agree & written, ~agree & written, agree & ~written)]


def measure(generator):
    rewards = torch.tensor([soft_choice(text, "A,B") for text in answers(generator)], dtype=torch.float64)
    groups = torch.arange(QUESTIONS).repeat_interleave(GROUP)
    found = {}
    for name, values in {"exact match": (rewards == 1).double(), "soft reward": rewards}.items():
        found[f"groups with a signal, {name}"] = (~zero_signal(values, groups)).double().mean().item()
    places = "where rollouts agree", "where they disagree", "where they agree after the first end"
    for ended in ("uniform", "ignore"):
        for place, weight in zip(places, mean_weights(generator, ended), strict=True):
            found[f"weight {place}, ended {ended}"] = weight
    return found


if __name__ == "__main__":
    report(
        "tw_grpo",
        over_seeds(measure),
        {
            "more groups have a signal with the soft reward than with an exact match": (
                lambda run: run["groups with a signal, soft reward"] > run["groups with a signal, exact match"]
            ),
            "positions weigh more where rollouts disagree than where they agree": lambda run: all(
                run[f"weight where they disagree, ended {way}"] > run[f"weight where rollouts agree, ended {way}"]
                for way in ("uniform", "ignore")
            ),
            "positions after the first end weigh more, even if the rest agrees (ended as uniform)": lambda run: (
                run["weight where they agree after the first end, ended uniform"]
                > run["weight where rollouts agree, ended uniform"]
            ),
        },
        "Qwen2.5-VL-7B trained on CLEVRER: CLEVRER 80.5 against Video-R1's 78.6, NExT-GQA 71.5 against 69.9.",
    )
