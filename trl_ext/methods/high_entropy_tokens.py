"""Training on high-entropy minority tokens only (Beyond the 80/20 Rule; Wang et al., arXiv 2506.01939)."""

import warnings
from dataclasses import dataclass, field

import torch

from ..core import MethodConfig, MethodTrainer, TokenBatch
from ..core.loss import PER_BATCH, ppo_clipped, renormalised_selection


@dataclass
class HighEntropyTokensConfig(MethodConfig):
    r"""
    Configuration of [`HighEntropyTokensTrainer`]. Defaults are those of the paper and its code, which build on DAPO;
    the code's normaliser is that of `loss_type="bnpo"`.

    Parameters:
        het_ratio (`float`, *optional*, defaults to `0.2`):
            Share of the tokens, those of highest entropy, that get a policy gradient; at least one token does.
        het_scope (`str`, *optional*, defaults to `"local"`):
            Where tokens compete: within the process's micro-batch, as in the authors' code, or within those of all
            processes (`"global"`).
        het_rule (`str`, *optional*, defaults to `"topk"`):
            `"topk"` selects exactly that many tokens, `"threshold"` also those that have the entropy of the last one.
        het_normalize (`str`, *optional*, defaults to `"selected"`):
            Whether the loss is divided by the `"selected"` tokens or, as in TRL, by `"all"`.
    """

    epsilon: float = field(default=0.2, metadata={"help": "Lower clip range."})
    epsilon_high: float | None = field(default=0.28, metadata={"help": "Upper clip range, DAPO's."})
    het_ratio: float = field(default=0.2, metadata={"help": "Share of the tokens that are trained on."})
    het_scope: str = field(
        default="local",
        metadata={
            "help": "Where tokens compete: the micro-batch, or those of all processes.",
            "choices": ["local", "global"],
        },
    )
    het_rule: str = field(
        default="topk",
        metadata={"help": "An exact number of tokens, or all above a threshold.", "choices": ["topk", "threshold"]},
    )
    het_normalize: str = field(
        default="selected",
        metadata={"help": "The tokens that the loss is divided by.", "choices": ["selected", "all"]},
    )

    def __post_init__(self):
        super().__post_init__()
        self.check_range("het_ratio", 0 < self.het_ratio <= 1, "in (0, 1]")
        self.check_choices("het_scope", "het_rule", "het_normalize")
        self.check_range("top_entropy_quantile", self.top_entropy_quantile == 1.0, "1.0, since `het_ratio` selects")


def high_entropy_mask(
    entropies: torch.Tensor, mask: torch.Tensor, ratio: float = 0.2, rule: str = "topk"
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    The `k = max(1, int(n * ratio + 0.9999))` of n unmasked tokens that have the highest entropy (Section 5 and the
    authors' code).

    Args:
        entropies (`torch.Tensor`), mask (`torch.Tensor`):
            Same shape, any; masked positions may hold anything.
        ratio (`float`, *optional*, defaults to `0.2`):
            Share of the tokens to select.
        rule (`str`, *optional*, defaults to `"topk"`):
            `"topk"` selects exactly k, among equal entropies the first in row-major order; `"threshold"` all whose
            entropy is at least the k-th highest.

    Returns:
        `tuple[torch.Tensor, torch.Tensor]`: the selection, boolean, of the same shape; and the k-th highest entropy,
        a scalar, NaN if no token is unmasked.
    """
    valid = mask.bool()
    selected = torch.zeros_like(valid)
    values = entropies.detach()[valid]
    if len(values) == 0:
        return selected, entropies.new_full((), torch.nan)
    count = max(1, int(len(values) * ratio + 0.9999))
    values, order = values.sort(descending=True, stable=True)
    threshold = values[count - 1]
    if rule == "threshold":
        return valid & (entropies.detach() >= threshold), threshold
    positions = valid.flatten().nonzero().squeeze(1)
    selected.view(-1)[positions[order[:count]]] = True
    return selected, threshold


class HighEntropyTokensTrainer(MethodTrainer):
    """
    High-entropy minority tokens, from Beyond the 80/20 Rule ([arXiv
    2506.01939](https://huggingface.co/papers/2506.01939)). Only the tokens at which the policy is least certain get a
    policy gradient, and the loss is their mean. For the paper's algorithm mix it with `dynamic_sampling`.

    TRL's `top_entropy_quantile` is another selection: it divides by all tokens, so the loss is about `het_ratio` times
    this one; its threshold is always that of all processes' micro-batches (here `het_scope="global"`); it keeps every
    token that ties with the threshold (`het_rule="threshold"`), which is interpolated, so it may keep one token less;
    and it refuses more than about 16 million tokens. So the two cannot be set together.

    Tokens compete in a micro-batch, hence the update depends on how a batch is split. Tokens of advantage 0 compete
    too. A KL term and an entropy bonus act on all tokens. With `loss_type="grpo"` a rollout without a selected token
    has the loss 0.

    Mixed methods with `token_weights` of their own (`clip_cov`) see the selected tokens only, as if there were no
    others; the covariances of `kl_cov`, which is a surrogate, are those of all tokens.

    Logs `high_entropy_tokens/kept` (share of the tokens), `high_entropy_tokens/threshold` (entropy in nats) and
    `high_entropy_tokens/clipped` (share of all tokens whose ratio is clipped, of which TRL's `clip_ratio/*` counts the
    kept ones).
    """

    config_class = HighEntropyTokensConfig
    runs_after = ("capo", "clip_cov")
    _name = "High-entropy tokens"
    _paper = {
        "title": "Beyond the 80/20 Rule: High-Entropy Minority Tokens Drive Effective Reinforcement Learning for LLM "
        "Reasoning",
        "id": "2506.01939",
        "citation": """\
@inproceedings{wang2025beyond,
    title     = {{Beyond the 80/20 Rule: High-Entropy Minority Tokens Drive Effective Reinforcement Learning for
                 LLM Reasoning}},
    author    = {Shenzhi Wang and Le Yu and Chang Gao and Chujie Zheng and Shixuan Liu and Rui Lu and others},
    booktitle = {Advances in Neural Information Processing Systems},
    year      = 2025,
    eprint    = {arXiv:2506.01939},
}""",
    }

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        if self.loss_type not in PER_BATCH:
            warnings.warn(
                f"`loss_type` is {self.loss_type!r}, but HighEntropyTokensTrainer is about the mean over the selected "
                "tokens of a batch: use 'bnpo', or 'dapo', which estimates it.",
                stacklevel=2,
            )

    def token_weights(self, tokens: TokenBatch):
        args, valid = self.args, tokens.mask.bool()
        entropies = tokens.entropies.detach()
        totals = None
        if args.het_scope == "local":
            selected, threshold = high_entropy_mask(entropies, valid, args.het_ratio, args.het_rule)
        else:
            everyone, _ = self.gather_flat(entropies[valid])
            keys, start = self.gather_flat(tokens.token_keys[valid])
            order = keys.argsort()  # ties must not depend on how the generation is split
            picked, threshold = high_entropy_mask(
                everyone[order], torch.ones_like(keys), args.het_ratio, args.het_rule
            )
            back = torch.empty_like(picked)
            back[order] = picked
            selected = torch.zeros_like(valid)
            selected[valid] = back[start : start + int(valid.sum())]
            processes = self.accelerator.num_processes
            # TRL divides by this process's tokens, or by the mean over processes.
            own = valid.sum() if self.loss_type == "bnpo" else torch.tensor(len(keys) / processes)
            totals = own, picked.sum() / processes
        if args.het_normalize == "selected":
            weights = renormalised_selection(selected, valid.to(entropies.dtype), self.loss_type, totals)
        else:
            weights = selected.to(entropies.dtype)
        one = torch.ones_like(threshold)
        self.log_token_metric("high_entropy_tokens/kept", selected.sum(), valid.sum())
        self.log_token_metric(
            "high_entropy_tokens/threshold", threshold.nan_to_num(), one.masked_fill(threshold.isnan(), 0.0)
        )
        clipped = ppo_clipped(tokens.log_ratio, tokens.advantages, tokens.ratio_low, tokens.ratio_high)
        self.log_token_metric("high_entropy_tokens/clipped", (clipped & valid).sum(), valid.sum())
        before = super().token_weights(tokens.replace(mask=selected.to(tokens.mask.dtype)))
        return weights if before is None else before * weights
