"""Curvature-Aware Policy Optimization (CAPO; Melo, Abate, Gal, arXiv 2510.00819)."""

import warnings
from dataclasses import dataclass, field

import torch
from peft import PeftModel

from ..core import MethodConfig, MethodTrainer, TokenBatch
from ..core.loss import PER_BATCH, renormalised_selection


CHUNK = 2**24  # numbers in the largest tensor that is made at once


@dataclass
class CAPOConfig(MethodConfig):
    r"""
    Configuration of [`CAPOTrainer`]. Defaults are those of the authors' GRPO runs (for Dr. GRPO they set
    `loss_type="dr_grpo"`, `capo_tau_fisher=1e-3`, `capo_tau_hessian=5e-4`).

    Parameters:
        capo_tau_fisher (`float`, *optional*, defaults to `1e-4`):
            A token is dropped if it alone would move the policy by this much (in nats of KL divergence) or more; 0
            switches this off.
        capo_tau_hessian (`float`, *optional*, defaults to `0.01`):
            A token is dropped if it alone would move the objective by this much or more; 0 switches this off.
        capo_symmetric (`bool`, *optional*, defaults to `True`):
            Whether the objective may also fall, by less than `capo_tau_hessian`; False drops a token that would lower
            it.
        capo_optimizer (`str`, *optional*, defaults to `"adam"`):
            The optimizer whose step is predicted: `"adam"`, as in the published runs, keeps moments of its own for
            every vocabulary id that it meets, and takes its coefficients from the trainer's `adam_beta1`,
            `adam_beta2` and `adam_epsilon`; `"sgd"` keeps nothing.
        capo_top_k (`int`, *optional*):
            Number of most likely tokens to which the policy is reduced in the prediction. None stands for the `top_k`
            of the generation, or 50 if that is not set; 0 for the whole vocabulary (only with `"sgd"`).
    """

    loss_type: str = field(
        default="grpo", metadata={"help": "A mean over the accepted tokens of each completion, then over rollouts."}
    )
    capo_tau_fisher: float = field(default=1e-4, metadata={"help": "Largest shift of the policy; 0: any."})
    capo_tau_hessian: float = field(default=0.01, metadata={"help": "Largest shift of the objective; 0: any."})
    capo_symmetric: bool = field(default=True, metadata={"help": "Whether the objective may fall as much as rise."})
    capo_optimizer: str = field(
        default="adam", metadata={"help": "Whose step is predicted.", "choices": ["adam", "sgd"]}
    )
    capo_top_k: int | None = field(
        default=None,
        metadata={"help": "Most likely tokens in the prediction; None: `top_k` or 50; 0: the vocabulary (sgd)."},
    )

    def __post_init__(self):
        super().__post_init__()
        self.check_range("capo_tau_fisher", self.capo_tau_fisher >= 0, "at least 0")
        self.check_range("capo_tau_hessian", self.capo_tau_hessian >= 0, "at least 0")
        self.check_choices("capo_optimizer")
        least = 0 if self.capo_optimizer == "sgd" else 1
        self.check_range("capo_top_k", self.capo_top_k is None or self.capo_top_k >= least, f"at least {least}")


def softmax_errors(
    logits: torch.Tensor, token_ids: torch.Tensor, top_k: int = 0
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """
    The policy reduced to its most likely tokens, and the gradient of the log-probability with respect to the logits.

    Args:
        logits (`torch.Tensor`):
            Without temperature, shape `(N, V)`.
        token_ids (`torch.Tensor`):
            The sampled tokens, shape `(N,)`; one that is not among the most likely leaves its row without the one.
        top_k (`int`, *optional*, defaults to `0`):
            Number k of tokens; 0 for the whole vocabulary.

    Returns:
        `tuple[torch.Tensor, torch.Tensor, torch.Tensor]`: probabilities `pi`, errors `v = onehot - pi`, and vocabulary
        ids, shape `(N, k)`.
    """
    if top_k:
        logits, ids = logits.topk(top_k, dim=-1)
    else:
        ids = torch.arange(logits.shape[-1], device=logits.device).expand_as(logits)
    probs = logits.softmax(-1)
    return probs, (ids == token_ids.unsqueeze(-1)).to(probs) - probs, ids


def predicted_shifts(
    probs: torch.Tensor, errors: torch.Tensor, moves: torch.Tensor, advantages: torch.Tensor, lr: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Second-order prediction of what a step of the LM head on one token alone does (Eq. 7 to 10).

    Args:
        probs (`torch.Tensor`), errors (`torch.Tensor`):
            From [`softmax_errors`], shape `(N, k)`.
        moves (`torch.Tensor`):
            Change of the logits per unit of learning rate, `u = G h`, shape `(N, k)`.
        advantages (`torch.Tensor`):
            Shape `(N,)`.
        lr (`float`):
            Learning rate.

    Returns:
        `tuple[torch.Tensor, torch.Tensor]`: shift of the objective `m_H` and of the policy (in nats) `m_F`, shape
        `(N,)`.
    """
    slope = (errors * moves).sum(-1)  # so that <g, G> = A * slope
    spread = (probs * moves**2).sum(-1) - (probs * moves).sum(-1) ** 2
    return advantages * (lr * slope + lr**2 / 2 * (slope**2 - spread)), lr**2 / 2 * slope**2


def sgd_moves(errors: torch.Tensor, hidden: torch.Tensor, advantages: torch.Tensor) -> torch.Tensor:
    """
    Change of the logits by gradient ascent, where the rows of the head move along `g = A v h`: `u = A |h|^2 v`.

    Args:
        errors (`torch.Tensor`):
            From [`softmax_errors`], shape `(N, k)`.
        hidden (`torch.Tensor`):
            The hidden states that gave the logits, shape `(N, H)`.
        advantages (`torch.Tensor`):
            Shape `(N,)`.

    Returns:
        `torch.Tensor`: Shape `(N, k)`.
    """
    return (advantages * (hidden**2).sum(-1)).unsqueeze(-1) * errors


def accepted(
    objective: torch.Tensor,
    policy: torch.Tensor,
    tau_hessian: float = 0.01,
    tau_fisher: float = 1e-4,
    symmetric: bool = True,
) -> torch.Tensor:
    """
    Tokens whose predicted shifts are small enough; a bound of 0 is no bound.

    Args:
        objective (`torch.Tensor`), policy (`torch.Tensor`):
            From [`predicted_shifts`], same shape.
        tau_hessian (`float`, *optional*, defaults to `0.01`), tau_fisher (`float`, *optional*, defaults to `1e-4`):
            Bounds of the objective's and of the policy's shift, themselves excluded.
        symmetric (`bool`, *optional*, defaults to `True`):
            Whether the lower bound of the objective's shift is `-tau_hessian`, excluded, or 0, included.

    Returns:
        `torch.Tensor`: Boolean, same shape.
    """
    kept = torch.ones_like(policy, dtype=torch.bool)
    if tau_fisher:
        kept &= policy < tau_fisher
    if tau_hessian:
        kept &= (objective < tau_hessian) & (objective > -tau_hessian if symmetric else objective >= 0)
    return kept


class RowMoments:
    """
    Adam's moments of the LM head's rows, for the vocabulary ids met so far.

    Attributes:
        ids (`torch.Tensor`):
            Ascending, shape `(R,)`.
        mean (`torch.Tensor`), square (`torch.Tensor`):
            First and second moments, shape `(R, H)`.
        steps (`int`):
            Updates so far, common to all rows.
    """

    def __init__(self, beta1: float = 0.9, beta2: float = 0.999, eps: float = 1e-8):
        self.beta1, self.beta2, self.eps = beta1, beta2, eps
        self.ids = torch.zeros(0, dtype=torch.long)
        self.mean = self.square = torch.zeros(0, 0)
        self.steps = 0

    def moves(
        self, errors: torch.Tensor, hidden: torch.Tensor, advantages: torch.Tensor, ids: torch.Tensor
    ) -> torch.Tensor:
        """
        Like [`sgd_moves`], for Adam's step: each token's gradient enters a copy of the moments, an unknown row's being
        0. Without any known row the step is that of gradient ascent.

        Args:
            errors (`torch.Tensor`), hidden (`torch.Tensor`), advantages (`torch.Tensor`):
                Shape `(N, k)`, `(N, H)`, `(N,)`.
            ids (`torch.Tensor`):
                The rows, shape `(N, k)`.

        Returns:
            `torch.Tensor`: Shape `(N, k)`.
        """
        if len(self.ids) == 0:
            return sgd_moves(errors, hidden, advantages)
        rows = torch.searchsorted(self.ids, ids).clamp(max=len(self.ids) - 1)
        known = (self.ids[rows] == ids).unsqueeze(-1)
        gradient = (advantages.unsqueeze(-1) * errors).unsqueeze(-1) * hidden.unsqueeze(1)
        square = self.square[rows].masked_fill_(~known, 0.0).mul_(self.beta2)
        square.addcmul_(gradient, gradient, value=1 - self.beta2).div_(1 - self.beta2 ** (self.steps + 1))
        mean = self.mean[rows].masked_fill_(~known, 0.0).mul_(self.beta1).add_(gradient, alpha=1 - self.beta1)
        step = mean.div_(square.sqrt_().add_(self.eps))
        return torch.einsum("nkh,nh->nk", step, hidden) / (1 - self.beta1 ** (self.steps + 1))

    def update(self, ids: torch.Tensor, gradients: torch.Tensor | None) -> None:
        """
        Make a step, which counts even if no row has a gradient.

        Args:
            ids (`torch.Tensor`):
                The rows, ascending, shape `(r,)`; may be empty.
            gradients (`torch.Tensor`, *optional*):
                Their mean gradients, shape `(r, H)`; not needed if there are no rows.
        """
        self.steps += 1
        if len(ids) == 0:
            return
        known = self.ids.to(ids.device)
        merged = torch.cat([known, ids]).unique()
        if len(merged) > len(known):
            for name in ("mean", "square"):
                grown = gradients.new_zeros(len(merged), gradients.shape[1])
                if len(known):
                    grown[torch.searchsorted(merged, known)] = getattr(self, name)
                setattr(self, name, grown)
            self.ids = merged
        rows = torch.searchsorted(self.ids, ids)
        self.mean[rows] = self.mean[rows].mul_(self.beta1).add_(gradients, alpha=1 - self.beta1)
        square = self.square[rows].mul_(self.beta2)
        self.square[rows] = square.addcmul_(gradients, gradients, value=1 - self.beta2)


def row_gradient_sums(
    errors: torch.Tensor, hidden: torch.Tensor, advantages: torch.Tensor, ids: torch.Tensor, rows: torch.Tensor
) -> torch.Tensor:
    """
    Sum of the tokens' gradients of each row of the LM head.

    Args:
        errors (`torch.Tensor`), hidden (`torch.Tensor`), advantages (`torch.Tensor`), ids (`torch.Tensor`):
            Shape `(N, k)`, `(N, H)`, `(N,)`, `(N, k)`.
        rows (`torch.Tensor`):
            All ids that occur, ascending, shape `(R,)`.

    Returns:
        `torch.Tensor`: Shape `(R, H)`.
    """
    tokens = torch.arange(len(ids), device=ids.device).repeat_interleave(ids.shape[1])
    index = torch.stack([torch.searchsorted(rows, ids.flatten()), tokens])
    values = (advantages.unsqueeze(-1) * errors).flatten()
    # A sparse product, since one gradient per token and row would be (N, k, H).
    matrix = torch.sparse_coo_tensor(index, values, (len(rows), len(ids)), check_invariants=False)
    return torch.sparse.mm(matrix, hidden)


class CAPOTrainer(MethodTrainer):
    """
    Curvature-Aware Policy Optimization ([arXiv 2510.00819](https://huggingface.co/papers/2510.00819); other papers are
    called CAPO too). Tokens that, stepped on alone at the current learning rate, would move the objective or the
    policy too far leave the loss and its normaliser. The prediction is a second-order model of the LM head; the rest
    of the network is taken as fixed, tied embeddings included, and temperature plays no part.

    With `capo_optimizer="adam"` the model has moments of its own, which move once per micro-batch by the mean gradient
    of every row over its occurrences on all processes. So the update depends on how a batch is split, the moments of
    zero-advantage tokens' rows shrink, and such a token may be dropped for what the moments alone would do. Before the
    first update the step is that of gradient ascent. With `"sgd"` a token's fate depends on itself only.

    State: for `"adam"` the moments, two vectors of the hidden size for every vocabulary id met, in float32 (or the
    model's float64), the same on all processes.

    Mixed methods with `token_weights` of their own see the accepted tokens only.

    Logs `capo/kept` (share of the tokens), `capo/objective_shift` and `capo/policy_shift` (means of the predictions
    over all tokens).
    """

    config_class = CAPOConfig
    _name = "CAPO"
    _paper = {
        "title": "Stabilizing Policy Gradients for Sample-Efficient Reinforcement Learning in LLM Reasoning",
        "id": "2510.00819",
        "citation": """\
@inproceedings{melo2026stabilizing,
    title     = {{Stabilizing Policy Gradients for Sample-Efficient Reinforcement Learning in LLM Reasoning}},
    author    = {Luckeciano C. Melo and Alessandro Abate and Yarin Gal},
    booktitle = {International Conference on Learning Representations},
    year      = 2026,
    eprint    = {arXiv:2510.00819},
}""",
    }

    @classmethod
    def needs(cls, args):
        return {"hidden_states"}

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        args, head = self.args, self._causal_model.get_output_embeddings()
        config = self._causal_model.config.get_text_config()
        self.capo_size = size = config.vocab_size
        if args.capo_top_k is not None and args.capo_top_k > size:
            raise ValueError(
                f"`capo_top_k` is {args.capo_top_k}, but the vocabulary has {size} tokens: use at most as many."
            )
        self.capo_k = min(args.top_k or 50, size) if args.capo_top_k is None else args.capo_top_k
        row = self.capo_k * config.hidden_size if args.capo_optimizer == "adam" else 0
        self._capo_chunk = max(1, CHUNK // max(size, row))  # tokens looked at at once
        self.capo_rows = RowMoments(args.adam_beta1, args.adam_beta2, args.adam_epsilon)
        self.capo_seen = -1  # the last micro-batch that moved the moments
        if self.loss_type in PER_BATCH and self.loss_type != "bnpo":
            warnings.warn(
                f"`loss_type={self.loss_type!r}` divides by the tokens of the whole generation, counted before "
                "CAPOTrainer drops any, so every micro-batch corrects for its own share only: use 'grpo' or 'bnpo'.",
                stacklevel=2,
            )
        if isinstance(self.model, PeftModel) and not any(p.requires_grad for p in head.parameters()):
            warnings.warn(
                "CAPOTrainer predicts steps of the LM head, which `peft_config` leaves untrained, so its predictions "
                "are a proxy: add the head to `modules_to_save`, or tune `capo_tau_fisher` and `capo_tau_hessian`.",
                stacklevel=2,
            )

    def token_weights(self, tokens: TokenBatch):
        args, valid = self.args, tokens.mask.bool()
        lr = args.learning_rate if self.lr_scheduler is None else self.lr_scheduler.get_last_lr()[0]
        rows, columns = valid.nonzero(as_tuple=True)
        parts = zip(rows.split(self._capo_chunk), columns.split(self._capo_chunk), strict=True)
        objective, policy, *rest = map(
            torch.cat, zip(*(self._capo_predict(tokens, at, lr) for at in parts), strict=True)
        )
        keep = accepted(objective, policy, args.capo_tau_hessian, args.capo_tau_fisher, args.capo_symmetric)
        kept = torch.zeros_like(valid)
        kept[rows, columns] = keep
        # Once per micro-batch, whoever else may ask for its weights.
        if args.capo_optimizer == "adam" and tokens.training and tokens.micro_step > self.capo_seen:
            self.capo_seen = tokens.micro_step
            self._capo_update(tokens, (rows[keep], columns[keep]), *(part[keep] for part in rest))
        self.log_token_metric("capo/kept", keep.sum(), valid.sum())
        self.log_token_metric("capo/objective_shift", objective.sum(), valid.sum())
        self.log_token_metric("capo/policy_shift", policy.sum(), valid.sum())
        weights = renormalised_selection(kept, valid.to(tokens.logps.dtype), self.loss_type)
        before = super().token_weights(tokens.replace(mask=kept.to(tokens.mask.dtype)))
        return weights if before is None else before * weights

    @staticmethod
    def _capo_inputs(tokens: TokenBatch, at: tuple) -> tuple[torch.Tensor, torch.Tensor]:
        """Hidden states and advantages of some tokens, in at least single precision."""
        hidden = tokens.hidden_states[at]
        hidden = hidden.to(torch.promote_types(hidden.dtype, torch.float32))
        return hidden, tokens.advantages[at].to(hidden)

    def _capo_predict(self, tokens: TokenBatch, at: tuple, lr: float) -> tuple[torch.Tensor, ...]:
        hidden, advantages = self._capo_inputs(tokens, at)
        logits = self.head_logits(tokens.hidden_states[at]).to(hidden)
        probs, errors, ids = softmax_errors(logits, tokens.token_ids[at], self.capo_k)
        if self.args.capo_optimizer == "sgd":
            return predicted_shifts(probs, errors, sgd_moves(errors, hidden, advantages), advantages, lr)
        moves = self.capo_rows.moves(errors, hidden, advantages, ids)
        return *predicted_shifts(probs, errors, moves, advantages, lr), errors, ids

    def _capo_update(self, tokens: TokenBatch, at: tuple, errors: torch.Tensor, ids: torch.Tensor) -> None:
        """Move the rows' moments by the mean gradients of the accepted tokens of all processes."""
        counts = torch.bincount(ids.flatten(), minlength=self.capo_size)
        counts = self.accelerator.reduce(counts, reduction="sum")  # which tells every process all the rows
        rows = counts.nonzero().squeeze(1)
        gradients = None
        if len(rows):
            sums = row_gradient_sums(errors, *self._capo_inputs(tokens, at), ids, rows)
            gradients = self.accelerator.reduce(sums, reduction="sum").div_(counts[rows].unsqueeze(1))
        self.capo_rows.update(rows, gradients)

    def method_state(self):
        moments = self.capo_rows
        tensors = {name: getattr(moments, name).cpu() for name in ("ids", "mean", "square")}
        return super().method_state() | {"capo": {"steps": moments.steps, **tensors}}

    def load_method_state(self, state):
        super().load_method_state(state)
        self.capo_rows.steps = state["capo"]["steps"]
        for name in ("ids", "mean", "square"):
            setattr(self.capo_rows, name, state["capo"][name].to(self.accelerator.device))
