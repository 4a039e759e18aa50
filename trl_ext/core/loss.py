"""TRL's surrogates and aggregations as pure functions, for methods that replace one of them and keep the other."""

import torch


def clipped_loss(
    log_ratio: torch.Tensor,
    advantages: torch.Tensor,
    ratio_low: "float | torch.Tensor",
    ratio_high: "float | torch.Tensor",
    delta: float | None = None,
) -> torch.Tensor:
    """
    PPO's clipped surrogate (arXiv 1707.06347), optionally with an upper bound for negative advantages (INTELLECT-2,
    arXiv 2505.07291).

    Args:
        log_ratio (`torch.Tensor`):
            Log importance ratio, shape `(B, T)`, or `(B, 1)` per sequence.
        advantages (`torch.Tensor`):
            Shape `(B, T)`.
        ratio_low (`float` or `torch.Tensor`), ratio_high (`float` or `torch.Tensor`):
            Bounds of the ratio.
        delta (`float`, *optional*):
            Upper bound of the unclipped ratio.

    Returns:
        `torch.Tensor`: Loss per token, shape `(B, T)`.
    """
    ratio = torch.exp(log_ratio)
    clipped = torch.clamp(ratio, ratio_low, ratio_high)
    if delta is not None:
        ratio = torch.clamp(ratio, max=delta)
    return -torch.min(ratio * advantages, clipped * advantages)


def cispo_loss(
    log_ratio: torch.Tensor, advantages: torch.Tensor, logps: torch.Tensor, ratio_high: "float | torch.Tensor"
) -> torch.Tensor:
    """
    CISPO's surrogate (MiniMax-M1, arXiv 2506.13585): REINFORCE with a capped, detached ratio. Arguments and result as
    in [`clipped_loss`], and `logps` the log-probabilities with gradient, shape `(B, T)`.
    """
    return -torch.clamp(torch.exp(log_ratio), max=ratio_high).detach() * advantages * logps


def sapo_loss(
    log_ratio: torch.Tensor, advantages: torch.Tensor, temperature_pos: float, temperature_neg: float
) -> torch.Tensor:
    """
    SAPO's surrogate (arXiv 2511.20347): a sigmoid gate of the ratio, one temperature per sign of the advantage.
    Arguments and result as in [`clipped_loss`].
    """
    temperature = torch.where(advantages > 0, temperature_pos, temperature_neg)
    return -torch.sigmoid(temperature * (torch.exp(log_ratio) - 1)) * 4 / temperature * advantages


def sequence_log_ratio(log_ratio: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """
    GSPO's log ratio (arXiv 2507.18071): the mean over the tokens of each sequence.

    Args:
        log_ratio (`torch.Tensor`):
            Per token, shape `(B, T)`.
        mask (`torch.Tensor`):
            Shape `(B, T)`.

    Returns:
        `torch.Tensor`: Shape `(B, 1)`.
    """
    return ((log_ratio * mask).sum(-1) / mask.sum(-1).clamp(min=1.0)).unsqueeze(-1)


def aggregate(
    per_token_loss: torch.Tensor,
    mask: torch.Tensor,
    loss_type: str,
    items: "torch.Tensor | float",
    rows: float,
    max_completion_length: int,
) -> torch.Tensor:
    """
    TRL's reductions of a micro-batch to a scalar, before the division by the accumulation steps.

    Args:
        per_token_loss (`torch.Tensor`):
            Shape `(B, T)`, or `(B, 1)` per sequence.
        mask (`torch.Tensor`):
            Shape `(B, T)`.
        loss_type (`str`):
            TRL's `loss_type`.
        items (`torch.Tensor` or `float`):
            Tokens of an average micro-batch of the generation (the divisor of `dapo`, `cispo` and `vespo`).
        rows (`float`):
            Rollouts of an average micro-batch (the divisor of `grpo`, `sapo`, `dr_grpo` and `luspo`).
        max_completion_length (`int`):
            The divisor of `dr_grpo`.

    Returns:
        `torch.Tensor`: Scalar.

    Raises:
        ValueError: for an unknown `loss_type`.
    """
    masked = per_token_loss * mask
    if loss_type in ("grpo", "sapo"):
        return (masked.sum(-1) / mask.sum(-1).clamp(min=1.0)).sum() / rows
    if loss_type == "bnpo":
        return masked.sum() / mask.sum().clamp(min=1.0)
    if loss_type == "dr_grpo":
        return masked.sum() / (rows * max_completion_length)
    if loss_type in ("dapo", "cispo", "vespo"):
        return masked.sum() / items
    if loss_type == "luspo":
        return masked.sum() / rows
    raise ValueError(f"Unknown `loss_type` {loss_type!r}.")
