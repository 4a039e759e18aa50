"""Dynamic sampling (Yu et al., DAPO, arXiv 2503.14476)."""

from dataclasses import dataclass, field

import torch

from ..core import MethodConfig, MethodTrainer, Requests, Scored
from ..core.prompts import make_generator
from ..core.rollouts import group_table


@dataclass
class DynamicSamplingConfig(MethodConfig):
    r"""
    Configuration of [`DynamicSamplingTrainer`].

    Parameters:
        ds_max_num_gen_batches (`int`, *optional*, defaults to `10`):
            Bound on the generation rounds of a step, the first included (10 in the authors' scripts).
        ds_gen_batch_multiplier (`int`, *optional*, defaults to `1`):
            Prompts per round, as a multiple of those that a step trains on (3 in the authors' scripts).
        ds_metric (`str`, *optional*):
            Name of the reward function whose spread decides, so that shaped rewards do not count; the weighted sum of
            all by default.
        ds_tol (`float`, *optional*, defaults to `1e-6`):
            Largest difference of scores that counts as none.
        ds_on_exhausted (`str`, *optional*, defaults to `"fill"`):
            What to train on when the bound is reached: `"fill"` (the groups with a signal, filled up with the
            earliest others), `"first"` (the first round as it is) or `"error"`.
    """

    ds_max_num_gen_batches: int = field(default=10, metadata={"help": "Bound on the generation rounds of a step."})
    ds_gen_batch_multiplier: int = field(default=1, metadata={"help": "Prompts per round / prompts trained on."})
    ds_metric: str | None = field(default=None, metadata={"help": "Reward function whose spread decides; None: sum."})
    ds_tol: float = field(default=1e-6, metadata={"help": "Largest difference of scores that counts as none."})
    ds_on_exhausted: str = field(
        default="fill",
        metadata={"help": "What to train on at the bound.", "choices": ["fill", "first", "error"]},
    )

    def __post_init__(self):
        super().__post_init__()
        self.check_range("ds_max_num_gen_batches", self.ds_max_num_gen_batches >= 1, "at least 1 (rounds are bounded)")
        self.check_range("ds_gen_batch_multiplier", self.ds_gen_batch_multiplier >= 1, "at least 1")
        self.check_range("ds_tol", self.ds_tol >= 0, "at least 0")
        self.check_choices("ds_on_exhausted")


def valid_groups(scores: torch.Tensor, group_ids: torch.Tensor, tol: float = 1e-6) -> torch.Tensor:
    """
    Groups with a signal: at least two scored rollouts, whose scores differ by more than `tol`.

    Args:
        scores (`torch.Tensor`):
            Shape `(N,)`; NaN = not scored.
        group_ids (`torch.Tensor`):
            Shape `(N,)`.
        tol (`float`, *optional*, defaults to `1e-6`):
            Tolerance.

    Returns:
        `torch.Tensor`: Boolean, one per group, by ascending group id.
    """
    table, _, _ = group_table(scores, group_ids)
    finite = table.isfinite()
    spread = table.masked_fill(~finite, -torch.inf).amax(1) - table.masked_fill(~finite, torch.inf).amin(1)
    return (finite.sum(1) >= 2) & (spread > tol)


def pick_groups(valid: torch.Tensor, wanted: int, on_exhausted: str = "fill") -> torch.Tensor:
    """
    Choose the groups to train on.

    Args:
        valid (`torch.Tensor`):
            Whether each group has a signal, in the order of generation, shape `(M',)`.
        wanted (`int`):
            Number of groups M.
        on_exhausted (`str`, *optional*, defaults to `"fill"`):
            What to do with fewer than M valid groups: `"fill"`, `"first"` or `"error"`.

    Returns:
        `torch.Tensor`: M positions, in the order of generation: the first M valid groups; else with `"fill"` all valid
        ones and the earliest others, with `"first"` the first M of all.

    Raises:
        RuntimeError: with `"error"` and fewer than M valid groups.
    """
    found = valid.nonzero().squeeze(1)[:wanted]
    if len(found) == wanted:
        return found
    if on_exhausted == "error":
        raise RuntimeError(
            f"only {len(found)} of {wanted} groups with a signal after `ds_max_num_gen_batches` rounds: raise it, "
            "use easier or harder prompts, or set `ds_on_exhausted='fill'`."
        )
    if on_exhausted == "first":
        return torch.arange(wanted, device=valid.device)
    filler = (~valid).nonzero().squeeze(1)[: wanted - len(found)]
    return torch.cat([found, filler]).sort().values


class DynamicSamplingTrainer(MethodTrainer):
    """
    Dynamic sampling of DAPO ([arXiv 2503.14476](https://huggingface.co/papers/2503.14476)). Groups whose scores are
    all equal are replaced by groups of other prompts, generated in further rounds, until the batch holds only groups
    with a signal or the bound is reached.

    State: the position in the stream of extra prompts.

    Logs `ds/num_gen_batches`, `ds/valid_share` (of all generated groups), `ds/discarded_valid` (groups with a signal
    that were not needed) and `ds/filler_groups` (groups without one that are trained on); with
    `mask_truncated_completions` also `ds/valid_by_masked` (share of the groups trained on whose signal lies in answers
    that were cut off, which are not trained on).
    """

    config_class = DynamicSamplingConfig
    replaces = ("more_rollouts", "pick_rollouts")
    contradicts = dict.fromkeys(
        ("gvm", "knapsack_rl"), "a batch of whole groups cannot be filled exactly when groups differ in size"
    )
    _name = "Dynamic sampling"
    _paper = {
        "title": "DAPO: An Open-Source LLM Reinforcement Learning System at Scale",
        "id": "2503.14476",
        "citation": """\
@article{yu2025dapo,
    title  = {{DAPO: An Open-Source LLM Reinforcement Learning System at Scale}},
    author = {Qiying Yu and Zheng Zhang and Ruofei Zhu and Yufeng Yuan and Xiaochen Zuo and Yu Yue and others},
    year   = 2025,
    eprint = {arXiv:2503.14476},
}""",
    }

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.ds_column = None if self.args.ds_metric is None else self.reward_column("ds_metric")
        self.ds_cursor = 0

    def _ds_valid(self, scored: Scored) -> torch.Tensor:
        scores = scored.raw_rewards if self.ds_column is None else scored.reward_matrix[:, self.ds_column]
        return valid_groups(scores, scored.group_ids, self.args.ds_tol)

    def _ds_fresh(self, count: int, used: set[int]) -> list[int]:
        """The next prompts of the stream that this generation has not used; any, once all were used."""
        size, rows = len(self.train_dataset), []
        while len(rows) < count:
            epoch, position = divmod(self.ds_cursor, size)
            order = torch.randperm(size, generator=make_generator(self.args.seed, "dynamic_sampling", epoch))
            for row in order[position:].tolist():
                self.ds_cursor += 1
                if row not in used or len(used) == size:
                    rows.append(row)
                    used.add(row)
                    if len(rows) == count:
                        break
        return rows

    def more_rollouts(self, scored: Scored, rounds: int):
        args = self.args
        wanted, multiple = args.generation_batch_size // args.num_generations, args.ds_gen_batch_multiplier
        if multiple > 1 and rounds == 1:
            count = (multiple - 1) * wanted  # the rest of the first round
        elif self._ds_valid(scored).sum() >= wanted or rounds - (multiple > 1) >= args.ds_max_num_gen_batches:
            return None
        else:
            count = multiple * wanted
        rows = torch.tensor(self._ds_fresh(count, set(scored.prompt_index.tolist())))
        first = int(scored.group_ids.max()) + 1
        groups = torch.arange(first, first + count)
        return Requests(rows.repeat_interleave(args.num_generations), groups.repeat_interleave(args.num_generations))

    def pick_rollouts(self, scored: Scored):
        args, valid = self.args, self._ds_valid(scored)
        wanted = args.generation_batch_size // args.num_generations
        groups = pick_groups(valid, wanted, args.ds_on_exhausted)
        self.log_metric("ds/num_gen_batches", len(valid) / (wanted * args.ds_gen_batch_multiplier))
        self.log_metric("ds/valid_share", valid.float().mean())
        self.log_metric("ds/discarded_valid", valid.sum() - valid[groups].sum())
        self.log_metric("ds/filler_groups", (~valid[groups]).sum())
        if self.mask_truncated_completions:
            others = scored.reward_matrix.masked_fill(scored.truncated.unsqueeze(1), torch.nan)
            alone = self._ds_valid(scored.replace(reward_matrix=others))
            self.log_metric("ds/valid_by_masked", (valid & ~alone)[groups].float().mean())
        ids = scored.group_ids.unique()[groups]
        return torch.isin(scored.group_ids, ids).nonzero().squeeze(1)

    def method_state(self):
        return super().method_state() | {"dynamic_sampling": {"cursor": self.ds_cursor}}

    def load_method_state(self, state):
        super().load_method_state(state)
        self.ds_cursor = state["dynamic_sampling"]["cursor"]
