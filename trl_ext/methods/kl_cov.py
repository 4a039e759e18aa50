"""KL-Cov (Cui et al., The Entropy Mechanism of Reinforcement Learning, arXiv 2505.22617)."""

from dataclasses import dataclass, field

import torch
from accelerate.utils import gather

from ..core import MethodConfig, MethodTrainer, TokenBatch
from .clip_cov import ENTROPY_MECHANISM, covariance_sums, token_covariance


@dataclass
class KLCovConfig(MethodConfig):
    r"""
    Configuration of [`KLCovTrainer`]. Defaults are those of the paper's 7B runs.

    Parameters:
        kl_cov_ratio (`float`, *optional*, defaults to `2e-3`):
            Share of the tokens that are penalised, at least one token. The paper uses 2e-3 at 7B and 2e-4 at 32B.
        kl_cov_coef (`float`, *optional*, defaults to `1.0`):
            Coefficient of the penalty.
        kl_cov_scope (`str`, *optional*, defaults to `"micro_batch"`):
            Where means and the largest covariances are taken: over the process's micro-batch, as in the authors'
            code, or over the micro-batches of all processes (`"global"`).
    """

    kl_cov_ratio: float = field(default=2e-3, metadata={"help": "Share of the tokens that are penalised."})
    kl_cov_coef: float = field(default=1.0, metadata={"help": "Coefficient of the penalty."})
    kl_cov_scope: str = field(
        default="micro_batch",
        metadata={"help": "Where statistics are taken.", "choices": ["micro_batch", "global"]},
    )

    def __post_init__(self):
        super().__post_init__()
        self.check_range("kl_cov_ratio", 0 < self.kl_cov_ratio <= 1, "in (0, 1]")
        self.check_range("kl_cov_coef", self.kl_cov_coef >= 0, "at least 0")
        self.check_choices("kl_cov_scope")


def kl_cov_selection(cov: torch.Tensor, mask: torch.Tensor, ratio: float) -> torch.Tensor:
    """
    The `max(1, int(ratio * n))` unmasked tokens of largest covariance (Eq. 13); at a tie the earlier in row-major
    order.

    Args:
        cov (`torch.Tensor`), mask (`torch.Tensor`):
            Same shape, any.
        ratio (`float`):
            Share of the n unmasked tokens to select.

    Returns:
        `torch.Tensor`: Boolean, same shape.
    """
    valid = mask.bool()
    selected = torch.zeros_like(valid)
    n_tokens = int(valid.sum())
    count = min(max(1, int(ratio * n_tokens)), n_tokens)
    order = cov.masked_fill(~valid, -torch.inf).flatten().argsort(descending=True, stable=True)
    selected.view(-1)[order[:count]] = True
    return selected


def kl_cov_loss(
    log_ratio: torch.Tensor, advantages: torch.Tensor, selected: torch.Tensor, coef: float = 1.0
) -> torch.Tensor:
    """
    The unclipped importance-weighted loss, plus the absolute log-ratio at the selected tokens (Eq. 14, Listing 1).

    Args:
        log_ratio (`torch.Tensor`):
            Per token, with gradient, shape `(B, T)`.
        advantages (`torch.Tensor`), selected (`torch.Tensor`):
            Shape `(B, T)`.
        coef (`float`, *optional*, defaults to `1.0`):
            Coefficient of the penalty.

    Returns:
        `torch.Tensor`: Loss per token, shape `(B, T)`.
    """
    return -advantages * log_ratio.exp() + coef * torch.where(selected, log_ratio.abs(), 0.0)


class KLCovTrainer(MethodTrainer):
    """
    KL-Cov, from The Entropy Mechanism of Reinforcement Learning for Reasoning Language Models ([arXiv
    2505.22617](https://huggingface.co/papers/2505.22617)). The ratio is not clipped; the tokens whose log-probability
    and advantage vary together the most pay for moving away from the policy that generated them.

    Logs `kl_cov/selected` (share of the tokens), `kl_cov/penalty` (mean absolute log-ratio of the selected ones),
    `kl_cov/abs_log_ratio` (of all) and `kl_cov/max_ratio`.
    """

    config_class = KLCovConfig
    replaces = ("policy_loss",)
    ignores = ("clip_range",)
    contradicts = {"clip_cov": "both act on the tokens of largest covariance, in opposite ways"}
    needs_off_policy = "has no effect beyond unclipped GRPO, because the log-ratio is 0,"
    _name = "KL-Cov"
    _paper = ENTROPY_MECHANISM

    def __init__(self, model, reward_funcs=None, args=None, *more, **kwargs):
        if args is not None and args.importance_sampling_level == "sequence":
            raise ValueError(
                "`importance_sampling_level` is 'sequence', but KL-Cov's penalty is defined per token: use 'token'."
            )
        super().__init__(model, reward_funcs, args, *more, **kwargs)

    def policy_loss(self, tokens: TokenBatch):
        args, mask = self.args, tokens.mask
        is_global = args.kl_cov_scope == "global"
        sums = covariance_sums(tokens.logps, tokens.advantages, mask)
        if is_global:
            sums = self.accelerator.reduce(sums, reduction="sum")
        cov = token_covariance(tokens.logps, tokens.advantages, mask, sums)
        valid = mask.bool()
        values, keys = cov[valid], tokens.token_keys[valid]
        if is_global:
            (values, _), (keys, _) = self.gather_flat(values), self.gather_flat(keys)
        order = keys.argsort()  # ties must not depend on how the batch is split
        picked = kl_cov_selection(values[order], torch.ones_like(keys), args.kl_cov_ratio)
        selected = torch.isin(tokens.token_keys, keys[order][picked]) & valid
        size = tokens.log_ratio.detach().abs()
        self.log_token_metric("kl_cov/selected", selected.sum(), mask.sum())
        self.log_token_metric("kl_cov/penalty", (size * selected).sum(), selected.sum())
        self.log_token_metric("kl_cov/abs_log_ratio", (size * mask).sum(), mask.sum())
        largest = torch.where(mask.bool(), tokens.log_ratio.detach(), -torch.inf).max()
        self.log_metric("kl_cov/max_ratio", gather(largest).max().exp())
        return kl_cov_loss(tokens.log_ratio, tokens.advantages, selected, args.kl_cov_coef)
