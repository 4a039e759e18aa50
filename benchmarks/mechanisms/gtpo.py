"""
GTPO: are format tokens that all answers share no longer pushed down by the wrong ones?

Groups of 8 answers, of which 1 to 7 are correct: 3 tokens of an opening tag and 2 of a closing tag that all share,
between them 4 to 32 random tokens. In an opening tag every answer is in the same state, so what a token gets of the
gradient is the sum of the answers' coefficients (the loss is a mean over tokens, then over answers): the push of the
wrong answers, and the net push, relative to the sum of the coefficients' sizes. Then a toy of learning, without clip
for either: the tag is written with a probability of 0.9, and 3 answers of 10 are correct, with or without it; the
wrong are half, as or twice as long as the correct; 300 steps of gradient ascent, rate 10, on the tag's log-odds.
The paper's figures are benchmarks; this is the conflict by which it explains them.
"""

import math

import torch
from common import over_seeds, report

from trl_ext.core.rollouts import group_advantages
from trl_ext.methods.gtpo import conflict_runs, conflict_weights, entropy_filter, gtpo_advantages, gtpo_loss


OPENING, CLOSING, OTHER, FIRST_BODY, VOCABULARY = (0, 1, 2), (3, 4), 5, 6, 1000
GROUP, GROUPS, STEPS, BATCH, RATE = 8, 200, 300, 32, 10.0
CORRECT = (1, 2, 4, 6, 7)
LENGTHS = {"half as long": (16, 8), "as long": (16, 16), "twice as long": (16, 32)}


def answers(body, tagged, generator):
    """Token ids and mask, of bodies of given lengths; without the tag its first token is another."""
    opening = torch.tensor(OPENING).repeat(len(body), 1)
    opening[:, 0] = torch.where(tagged, opening[:, 0], OTHER)
    total = len(OPENING) + body + len(CLOSING)
    positions = torch.arange(int(total.max())).expand(len(body), -1)
    ids = torch.randint(FIRST_BODY, VOCABULARY, positions.shape, generator=generator)
    ids[:, : len(OPENING)] = opening
    closing = positions - (total - len(CLOSING)).unsqueeze(1)
    ids = torch.where(closing >= 0, closing.clamp(0, 1) + CLOSING[0], ids)
    return ids, (positions < total.unsqueeze(1)).long()


def coefficients(name, rewards, groups, ids, mask, generator):
    """What each token's log-probability is multiplied by, `(N, T)`."""
    if name == "GRPO":
        per_token = group_advantages(rewards, groups).unsqueeze(1) * mask
    else:
        advantages = gtpo_advantages(rewards, groups)
        entropy = 0.2 + 0.4 * torch.rand(len(rewards), generator=generator, dtype=torch.float64)  # below ln 2
        loss = gtpo_loss(torch.zeros(ids.shape, dtype=torch.float64), advantages, entropy, entropy_filter(entropy))
        prefix, suffix = conflict_runs(ids, mask, advantages, groups)
        per_token = -loss * conflict_weights(prefix, suffix, advantages, mask)
    return per_token / mask.sum(1, keepdim=True)


def pushes(name, correct, generator):
    rewards = (torch.arange(GROUP) < correct).double().repeat(GROUPS)
    groups = torch.arange(GROUPS).repeat_interleave(GROUP)
    body = torch.randint(4, 33, rewards.shape, generator=generator)
    ids, mask = answers(body, torch.ones(len(body), dtype=torch.bool), generator)
    of_tag = coefficients(name, rewards, groups, ids, mask, generator)[:, 0].view(GROUPS, GROUP)
    size = of_tag.abs().sum(1)
    wrong = (of_tag[:, correct:].sum(1) / size).mean().item()
    return wrong, (of_tag.sum(1) / size).mean().item(), (of_tag.sum(1) < 0).double().mean().item()


def learn(name, lengths, generator):
    """Probability of the tag at the end."""
    odds = torch.tensor(math.log(9.0), dtype=torch.float64)
    groups = torch.arange(BATCH).repeat_interleave(GROUP)
    for _ in range(STEPS):
        tagged = torch.bernoulli(odds.sigmoid().expand(BATCH * GROUP), generator=generator).bool()
        correct = torch.bernoulli(torch.full((BATCH * GROUP,), 0.3), generator=generator).bool()
        ids, mask = answers(torch.where(correct, *torch.tensor(lengths)), tagged, generator)
        of_tag = coefficients(name, correct.double(), groups, ids, mask, generator)[:, 0]
        odds = odds + RATE * (of_tag * (tagged.double() - odds.sigmoid())).mean()
    return odds.sigmoid().item()


def measure(generator):
    found = {}
    for name in ("GRPO", "GTPO"):
        for correct in CORRECT:
            wrong, net, down = pushes(name, correct, generator)
            found[f"push of the wrong answers on the tag, {name}, correct {correct}"] = wrong
            found[f"net push on the tag, {name}, correct {correct}"] = net
            found[f"share of groups that push the tag down, {name}, correct {correct}"] = down
        for case, lengths in LENGTHS.items():
            found[f"probability of the tag after learning, wrong answers {case}, {name}"] = learn(
                name, lengths, generator
            )
    return found


LEARNT = "probability of the tag after learning, wrong answers"
CLAIMS = {
    "wrong answers push a shared opening tag down with GRPO, and not at all with GTPO": lambda run: all(
        run[f"push of the wrong answers on the tag, GRPO, correct {correct}"] < -0.4
        and run[f"push of the wrong answers on the tag, GTPO, correct {correct}"] == 0
        for correct in CORRECT
    ),
    "with one correct answer of 8 the net push on it is about 0 with GRPO and clearly upwards with GTPO": lambda run: (
        abs(run["net push on the tag, GRPO, correct 1"]) < 0.1 and run["net push on the tag, GTPO, correct 1"] > 0.5
    ),
    "a tag that has no part in the reward becomes more probable with GTPO, however long wrong answers are": (
        lambda run: all(run[f"{LEARNT} {case}, GTPO"] > 0.9 for case in LENGTHS)
    ),
    "a tag that has no part in the reward becomes less probable with GRPO where wrong answers are half as long": (
        lambda run: run[f"{LEARNT} half as long, GRPO"] < 0.9
    ),
}
PAPER = "LLaMA-8B and Qwen2.5-3B, maths: more accurate and better formatted than GRPO, without KL; in figures only."


if __name__ == "__main__":
    report("gtpo", over_seeds(measure), CLAIMS, PAPER)
