"""Reuse of earlier solutions by a PUCT rule, from TTT-Discover (Yuksekgonul, Koceja, Li et al., arXiv 2601.16175)."""

import dataclasses
import math
from dataclasses import dataclass, field

import torch
from accelerate.utils import gather_object

from ..core import MethodConfig, MethodTrainer, Rollouts
from ..core.config import import_function
from .ttt_discover import TTTDiscoverTrainer


@dataclass
class PUCTConfig(MethodConfig):
    r"""
    Configuration of [`PUCTTrainer`]. Defaults are those of the paper and its code.

    Parameters:
        puct_c (`float`, *optional*, defaults to `1.0`):
            Weight of exploration.
        puct_topk_children (`int`, *optional*, defaults to `2`):
            Best children that are kept of each state; 0 keeps all.
        puct_max_size (`int`, *optional*, defaults to `1000`):
            States that are kept after a step, seeds included; these stay even if there are more of them.
        puct_value_column (`str`, *optional*):
            Column of the data set with the value of each seed; by default 0.0 for all. Give it if rewards can be below
            0, or the seeds would look better than every solution.
        puct_render (`str`, *optional*, defaults to `"trl_ext.methods.puct:append_solution"`):
            Import path of a function from a [`State`] and its example, the row of the data set that it descends from,
            to the prompt to generate from.
        puct_parse (`str`, *optional*, defaults to `"trl_ext.methods.puct:reward_and_text"`):
            Import path of a function from a completion, its example and its reward to the value of the solution
            (higher is better) and its content (text, or lists, dicts and numbers), or None if there is none in it.
    """

    puct_c: float = field(default=1.0, metadata={"help": "Weight of exploration."})
    puct_topk_children: int = field(default=2, metadata={"help": "Best children kept of each state; 0: all."})
    puct_max_size: int = field(default=1000, metadata={"help": "States kept after a step."})
    puct_value_column: str | None = field(default=None, metadata={"help": "Column of the seeds' values; None: 0."})
    puct_render: str = field(
        default="trl_ext.methods.puct:append_solution",
        metadata={"help": "Function from a state and its example to a prompt, 'package.module:function'."},
    )
    puct_parse: str = field(
        default="trl_ext.methods.puct:reward_and_text",
        metadata={"help": "Function from a completion, example and reward to (value, content) or None."},
    )

    def __post_init__(self):
        super().__post_init__()
        self.check_range("puct_c", 0 <= self.puct_c < math.inf, "at least 0 and finite")
        self.check_range("puct_topk_children", self.puct_topk_children >= 0, "at least 0")
        self.check_range("puct_max_size", self.puct_max_size >= 0, "at least 0")


@dataclass
class State:
    """
    A solution to go on from.

    Attributes:
        id (`int`):
            Number by order of insertion.
        value (`float`):
            Its score; higher is better.
        row (`int`):
            Row of the training set that it descends from.
        ancestors (`list[int]`):
            Ids from its parent up to the seed; empty for a seed.
        content (`str`, `list`, `dict` or number, *optional*):
            The solution; None for a seed.
    """

    id: int
    value: float
    row: int
    ancestors: list[int] = field(default_factory=list)
    content: "str | list | dict | float | None" = None


class Archive:
    """
    The states found so far and their statistics: visits n, best child value m, and expansions T. Seeds stay for ever;
    of removed states n and m stay.

    Args:
        seed_values (`list[float]`):
            Values of the seeds, which get the ids and rows 0, 1, ...
        c (`float`, *optional*, defaults to `1.0`), topk_children (`int`, *optional*, defaults to `2`), max_size
            (`int`, *optional*, defaults to `1000`):
            See [`PUCTConfig`].
    """

    def __init__(self, seed_values: list[float], c: float = 1.0, topk_children: int = 2, max_size: int = 1000):
        if not all(map(math.isfinite, seed_values)):
            raise ValueError("every seed needs a finite value.")
        self.c, self.topk_children, self.max_size = c, topk_children, max_size
        self.states = {row: State(row, float(value), row) for row, value in enumerate(seed_values)}
        self.n: dict[int, int] = {}
        self.m: dict[int, float] = {}
        self.T = 0
        self.next_id = len(self.states)

    def scores(self) -> dict[int, float]:
        """PUCT score of every state by id: Q + c * scale * P * sqrt(1 + T) / (1 + n)."""
        states = list(self.states.values())
        values = [state.value for state in states if state.ancestors] or [state.value for state in states]
        scale = max(max(values) - min(values), 1e-6) if values else 1.0
        size = len(states)
        bonus = self.c * scale * math.sqrt(1 + self.T) / (size * (size + 1) / 2 or 1)
        ranked = sorted(states, key=lambda state: (-state.value, state.id))
        scores = {}
        for rank, state in enumerate(ranked):
            n = self.n.get(state.id, 0)
            q = self.m.get(state.id, state.value) if n else state.value
            scores[state.id] = q + bonus * (size - rank) / (1 + n)
        return scores

    def pick(self, count: int) -> list[State]:
        """
        States to expand, by descending score, then value. A pick blocks its ancestors and descendants; once all others
        are blocked, the picks are repeated in their order.
        """
        scores = self.scores()
        picked: list[State] = []
        ancestors, ids = set(), set()
        for state in sorted(self.states.values(), key=lambda s: (-scores[s.id], -s.value, s.id)):
            if len(picked) == count:
                break
            if state.id not in ancestors and ids.isdisjoint(state.ancestors):
                picked.append(state)
                ids.add(state.id)
                ancestors.update(state.ancestors)
        return [picked[i % len(picked)] for i in range(count)] if picked else []

    def update(self, parent: State, children: "list[tuple[float, object] | None]") -> int:
        """
        Count one expansion of a state, and keep the best of its new children that are not known yet.

        Args:
            parent ([`State`]):
                The state that was expanded.
            children (`list[tuple[float, object] | None]`):
                Value and content of each child; None for a rollout without a valid one.

        Returns:
            `int`: Children that were inserted.
        """
        self.T += 1
        for state in (parent.id, *parent.ancestors):
            self.n[state] = self.n.get(state, 0) + 1
        children = sorted((child for child in children if child is not None), key=lambda child: -child[0])
        if children:
            self.m[parent.id] = max(self.m.get(parent.id, -math.inf), float(children[0][0]))
        before = self.next_id
        for value, content in children[: self.topk_children or None]:
            # A duplicate uses up its place.
            if not any(content == state.content for state in self.states.values()):
                ancestors = [parent.id, *parent.ancestors]
                self.states[self.next_id] = State(self.next_id, float(value), parent.row, ancestors, content)
                self.next_id += 1
        return self.next_id - before

    def trim(self) -> None:
        """At the end of a step: the best children of each state, then the best states up to the largest size."""
        best = sorted(self.states.values(), key=lambda state: (-state.value, state.id))
        kept = {state.id for state in best if not state.ancestors}
        room, children = self.max_size - len(kept), {}
        for state in best:
            if not state.ancestors:
                continue
            siblings = children[state.ancestors[0]] = children.get(state.ancestors[0], 0) + 1
            if room > 0 and (siblings <= self.topk_children or not self.topk_children):
                kept.add(state.id)
                room -= 1
        self.states = {key: state for key, state in self.states.items() if key in kept}

    def state_dict(self) -> dict:
        """Everything as numbers, strings, lists and dicts."""
        states = [dataclasses.asdict(state) for state in self.states.values()]
        return {"states": states, "n": dict(self.n), "m": dict(self.m), "T": self.T, "next_id": self.next_id}

    def load_state_dict(self, state: dict) -> None:
        """Restore what `state_dict` returned."""
        self.states = {fields["id"]: State(**fields) for fields in state["states"]}
        self.n, self.m = dict(state["n"]), dict(state["m"])
        self.T, self.next_id = state["T"], state["next_id"]


def append_solution(state: State, example: dict) -> "str | list[dict]":
    """
    The default of `puct_render`: the example's prompt, followed by the solution and its value.

    Args:
        state ([`State`]):
            What to go on from.
        example (`dict`):
            The row of the training set that it descends from.

    Returns:
        `str` or `list[dict]`: the prompt; that of a seed is the row's own.
    """
    prompt = example["prompt"]
    if state.content is None:
        return prompt
    text = f"\n\nAn earlier solution, with a score of {state.value:g}:\n\n{state.content}\n\nFind a better one."
    if isinstance(prompt, str):
        return prompt + text
    last = max(i for i, message in enumerate(prompt) if message["role"] == "user")
    content = prompt[last]["content"]
    content = content + text if isinstance(content, str) else [*content, {"type": "text", "text": text}]
    return [*prompt[:last], {**prompt[last], "content": content}, *prompt[last + 1 :]]


def reward_and_text(completion: "str | list[dict]", example: dict, reward: float) -> "tuple[float, str] | None":
    """
    The default of `puct_parse`: the (weighted sum of) rewards, and the completion's text.

    Args:
        completion (`str` or `list[dict]`):
            What the policy wrote; of a conversation its last message counts.
        example (`dict`):
            What the reward functions saw: the row of the training set with the prompt of the state.
        reward (`float`):
            Weighted sum of the rewards.

    Returns:
        `tuple[float, str]` or `None`: value and content; None if there is no text.
    """
    text = completion if isinstance(completion, str) else completion[-1].get("content") if completion else None
    return (reward, text) if text else None


class PUCTTrainer(MethodTrainer):
    """
    State reuse of TTT-Discover, from Learning to Discover at Test Time ([arXiv
    2601.16175](https://huggingface.co/papers/2601.16175)): every group starts from an earlier solution, picked from an
    archive by a PUCT rule with the best instead of the mean child value. The rows of the training set are the seeds,
    start states of one problem whose scores can be compared; a single row will do. Works with any advantages:
    `mix("ttt_discover", "puct")` is the paper.

    How a state becomes a prompt and a completion a state say `puct_render` and `puct_parse`, import paths of functions
    (in Python `trainer.puct_render` and `trainer.puct_parse` may be set to functions, too). By default the earlier
    solution is appended to the prompt and its value is the reward, before any shaping. A rollout without a reward, a
    parsed content or a finite value only counts as a visit. The model's context must hold the rendered prompt.

    State: the archive, the same on all processes; [`Archive`].

    Logs `puct/best` (best value so far, seeds aside), `puct/size`, `puct/picked` (mean value of the states that the
    generation started from), `puct/valid` (share of the rollouts) and `puct/inserted` (share of the rollouts).
    """

    config_class = PUCTConfig
    replaces = ("choose_prompts",)
    ignores = ("prompt_weights", "more_rollouts")
    contradicts = {
        "dcpo": "its statistics belong to a row, and many states belong to one row",
        "dynamic_sampling": "its further rounds draw rows of the data set instead of states of the archive",
        "knapsack_rl": "its budgets follow the success rate of a row, and many states belong to one row",
        "scaf_grpo": "its hinted prompts would replace those of the states",
        "spo": "its baseline belongs to a row, and many states belong to one row",
    }
    _name = "TTT-Discover state reuse (PUCT)"
    _paper = TTTDiscoverTrainer._paper

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        args, column = self.args, self.args.puct_value_column
        self.puct_render = import_function(args.puct_render, "puct_render")
        self.puct_parse = import_function(args.puct_parse, "puct_parse")
        values = [0.0] * len(self.train_dataset)
        if column is not None:
            if column not in self.train_dataset.column_names:
                raise ValueError(
                    f"`puct_value_column` is {column!r}, which the data set has not; its columns are "
                    f"{self.train_dataset.column_names}."
                )
            values = [_finite(value) for value in self.train_dataset[column]]
            if None in values:
                raise ValueError(
                    f"`puct_value_column` {column!r} has no finite value in row {values.index(None)}: every seed "
                    "needs one, since states are compared by their values."
                )
        self.puct_archive = Archive(values, args.puct_c, args.puct_topk_children, args.puct_max_size)
        self.puct_picks: list[State] = []  # by group id

    def choose_prompts(self, n: int, generator: torch.Generator):
        self.puct_picks = self.puct_archive.pick(n)
        return torch.tensor([state.row for state in self.puct_picks])

    def edit_examples(self, examples: list[dict], group_ids: torch.Tensor):
        examples = super().edit_examples(examples, group_ids)
        states = [self.puct_picks[group] for group in group_ids.tolist()]
        return [
            {**example, "prompt": self.puct_render(state, example)}
            for example, state in zip(examples, states, strict=True)
        ]

    def _puct_child(self, completion, example, reward) -> "tuple[float, object] | None":
        reward = _finite(reward)
        child = None if reward is None else self.puct_parse(completion, example, reward)
        if child is None or (value := _finite(child[0])) is None:
            return None
        return value, child[1]

    def observe(self, rollouts: Rollouts):
        super().observe(rollouts)
        rewards = rollouts.raw_rewards[rollouts.local].tolist()
        mine = list(map(self._puct_child, rollouts.completions, rollouts.examples, rewards))
        children = gather_object(mine)
        archive, inserted = self.puct_archive, 0
        self.log_metric("puct/picked", sum(state.value for state in self.puct_picks) / len(self.puct_picks))
        for group, child in zip(rollouts.group_ids.tolist(), children, strict=True):
            inserted += archive.update(self.puct_picks[group], [child])
        archive.trim()
        found = [state.value for state in archive.states.values() if state.ancestors]
        if found:
            self.log_metric("puct/best", max(found))
        self.log_metric("puct/size", len(archive.states))
        self.log_metric("puct/valid", 1 - children.count(None) / len(children))
        self.log_metric("puct/inserted", inserted / len(children))

    def method_state(self):
        return super().method_state() | {"puct": self.puct_archive.state_dict()}

    def load_method_state(self, state):
        super().load_method_state(state)
        self.puct_archive.load_state_dict(state["puct"])


def _finite(value) -> float | None:
    return float(value) if value is not None and math.isfinite(value) else None
