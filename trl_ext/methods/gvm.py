"""Gradient Variance Minimisation (GVM for RAFT and GRPO; arXiv 2505.02391)."""

import warnings
from dataclasses import dataclass, field

import torch

from ..core import MethodConfig, MethodTrainer, Rollouts, TokenBatch
from ..core.mixing import methods_of
from ..core.rollouts import Sample


@dataclass
class GVMConfig(MethodConfig):
    r"""
    Configuration of [`GVMTrainer`]. Defaults are those of the authors' code; the paper's values could not be verified.

    Parameters:
        gvm_alpha (`float`, *optional*, defaults to `1e-3`), gvm_beta (`float`, *optional*, defaults to `2.0`):
            Strength and power of the penalty on prompts that are hardly ever solved.
        gvm_presamples (`int`, *optional*, defaults to `8`):
            Rollouts per prompt that estimate its acceptance rate and gradient norm; they are not trained on.
        gvm_max_accept (`float`, *optional*, defaults to `1.0`):
            Acceptance rate above which prompts get nothing; 0 switches the filter off.
        gvm_min_expected (`float`, *optional*, defaults to `0.0`):
            Accepted rollouts that a prompt must lead one to expect.
        gvm_grad_params (`str`, *optional*, defaults to `"embed_tokens"`):
            Part of the name of the parameter whose gradient norm is taken, the first that has it; None takes all norms
            as 1, which needs no backward passes (ours).
        gvm_update_steps (`int`, *optional*, defaults to `9`):
            Generations after which an estimate is made anew when its prompt is drawn again.
        gvm_min_rollouts (`int`, *optional*):
            Least rollouts of a prompt that gets any (ours); by default 2, or 1 with `gvm_loss="raft"`.
        gvm_loss (`str`, *optional*, defaults to `"grpo"`):
            `"grpo"`, or `"raft"`: the rewards of accepted rollouts are their advantages, without a baseline.
        gvm_prompt_weights (`bool`, *optional*):
            Whether every prompt has the same weight in the loss however many rollouts it has, as in the paper's
            algorithm; by default so with `"raft"`, and not with `"grpo"`, as in the code.
        gvm_success_threshold (`float`, *optional*, defaults to `0.5`):
            (Weighted sum of) rewards above which a rollout is accepted.
    """

    gvm_alpha: float = field(default=1e-3, metadata={"help": "Strength of the penalty on unsolved prompts."})
    gvm_beta: float = field(default=2.0, metadata={"help": "Power of that penalty."})
    gvm_presamples: int = field(default=8, metadata={"help": "Rollouts per prompt for its estimate."})
    gvm_max_accept: float = field(default=1.0, metadata={"help": "Largest acceptance rate that gets rollouts."})
    gvm_min_expected: float = field(default=0.0, metadata={"help": "Least accepted rollouts to be expected."})
    gvm_grad_params: str | None = field(
        default="embed_tokens", metadata={"help": "Parameter whose gradient norm counts; None: all norms are 1."}
    )
    gvm_update_steps: int = field(default=9, metadata={"help": "Generations that an estimate is good for."})
    gvm_min_rollouts: int | None = field(default=None, metadata={"help": "Least rollouts of a prompt, if any."})
    gvm_loss: str = field(default="grpo", metadata={"help": "Advantages.", "choices": ["grpo", "raft"]})
    gvm_prompt_weights: bool | None = field(default=None, metadata={"help": "Weigh prompts alike in the loss."})
    gvm_success_threshold: float = field(default=0.5, metadata={"help": "Reward above which a rollout is accepted."})

    def __post_init__(self):
        super().__post_init__()
        least = self.gvm_min_rollouts
        self.check_range("gvm_alpha", self.gvm_alpha >= 0, "at least 0")
        self.check_range("gvm_beta", self.gvm_beta > 0, "positive")
        self.check_range("gvm_presamples", self.gvm_presamples >= 1, "at least 1")
        self.check_range("gvm_max_accept", 0 <= self.gvm_max_accept <= 1, "in [0, 1]")
        self.check_range("gvm_min_expected", self.gvm_min_expected >= 0, "at least 0")
        self.check_range("gvm_grad_params", self.gvm_grad_params != "", "part of a parameter's name, or None")
        self.check_range("gvm_update_steps", self.gvm_update_steps >= 1, "at least 1")
        self.check_range("gvm_min_rollouts", least is None or least >= 1, "at least 1, or None")
        self.check_choices("gvm_loss")


def gvm_ratios(
    rates: torch.Tensor,
    norms: torch.Tensor,
    total: int,
    alpha: float = 1e-3,
    beta: float = 2.0,
    max_accept: float = 1.0,
    min_expected: float = 0.0,
) -> torch.Tensor:
    """
    Shares of the budget that minimise the variance of the averaged gradient: in proportion to the gradient norm over
    the root of the acceptance rate, with a penalty on small rates.

    Args:
        rates (`torch.Tensor`):
            Acceptance rate of each prompt, shape `(M,)`.
        norms (`torch.Tensor`):
            Mean gradient norm of its accepted rollouts, shape `(M,)`.
        total (`int`):
            Rollouts to deal.
        alpha (`float`, *optional*, defaults to `1e-3`), beta (`float`, *optional*, defaults to `2.0`):
            Penalty: alpha / rate^(beta - 1) is added to the rate.
        max_accept (`float`, *optional*, defaults to `1.0`), min_expected (`float`, *optional*, defaults to `0.0`):
            Filters, see [`GVMConfig`]; ignored where they would leave nothing.

    Returns:
        `torch.Tensor`: Shape `(M,)`, with the sum 1; equal shares if no prompt has an accepted rollout.
    """
    rates, norms = rates.double(), norms.double()
    usable = (rates > 0) & (norms > 0)
    safe = torch.where(usable, rates, 1.0)
    scores = torch.where(usable, norms / (safe + alpha / safe ** (beta - 1)).sqrt(), 0.0)
    if not usable.any():
        return torch.full_like(rates, 1 / len(rates))
    ratios = scores / scores.sum()
    kept = torch.ones_like(usable)
    if max_accept > 0:
        kept &= rates <= max_accept
    if min_expected > 0:
        kept &= rates * ratios * total >= min_expected
    filtered = ratios * kept
    return filtered / filtered.sum() if filtered.any() else ratios


def gvm_budgets(ratios: torch.Tensor, total: int, min_rollouts: int = 1) -> torch.Tensor:
    """
    Whole numbers of rollouts with a given sum.

    Args:
        ratios (`torch.Tensor`):
            Shares with the sum 1, shape `(M,)`.
        total (`int`):
            Sum of the result.
        min_rollouts (`int`, *optional*, defaults to `1`):
            Prompts with fewer get none, the one with the fewest first, and their share goes to the others.

    Returns:
        `torch.Tensor`: Shape `(M,)`, integers.
    """
    ratios = ratios.double().clone()
    while True:
        expected = ratios * total
        budgets = expected.round()  # half to even
        missing = int(total - budgets.sum())
        residuals = expected - budgets
        order = residuals.argsort(descending=missing > 0, stable=True)[: abs(missing)]
        budgets[order] += 1 if missing > 0 else -1
        small = ((budgets > 0) & (budgets < min_rollouts)).nonzero().squeeze(1)
        if len(small) == 0 or int((ratios > 0).sum()) == 1:
            return budgets.long()
        fewest = small[budgets[small] == budgets[small].min()][-1]
        ratios[fewest] = 0.0
        ratios /= ratios.sum()


def gvm_prompt_weights(counted: torch.Tensor, group_ids: torch.Tensor) -> torch.Tensor:
    """
    Weight of each rollout that makes every prompt count alike in a mean over all rollouts.

    Args:
        counted (`torch.Tensor`):
            Rollouts over which a prompt's mean is taken, boolean, shape `(N,)`.
        group_ids (`torch.Tensor`):
            Shape `(N,)`.

    Returns:
        `torch.Tensor`: Shape `(N,)`; 0 for prompts without a counted rollout.
    """
    ids, row = group_ids.unique(return_inverse=True)
    counts = torch.zeros(len(ids), dtype=torch.float64, device=counted.device).index_add(0, row, counted.double())
    weights = len(group_ids) / ((counts > 0).sum().clamp(min=1) * counts)
    return torch.where(counts > 0, weights, 0.0)[row]


class GVMTrainer(MethodTrainer):
    """
    GVM-GRPO and GVM-RAFT: Optimizing Chain-of-Thought Reasoners via Gradient Variance Minimization in Rejection
    Sampling and RL ([arXiv 2505.02391](https://huggingface.co/papers/2505.02391)). Rollouts made beforehand tell how
    often each prompt is solved and how large its gradients are; the budget of a generation is dealt so that the
    variance of the averaged gradient is smallest. The estimates cost `gvm_presamples` rollouts per prompt, which count
    in `num_rollouts`, and a backward pass for each accepted one.

    Where the paper estimates for a whole shard and then trains on it, here a prompt is estimated when it is drawn,
    unless its last estimate is recent: equally many rollouts, by a fresher policy. The budget is dealt within each
    generation. Log-probabilities are at the trainer's temperature (1 in the paper's runs), and GRPO's advantages are
    TRL's, with 1e-4 in the denominator, where the code has 1e-6.

    State: acceptance rate, gradient norm and the generation of the estimate, of every prompt.

    Logs `gvm/rate` and `gvm/norm` (means over the generation's prompts), `gvm/max_budget`, `gvm/skipped` (share of the
    prompts without rollouts) and `gvm/estimated` (share of the prompts that were estimated anew).
    """

    config_class = GVMConfig
    replaces = ("prompt_budgets",)
    contradicts = {
        "disco": "DisCO keeps whole groups in a micro-batch, which needs equal budgets",
        "scaf_grpo": "it deals no rollouts to prompts that nobody solves, which hints are for",
        "puct": "its estimates belong to a row, and many states belong to one row",
    }
    _name = "GVM"
    _paper = {
        "title": "Optimizing Chain-of-Thought Reasoners via Gradient Variance Minimization in Rejection Sampling and "
        "RL",
        "id": "2505.02391",
        "citation": """\
@article{yao2025optimizing,
    title  = {{Optimizing Chain-of-Thought Reasoners via Gradient Variance Minimization in Rejection Sampling and
              RL}},
    author = {Jiarui Yao and others},
    year   = 2025,
    eprint = {arXiv:2505.02391},
}""",
    }

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        name = self.args.gvm_grad_params
        self._gvm_parameter = None
        if name is not None:
            if self.is_fsdp_enabled or self.is_deepspeed_enabled:
                raise ValueError(
                    f"`gvm_grad_params` is {name!r}, but under FSDP and DeepSpeed no process holds the whole model "
                    "for a backward pass of its own: set it to None, which takes all gradient norms as 1."
                )
            self._refuse_images()
            parameters = self.accelerator.unwrap_model(self.model).named_parameters()
            found = [parameter for key, parameter in parameters if name in key and parameter.requires_grad]
            if not found:
                raise ValueError(
                    f"`gvm_grad_params` is {name!r}, but no trainable parameter has that in its name: name another "
                    "(with LoRA for example 'lora_B'), or set it to None."
                )
            self._gvm_parameter = found[0]
        if self.args.gvm_loss == "raft":
            for base in methods_of(type(self)):
                if "compute_advantages" in base.__dict__.get("replaces", ()):
                    raise ValueError(
                        f"`gvm_loss` 'raft' brings its own advantages, and so does {base.__name__}: use 'grpo'."
                    )
                if base.slug == "d3s":
                    raise ValueError(
                        "`gvm_loss` 'raft' gives every accepted rollout the same advantage, and D3S selects rollouts "
                        "by the variance of their advantages: use 'grpo'."
                    )
        if self.args.gvm_max_accept in (0, 1) and self.args.gvm_loss == "grpo":
            warnings.warn(
                "`gvm_max_accept` leaves rollouts to prompts that are always solved, whose groups have no advantage "
                "in GRPO: set it below 1 (the authors' code does not).",
                stacklevel=2,
            )
        size = len(self.train_dataset)
        self.gvm_rates = torch.full((size,), torch.nan, dtype=torch.float64)
        self.gvm_norms = self.gvm_rates.clone()
        self.gvm_estimated = torch.full((size,), -1)  # generation of the estimate

    def _gvm_measure(self, row: int, samples: list[Sample]) -> tuple[float, float]:
        """Acceptance rate, and mean gradient norm of the accepted samples."""
        weights = self.reward_weights.tolist()
        accepted, scored = [], 0
        for sample in samples:
            known = [
                (reward, weight) for reward, weight in zip(sample.rewards, weights, strict=True) if reward == reward
            ]
            scored += bool(known)
            total = sum(reward * weight for reward, weight in known)
            if known and not sample.truncated and total > self.args.gvm_success_threshold:
                accepted.append(sample)
        if not accepted:
            return 0.0, 0.0
        norms = [1.0] if self._gvm_parameter is None else [self._gvm_norm(sample) for sample in accepted]
        return len(accepted) / scored, sum(norms) / len(norms)

    def _gvm_norm(self, sample: Sample) -> float:
        (gradient,) = torch.autograd.grad(self.sample_logps(sample).sum(), self._gvm_parameter)
        return gradient.norm().item()

    def prompt_budgets(self, rows: torch.Tensor):
        args = self.args
        age = self._generation - self.gvm_estimated
        due = rows[(self.gvm_estimated[rows] < 0) | (age[rows] >= args.gvm_update_steps)].unique()
        if len(due):
            _, found = self.score_prompts(due, args.gvm_presamples, measure=self._gvm_measure)
            self.gvm_rates[due], self.gvm_norms[due] = torch.tensor(found, dtype=torch.float64).T
            self.gvm_estimated[due] = self._generation
        total = args.generation_batch_size
        rates, norms = self.gvm_rates[rows], self.gvm_norms[rows]
        ratios = gvm_ratios(
            rates, norms, total, args.gvm_alpha, args.gvm_beta, args.gvm_max_accept, args.gvm_min_expected
        )
        least = args.gvm_min_rollouts or (1 if args.gvm_loss == "raft" else 2)
        budgets = gvm_budgets(ratios, total, least)
        self.log_metric("gvm/rate", rates.mean())
        self.log_metric("gvm/norm", norms.mean())
        self.log_metric("gvm/max_budget", budgets.max())
        self.log_metric("gvm/skipped", (budgets == 0).double().mean())
        self.log_metric("gvm/estimated", len(due) / len(rows))
        return budgets

    def compute_advantages(self, rollouts: Rollouts):
        if self.args.gvm_loss == "raft":
            return rollouts.rewards.clamp(min=0).nan_to_num(nan=0.0)
        return super().compute_advantages(rollouts)

    def carry(self, rollouts: Rollouts):
        args, carried = self.args, super().carry(rollouts)
        raft = args.gvm_loss == "raft"
        if not (raft if args.gvm_prompt_weights is None else args.gvm_prompt_weights) or not rollouts.training:
            return carried
        counted = rollouts.rewards > 0 if raft else torch.ones_like(rollouts.truncated)
        weights = gvm_prompt_weights(counted, rollouts.group_ids).float()
        return carried | {"gvm": weights[rollouts.local]}

    def token_weights(self, tokens: TokenBatch):
        weights = super().token_weights(tokens)
        if "gvm" not in tokens.carried:
            return weights
        mine = tokens.carried["gvm"].unsqueeze(1).expand_as(tokens.logps)
        return mine if weights is None else weights * mine

    def prompt_table(self):
        columns = {"rate": self.gvm_rates, "norm": self.gvm_norms, "estimated": self.gvm_estimated}
        return super().prompt_table() | {f"gvm/{name}": column for name, column in columns.items()}

    def method_state(self):
        state = {"rates": self.gvm_rates, "norms": self.gvm_norms, "estimated": self.gvm_estimated}
        return super().method_state() | {"gvm": state}

    def load_method_state(self, state):
        super().load_method_state(state)
        state = state["gvm"]
        self.gvm_rates, self.gvm_norms, self.gvm_estimated = state["rates"], state["norms"], state["estimated"]
