"""GRPO with a dynamic KL weight (GRPO-D of OThink-MR1; arXiv 2503.16081)."""

from dataclasses import dataclass, field

from ..core import MethodConfig, MethodTrainer, TokenBatch


@dataclass
class GRPODConfig(MethodConfig):
    r"""
    Configuration of [`GRPODTrainer`], which sets TRL's `beta` itself. TRL's `use_bias_correction_kl` is off: the
    paper's penalty is not weighed by the importance ratio.

    Parameters:
        kl_beta_min (`float`, *optional*, defaults to `0.0`), kl_beta_max (`float`, *optional*, defaults to `0.02`):
            Range of the KL weight. The paper has 0 and 0.02 for geometry, 0.04 and 0.1 for visual counting.
        kl_explore_ratio (`float`, *optional*, defaults to `0.3`):
            Share of the steps that explore.
        kl_total_steps (`int`, *optional*):
            Optimizer steps of the whole schedule; by default those of the run.
        kl_schedule (`str`, *optional*, defaults to `"dip"`):
            `"dip"` is the paper's equation: from the middle of the range down to its lower end while exploring, then
            up to its upper end. `"monotone"` follows the paper's words instead, and rises all the time.
    """

    use_bias_correction_kl: bool = field(default=False, metadata={"help": "Weigh the KL term by the ratio."})
    kl_beta_min: float = field(default=0.0, metadata={"help": "Lowest KL weight."})
    kl_beta_max: float = field(default=0.02, metadata={"help": "Highest KL weight."})
    kl_explore_ratio: float = field(default=0.3, metadata={"help": "Share of the steps that explore."})
    kl_total_steps: int | None = field(default=None, metadata={"help": "Optimizer steps of the schedule."})
    kl_schedule: str = field(
        default="dip",
        metadata={"help": "Fall and rise ('dip') or rise only.", "choices": ["dip", "monotone"]},
    )

    def __post_init__(self):
        self.check_choices("kl_schedule")
        self.check_range("kl_beta_min", self.kl_beta_min >= 0, "at least 0")
        self.check_range("kl_beta_max", self.kl_beta_max > 0, "positive")
        self.check_range("kl_beta_max", self.kl_beta_max >= self.kl_beta_min, "at least kl_beta_min")
        self.check_range("kl_explore_ratio", 0 <= self.kl_explore_ratio <= 1, "in [0, 1]")
        self.check_range(
            "kl_total_steps", self.kl_total_steps is None or self.kl_total_steps >= 1, "at least 1, or None"
        )
        self.check_range("beta", self.beta in (0.0, self.kl_beta_max), "left out: kl_beta_min and kl_beta_max set it")
        self.beta = self.kl_beta_max  # TRL makes a reference model, and scores with it, only if this is not 0
        super().__post_init__()


def kl_beta(
    step: int,
    total_steps: int,
    beta_min: float = 0.0,
    beta_max: float = 0.02,
    explore_ratio: float = 0.3,
    schedule: str = "dip",
) -> float:
    """
    The KL weight of an optimizer step (equation 3).

    Args:
        step (`int`):
            Optimizer steps done.
        total_steps (`int`):
            Steps of the schedule; afterwards the weight stays at `beta_max`.
        beta_min (`float`, *optional*, defaults to `0.0`), beta_max (`float`, *optional*, defaults to `0.02`):
            Range.
        explore_ratio (`float`, *optional*, defaults to `0.3`):
            Share of the steps that explore.
        schedule (`str`, *optional*, defaults to `"dip"`):
            `"dip"` or `"monotone"`, see [`GRPODConfig`].

    Returns:
        `float`: the weight.
    """
    exploring = explore_ratio * total_steps if schedule == "dip" else 0.0
    if step > total_steps:
        return beta_max
    if exploring > 0 and step <= exploring:
        middle = (beta_min + beta_max) / 2
        return middle - (middle - beta_min) * step / exploring
    return beta_min + (beta_max - beta_min) * (step - exploring) / (total_steps - exploring)


class GRPODTrainer(MethodTrainer):
    """
    GRPO-D: GRPO with a dynamic KL weight ([arXiv 2503.16081](https://huggingface.co/papers/2503.16081)). The weight
    falls while the policy is to explore, then rises. The rest of the published runs is TRL's: `loss_type="grpo"`.

    State: the length of the schedule, so that a resumed run keeps it unless `kl_total_steps` says another.

    Logs `grpo_d/beta`.
    """

    config_class = GRPODConfig
    replaces = ("kl_weight",)
    contradicts = {
        "d3s": "D3S masks tokens, which would leave the KL term too, so it works without one",
        "gtpo": "GTPO works without a KL term",
        "kdrl": "KDRL puts a pull to its teacher in the place of the KL term",
    }
    _name = "GRPO-D"
    _paper = {
        "title": "OThink-MR1: Stimulating multimodal generalized reasoning capabilities via dynamic reinforcement "
        "learning",
        "id": "2503.16081",
        "citation": """\
@article{liu2025othink,
    title  = {{OThink-MR1: Stimulating multimodal generalized reasoning capabilities via dynamic reinforcement
              learning}},
    author = {Zhiyuan Liu and others},
    year   = 2025,
    eprint = {arXiv:2503.16081},
}""",
    }

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.grpo_d_total_steps = self.args.kl_total_steps

    def kl_weight(self, tokens: TokenBatch):
        args = self.args
        if self.grpo_d_total_steps is None and tokens.training:
            self.grpo_d_total_steps = self.state.max_steps
        total = self.grpo_d_total_steps or 1  # an evaluation before the first step
        weight = kl_beta(
            tokens.step, total, args.kl_beta_min, args.kl_beta_max, args.kl_explore_ratio, args.kl_schedule
        )
        self.log_metric("grpo_d/beta", weight)
        return weight

    def method_state(self):
        return super().method_state() | {"grpo_d": {"total_steps": self.grpo_d_total_steps}}

    def load_method_state(self, state):
        super().load_method_state(state)
        if self.args.kl_total_steps is None:
            self.grpo_d_total_steps = state["grpo_d"]["total_steps"]
