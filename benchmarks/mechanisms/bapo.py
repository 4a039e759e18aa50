"""
BAPO: do moving clip bounds let more tokens of positive advantage in, up to their target share, and does entropy stay?

With the paper's bounds and its target of 0.4. First a stale batch: rollouts of prompts with success rates from
Beta(1, 3), ratios of mean 1 whose logarithms scatter by 0.5, failed rollouts 1 to 2 times as long as successful ones;
what the bounds 0.6 and 1.2 give, at which the search starts, those at which it ends, and the upper one alone at its
largest. Then a softmax policy is trained, entropy and expected reward in place of the paper's benchmarks, against
GRPO's clip range of 0.2; tokens of negative advantage weigh 1 or 2 times as much, as if there were that many more.
"""

import torch
from common import beta_rates, over_seeds, report, simulated_groups
from softmax_policy import train

from trl_ext.core.loss import clipped_loss
from trl_ext.core.rollouts import group_advantages
from trl_ext.methods.bapo import bapo_candidates, bapo_search, bapo_sums


LOWS, HIGHS = bapo_candidates(0.6, 0.9, 0.02), bapo_candidates(1.2, 3.0, 0.05)
LENGTHS, SPREAD = (1, 1.3, 1.6, 2), 0.5
LOSS, GRADIENT = "share of the loss from positive tokens", "share of positive tokens with a gradient"
FAR = "with failed rollouts 1.6 or 2 times as long"


def search(ratio, advantages, mask):
    """Sums of both signs over the candidates, and the steps of the lower and of the upper bound."""
    positive, negative = (sums.tolist() for sums in bapo_sums(ratio, advantages, mask, LOWS, HIGHS))
    return positive, negative, *bapo_search(positive, negative, target=0.4)


def stale_batch(length, generator):
    rewards, groups = simulated_groups(beta_rates(1.0, 3.0, 2000, generator), 8, generator)
    advantages = group_advantages(rewards, groups).unsqueeze(1).expand(-1, 20)
    noise = torch.randn(advantages.shape, generator=generator, dtype=torch.float64)
    mask = torch.arange(20) < torch.where(rewards > 0, 10, 10 * length).unsqueeze(1)
    return (SPREAD * noise - SPREAD**2 / 2).exp(), advantages, mask


def training_loss(weight, adaptive):
    def loss(batch):
        advantages = torch.where(batch.advantages < 0, weight * batch.advantages, batch.advantages)
        low, high = 0.8, 1.2
        if adaptive:
            _, _, j, i = search(batch.log_ratio.detach().exp(), advantages, batch.mask)
            low, high = LOWS[j], HIGHS[i]
        return clipped_loss(batch.log_ratio, advantages, low, high).mean()

    return loss


def measure(generator):
    found = {}
    for length in LENGTHS:
        ratio, advantages, mask = stale_batch(length, generator)
        positive, negative, j, i = search(ratio, advantages, mask)
        good = ratio[mask & (advantages > 0)]
        for name, low, high in (("start", 0, 0), ("upper bound alone", 0, -1), ("BAPO", j, i)):
            where = f"{name}, length ratio {length}"
            share = positive[high] / (positive[high] + negative[low])
            found[f"{LOSS}, {where}"] = share
            found[f"{GRADIENT}, {where}"] = (good <= HIGHS[high]).double().mean().item()
        found[f"lower bound, BAPO, length ratio {length}"] = LOWS[j]
        found[f"upper bound, BAPO, length ratio {length}"] = HIGHS[i]
    for weight in (1, 2):
        for name, adaptive in (("GRPO", False), ("BAPO", True)):
            last = train(training_loss(weight, adaptive), generator)[-1]
            found[f"entropy after 20 phases, {name}, negative weight {weight}"] = last.entropies.mean().item()
            found[f"reward after 20 phases, {name}, negative weight {weight}"] = last.success.mean().item()
    return found


def larger(run, quantity, more, less):
    lengths = [f"length ratio {length}" for length in LENGTHS[2:]]
    return all(run[f"{quantity}, {more}, {far}"] > run[f"{quantity}, {less}, {far}"] for far in lengths)


def more_entropy(weight):
    names = [f"entropy after 20 phases, {name}, negative weight {weight}" for name in ("BAPO", "GRPO")]
    return lambda run: run[names[0]] > run[names[1]]


if __name__ == "__main__":
    claims = {
        "with failed rollouts 1.3 times as long, the bounds move until positive tokens have their target share": (
            lambda run: run[f"{LOSS}, start, length ratio 1.3"] < 0.4 <= run[f"{LOSS}, BAPO, length ratio 1.3"]
        ),
        f"{FAR}, more positive tokens have a gradient and their share of the loss rises": lambda run: (
            larger(run, GRADIENT, "BAPO", "start") and larger(run, LOSS, "BAPO", "start")
        ),
        f"{FAR}, that share would be higher yet if only the upper bound moved": lambda run: larger(
            run, LOSS, "upper bound alone", "BAPO"
        ),
        "more entropy stays than with GRPO, both signs weighing the same": more_entropy(1),
        "more entropy stays than with GRPO, negative tokens weighing double": more_entropy(2),
    }
    paper = (
        "BP-Math-32B, AIME24 and AIME25: SFT 84.4 and 78.1, GRPO 84.6 and 78.8, BAPO 87.1 and 80.0; at 7B 66.9 and "
        "59.0, 69.2 and 59.2, 70.8 and 62.5."
    )
    report("bapo", over_seeds(measure), claims, paper)
