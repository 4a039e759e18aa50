"""Filtered prompts and prefixes of good solutions (ReST-GRPO, from ReST-RL, arXiv 2508.19576)."""

import inspect
import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from trl.trainer.utils import is_async_callable

from ..core import MethodConfig, MethodTrainer, Rollouts
from ..core.prompts import ShuffledOrder, make_generator
from ..core.rollouts import Sample, group_table, weighted_sum, zero_signal


TOLERANCE = 1e-6  # rewards arrive in single precision, and one that equals a threshold reaches it


@dataclass
class ReSTGRPOConfig(MethodConfig):
    r"""
    Configuration of [`ReSTGRPOTrainer`]. Defaults are those of the authors' code.

    Parameters:
        rest_std_threshold (`float`, *optional*, defaults to `0.05`):
            Standard deviation of a prompt's rewards below which the prompt is dropped.
        rest_accept_threshold (`float`, *optional*, defaults to `0.9`):
            Reward that the best solution needs for its beginnings to become items; infinity makes none.
        rest_n_sub (`int`, `float` or `str`, *optional*, defaults to `0.5`):
            Beginnings that are drawn of a solution: an integer is their number, a float in (0, 1] the share of those
            that there are (so 1 is one draw and 1.0 as many as there are), `"all"` takes each once. 0 trains on the
            data set as it is, without any sampling.
        rest_decay (`float`, *optional*, defaults to `0.95`):
            Probability of a beginning relative to that which is one unit shorter.
        rest_num_samples (`int`, *optional*, defaults to `5`):
            Solutions sampled of every prompt before each iteration.
        rest_iterations (`int`, *optional*, defaults to `2`):
            How often the items are built. Those of the last iteration are repeated, in another order, until
            `max_steps`.
        rest_prefix_unit (`str`, *optional*, defaults to `"\n"`):
            Separator of the units of a solution.
        rest_drop_full (`bool`, *optional*, defaults to `False`):
            Leave out the beginning that is the whole solution.
        rest_stop_strings (`list[str]`, *optional*):
            Strings that end a solution; the reward functions see the text before the first of them.
        rest_stop_bonus (`float`, *optional*, defaults to `1e-3`):
            Reward for a stop string.
        rest_trailing_penalty (`float`, *optional*, defaults to `1e-6`):
            Penalty per character after the first stop string.
        rest_max_prompt_length (`int`, *optional*):
            Tokens that an item's prompt may have; longer ones are left out, since a cut one would be another state.
        rest_on_empty (`str`, *optional*, defaults to `"error"`):
            What to do if no prompt is left: `"error"`, or `"unfiltered"` to warn and train on all of them (ours).
    """

    rest_std_threshold: float = field(default=0.05, metadata={"help": "Least standard deviation of rewards."})
    rest_accept_threshold: float = field(default=0.9, metadata={"help": "Least reward of a solution to begin from."})
    # `str` for the command line, where 1 and 1.0 must stay apart.
    rest_n_sub: str = field(default=0.5, metadata={"help": "Draws per solution: a number, a float share, or 'all'."})
    rest_decay: float = field(default=0.95, metadata={"help": "How much less likely each further unit is."})
    rest_num_samples: int = field(default=5, metadata={"help": "Solutions sampled per prompt and iteration."})
    rest_iterations: int = field(default=2, metadata={"help": "How often the items are built."})
    rest_prefix_unit: str = field(default="\n", metadata={"help": "Separator of a solution's units."})
    rest_drop_full: bool = field(default=False, metadata={"help": "Leave out whole solutions."})
    rest_stop_strings: list[str] | None = field(default=None, metadata={"help": "Strings that end a solution."})
    rest_stop_bonus: float = field(default=1e-3, metadata={"help": "Reward for a stop string."})
    rest_trailing_penalty: float = field(default=1e-6, metadata={"help": "Penalty per character after it."})
    rest_max_prompt_length: int | None = field(default=None, metadata={"help": "Tokens of an item's prompt."})
    rest_on_empty: str = field(
        default="error", metadata={"help": "What to do if no prompt is left.", "choices": ["error", "unfiltered"]}
    )

    def __post_init__(self):
        super().__post_init__()
        self.check_range("rest_std_threshold", 0 <= self.rest_std_threshold < math.inf, "at least 0 and finite")
        self.check_range("rest_accept_threshold", not math.isnan(self.rest_accept_threshold), "a number")
        if isinstance(self.rest_n_sub, str) and self.rest_n_sub != "all":
            try:
                text = self.rest_n_sub
                self.rest_n_sub = int(text) if text.strip().lstrip("+-").isdigit() else float(text)
            except ValueError:
                pass  # refused below
        draws = self.rest_n_sub
        valid = draws == "all" or (isinstance(draws, int) and not isinstance(draws, bool) and draws >= 0)
        valid = valid or (isinstance(draws, float) and 0 < draws <= 1)
        self.check_range("rest_n_sub", valid, "an integer of at least 0, a float in (0, 1] or 'all'")
        self.check_range("rest_decay", 0 < self.rest_decay < 1, "in (0, 1)")
        self.check_range("rest_num_samples", self.rest_num_samples >= 2, "at least 2")
        self.check_range("rest_iterations", self.rest_iterations >= 1, "at least 1")
        self.check_range("rest_prefix_unit", self.rest_prefix_unit != "", "a string that is not empty")
        self.check_range("rest_stop_strings", "" not in (self.rest_stop_strings or ()), "strings that are not empty")
        self.check_range("rest_stop_bonus", self.rest_stop_bonus >= 0, "at least 0")
        self.check_range("rest_trailing_penalty", self.rest_trailing_penalty >= 0, "at least 0")
        length = self.rest_max_prompt_length
        self.check_range("rest_max_prompt_length", length is None or length >= 1, "at least 1")
        self.check_choices("rest_on_empty")


# --------------------------------------------------------------------------------------------- from samples to items


def rest_statistics(rewards: torch.Tensor, group_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """
    What decides about a prompt, from samples of its solutions.

    Args:
        rewards (`torch.Tensor`):
            Shape `(N,)`; NaN = not scored.
        group_ids (`torch.Tensor`):
            Prompt of each sample, shape `(N,)`.

    Returns:
        `tuple[torch.Tensor, torch.Tensor]`: for each of the M prompts, by ascending group id, the population standard
        deviation of its rewards (exactly 0 if they are equal, NaN for fewer than two), and which of its samples is
        the best (the first of equal ones, -1 if none is scored).
    """
    table, _, _ = group_table(rewards, group_ids)
    scored = ~table.isnan()
    std = ((table - table.nanmean(1, keepdim=True)) ** 2).nanmean(1).sqrt()
    highest = table.masked_fill(~scored, -torch.inf)
    std = torch.where(highest.amax(1) == table.masked_fill(~scored, torch.inf).amin(1), 0.0, std)
    best = torch.where(scored.any(1), highest.argmax(1), -1)
    return torch.where(scored.sum(1) < 2, torch.nan, std), best


def rest_prefixes(solution: str, unit: str = "\n", drop_full: bool = False) -> list[str]:
    """
    Beginnings of a solution: its first units, each closed by the separator, from one to all of them.

    Args:
        solution (`str`):
            Its text; white space and separators at the end do not count.
        unit (`str`, *optional*, defaults to a line break):
            Separator of the units.
        drop_full (`bool`, *optional*, defaults to `False`):
            Leave out the whole solution.

    Returns:
        `list[str]`: shortest first; empty for an empty solution.
    """
    solution = solution.rstrip()
    while solution.endswith(unit):
        solution = solution.removesuffix(unit).rstrip()
    parts = solution.split(unit) if solution else []
    return [unit.join(parts[:i]) + unit for i in range(1, len(parts) + 1 - drop_full)]


def rest_draw_count(length: int, n_sub: "int | float | str" = 0.5) -> int:
    """How many of `length` beginnings are drawn: `n_sub` itself, as a float that share of them, `"all"` all."""
    if n_sub == "all":
        return length
    return math.ceil(length * n_sub - 1e-9) if isinstance(n_sub, float) else n_sub


def rest_draw_probabilities(length: int, decay: float = 0.95) -> torch.Tensor:
    """Probability `decay**i`, normalised, of the beginnings of i + 1 units, shape `(length,)`."""
    weights = decay ** torch.arange(length, dtype=torch.float64)
    return weights / weights.sum()


def rest_draws(
    length: int, n_sub: "int | float | str" = 0.5, decay: float = 0.95, generator: torch.Generator | None = None
) -> torch.Tensor:
    """
    Draw beginnings of a solution, with replacement.

    Args:
        length (`int`):
            Number of beginnings.
        n_sub (`int`, `float` or `str`, *optional*, defaults to `0.5`), decay (`float`, *optional*, defaults to
            `0.95`):
            See [`ReSTGRPOConfig`].
        generator (`torch.Generator`, *optional*):
            Source of randomness, on the CPU.

    Returns:
        `torch.Tensor`: Their indices in the order drawn; with `"all"` each once.
    """
    count = rest_draw_count(length, n_sub) if length else 0
    if n_sub == "all" or not count:
        return torch.arange(count)
    return torch.multinomial(rest_draw_probabilities(length, decay), count, replacement=True, generator=generator)


def build_rest_dataset(
    rewards: torch.Tensor,
    solutions: "list[str | list[str]]",
    rows: "list[int] | None" = None,
    std_threshold: float = 0.05,
    accept_threshold: float = 0.9,
    n_sub: "int | float | str" = 0.5,
    decay: float = 0.95,
    unit: str = "\n",
    drop_full: bool = False,
    seed: int = 42,
    iteration: int = 0,
) -> list[tuple[int, str]]:
    """
    Turn sampled solutions into the items to train on: each prompt whose rewards vary, alone and with drawn beginnings
    of its best solution.

    Args:
        rewards (`torch.Tensor`):
            Of n samples per prompt, shape `(M, n)`; NaN = not scored.
        solutions (`list[str]` or `list[list[str]]`):
            Texts of each prompt's samples, or of its best one alone.
        rows (`list[int]`, *optional*):
            Names of the prompts; by default 0, 1, ...
        std_threshold (`float`), accept_threshold (`float`), n_sub (`int`, `float` or `str`), decay (`float`), unit
            (`str`), drop_full (`bool`), *optional*:
            See [`ReSTGRPOConfig`].
        seed (`int`, *optional*, defaults to `42`), iteration (`int`, *optional*, defaults to `0`):
            Of the draws, which for each prompt depend on these and its name only.

    Returns:
        `list[tuple[int, str]]`: prompt and beginning of each item, not shuffled; `""` for the prompt alone. What is
        drawn twice is there twice.
    """
    rows = list(range(len(rewards))) if rows is None else rows
    if n_sub != "all" and n_sub <= 0:
        return [(row, "") for row in rows]
    groups = torch.arange(len(rewards)).repeat_interleave(rewards.shape[1])
    stds, best = rest_statistics(rewards.flatten(), groups)
    items = []
    for row, rated, solution, std, j in zip(rows, rewards, solutions, stds.tolist(), best.tolist(), strict=True):
        if not std >= std_threshold - TOLERANCE:
            continue
        items.append((row, ""))
        if rated[j] < accept_threshold - TOLERANCE:
            continue
        prefixes = rest_prefixes(solution if isinstance(solution, str) else solution[j], unit, drop_full)
        draws = rest_draws(len(prefixes), n_sub, decay, make_generator(seed, "rest_grpo", iteration, row))
        items += [(row, prefixes[i]) for i in draws.tolist()]
    return items


# ---------------------------------------------------------------------------------------------- prompts and rewards


def continue_prompt(prompt: "str | list[dict]", partial: str) -> "str | list[dict]":
    """The prompt followed by part of an answer; in a conversation as (part of) a last assistant message."""
    if not partial or isinstance(prompt, str):
        return prompt + partial if partial else prompt
    if prompt[-1]["role"] != "assistant":
        return [*prompt, {"role": "assistant", "content": partial}]
    content = prompt[-1]["content"]
    content = content + partial if isinstance(content, str) else [*content, {"type": "text", "text": partial}]
    return [*prompt[:-1], {**prompt[-1], "content": content}]


def continuing_template(template: str) -> str:
    """
    A chat template that lets the policy go on with a last assistant message, where other templates would open a new
    turn after it: the message's text follows the generation prompt. Other conversations are rendered as before.

    Args:
        template (`str`):
            A Jinja chat template.

    Returns:
        `str`: the new one.
    """
    return (
        "{%- set rest_partial = '' %}"
        "{%- if add_generation_prompt and messages[-1]['role'] == 'assistant' %}"
        "{%- set rest_partial = messages[-1]['content'] %}"
        "{%- if rest_partial is not string %}"
        "{%- set rest_partial = rest_partial | map(attribute='text') | join %}"
        "{%- endif %}"
        "{%- set messages = messages[:-1] %}"
        "{%- endif %}\n"  # Jinja takes the line break away, and so it does with one at the end of a template
        f"{template.removesuffix(chr(10))}"
        "{{ rest_partial }}"
    )


def rest_cut(text: str, stop_strings=()) -> tuple[str, int | None]:
    """
    Cut a text at the earliest stop string (in the same place: the one listed first).

    Args:
        text (`str`):
            What was written.
        stop_strings (`Sequence[str]`, *optional*, defaults to `()`):
            Strings that end a solution.

    Returns:
        `tuple[str, int | None]`: the text before it, and how many characters follow it; the whole text and None if
        there is none.
    """
    found = [(text.find(stop), i) for i, stop in enumerate(stop_strings) if stop in text]
    if not found:
        return text, None
    start, i = min(found)
    return text[:start], len(text) - start - len(stop_strings[i])


def rest_reward(
    verifier: Callable, stop_strings=(), stop_bonus: float = 1e-3, trailing_penalty: float = 1e-6
) -> Callable:
    """
    A reward function for items out of one for whole solutions: the verifier gets the beginning and what was written
    after it, up to a stop string, as one completion, and the prompt without the beginning. A completion for which it
    raises an error scores 0, with a warning; None stays None.

    Args:
        verifier (`Callable`):
            A reward function as TRL takes them, also an asynchronous one.
        stop_strings (`Sequence[str]`, *optional*, defaults to `()`):
            Strings that end a solution.
        stop_bonus (`float`, *optional*, defaults to `1e-3`), trailing_penalty (`float`, *optional*, defaults to
            `1e-6`):
            Added for a stop string, and taken off for every character after it.

    Returns:
        `Callable`: a reward function that takes the beginnings from the column `partial_state`.
    """
    name = getattr(verifier, "__name__", type(verifier).__name__)

    def whole(completions, prompts, partial_state, columns):
        partials = [partial or "" for partial in partial_state or [""] * len(completions)]
        extras, texts = [], []
        for completion, partial in zip(completions, partials, strict=True):
            text = completion if isinstance(completion, str) else completion[0].get("content") or ""
            before, after = rest_cut(text, stop_strings)
            extras.append(0.0 if after is None else stop_bonus - trailing_penalty * after)
            text = partial + before
            texts.append(
                text if isinstance(completion, str) else [{**completion[0], "content": text}, *completion[1:]]
            )
        if prompts is not None:
            prompts = [_without(prompt, partial) for prompt, partial in zip(prompts, partials, strict=True)]
            columns = {"prompts": prompts, **columns}
        return {"completions": texts, **columns}, extras

    def one_by_one(columns):
        size = len(columns["completions"])
        for i in range(size):
            lists = {key: [v[i]] for key, v in columns.items() if isinstance(v, list) and len(v) == size}
            yield {**columns, **lists}

    def failed(error):
        warnings.warn(f"the reward function {name!r} failed and a completion scores 0: {error!r}", stacklevel=3)
        return [0.0]

    def total(scores, extras):
        return [None if score is None else score + extra for score, extra in zip(scores, extras, strict=True)]

    def reward(completions, prompts=None, partial_state=None, **columns):
        columns, extras = whole(completions, prompts, partial_state, columns)
        try:
            return total(verifier(**columns), extras)
        except Exception:
            scores = []
            for single in one_by_one(columns):
                try:
                    scores += verifier(**single)
                except Exception as error:
                    scores += failed(error)
            return total(scores, extras)

    async def async_reward(completions, prompts=None, partial_state=None, **columns):
        columns, extras = whole(completions, prompts, partial_state, columns)
        try:
            return total(await verifier(**columns), extras)
        except Exception:
            scores = []
            for single in one_by_one(columns):
                try:
                    scores += await verifier(**single)
                except Exception as error:
                    scores += failed(error)
            return total(scores, extras)

    made = async_reward if is_async_callable(verifier) else reward
    made.__name__ = name
    return made


def _without(prompt: "str | list[dict]", partial: str) -> "str | list[dict]":
    if isinstance(prompt, str):
        return prompt.removesuffix(partial)
    return prompt[:-1] if partial and prompt[-1]["role"] == "assistant" else prompt


class ReSTGRPOTrainer(MethodTrainer):
    """
    ReST-GRPO, from ReST-RL: Achieving Accurate Code Reasoning of LLMs with Optimized Self-Training and Decoding
    ([arXiv 2508.19576](https://huggingface.co/papers/2508.19576)). At the start of an iteration the policy samples
    solutions of every prompt, which counts in `num_rollouts`. Prompts whose rewards hardly vary are dropped; where the
    best solution is good, beginnings of it become further items, from which groups go on. After one pass over the
    items the next iteration samples anew; what does not fill a generation is left out, fewer items than that are
    repeated. The length of an iteration is only known when it begins: set `max_steps`. Decoding by tree search
    (VM-MCTS) is not part of this.

    Reward functions see whole solutions, as if the policy had written the beginning too ([`rest_reward`]); one that
    has a parameter `partial_state` gets the bare completion, and the beginning there (no such column while sampling
    and in evaluation, so give it a default). The bonus for a stop string goes to the first of the former. A column
    `partial_state` of the data set is text at the end of the prompt that belongs to the solution. In conversations
    the beginning is an assistant message, which a changed chat template lets the policy go on with; a `rollout_func`
    must do that itself.

    State: the items, the number of the iteration and when it began.

    Logs `rest_grpo/iteration`, `rest_grpo/items`, `rest_grpo/kept` (share of the prompts), `rest_grpo/prefixed` (share
    of the items with a beginning), `rest_grpo/prefix_length` (its mean units), and of the generation's groups with
    and without a beginning `rest_grpo/prefix_reward`, `rest_grpo/prefix_signal` (share of rollouts whose group has
    different rewards), `rest_grpo/base_reward` and `rest_grpo/base_signal`.
    """

    config_class = ReSTGRPOConfig
    replaces = ("choose_prompts",)
    ignores = ("prompt_weights", "more_rollouts")
    contradicts = {
        "dcpo": "its statistics belong to a row, and several items belong to one row",
        "dynamic_sampling": "its further rounds draw rows of the data set instead of items",
        "gvm": "its budgets follow what was sampled of a row, and several items belong to one row",
        "knapsack_rl": "its budgets follow the success rate of a row, and several items belong to one row",
        "scaf_grpo": "its hinted prompts would replace those of the items",
        "spo": "its baseline belongs to a row, and several items belong to one row",
    }
    _name = "ReST-GRPO"
    _paper = {
        "title": "ReST-RL: Achieving Accurate Code Reasoning of LLMs with Optimized Self-Training and Decoding",
        "id": "2508.19576",
        "citation": """\
@article{restrl2025,
    title  = {{ReST-RL: Achieving Accurate Code Reasoning of LLMs with Optimized Self-Training and Decoding}},
    year   = 2025,
    eprint = {arXiv:2508.19576},
}""",
    }

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        args = self.args
        if self.tools or self.environment_factories is not None:
            raise ValueError(
                "`rest_prefix_unit` cuts a solution that the policy writes alone, and with tools or an environment it "
                "does not: train without them, or without ReST-GRPO."
            )
        bonus, penalty = args.rest_stop_bonus, args.rest_trailing_penalty
        for i, function in enumerate(self.reward_funcs):
            if isinstance(function, torch.nn.Module) or "partial_state" in inspect.signature(function).parameters:
                continue
            self.reward_funcs[i] = rest_reward(function, args.rest_stop_strings or (), bonus, penalty)
            bonus = penalty = 0.0
        if not isinstance(self.train_dataset[0]["prompt"], str):
            template = self.chat_template or getattr(self.processing_class, "chat_template", None)
            template = template.get("default") if isinstance(template, dict) else template
            if self.rollout_func is None and template is None:
                raise ValueError("the prompts are conversations, but the tokenizer has no `chat_template`: set one.")
            self.chat_template = template and continuing_template(template)
        self.rest_items: list[tuple[int, str]] = []
        self.rest_iteration = 0
        self.rest_built = 0  # generation for which the items were built
        self.rest_picks: list[str] = []  # by group id
        self._rest_order = None

    def _rest_measure(self, row: int, samples: list[Sample]) -> tuple[int, str]:
        """Length of the prompt, and the best solution."""
        rewards = torch.tensor([sample.rewards for sample in samples], dtype=torch.float64)
        rewards = weighted_sum(rewards, self.reward_weights.cpu())
        _, best = rest_statistics(rewards, torch.zeros(len(samples)))
        sample = samples[best]
        if not rewards[best] >= self.args.rest_accept_threshold - TOLERANCE:
            return len(sample.prompt_ids), ""
        if sample.tool_mask is not None and not all(sample.tool_mask):
            raise ValueError(
                "`rollout_func` returned a solution that the policy did not write alone (`env_mask`), which cannot be "
                "cut into beginnings: set `rest_accept_threshold` to infinity to filter prompts only."
            )
        text = self.processing_class.decode(sample.completion_ids, skip_special_tokens=True)
        return len(sample.prompt_ids), rest_cut(text, self.args.rest_stop_strings or ())[0]

    def _rest_build(self) -> None:
        args, size = self.args, len(self.train_dataset)
        scores, found = self.score_prompts(torch.arange(size), args.rest_num_samples, measure=self._rest_measure)
        lengths, solutions = zip(*found, strict=True)
        rewards = weighted_sum(scores.flatten(0, 1).cpu().double(), self.reward_weights.cpu())
        self.rest_iteration, self.rest_built = self.rest_iteration + 1, self._generation
        items = build_rest_dataset(
            rewards.view(size, -1),
            solutions,
            None,
            args.rest_std_threshold,
            args.rest_accept_threshold,
            args.rest_n_sub,
            args.rest_decay,
            args.rest_prefix_unit,
            args.rest_drop_full,
            args.seed,
            self.rest_iteration,
        )
        if not items:
            problem = (
                f"ReST-GRPO dropped all {size} prompts in iteration {self.rest_iteration}: the rewards of their "
                f"{args.rest_num_samples} samples (mean {rewards.nanmean().item():.3g}) vary by less than "
                f"`rest_std_threshold` ({args.rest_std_threshold})"
            )
            if args.rest_on_empty == "error":
                raise ValueError(
                    f"{problem}: lower it, raise `rest_num_samples`, use other prompts, or train on all of them with "
                    "`rest_on_empty='unfiltered'`."
                )
            warnings.warn(f"{problem}, so all of them are trained on.", stacklevel=2)
            items = [(row, "") for row in range(size)]
        if args.rest_max_prompt_length is not None:
            tokenizer = getattr(self.processing_class, "tokenizer", self.processing_class)
            items = [
                (row, partial)
                for row, partial in items
                if lengths[row] + len(tokenizer(partial, add_special_tokens=False)["input_ids"])
                <= args.rest_max_prompt_length
            ]
            if not items:
                raise ValueError(
                    f"`rest_max_prompt_length` is {args.rest_max_prompt_length}, and the prompt of every item is "
                    "longer: raise it."
                )
        self._rest_use(items)

    def _rest_use(self, items: list[tuple[int, str]]) -> None:
        self.rest_items = items
        chunk = self.args.generation_batch_size // self.args.num_generations
        seed = self.args.seed + self.rest_iteration
        self._rest_order = ShuffledOrder(len(items), chunk, self.args.shuffle_dataset, seed)

    def choose_prompts(self, n: int, generator: torch.Generator):
        if self.args.rest_n_sub == 0:
            self.rest_picks = [""] * n
            return super().choose_prompts(n, generator)
        done = self._generation - self.rest_built >= max(1, len(self.rest_items) // n)
        if not self.rest_items or (done and self.rest_iteration < self.args.rest_iterations):
            self._rest_build()
        picks = [self.rest_items[i] for i in self._rest_order.rows(self._generation - self.rest_built).tolist()]
        self.rest_picks = [partial for _, partial in picks]
        return torch.tensor([row for row, _ in picks])

    def edit_examples(self, examples: list[dict], group_ids: torch.Tensor):
        examples = super().edit_examples(examples, group_ids)
        for example, group in zip(examples, group_ids.tolist(), strict=True):
            partial = self.rest_picks[group]
            example["prompt"] = continue_prompt(example["prompt"], partial)
            example["partial_state"] = (example.get("partial_state") or "") + partial
        return examples

    def observe(self, rollouts: Rollouts):
        super().observe(rollouts)
        scored, prefixed = rollouts.scored, torch.tensor([bool(p) for p in self.rest_picks])
        prefixed = prefixed.to(rollouts.group_ids.device)[rollouts.group_ids]
        signal = ~zero_signal(rollouts.raw_rewards, rollouts.group_ids)
        for name, members in (("prefix", prefixed & scored), ("base", ~prefixed & scored)):
            if members.any():
                self.log_metric(f"rest_grpo/{name}_reward", rollouts.raw_rewards[members].mean())
                self.log_metric(f"rest_grpo/{name}_signal", signal[members].double().mean())
        if not self.rest_items:
            return
        units = [partial.count(self.args.rest_prefix_unit) for _, partial in self.rest_items if partial]
        self.log_metric("rest_grpo/iteration", self.rest_iteration)
        self.log_metric("rest_grpo/items", len(self.rest_items))
        self.log_metric("rest_grpo/kept", len({row for row, _ in self.rest_items}) / len(self.train_dataset))
        self.log_metric("rest_grpo/prefixed", len(units) / len(self.rest_items))
        if units:
            self.log_metric("rest_grpo/prefix_length", sum(units) / len(units))

    def prompt_table(self):
        rows = torch.tensor([row for row, _ in self.rest_items], dtype=torch.long)
        items = torch.bincount(rows, minlength=len(self.train_dataset))
        return super().prompt_table() | {"rest_grpo/items": items}

    def method_state(self):
        items = {"rows": [row for row, _ in self.rest_items], "partials": [partial for _, partial in self.rest_items]}
        return super().method_state() | {
            "rest_grpo": {**items, "iteration": self.rest_iteration, "built": self.rest_built}
        }

    def load_method_state(self, state):
        super().load_method_state(state)
        state = state["rest_grpo"]
        self.rest_iteration, self.rest_built = state["iteration"], state["built"]
        self._rest_use(list(zip(state["rows"], state["partials"], strict=True)))
