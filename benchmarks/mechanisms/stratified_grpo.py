"""
Stratified GRPO: are rollouts no longer preferred for their stratum alone?

5,000 groups of 8 rollouts, each in one of three strata (0, 1 or 2 searches) with success rates of 0.1, 0.4 and 0.7;
nothing else tells rollouts apart. The mean advantage per stratum of GRPO, of the pure stratified advantage (blend 1)
and of the default blend of 0.8, and the variance of the rewards' deviations, from the mean of the group and from that
of the stratum. A mean advantage of 0 in every stratum also means that the policy is not told which one pays more.
"""

import torch
from common import over_seeds, report

from trl_ext.core.rollouts import group_advantages
from trl_ext.methods.stratified_grpo import normalized, stratified_advantages, stratum_ids


GROUPS, SIZE, RATES = 5_000, 8, (0.1, 0.4, 0.7)
STRATA = range(len(RATES))


def measure(generator):
    labels = torch.randint(len(RATES), (GROUPS * SIZE,), generator=generator)
    rewards = torch.bernoulli(torch.tensor(RATES, dtype=torch.float64)[labels], generator=generator)
    groups = torch.arange(GROUPS).repeat_interleave(SIZE)
    found = {}
    for name, advantages in {
        "GRPO": group_advantages(rewards, groups),
        "blend of 1": stratified_advantages(rewards, groups, labels, blend=1.0),
        "blend of 0.8": stratified_advantages(rewards, groups, labels),
    }.items():
        for label in STRATA:
            found[f"mean advantage, {name}, searches {label}"] = advantages[labels == label].mean().item()
        found[f"share of rollouts with a signal, {name}"] = (advantages != 0).double().mean().item()
    for name, ids in {"group": groups, "stratum": stratum_ids(groups, labels)}.items():
        deviations = normalized(rewards, ids, scale=False)
        found[f"variance of the deviations within the {name}"] = deviations.var(unbiased=False).item()
    return found


def offset(run, name):
    """Largest mean advantage that a stratum gives."""
    return max(abs(run[f"mean advantage, {name}, searches {label}"]) for label in STRATA)


if __name__ == "__main__":
    report(
        "stratified_grpo",
        over_seeds(measure),
        {
            "GRPO prefers rollouts for their stratum (mean advantage above 0.1)": lambda run: (
                offset(run, "GRPO") > 0.1
            ),
            "the pure stratified advantage does not prefer them (below 0.01)": lambda run: (
                offset(run, "blend of 1") < 0.01
            ),
            "the default blend prefers strata less than half as much as GRPO": (
                lambda run: offset(run, "blend of 0.8") < offset(run, "GRPO") / 2
            ),
            "deviations vary less within strata than within groups": lambda run: (
                run["variance of the deviations within the stratum"]
                < run["variance of the deviations within the group"]
            ),
            "the pure stratified advantage leaves fewer rollouts a signal than GRPO's": lambda run: (
                run["share of rollouts with a signal, blend of 1"] < run["share of rollouts with a signal, GRPO"]
            ),
        },
        "Search agents on single- and multi-hop questions: up to 11.3 points above GRPO.",
    )
