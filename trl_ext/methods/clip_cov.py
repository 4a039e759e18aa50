"""Clip-Cov (Cui et al., The Entropy Mechanism of Reinforcement Learning, arXiv 2505.22617)."""

from dataclasses import dataclass, field

import torch

from ..core import MethodConfig, MethodTrainer, TokenBatch
from ..core.loss import ppo_clipped
from ..core.prompts import make_generator


ENTROPY_MECHANISM = {
    "title": "The Entropy Mechanism of Reinforcement Learning for Reasoning Language Models",
    "id": "2505.22617",
    "citation": """\
@article{cui2025entropy,
    title  = {{The Entropy Mechanism of Reinforcement Learning for Reasoning Language Models}},
    author = {Ganqu Cui and Yuchen Zhang and Jiacheng Chen and Lifan Yuan and Zhi Wang and Yuxin Zuo and others},
    year   = 2025,
    eprint = {arXiv:2505.22617},
}""",
}


@dataclass
class ClipCovConfig(MethodConfig):
    r"""
    Configuration of [`ClipCovTrainer`]. Defaults are those of the paper and of its scripts.

    Parameters:
        clip_cov_ratio (`float`, *optional*, defaults to `2e-4`):
            Share of the tokens whose policy gradient is dropped, at least one token.
        clip_cov_low (`float`, *optional*, defaults to `1.0`), clip_cov_high (`float`, *optional*, defaults to `5.0`):
            A token is eligible if its covariance lies strictly between these bounds.
        clip_cov_scope (`str`, *optional*, defaults to `"micro_batch"`):
            Where means, counts and the draw are taken: over the process's micro-batch, as in the authors' code, or
            over the micro-batches of all processes (`"global"`).
        clip_cov_seed (`int`, *optional*):
            Seed of the draw; the run's seed if None.
    """

    epsilon: float = field(default=1.0, metadata={"help": "Lower clip range; the published runs open it to (0, 2)."})
    epsilon_high: float | None = field(default=1.0, metadata={"help": "Upper clip range; see `epsilon`."})
    clip_cov_ratio: float = field(default=2e-4, metadata={"help": "Share of tokens whose gradient is dropped."})
    clip_cov_low: float = field(default=1.0, metadata={"help": "Lower bound of an eligible token's covariance."})
    clip_cov_high: float = field(default=5.0, metadata={"help": "Upper bound of an eligible token's covariance."})
    clip_cov_scope: str = field(
        default="micro_batch",
        metadata={"help": "Where statistics are taken.", "choices": ["micro_batch", "global"]},
    )
    clip_cov_seed: int | None = field(default=None, metadata={"help": "Seed of the draw; None: the run's seed."})

    def __post_init__(self):
        super().__post_init__()
        self.check_range("clip_cov_ratio", 0 < self.clip_cov_ratio <= 1, "in (0, 1]")
        self.check_range("clip_cov_low", self.clip_cov_low > 0, "positive")
        self.check_range("clip_cov_high", self.clip_cov_high > self.clip_cov_low, "above clip_cov_low")
        self.check_choices("clip_cov_scope")


def token_covariance(
    logps: torch.Tensor, advantages: torch.Tensor, mask: torch.Tensor, sums: torch.Tensor | None = None
) -> torch.Tensor:
    """
    Centred product of log-probability and advantage of every token (Eq. 10).

    Args:
        logps (`torch.Tensor`), advantages (`torch.Tensor`), mask (`torch.Tensor`):
            Shape `(B, T)`; masked positions may hold anything.
        sums (`torch.Tensor`, *optional*):
            `covariance_sums` over a larger batch, if the means are to be taken there.

    Returns:
        `torch.Tensor`: Shape `(B, T)`, detached; 0 at masked positions.
    """
    count, logp_sum, advantage_sum = covariance_sums(logps, advantages, mask) if sums is None else sums
    product = (advantages - advantage_sum / count) * (logps.detach() - logp_sum / count)
    return torch.where(mask.bool(), product, 0.0)


def covariance_sums(logps: torch.Tensor, advantages: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Number of unmasked tokens, sum of their log-probabilities and of their advantages, shape `(3,)`."""
    valid = mask.bool()
    parts = (valid.to(logps.dtype), torch.where(valid, logps.detach(), 0.0), torch.where(valid, advantages, 0.0))
    return torch.stack([part.sum() for part in parts])


def clip_cov_eligible(
    cov: torch.Tensor, clipped: torch.Tensor, mask: torch.Tensor, low: float = 1.0, high: float = 5.0
) -> torch.Tensor:
    """
    Tokens that may be selected (Eq. 11, with the code's strict bounds): unmasked, not clipped by PPO, covariance
    between `low` and `high`.

    Args:
        cov (`torch.Tensor`), clipped (`torch.Tensor`), mask (`torch.Tensor`):
            Shape `(B, T)`.
        low (`float`, *optional*, defaults to `1.0`), high (`float`, *optional*, defaults to `5.0`):
            Bounds of the covariance.

    Returns:
        `torch.Tensor`: Boolean, shape `(B, T)`.
    """
    return mask.bool() & ~clipped & (cov > low) & (cov < high)


def clip_cov_draw(candidates: torch.Tensor, n_tokens: int, ratio: float, generator: torch.Generator) -> torch.Tensor:
    """
    Draw tokens uniformly without replacement: `max(int(ratio * n_tokens), 1)` of them, or all if there are fewer.

    Args:
        candidates (`torch.Tensor`):
            The eligible tokens, shape `(E,)`, in an order that does not depend on how the batch is split.
        n_tokens (`int`):
            Unmasked tokens of the batch.
        ratio (`float`):
            Share of them to select.
        generator (`torch.Generator`):
            Source of randomness, on the CPU.

    Returns:
        `torch.Tensor`: The selected tokens, shape `(at most E,)`.
    """
    count = max(int(ratio * n_tokens), 1)
    return candidates[torch.randperm(len(candidates), generator=generator)[:count].to(candidates.device)]


class ClipCovTrainer(MethodTrainer):
    """
    Clip-Cov, from The Entropy Mechanism of Reinforcement Learning for Reasoning Language Models ([arXiv
    2505.22617](https://huggingface.co/papers/2505.22617)). A few tokens whose log-probability and advantage are both
    far above, or both far below, their means get no policy gradient, so that entropy falls more slowly.

    Logs `clip_cov/selected`, `clip_cov/eligible` (shares of the tokens) and `clip_cov/covariance` (mean).
    """

    config_class = ClipCovConfig
    contradicts = {"kl_cov": "both act on the tokens of largest covariance, in opposite ways"}
    _name = "Clip-Cov"
    _paper = ENTROPY_MECHANISM

    def token_weights(self, tokens: TokenBatch):
        args, mask = self.args, tokens.mask
        is_global = args.clip_cov_scope == "global"
        sums = covariance_sums(tokens.logps, tokens.advantages, mask)
        if is_global:
            sums = self.accelerator.reduce(sums, reduction="sum")
        cov = token_covariance(tokens.logps, tokens.advantages, mask, sums)
        if tokens.ratio_low is None:  # CISPO never clips a token out
            clipped = torch.zeros_like(cov, dtype=torch.bool)
        else:
            clipped = ppo_clipped(tokens.log_ratio, tokens.advantages, tokens.ratio_low, tokens.ratio_high)
        eligible = clip_cov_eligible(cov, clipped, mask, args.clip_cov_low, args.clip_cov_high)
        candidates = tokens.token_keys[eligible]
        if is_global:
            candidates, _ = self.gather_flat(candidates)
        seed = args.seed if args.clip_cov_seed is None else args.clip_cov_seed
        process = 0 if is_global else self.accelerator.process_index
        generator = make_generator(seed, "clip_cov", tokens.micro_step, process)
        chosen = clip_cov_draw(candidates.sort().values, int(sums[0]), args.clip_cov_ratio, generator)
        selected = torch.isin(tokens.token_keys, chosen) & eligible
        count = mask.sum()
        self.log_token_metric("clip_cov/selected", selected.sum(), count)
        self.log_token_metric("clip_cov/eligible", eligible.sum(), count)
        self.log_token_metric("clip_cov/covariance", cov.sum(), count)
        weights, before = (~selected).to(tokens.logps.dtype), super().token_weights(tokens)
        return weights if before is None else before * weights
