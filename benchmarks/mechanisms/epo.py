"""
EPO: does the penalty hold entropy in a corridor around its history, and does its released form do anything?

A softmax policy stands in for an agent, its entropy and expected reward for the paper's success rates: 40 phases of 8
updates, a rollout is one turn. Weights and corridor as published (0.001, 0 to 2 times the history), and larger and
narrower (0.02, and 0.8 to 1.2 times as in a released configuration), since entropy here never doubles. The penalty is
the paper's distance (hinge) or the code's constant (indicator); the comparison is the entropy bonus alone. The long
training was chosen after a shorter one (60 phases of 1 update), in which even the narrow corridor moved entropy by no
more than 0.0002.
"""

from statistics import fmean

from common import over_seeds, report
from softmax_policy import train

from trl_ext.core.loss import clipped_loss
from trl_ext.methods.epo import epo_loss, epo_penalty


PHASES = 40
SETTINGS = {
    "published setting": {"coef": 0.001, "kappa_low": 0.0, "kappa_high": 2.0},
    "narrow corridor": {"coef": 0.02, "kappa_low": 0.8, "kappa_high": 1.2},
}
FORMS = {"bonus alone": {"smooth_coef": 0.0}, "hinge": {"penalty": "hinge"}, "indicator": {"penalty": "indicator"}}


def epo(setting, form, distances):
    history = []

    def loss(batch):
        if batch.update == 0:  # of this phase's own entropy nothing is known yet
            history.append(batch.entropies.mean().item())
        past, corridor = history[:-1], (setting["kappa_low"], setting["kappa_high"])
        terms = epo_loss(batch.entropies, batch.mask, past, len(past), PHASES, **setting, **form)
        if past:
            distances.append(epo_penalty(batch.entropies.detach(), fmean(past), *corridor).mean().item())
        return clipped_loss(batch.log_ratio, batch.advantages, 0.8, 1.2).mean() + sum(terms)

    return loss


def measure(generator):
    found = {}
    for name, setting in SETTINGS.items():
        last = {}
        for form, more in FORMS.items():
            distances = []
            last[form] = train(epo(setting, more, distances), generator, PHASES)[-1]
            found[f"distance from the corridor, {form}, {name}"] = fmean(distances)
            found[f"entropy after {PHASES} phases, {form}, {name}"] = last[form].entropies.mean().item()
            found[f"reward after {PHASES} phases, {form}, {name}"] = last[form].success.mean().item()
        for form in ("hinge", "indicator"):
            moved = (last[form].entropies - last["bonus alone"].entropies).abs().max().item()
            found[f"largest difference from the bonus alone, {form}, {name}"] = moved
    return found


if __name__ == "__main__":
    moved = "largest difference from the bonus alone"
    claims = {
        "the code's constant penalty leaves exactly the policy of the bonus alone": lambda run: all(
            run[f"{moved}, indicator, {name}"] == 0 for name in SETTINGS
        ),
        "the paper's distance, in its published setting, changes the policy": lambda run: (
            run[f"{moved}, hinge, published setting"] > 0
        ),
        "with a narrow corridor the paper's distance keeps entropy nearer to it than the bonus alone": lambda run: (
            run["distance from the corridor, hinge, narrow corridor"]
            < run["distance from the corridor, bonus alone, narrow corridor"]
        ),
        "with a narrow corridor the paper's distance ends with more entropy than the bonus alone": lambda run: (
            run[f"entropy after {PHASES} phases, hinge, narrow corridor"]
            > run[f"entropy after {PHASES} phases, bonus alone, narrow corridor"]
        ),
    }
    paper = (
        "Average success on seen and unseen tasks: Qwen2.5-7B, ScienceWorld, PPO 38.4 and 39.1, with EPO 96.8 and "
        "96.2, GRPO 81.6 and 80.9, with EPO 83.8 and 81.3; Qwen2.5-3B, ALFWorld, GRPO 63.3 and 63.5, with EPO 75.8 "
        "and 75.4."
    )
    report("epo", over_seeds(measure), claims, paper)
