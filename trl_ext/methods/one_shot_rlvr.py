"""RLVR with one training example: histories to select it by, and its loss (Wang et al., arXiv 2504.20571)."""

from dataclasses import dataclass, field

import numpy as np

from ..core import MethodConfig, MethodTrainer, Rollouts
from ..core.rollouts import prompt_visits


@dataclass
class OneShotRLVRConfig(MethodConfig):
    r"""
    Configuration of [`OneShotRLVRTrainer`]. The loss has the paper's entropy bonus and plain KL penalty by default.

    Parameters:
        hv_outcome_reward (`str`, *optional*):
            Name of the reward function that says whether an answer is right; the first by default.
    """

    entropy_coef: float = field(default=0.001, metadata={"help": "Weight of the entropy bonus."})
    beta: float = field(default=0.001, metadata={"help": "Weight of the KL penalty."})
    use_bias_correction_kl: bool = field(default=False, metadata={"help": "Weigh the KL term by the ratio."})
    hv_outcome_reward: str | None = field(default=None, metadata={"help": "Reward function of the outcome."})

    def __post_init__(self):
        super().__post_init__()
        fixed = not (self.use_adaptive_entropy and self.entropy_coef)
        self.check_range("use_adaptive_entropy", fixed, "False where `entropy_coef` is the bonus's constant weight")


def historical_variance(history: list[float]) -> float:
    """
    Variance of a prompt's success rates over its visits (population form, 12 decimals: equal histories must not be
    ordered by rounding).

    Args:
        history (`list[float]`):
            Success rate at each visit.

    Returns:
        `float`: the variance.
    """
    return round(float(np.var(np.asarray(history, dtype=np.float64))), 12)


def rank_examples(histories: "dict[int, list[float]]", min_epochs: int = 2) -> list[int]:
    """
    Order prompts by the variance of their history, largest first; ties stay in the order given.

    Args:
        histories (`dict[int, list[float]]`):
            Success rates at each visit, by prompt.
        min_epochs (`int`, *optional*, defaults to `2`):
            Visits that a prompt needs to be ranked.

    Returns:
        `list[int]`: prompts.

    Raises:
        ValueError: if `min_epochs` is below 2.
    """
    if min_epochs < 2:
        raise ValueError(f"`min_epochs` must be at least 2 (one visit has no variance), got {min_epochs!r}.")
    ranked = [prompt for prompt, history in histories.items() if len(history) >= min_epochs]
    return sorted(ranked, key=lambda prompt: -historical_variance(histories[prompt]))


def repeat_examples(prompts: list[int], size: int) -> list[int]:
    """
    Fill a batch by going round the selected prompts.

    Args:
        prompts (`list[int]`):
            Selected prompts, best first.
        size (`int`):
            Length of the result.

    Returns:
        `list[int]`: prompts, shape `(size,)`.

    Raises:
        ValueError: if there are no prompts or too many.
    """
    if not prompts or size < len(prompts):
        raise ValueError(f"`repeat_to` must be at least the number of selected prompts ({len(prompts)}), got {size}.")
    return [prompts[i % len(prompts)] for i in range(size)]


class OneShotRLVRTrainer(MethodTrainer):
    """
    One-shot RLVR: Reinforcement Learning for Reasoning in Large Language Models with One Training Example ([arXiv
    2504.20571](https://huggingface.co/papers/2504.20571)). A first run over the whole pool records the success rate
    of every prompt at each visit; `trl-ext select` takes the prompt whose rates vary most, repeated to a batch; a
    second run trains on it alone, from the same start. Both runs have GRPO's loss with an entropy bonus.

    State: the history of every prompt.

    Logs `one_shot_rlvr/variance` (mean variance of the histories of the prompts just visited).
    """

    config_class = OneShotRLVRConfig
    contradicts = {
        "d3s": "D3S masks tokens, which would leave the KL and entropy terms too, so it works without them",
        "grpo_d": "both set the weight of the KL term",
    }
    _name = "One-shot RLVR"
    _paper = {
        "title": "Reinforcement Learning for Reasoning in Large Language Models with One Training Example",
        "id": "2504.20571",
        "citation": """\
@article{wang2025oneshot,
    title  = {{Reinforcement Learning for Reasoning in Large Language Models with One Training Example}},
    author = {Yiping Wang and others},
    year   = 2025,
    eprint = {arXiv:2504.20571},
}""",
    }

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.one_shot_column = self.reward_column("hv_outcome_reward")
        self.one_shot_histories: dict[int, list[float]] = {}

    def observe(self, rollouts: Rollouts):
        super().observe(rollouts)
        everything = rollouts.everything
        rows, outcomes = prompt_visits(everything, everything.reward_matrix[:, self.one_shot_column])
        for row, mean in zip(rows.tolist(), outcomes.nanmean(1).tolist(), strict=True):
            self.one_shot_histories.setdefault(row, []).append(mean)
        if len(rows):
            variances = [historical_variance(self.one_shot_histories[row]) for row in rows.tolist()]
            self.log_metric("one_shot_rlvr/variance", sum(variances) / len(variances))

    def prompt_table(self):
        histories = [self.one_shot_histories.get(row, []) for row in range(len(self.train_dataset))]
        return super().prompt_table() | {"one_shot_rlvr/history": histories}

    def method_state(self):
        return super().method_state() | {"one_shot_rlvr": self.one_shot_histories}

    def load_method_state(self, state):
        super().load_method_state(state)
        self.one_shot_histories = state["one_shot_rlvr"]
