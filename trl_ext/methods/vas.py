"""Variance-Aware Sampling (VAS of MMR1; arXiv 2509.21268)."""

import math
import warnings
from collections import Counter
from dataclasses import dataclass, field

import numpy as np
import torch
from accelerate.utils import gather_object

from ..core import MethodConfig, MethodTrainer, Rollouts
from ..core.prompts import draw_rows, make_generator
from ..core.rollouts import Sample, positive_variance


@dataclass
class VASConfig(MethodConfig):
    r"""
    Configuration of [`VASTrainer`]. Defaults are the paper's.

    Parameters:
        vas_lambda (`float`, *optional*, defaults to `0.5`):
            Share of a generation's prompts that are drawn by their score; the rest is uniform.
        vas_ovs_weight (`float`, *optional*, defaults to `0.8`), vas_tds_weight (`float`, *optional*, defaults to
            `0.2`):
            Weights of outcome variance and trajectory diversity in the score.
        vas_update_steps (`int`, *optional*, defaults to `35`):
            Generations between two refreshes, which sample anew for every prompt of the data set.
        vas_num_rollouts (`int`, *optional*, defaults to `32`):
            Samples per prompt at a refresh.
        vas_diversity (`str`, *optional*, defaults to `"inverse_self_bleu"`):
            `"inverse_self_bleu"`, `"edit"` (squared edit distance, better for short answers) or `"distinct_3"`.
        vas_momentum (`float`, *optional*, defaults to `0.0`):
            Share of the old score that a refresh keeps.
        vas_scoring (`str`, *optional*, defaults to `"refresh"`):
            `"refresh"`, or `"online"` (ours): scores are those of a prompt's own last groups, which costs nothing but
            is not the paper's estimate; unseen prompts have the mean of the others.
        vas_minmax (`bool`, *optional*, defaults to `False`):
            Whether scores are rescaled to [0, 1] before drawing, as in the code, which never draws the lowest.
        vas_outcome (`str`, *optional*, defaults to `"variance"`):
            `"variance"` p(1 - p) of the success rate, or `"positive_variance"`, for graded rewards: the mean squared
            excess over their mean.
        vas_accuracy_reward (`str`, *optional*):
            Name of the reward function that says whether an answer is right; the first by default.
        vas_success_threshold (`float`, *optional*, defaults to `0.5`):
            Reward above which an answer is right.
        vas_max_tokens (`int`, *optional*):
            Tokens of each sample that diversity looks at; None = all. Edit distances take time in their square.
    """

    vas_lambda: float = field(default=0.5, metadata={"help": "Share of prompts drawn by their score."})
    vas_ovs_weight: float = field(default=0.8, metadata={"help": "Weight of the outcome variance."})
    vas_tds_weight: float = field(default=0.2, metadata={"help": "Weight of the trajectory diversity."})
    vas_update_steps: int = field(default=35, metadata={"help": "Generations between two refreshes."})
    vas_num_rollouts: int = field(default=32, metadata={"help": "Samples per prompt at a refresh."})
    vas_diversity: str = field(
        default="inverse_self_bleu",
        metadata={"help": "Measure of diversity.", "choices": ["inverse_self_bleu", "edit", "distinct_3"]},
    )
    vas_momentum: float = field(default=0.0, metadata={"help": "Share of the old score kept at a refresh."})
    vas_scoring: str = field(
        default="refresh",
        metadata={"help": "Sample anew, or use the training groups.", "choices": ["refresh", "online"]},
    )
    vas_minmax: bool = field(default=False, metadata={"help": "Rescale scores to [0, 1]."})
    vas_outcome: str = field(
        default="variance",
        metadata={"help": "Score of the outcomes.", "choices": ["variance", "positive_variance"]},
    )
    vas_accuracy_reward: str | None = field(default=None, metadata={"help": "Reward function of the outcome."})
    vas_success_threshold: float = field(default=0.5, metadata={"help": "Reward above which an answer is right."})
    vas_max_tokens: int | None = field(default=None, metadata={"help": "Tokens that diversity looks at."})

    def __post_init__(self):
        super().__post_init__()
        self.check_range("vas_lambda", 0 <= self.vas_lambda <= 1, "in [0, 1]")
        self.check_range("vas_ovs_weight", self.vas_ovs_weight >= 0, "at least 0")
        self.check_range("vas_tds_weight", self.vas_tds_weight >= 0, "at least 0")
        self.check_range("vas_update_steps", self.vas_update_steps >= 1, "at least 1")
        self.check_range("vas_num_rollouts", self.vas_num_rollouts >= 2, "at least 2")
        self.check_range("vas_momentum", 0 <= self.vas_momentum < 1, "in [0, 1)")
        self.check_range("vas_max_tokens", self.vas_max_tokens is None or self.vas_max_tokens >= 1, "at least 1")
        self.check_choices("vas_diversity", "vas_scoring", "vas_outcome")


def self_bleu(responses: list[list[int]]) -> float:
    """
    Mean BLEU-3 of each response against all others, on token ids (weights 1/3 each; a precision of 0 beyond unigrams
    counts as 0.1 matches).

    Args:
        responses (`list[list[int]]`):
            Token ids, without padding.

    Returns:
        `float`: 1 for identical responses of at least three tokens, 0 without a common token.
    """
    logs = np.zeros(len(responses))
    lengths = [len(response) for response in responses]
    with np.errstate(divide="ignore"):
        for n in (1, 2, 3):
            grams = [Counter(zip(*(response[i:] for i in range(n)), strict=False)) for response in responses]
            # The largest count over the others is the largest of all, or the second largest for its owner.
            first, second, owner = Counter(), Counter(), {}
            for i, counts in enumerate(grams):
                for gram, count in counts.items():
                    if count > first[gram]:
                        second[gram], first[gram], owner[gram] = first[gram], count, i
                    else:
                        second[gram] = max(second[gram], count)
            for i, counts in enumerate(grams):
                matches = sum(
                    min(count, second[gram] if owner[gram] == i else first[gram]) for gram, count in counts.items()
                )
                if matches == 0 and n > 1:
                    matches = 0.1
                logs[i] += np.log(matches / max(1, lengths[i] - n + 1)) / 3
    for i, length in enumerate(lengths):
        closest = min((other for j, other in enumerate(lengths) if j != i), key=lambda x: (abs(x - length), x))
        if 0 < length <= closest:
            logs[i] += 1 - closest / length
    return float(np.exp(logs).mean())


def edit_distance(first: list[int], second: list[int]) -> int:
    """Levenshtein distance of two lists of token ids."""
    second, columns = np.asarray(second), np.arange(len(second) + 1)
    row = columns
    for i, token in enumerate(first):
        best = np.minimum(row[1:] + 1, row[:-1] + (second != token))
        # Insertions: the cheapest of all cells to the left, one more for each step.
        row = np.minimum.accumulate(np.concatenate([[i + 1], best]) - columns) + columns
    return int(row[-1])


def trajectory_diversity(responses: list[list[int]], measure: str = "inverse_self_bleu") -> float:
    """
    Diversity of the responses to a prompt (TDS).

    Args:
        responses (`list[list[int]]`):
            Token ids of the completions, the end token included, without padding.
        measure (`str`, *optional*, defaults to `"inverse_self_bleu"`):
            See [`VASConfig`].

    Returns:
        `float`: In [0, 1], higher = more diverse; 0 for fewer than two responses.
    """
    if len(responses) < 2:
        return 0.0
    if measure == "inverse_self_bleu":
        return 1 - self_bleu(responses)
    if measure == "distinct_3":
        grams = [gram for response in responses for gram in zip(*(response[i:] for i in range(3)), strict=False)]
        return len(set(grams)) / len(grams) if grams else 0.0
    squares = [
        (edit_distance(a, b) / max(len(a), len(b), 1)) ** 2 for i, a in enumerate(responses) for b in responses[:i]
    ]
    return sum(squares) / len(squares)


def outcome_variance(rewards: torch.Tensor, outcome: str = "variance", threshold: float = 0.5) -> torch.Tensor:
    """
    Outcome variance score (OVS) of prompts.

    Args:
        rewards (`torch.Tensor`):
            With one prompt per row, NaN = not scored, shape `(M, N)`.
        outcome (`str`, *optional*, defaults to `"variance"`):
            See [`VASConfig`].
        threshold (`float`, *optional*, defaults to `0.5`):
            Reward above which an answer is right.

    Returns:
        `torch.Tensor`: Shape `(M,)`; 0 for a row without a reward.
    """
    if outcome == "positive_variance":
        return positive_variance(rewards).nan_to_num(nan=0.0)
    rates = success_rates(rewards, threshold).nan_to_num(nan=0.0)
    return rates * (1 - rates)


def success_rates(rewards: torch.Tensor, threshold: float = 0.5) -> torch.Tensor:
    """Share of right answers among the scored ones of each row; NaN without any, shape `(M,)`."""
    return torch.where(rewards.isnan(), torch.nan, (rewards > threshold).double()).nanmean(1)


def vas_batch_sizes(n: int, share: float) -> tuple[int, int]:
    """How many of `n` prompts are drawn by score, and how many uniformly."""
    weighted = math.floor(share * n + 1e-9)
    return weighted, n - weighted


def pool_rows(size: int, start: int, count: int, seed: int) -> torch.Tensor:
    """
    Rows number `start` to `start + count` of an endless sequence of permutations, each drawn from the seed.

    Args:
        size (`int`):
            Number of prompts.
        start (`int`), count (`int`):
            The part to return.
        seed (`int`):
            Of the run.

    Returns:
        `torch.Tensor`: Shape `(count,)`.
    """
    first = start // size
    epochs = range(first, -(-(start + count) // size))
    orders = [torch.randperm(size, generator=make_generator(seed, "vas_pool", epoch)) for epoch in epochs]
    return torch.cat([*orders, torch.zeros(0, dtype=torch.long)])[start - first * size :][:count]


def interleave(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """Entries of two tensors in turn, then what is left of the longer one."""
    common = min(len(first), len(second))
    pairs = torch.stack([first[:common], second[:common]], dim=1).flatten()
    return torch.cat([pairs, first[common:], second[common:]])


def _cut_off_is_wrong(rewards: torch.Tensor, truncated: torch.Tensor) -> torch.Tensor:
    return rewards.masked_fill(truncated & ~rewards.isnan(), 0.0)


class VASTrainer(MethodTrainer):
    """
    VAS: Variance-Aware Sampling, from MMR1: Enhancing Multimodal Reasoning with Variance-Aware Sampling and Open
    Resources ([arXiv 2509.21268](https://huggingface.co/papers/2509.21268)). Half of the prompts are drawn by a score,
    the variance of their outcomes and the diversity of their answers; the scores are refreshed now and then by
    sampling for every prompt of the data set, which counts in `num_rollouts`.

    Diversity counts as the paper means it, more of it drawn more often; the released code adds the similarity
    instead, of responses with their padding.

    State: score, outcome variance, diversity and success rate of every prompt.

    Logs `vas/ovs` and `vas/tds` (means over the data set) and `vas/drawn_score` (mean score of the generation's
    prompts over that of all).
    """

    config_class = VASConfig
    replaces = ("choose_prompts",)
    ignores = ("prompt_weights",)
    _name = "VAS"
    _paper = {
        "title": "MMR1: Enhancing Multimodal Reasoning with Variance-Aware Sampling and Open Resources",
        "id": "2509.21268",
        "citation": """\
@article{leng2025mmr1,
    title  = {{MMR1: Enhancing Multimodal Reasoning with Variance-Aware Sampling and Open Resources}},
    author = {Sicong Leng and others},
    year   = 2025,
    eprint = {arXiv:2509.21268},
}""",
    }

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.vas_column = self.reward_column("vas_accuracy_reward")
        prompts = self.args.generation_batch_size // self.args.num_generations
        if vas_batch_sizes(prompts, self.args.vas_lambda)[0] == 0:
            warnings.warn(
                f"`vas_lambda` ({self.args.vas_lambda}) of {prompts} prompts per generation is less than one, so that "
                "all are drawn uniformly: raise it, or the number of prompts.",
                stacklevel=2,
            )
        # Rows: score, outcome variance, diversity, success rate; NaN = not known.
        self.vas_known = torch.full((4, len(self.train_dataset)), torch.nan, dtype=torch.float64)
        self.vas_refreshed = -1

    def _vas_measure(self, rewards: torch.Tensor, responses: list[list[int]]) -> list[float]:
        """Outcome variance, diversity and success rate from rewards `(N,)` and token ids."""
        args, cut = self.args, self.args.vas_max_tokens
        rewards = rewards.unsqueeze(0)
        ovs = outcome_variance(rewards, args.vas_outcome, args.vas_success_threshold)
        tds = trajectory_diversity([ids[:cut] for ids in responses], args.vas_diversity) if args.vas_tds_weight else 0
        return [ovs.item(), tds, success_rates(rewards, args.vas_success_threshold).item()]

    def _vas_sampled(self, row: int, samples: list[Sample]) -> list[float]:
        rewards = torch.tensor([sample.rewards[self.vas_column] for sample in samples], dtype=torch.float64)
        truncated = torch.tensor([sample.truncated for sample in samples])
        rewards = _cut_off_is_wrong(rewards, truncated)
        return self._vas_measure(rewards, [sample.completion_ids for sample in samples])

    def _vas_learn(self, rows: torch.Tensor, found: list[list[float]]) -> None:
        ovs, tds, rate = torch.tensor(found, dtype=torch.float64).T
        score = self.args.vas_ovs_weight * ovs + self.args.vas_tds_weight * tds
        old, share = self.vas_known[0, rows], self.args.vas_momentum
        score = torch.where(old.isnan(), score, share * old + (1 - share) * score)
        self.vas_known[:, rows] = torch.stack([score, ovs, tds, rate])

    def _vas_scores(self) -> torch.Tensor:
        scores = self.vas_known[0]
        mean = scores.nanmean().nan_to_num(nan=1.0)
        scores = torch.where(scores.isnan(), mean, scores)
        if self.args.vas_minmax:
            scores = (scores - scores.min()) / (scores.max() - scores.min() + 1e-8)
        return scores

    def choose_prompts(self, n: int, generator: torch.Generator):
        args, size = self.args, len(self.train_dataset)
        due = args.vas_scoring == "refresh" and self._generation % args.vas_update_steps == 0
        if due and self.vas_refreshed != self._generation:
            rows = torch.arange(size)
            _, found = self.score_prompts(rows, args.vas_num_rollouts, measure=self._vas_sampled)
            self._vas_learn(rows, found)
            self.vas_refreshed = self._generation
        scores = self._vas_scores()
        if not scores.any():
            return draw_rows(torch.ones(size), n, generator)
        weighted, uniform = vas_batch_sizes(n, args.vas_lambda)
        drawn = torch.multinomial(scores, max(weighted, 1), replacement=True, generator=generator)[:weighted]
        chosen = interleave(drawn, pool_rows(size, self._generation * uniform, uniform, args.seed))
        self.log_metric("vas/drawn_score", scores[chosen].mean() / scores.mean())
        return chosen

    def observe(self, rollouts: Rollouts):
        super().observe(rollouts)
        if self.args.vas_scoring == "online":
            self._vas_observe(rollouts)
        for name, values in zip(("ovs", "tds"), self.vas_known[1:3], strict=True):
            if not values.isnan().all():
                self.log_metric(f"vas/{name}", values.nanmean())

    def _vas_observe(self, rollouts: Rollouts) -> None:
        # `mask_truncated_completions` masks all of an answer that was cut off, which has its length all the same.
        sizes = torch.maximum(rollouts.completion_mask.sum(1), rollouts.lengths[rollouts.local]).tolist()
        pairs = zip(rollouts.completion_ids.tolist(), sizes, strict=True)
        responses = gather_object([ids[:size] for ids, size in pairs])
        rewards = _cut_off_is_wrong(rollouts.reward_matrix[:, self.vas_column], rollouts.truncated).cpu().double()
        prompts = rollouts.prompt_index.cpu().masked_fill(rollouts.changed_prompt.cpu(), -1)
        rows, found = prompts[prompts >= 0].unique(), []
        for row in rows:
            members = (prompts == row).nonzero().squeeze(1)
            found.append(self._vas_measure(rewards[members], [responses[i] for i in members.tolist()]))
        if found:
            self._vas_learn(rows, found)

    def prompt_table(self):
        columns = zip(("score", "ovs", "tds", "rate"), self.vas_known, strict=True)
        return super().prompt_table() | {f"vas/{name}": values for name, values in columns}

    def method_state(self):
        return super().method_state() | {"vas": {"known": self.vas_known, "refreshed": self.vas_refreshed}}

    def load_method_state(self, state):
        super().load_method_state(state)
        self.vas_known, self.vas_refreshed = state["vas"]["known"], state["vas"]["refreshed"]
