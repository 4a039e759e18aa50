"""TRL's surrogates and aggregations as pure functions, for methods that replace one of them and keep the other."""

import torch


PER_ROW = ("grpo", "sapo")  # TRL's losses that divide by the tokens of a rollout,
PER_BATCH = ("bnpo", "dapo", "cispo", "vespo")  # and by those of a batch


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


def ppo_clipped(
    log_ratio: torch.Tensor,
    advantages: torch.Tensor,
    ratio_low: "float | torch.Tensor | None",
    ratio_high: "float | torch.Tensor | None",
) -> torch.Tensor:
    """
    Tokens at which PPO's bound is active: the clipped term is strictly the larger loss.

    Args:
        log_ratio (`torch.Tensor`):
            Shape `(B, T)` or `(B, 1)`.
        advantages (`torch.Tensor`):
            Shape `(B, T)`.
        ratio_low (`float` or `torch.Tensor`), ratio_high (`float` or `torch.Tensor`):
            Bounds of the ratio; None = no bound, but not on both sides.

    Returns:
        `torch.Tensor`: Boolean, shape `(B, T)`.
    """
    ratio = log_ratio.detach().exp()
    return -advantages * ratio.clamp(ratio_low, ratio_high) > -advantages * ratio


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


def renormalised_selection(
    selection: torch.Tensor,
    mask: torch.Tensor,
    loss_type: str,
    totals: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> torch.Tensor:
    """
    Token weights that take the tokens which are not selected out of the loss and out of its normaliser: the selected
    ones weigh as much more as the normaliser of TRL's loss counts too many tokens. That is exact for `"grpo"` (per
    rollout) and `"bnpo"` (per micro-batch) and an estimate for `"dapo"`, whose normaliser spans a generation, of which
    a micro-batch knows its own share; `"dr_grpo"` counts no tokens. A rollout, or a micro-batch, without selected
    tokens adds nothing.

    Args:
        selection (`torch.Tensor`), mask (`torch.Tensor`):
            The selected tokens and all that enter the loss, shape `(B, T)`.
        loss_type (`str`):
            TRL's `loss_type`.
        totals (`tuple[torch.Tensor, torch.Tensor]`, *optional*):
            Number of all and of selected tokens to use for losses that divide by those of a batch, if they are not to
            be counted in this one.

    Returns:
        `torch.Tensor`: Shape `(B, T)`, of the mask's dtype if that is a floating one; 0 where nothing is selected.
    """
    mask = mask if mask.is_floating_point() else mask.float()
    kept = mask * selection
    if loss_type in PER_ROW:
        total, count = mask.sum(1, keepdim=True), kept.sum(1, keepdim=True)
    elif loss_type in PER_BATCH:
        total, count = (mask.sum(), kept.sum()) if totals is None else totals
    else:
        return kept
    return kept * (total / count.masked_fill(count == 0, 1))
