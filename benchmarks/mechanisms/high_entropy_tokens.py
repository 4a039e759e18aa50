"""
High-entropy tokens: is the fifth of the tokens at which the policy is least certain enough to learn from?

A softmax policy with 1,536 tokens per update, 40 phases of 8 updates, DAPO's clip range of 0.2 and 0.28; its expected
reward stands in for the paper's benchmarks. Here uncertainty is spread almost evenly at first (a fifth of the tokens
holds little more than a fifth of the entropy), while a language model is certain of most tokens. The loss is the mean
over the selected tokens; its gradient is also set against that of TRL's `top_entropy_quantile`, which divides by all.
"""

import torch
from common import over_seeds, report
from softmax_policy import train

from trl_ext.core.loss import clipped_loss, renormalised_selection
from trl_ext.methods.high_entropy_tokens import high_entropy_mask


SHARES, PHASES = (0.1, 0.2, 0.5), (10, 20, 40)


def all_tokens(batch):
    return clipped_loss(batch.log_ratio, batch.advantages, 0.8, 1.28).mean()


def selected(share, others=False, seen=None):
    def loss(batch):
        chosen, _ = high_entropy_mask(batch.entropies, batch.mask, share)
        chosen = ~chosen if others else chosen
        per_token = clipped_loss(batch.log_ratio, batch.advantages, 0.8, 1.28)
        result = (per_token * renormalised_selection(chosen, batch.mask, "bnpo")).mean()
        if seen is not None:
            norms = [
                torch.autograd.grad(value, batch.logps, retain_graph=True)[0].norm()
                for value in (result, (per_token * chosen).mean())
            ]
            entropies = batch.entropies.detach()
            seen.append([norms[0] / norms[1], entropies[chosen].sum() / entropies.sum()])
        return result

    return loss


def measure(generator):
    seen = []
    arms = {"all tokens": all_tokens} | {f"highest entropy, share {share}": selected(share) for share in SHARES}
    arms["highest entropy, share 0.2"] = selected(0.2, seen=seen)
    arms["the other 80%"] = selected(0.2, others=True)
    found = {}
    for name, loss in arms.items():
        phases = train(loss, generator, phases=max(PHASES))
        for number in PHASES:
            found[f"entropy, {name}, phase {number}"] = phases[number - 1].entropies.mean().item()
            found[f"reward, {name}, phase {number}"] = phases[number - 1].success.mean().item()
    gain, entropy = torch.tensor(seen).mean(0).tolist()
    return found | {"gradient over TRL's, share 0.2": gain, "part of the entropy in a fifth of the tokens": entropy}


def compare(quantity, name, phase):
    """Whether a number is larger with the fifth of highest entropy than with other tokens."""
    return lambda run: (
        run[f"{quantity}, highest entropy, share 0.2, phase {phase}"] > run[f"{quantity}, {name}, phase {phase}"]
    )


if __name__ == "__main__":
    claims = {
        "training on the fifth of highest entropy keeps more entropy than on all tokens": compare(
            "entropy", "all tokens", 40
        ),
        "training on the fifth of highest entropy ends with a higher reward than on all tokens": compare(
            "reward", "all tokens", 40
        ),
        "training on the fifth of highest entropy ends with a higher reward than on the other 80%": compare(
            "reward", "the other 80%", 40
        ),
        "after 10 phases the fifth of highest entropy has led to a higher reward than the other 80%": compare(
            "reward", "the other 80%", 10
        ),
    }
    paper = (
        "Average of 6 sets, all tokens and the fifth of highest entropy: Qwen3-32B 66.59 and 70.69, 14B 61.40 and "
        "64.39, 8B 53.71 and 54.23; the other 80% are much worse."
    )
    report("high_entropy_tokens", over_seeds(measure), claims, paper)
