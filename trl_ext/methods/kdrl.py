"""Knowledge Distillation and Reinforcement Learning unified (KDRL, arXiv 2506.02208)."""

import warnings
from dataclasses import dataclass, field

import torch
from peft import PeftModel
from transformers import AutoTokenizer

from ..core import MethodConfig, MethodTrainer, Rollouts, TokenBatch
from ..core.rollouts import nonzero
from ..core.trainer import strictly_on_policy


@dataclass
class KDRLConfig(MethodConfig):
    r"""
    Configuration of [`KDRLTrainer`]. The schedule is that of the paper's annealed runs.

    Parameters:
        kd_teacher (`str`, *optional*):
            Path or Hub id of the teacher, which must have the policy's vocabulary; `"base"` is the policy with its
            LoRA adapter switched off.
        kd_estimator (`str`, *optional*, defaults to `"k2"`):
            Estimator of the divergence: `"k2"`, whose gradient is that of the reverse KL divergence, or `"k3"`.
        kd_beta_init (`float`, *optional*, defaults to `5e-3`), kd_beta_min (`float`, *optional*, defaults to `1e-3`),
            kd_beta_decay (`float`, *optional*, defaults to `5e-5`):
            Coefficient of the distillation term at the start, at least, and its decrease per optimizer step.
        kd_mask (`str`, *optional*, defaults to `"none"`):
            Distil on all answers (`"none"`), on wrong ones (`"response"`), or in groups without a correct one
            (`"group"`).
        kd_mask_norm (`str`, *optional*, defaults to `"all"`):
            Divide by all tokens, or by those of the answers that are distilled on (`"kept"`).
        kd_correct_reward (`str`, *optional*):
            Reward function that tells correct answers (a reward of at least 1); the first one by default.
    """

    kd_teacher: str | None = field(default=None, metadata={"help": "Path or Hub id of the teacher, or 'base'."})
    kd_estimator: str = field(default="k2", metadata={"help": "Estimator of the divergence.", "choices": ["k2", "k3"]})
    kd_beta_init: float = field(default=5e-3, metadata={"help": "Coefficient at the start."})
    kd_beta_min: float = field(default=1e-3, metadata={"help": "Least coefficient."})
    kd_beta_decay: float = field(default=5e-5, metadata={"help": "Decrease of the coefficient per step."})
    kd_mask: str = field(
        default="none", metadata={"help": "Which answers to distil on.", "choices": ["none", "response", "group"]}
    )
    kd_mask_norm: str = field(default="all", metadata={"help": "Tokens to divide by.", "choices": ["all", "kept"]})
    kd_correct_reward: str | None = field(
        default=None, metadata={"help": "Reward function that tells correct answers; None: the first."}
    )

    def __post_init__(self):
        super().__post_init__()
        self.check_choices("kd_estimator", "kd_mask", "kd_mask_norm")
        self.check_range("kd_beta_init", self.kd_beta_init >= 0, "at least 0")
        self.check_range("kd_beta_min", 0 <= self.kd_beta_min <= self.kd_beta_init, "in [0, kd_beta_init]")
        self.check_range("kd_beta_decay", self.kd_beta_decay >= 0, "at least 0")


def kd_divergence(logps: torch.Tensor, teacher_logps: torch.Tensor, estimator: str = "k2") -> torch.Tensor:
    """
    Divergence from the teacher at each sampled token, from R = teacher - student log-probability: k2 = R^2 / 2,
    k3 = exp(R) - R - 1.

    Args:
        logps (`torch.Tensor`):
            With gradient, shape `(B, T)`.
        teacher_logps (`torch.Tensor`):
            Shape `(B, T)`; clamped to at least -30.
        estimator (`str`, *optional*, defaults to `"k2"`):
            `"k2"` or `"k3"`.

    Returns:
        `torch.Tensor`: Shape `(B, T)`.
    """
    gap = teacher_logps.clamp(min=-30) - logps
    if estimator == "k2":
        return gap**2 / 2
    gap = gap.clamp(-20, 20)
    return gap.exp() - gap - 1


def kd_loss(
    logps: torch.Tensor,
    teacher_logps: torch.Tensor,
    mask: torch.Tensor,
    keep: torch.Tensor,
    estimator: str = "k2",
    count: "torch.Tensor | None" = None,
) -> torch.Tensor:
    """
    Distillation term: the divergence at the tokens of kept answers, over all tokens.

    Args:
        logps (`torch.Tensor`), teacher_logps (`torch.Tensor`), mask (`torch.Tensor`):
            Shape `(B, T)`; masked positions may hold anything.
        keep (`torch.Tensor`):
            Answers to distil on, boolean, shape `(B,)`.
        estimator (`str`, *optional*, defaults to `"k2"`):
            `"k2"` or `"k3"`.
        count (`torch.Tensor`, *optional*):
            Tokens to divide by; by default all unmasked ones.

    Returns:
        `torch.Tensor`: Scalar; 0, connected to the graph, if nothing is kept.
    """
    valid = mask.bool()
    teacher_logps = torch.where(valid, teacher_logps, 0.0)
    terms = kd_divergence(torch.where(valid, logps, 0.0), teacher_logps, estimator)
    if count is None:
        count = valid.sum()
    return torch.where(valid & keep.unsqueeze(1), terms, 0.0).sum() / nonzero(count)


def kd_keep(correct: torch.Tensor, group_ids: torch.Tensor, mask: str = "none") -> torch.Tensor:
    """
    Answers to distil on.

    Args:
        correct (`torch.Tensor`):
            Boolean, shape `(N,)`.
        group_ids (`torch.Tensor`):
            Shape `(N,)`.
        mask (`str`, *optional*, defaults to `"none"`):
            `"none"`: all; `"response"`: wrong ones; `"group"`: those of groups without a correct one.

    Returns:
        `torch.Tensor`: Boolean, shape `(N,)`.
    """
    if mask == "none":
        return torch.ones_like(correct)
    if mask == "response":
        return ~correct
    return ~torch.isin(group_ids, group_ids[correct])


def kd_beta(step: int, init: float = 5e-3, least: float = 1e-3, decay: float = 5e-5) -> float:
    """Coefficient at an optimizer step: `max(init - decay * step, least)`."""
    return max(init - decay * step, least)


class KDRLTrainer(MethodTrainer):
    """
    KDRL: Post-Training Reasoning LLMs via Unified Knowledge Distillation and Reinforcement Learning ([arXiv
    2506.02208](https://huggingface.co/papers/2506.02208)). The policy is also pulled towards a frozen teacher at the
    tokens it samples itself.

    Costs one forward pass of the teacher per generation and the teacher's memory (none for `kd_teacher="base"`).

    End-of-sequence tokens are left out of the term where the teacher's tokenizer has another one.

    Logs `kd/loss` (times its coefficient), `kd/beta`, `kd/kept` (share of the answers), `kd/clamped` (share of the
    tokens that the teacher finds all but impossible) and, with k3, `kd/far` (share of the tokens whose log-ratio was
    cut to 20).
    """

    config_class = KDRLConfig
    _kd_left_out: torch.Tensor | None = None  # end-of-sequence tokens that the teacher does not share
    _name = "KDRL"
    _paper = {
        "title": "KDRL: Post-Training Reasoning LLMs via Unified Knowledge Distillation and Reinforcement Learning",
        "id": "2506.02208",
        "citation": """\
@article{xu2025kdrl,
    title  = {{KDRL: Post-Training Reasoning LLMs via Unified Knowledge Distillation and Reinforcement Learning}},
    author = {Hongling Xu and others},
    year   = 2025,
    eprint = {arXiv:2506.02208},
}""",
    }

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        args = self.args
        self.kd_column = self.reward_column("kd_correct_reward")
        if args.kd_teacher is None:
            raise ValueError("`kd_teacher` must be given: a path, a Hub id, or 'base' (the policy without LoRA).")
        if args.beta != 0.0:
            warnings.warn(
                f"`beta` is {args.beta}: KDRL replaces the KL term to the initial policy by one to the teacher; "
                "leave `beta` at 0 for the paper's objective.",
                stacklevel=2,
            )
        if not strictly_on_policy(args):
            warnings.warn(
                "KDRL is defined for strictly on-policy updates, where clipping never acts; with these settings "
                "(`num_iterations`, `steps_per_generation`) its policy term is TRL's clipped one.",
                stacklevel=2,
            )
        if args.kd_teacher == "base":
            self.kd_teacher = None
            if not isinstance(self.accelerator.unwrap_model(self.model), PeftModel):
                raise ValueError(
                    "`kd_teacher` is 'base', but the policy has no LoRA adapter to switch off: give a path."
                )
            return
        try:
            tokenizer = AutoTokenizer.from_pretrained(args.kd_teacher)
        except OSError as error:
            raise ValueError(
                f"`kd_teacher` {args.kd_teacher!r} is neither a model's directory nor a model that the Hub gives us: "
                "correct it."
            ) from error
        if tokenizer.get_vocab() != self._tokenizer.get_vocab():
            raise ValueError(
                f"`kd_teacher` {args.kd_teacher!r} has another vocabulary ({len(tokenizer)} tokens) than the policy "
                f"({len(self._tokenizer.get_vocab())}): distillation compares token by token, so choose a teacher of "
                "the same family."
            )
        self.kd_teacher = self.load_frozen_model(args.kd_teacher)
        # A base model and its chat model end an answer differently: the teacher must not punish the policy's way.
        if tokenizer.eos_token_id != self._tokenizer.eos_token_id:
            self._kd_left_out = torch.tensor(self.eos_token_ids, device=self.accelerator.device)

    def _kd_mask(self, mask: torch.Tensor, token_ids: torch.Tensor) -> torch.Tensor:
        return mask if self._kd_left_out is None else mask * ~torch.isin(token_ids, self._kd_left_out)

    def carry(self, rollouts: Rollouts):
        correct = rollouts.reward_matrix[:, self.kd_column] >= 1  # not so if unscored
        keep = kd_keep(correct, rollouts.group_ids, self.args.kd_mask)
        logps = self.frozen_logps(rollouts, self.kd_teacher)
        mask = self._kd_mask(rollouts.mask, rollouts.completion_ids)
        kept = keep if rollouts.selected is None else keep & rollouts.selected
        sums = [mask.sum(), (mask * kept[rollouts.local].unsqueeze(1)).sum(), (mask * (logps < -30)).sum()]
        all_tokens, kept_tokens, clamped = self.accelerator.reduce(torch.stack(sums).float(), reduction="sum")
        self.log_metric("kd/kept", keep.float().mean())
        self.log_metric("kd/clamped", clamped / all_tokens.clamp(min=1))
        return super().carry(rollouts) | {
            "kd/teacher_logps": logps,
            "kd/keep": keep[rollouts.local],
            "kd/tokens": kept_tokens,
        }

    def regularizers(self, tokens: TokenBatch):
        args, carried = self.args, tokens.carried
        count = tokens.items if args.kd_mask_norm == "all" else tokens.share(carried["kd/tokens"])
        mask, logps = self._kd_mask(tokens.mask, tokens.token_ids), carried["kd/teacher_logps"]
        value = kd_loss(tokens.logps, logps, mask, carried["kd/keep"], args.kd_estimator, count)
        if args.kd_estimator == "k3":
            far = (logps.clamp(min=-30) - tokens.logps.detach()).abs() > 20
            self.log_token_metric("kd/far", (far * mask).sum(), mask.sum())
        beta = kd_beta(tokens.step, args.kd_beta_init, args.kd_beta_min, args.kd_beta_decay)
        self.log_metric("kd/beta", beta)
        return super().regularizers(tokens) | {"kd/loss": beta * value}
