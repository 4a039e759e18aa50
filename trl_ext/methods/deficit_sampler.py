"""Low-discrepancy draws of prompts, after PROPS's idea of on-policy data without on-policy sampling."""

from dataclasses import dataclass

import torch

from ..core import MethodConfig, MethodTrainer, Rollouts
from ..core.prompts import draw_by_deficit, usable_weights


@dataclass
class DeficitSamplerConfig(MethodConfig):
    r"""Configuration of [`DeficitSamplerTrainer`], which has no settings of its own."""


class DeficitSamplerTrainer(MethodTrainer):
    """
    Draws prompts by their deficit, expected minus actual count, instead of independently: what On-Policy Policy
    Gradient Reinforcement Learning Without On-Policy Sampling ([arXiv
    2311.08290](https://huggingface.co/papers/2311.08290)) does for actions, carried over to prompts (ours). The
    expected counts are those of the sampling weights of a mixed method, such as SPO's, or uniform; weights may change
    at every generation.

    State: the deficit and the number of draws of every prompt.

    Logs `deficit/largest` (largest absolute deficit, in draws; independent draws would let it grow).
    """

    config_class = DeficitSamplerConfig
    replaces = ("choose_prompts",)
    _name = "Deficit sampler"
    _paper = {
        "title": "On-Policy Policy Gradient Reinforcement Learning Without On-Policy Sampling",
        "id": "2311.08290",
        "citation": """\
@article{corrado2023onpolicy,
    title  = {{On-Policy Policy Gradient Reinforcement Learning Without On-Policy Sampling}},
    author = {Nicholas E. Corrado and Josiah P. Hanna},
    year   = 2023,
    eprint = {arXiv:2311.08290},
}""",
    }

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.deficit_deficits = torch.zeros(len(self.train_dataset), dtype=torch.float64)
        self.deficit_counts = torch.zeros(len(self.train_dataset), dtype=torch.long)
        self.deficit_pending = None  # rows and deficits of the generation under way

    def choose_prompts(self, n: int, generator: torch.Generator):
        weights = self.prompt_weights()
        size = len(self.deficit_deficits)
        if weights is None:
            target = torch.full((size,), 1 / size, dtype=torch.float64)
        else:
            weights = usable_weights(torch.as_tensor(weights))
            target = weights / weights.sum()
        self.deficit_pending = draw_by_deficit(self.deficit_deficits, target, n)
        return self.deficit_pending[0]

    def observe(self, rollouts: Rollouts):
        super().observe(rollouts)
        rows, self.deficit_deficits = self.deficit_pending
        self.deficit_counts += torch.bincount(rows, minlength=len(self.deficit_counts))
        self.log_metric("deficit/largest", self.deficit_deficits.abs().max())

    def prompt_table(self):
        columns = {"deficit/draws": self.deficit_counts, "deficit/deficit": self.deficit_deficits}
        return super().prompt_table() | columns

    def method_state(self):
        state = {"deficits": self.deficit_deficits, "counts": self.deficit_counts}
        return super().method_state() | {"deficit_sampler": state}

    def load_method_state(self, state):
        super().load_method_state(state)
        state = state["deficit_sampler"]
        self.deficit_deficits, self.deficit_counts = state["deficits"], state["counts"]
