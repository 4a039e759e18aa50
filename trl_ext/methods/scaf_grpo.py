"""Scaffolded GRPO (Scaf-GRPO, arXiv 2510.19807)."""

import copy
import math
from dataclasses import dataclass, field

import torch
from trl import is_conversational

from ..core import MethodConfig, MethodTrainer, Requests, Scored
from ..core.prompts import make_generator
from ..core.rollouts import group_table


@dataclass
class ScafGRPOConfig(MethodConfig):
    r"""
    Configuration of [`ScafGRPOTrainer`]. Defaults are the paper's; those of the plateau rule are ours.

    Parameters:
        scaf_exempt_fraction (`float`, *optional*, defaults to `0.15`):
            Share of the training steps without hints.
        scaf_exempt_steps (`int`, *optional*):
            Number of steps without hints, in place of the share (50 in the authors' code).
        scaf_exempt_mode (`str`, *optional*, defaults to `"fixed"`):
            `"plateau"` starts giving hints when the number of unsolved groups has stopped falling.
        scaf_plateau_window (`int`, *optional*, defaults to `20`), scaf_plateau_tol (`float`, *optional*, defaults to
            `0.02`), scaf_exempt_min_fraction (`float`, *optional*, defaults to `0.05`):
            Generations over which the fall is measured, relative fall that counts as none, and share of the training
            steps before which hints never start.
        scaf_fail_threshold (`float`, *optional*, defaults to `0.0`):
            A rollout fails if its reward is at most this.
        scaf_hint_columns (`list[str]`, *optional*, defaults to `["knowledge", "planning", "solution"]`):
            Columns of the data set with lists of hints, from the vaguest to the most concrete.
        scaf_hint_levels (`int`, *optional*, defaults to `4`):
            Most hints used of a column; level l shows the first l of them.
        scaf_hint_search (`str`, *optional*, defaults to `"sequential"`):
            `"sequential"` stops at the first success, `"parallel"` tries all levels in one round.
        scaf_template (`str`, *optional*):
            The hinted question, from `{question}`, `{column}` and `{hints}`.
    """

    scaf_exempt_fraction: float = field(default=0.15, metadata={"help": "Share of the steps without hints."})
    scaf_exempt_steps: int | None = field(default=None, metadata={"help": "Steps without hints, instead."})
    scaf_exempt_mode: str = field(
        default="fixed", metadata={"help": "When hints start.", "choices": ["fixed", "plateau"]}
    )
    scaf_plateau_window: int = field(default=20, metadata={"help": "Generations over which the fall is measured."})
    scaf_plateau_tol: float = field(default=0.02, metadata={"help": "Relative fall that counts as none."})
    scaf_exempt_min_fraction: float = field(default=0.05, metadata={"help": "Share of the steps never hinted."})
    scaf_fail_threshold: float = field(default=0.0, metadata={"help": "A rollout fails at or below this reward."})
    scaf_hint_columns: list[str] = field(
        default_factory=lambda: ["knowledge", "planning", "solution"],
        metadata={"help": "Columns with lists of hints."},
    )
    scaf_hint_levels: int = field(default=4, metadata={"help": "Most hints used of a column."})
    scaf_hint_search: str = field(
        default="sequential", metadata={"help": "How levels are tried.", "choices": ["sequential", "parallel"]}
    )
    scaf_template: str = field(
        default="Question: {question}\n{column} Hints: {hints}", metadata={"help": "The hinted question."}
    )

    def __post_init__(self):
        super().__post_init__()
        self.check_range("scaf_exempt_fraction", 0 <= self.scaf_exempt_fraction < 1, "in [0, 1)")
        steps = self.scaf_exempt_steps
        self.check_range("scaf_exempt_steps", steps is None or steps >= 0, "at least 0 or None")
        self.check_choices("scaf_exempt_mode", "scaf_hint_search")
        self.check_range("scaf_plateau_window", self.scaf_plateau_window >= 1, "at least 1")
        self.check_range("scaf_plateau_tol", self.scaf_plateau_tol >= 0, "at least 0")
        self.check_range("scaf_exempt_min_fraction", 0 <= self.scaf_exempt_min_fraction <= 1, "in [0, 1]")
        self.check_range("scaf_hint_columns", len(self.scaf_hint_columns) > 0, "a list of at least one column")
        self.check_range("scaf_hint_levels", self.scaf_hint_levels >= 1, "at least 1")


def exempt_steps(max_steps: int, fraction: float = 0.15, steps: int | None = None) -> int:
    """Number of optimizer steps without hints: `steps` if given, else `ceil(fraction * max_steps)`."""
    return math.ceil(fraction * max_steps - 1e-9) if steps is None else steps


def cliff_groups(rewards: torch.Tensor, group_ids: torch.Tensor, threshold: float = 0.0) -> torch.Tensor:
    """
    Groups in which every scored rollout failed.

    Args:
        rewards (`torch.Tensor`):
            Shape `(N,)`; NaN = not scored.
        group_ids (`torch.Tensor`):
            Shape `(N,)`.
        threshold (`float`, *optional*, defaults to `0.0`):
            A rollout fails at or below this reward.

    Returns:
        `torch.Tensor`: Ids of those groups, ascending; a group without a scored rollout is none of them.
    """
    table, _, _ = group_table(rewards, group_ids)
    known = ~table.isnan()
    return group_ids.unique()[(known.any(1) & ((table <= threshold) | ~known).all(1))]


def hint_levels(hints: dict[str, list[str]], most: int = 4) -> list[tuple[str, list[str]]]:
    """
    The levels of help in the order in which they are tried: of each column in turn its first hint, its first two, ...

    Args:
        hints (`dict[str, list[str]]`):
            Hints by column; absent ones may be empty or None.
        most (`int`, *optional*, defaults to `4`):
            Most hints used of a column.

    Returns:
        `list[tuple[str, list[str]]]`: column and hints of each level.
    """
    levels = []
    for column, items in hints.items():
        items = [item for item in ([items] if isinstance(items, str) else items or []) if item]
        levels += [(column, items[:count]) for count in range(1, min(len(items), most) + 1)]
    return levels


class ScafGRPOTrainer(MethodTrainer):
    """
    Scaffolded GRPO ([arXiv 2510.19807](https://huggingface.co/papers/2510.19807)). When every rollout of a prompt
    fails, the policy is asked again with hints, from vague to concrete; the first success, together with its hinted
    prompt, takes the place of one failed rollout. Of the code's options, two replaced rollouts and the success with
    the plain prompt are not here.

    State (mode `"plateau"`): moving average of the unsolved groups, its history and whether hints have started.

    Logs `scaf/cliff_groups`, `scaf/rescued_groups` and `scaf/extra_rollouts` per generation, and `scaf/guided`.
    """

    config_class = ScafGRPOConfig
    replaces = ("more_rollouts", "pick_rollouts")
    _name = "Scaf-GRPO"
    _paper = {
        "title": "Scaf-GRPO: Scaffolded Group Relative Policy Optimization for Enhancing LLM Reasoning",
        "id": "2510.19807",
        "citation": """\
@article{zhang2025scaf,
    title  = {{Scaf-GRPO: Scaffolded Group Relative Policy Optimization for Enhancing LLM Reasoning}},
    author = {Xichen Zhang and Sitong Wu and Yinghao Zhu and Haoru Tan and Shaozuo Yu and Ziyi He and Jiaya Jia},
    year   = 2025,
    eprint = {arXiv:2510.19807},
}""",
    }

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        wanted, there = self.args.scaf_hint_columns, self.train_dataset.column_names
        if not set(wanted) & set(there):
            raise ValueError(
                f"`scaf_hint_columns` is {wanted}, none of which the data set has; its columns are {there}. Name the "
                "columns that hold lists of hints."
            )
        if self.environment_factories is not None:
            raise ValueError(
                "`environment_factory` is set, but Scaf-GRPO's hints go into prompts that are answered without one: "
                "leave one of the two out."
            )
        self.scaf_columns = [column for column in wanted if column in there]
        self.scaf_average: list[float] = []  # of the unsolved groups, per generation
        self.scaf_started = False

    def _scaf_guided(self, cliffs: int) -> bool:
        args, step, planned = self.args, self.state.global_step + 1, self.state.max_steps
        if args.scaf_exempt_mode == "fixed":
            return step > exempt_steps(planned, args.scaf_exempt_fraction, args.scaf_exempt_steps)
        past, window = self.scaf_average, args.scaf_plateau_window
        past.append(0.9 * past[-1] + 0.1 * cliffs if past else float(cliffs))
        if len(past) > window and step > args.scaf_exempt_min_fraction * planned:
            before = past[-1 - window]
            self.scaf_started |= before - past[-1] <= args.scaf_plateau_tol * before
        del past[: -1 - window]
        return self.scaf_started

    def _scaf_prompts(self, row: int) -> list:
        """The hinted prompts of a row, one per level; levels that do not fit the model's context are left out."""
        example = self.train_dataset[row]
        levels = hint_levels({column: example[column] for column in self.scaf_columns}, self.args.scaf_hint_levels)
        prompts = []
        for column, hints in levels:
            prompt = copy.deepcopy(example["prompt"])
            fill = {"column": column.capitalize(), "hints": " ".join(hints)}
            if is_conversational(example):
                last = max(i for i, message in enumerate(prompt) if message["role"] == "user")
                content = prompt[last]["content"]
                if isinstance(content, str):
                    prompt[last]["content"] = self.args.scaf_template.format(question=content, **fill)
                else:  # parts: images stay, the text part takes the hints
                    text = next(part for part in content if part["type"] == "text")
                    text["text"] = self.args.scaf_template.format(question=text["text"], **fill)
            else:
                prompt = self.args.scaf_template.format(question=prompt, **fill)
            prompts.append(prompt)
        if not prompts:
            return []
        limit = self.args.vllm_max_model_length if self.use_vllm else None
        limit = limit or self.context_length or math.inf
        lengths = self.prompt_lengths(prompts)
        return [p for p, n in zip(prompts, lengths, strict=True) if n + self.max_completion_length <= limit]

    def more_rollouts(self, scored: Scored, rounds: int):
        size, args = self.args.generation_batch_size, self.args
        rewards = scored.raw_rewards
        if rounds == 1:
            cliffs = cliff_groups(rewards, scored.group_ids, args.scaf_fail_threshold).tolist()
            guided = self._scaf_guided(len(cliffs))
            self.log_metric("scaf/cliff_groups", len(cliffs))
            self.log_metric("scaf/guided", guided)
            rows = dict(zip(scored.group_ids.tolist(), scored.prompt_index.tolist(), strict=True))
            self._scaf_search = {g: (rows[g], self._scaf_prompts(rows[g])) for g in cliffs} if guided else {}
        asked = []
        for group, (row, prompts) in self._scaf_search.items():
            mine = (scored.group_ids[size:] == group).nonzero().squeeze(1) + size
            solved = len(self._scaf_successes(scored, group)) > 0
            if args.scaf_hint_search == "parallel":
                prompts = prompts if rounds == 1 else []
            else:
                prompts = [] if solved else prompts[len(mine) : len(mine) + 1]
            asked += [(row, group, prompt) for prompt in prompts]
        if not asked:
            return None
        rows, groups, prompts = zip(*asked, strict=True)
        return Requests(torch.tensor(rows), torch.tensor(groups), list(prompts))

    def _scaf_successes(self, scored: Scored, group: int) -> list[int]:
        size = self.args.generation_batch_size
        good = (scored.group_ids == group) & (scored.raw_rewards > self.args.scaf_fail_threshold)
        if self.mask_truncated_completions:
            good &= ~scored.truncated
        return [position for position in good.nonzero().squeeze(1).tolist() if position >= size]

    def pick_rollouts(self, scored: Scored):
        size, rescued = self.args.generation_batch_size, 0
        rows = torch.arange(size)
        for group in self._scaf_search:
            successes = self._scaf_successes(scored, group)
            if not successes:
                continue
            mine = (scored.group_ids[:size] == group) & scored.scored[:size]
            failed = mine.nonzero().squeeze(1)
            generator = make_generator(self.args.seed, "scaf_grpo", self._generation, group)
            drawn = int(torch.randint(len(failed), (), generator=generator))
            rows[int(failed[drawn])] = successes[0]
            rescued += 1
        self.log_metric("scaf/rescued_groups", rescued)
        self.log_metric("scaf/extra_rollouts", len(scored) - size)
        return rows

    def method_state(self):
        return super().method_state() | {"scaf_grpo": {"average": self.scaf_average, "started": self.scaf_started}}

    def load_method_state(self, state):
        super().load_method_state(state)
        self.scaf_average, self.scaf_started = state["scaf_grpo"]["average"], state["scaf_grpo"]["started"]
