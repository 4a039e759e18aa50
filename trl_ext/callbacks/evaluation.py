"""Held-out scores with their uncertainty (On Randomness in Agentic Evals, arXiv 2602.07150, and others)."""

import contextlib
import copy
import json
import math
import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from datasets import Dataset
from transformers import Trainer, TrainerCallback

from ..compare import HISTORY
from ..core.state import fingerprint
from ..evaluation import (
    best_attempts,
    bootstrap_interval,
    clustered_se,
    detectable_difference,
    exact_match,
    levenshtein_ratio,
    maj_at_k,
    monotonicity,
    normal_interval,
    pass_at_k,
    pass_hat_k,
    simulate_verifier,
    variance_split,
)
from ..tasks.embedded import completion_text


PREFIX = "eval_stats/"
RECORD = f"{PREFIX}record"  # what the history keeps beside the metrics, as text in the entry of `log_history`


@dataclass
class EvalStatsConfig:
    r"""
    Configuration of [`EvalStatsCallback`].

    Parameters:
        eval_num_samples (`int`, *optional*, defaults to `10`):
            Samples n per prompt. With one there is no telling how much of a score's variance is sampling.
        eval_ks (`tuple[int, ...]`, *optional*):
            Numbers of attempts k, at most n; 1 is always among them. The powers of two up to n if None.
        eval_alpha (`float`, *optional*, defaults to `0.05`):
            Chance that an interval misses the truth, or that a difference is found where there is none.
        eval_power (`float`, *optional*, defaults to `0.8`):
            Chance of finding a difference of the size called detectable.
        eval_bootstrap (`int`, *optional*, defaults to `1000`):
            Resamples of the bootstrap.
        eval_seed (`int`, *optional*, defaults to `0`):
            Of the bootstrap and of random subsets, together with the step.
        eval_fp_cost (`tuple[float, ...]`, *optional*, defaults to `(0, 1, 2, 4, 8)`):
            Costs of an accepted wrong answer, in units of the value of a correct one, for which the best number of
            attempts is reported; used with `eval_weak_reward`.
        eval_lr_threshold (`float`, *optional*, defaults to `0.75`):
            Similarity from which on a short answer counts as the right one; used with `eval_answer_column`.
        eval_temperature (`float`, *optional*):
            Sampling temperature; that of training if None. 0 is greedy decoding.
        eval_reward (`str`, *optional*):
            Name of the reward function that says whether a sample is correct; the first one if None.
        eval_weak_reward (`str`, *optional*):
            Name of a reward function that plays an imperfect verifier. If given, sampling until it accepts is
            simulated (arXiv 2411.17501).
        eval_success_threshold (`float`, *optional*, defaults to `0.5`):
            Reward above which a sample is correct.
        eval_unscored (`str`, *optional*, defaults to `"wrong"`):
            What a sample without a reward counts as: `"wrong"`, or `"drop"` to leave it out of its prompt.
        eval_answer_column (`str`, *optional*):
            Column of the data set with the right answer, for the majority and for short answers.
        eval_at_start (`bool`, *optional*, defaults to `False`):
            Whether to evaluate before the first step, too.
    """

    eval_num_samples: int = 10
    eval_ks: tuple[int, ...] | None = None
    eval_alpha: float = 0.05
    eval_power: float = 0.8
    eval_bootstrap: int = 1000
    eval_seed: int = 0
    eval_fp_cost: tuple[float, ...] = (0, 1, 2, 4, 8)
    eval_lr_threshold: float = 0.75
    eval_temperature: float | None = None
    eval_reward: str | None = None
    eval_weak_reward: str | None = None
    eval_success_threshold: float = 0.5
    eval_unscored: str = "wrong"
    eval_answer_column: str | None = None
    eval_at_start: bool = False

    def __post_init__(self):
        n = self.eval_num_samples
        if isinstance(self.eval_ks, int):
            self.eval_ks = (self.eval_ks,)
        if isinstance(self.eval_fp_cost, (int, float)):
            self.eval_fp_cost = (self.eval_fp_cost,)
        ks = () if self.eval_ks is None else tuple(self.eval_ks)
        for name, fine, range_ in (
            ("eval_num_samples", isinstance(n, int) and n >= 1, "a whole number, at least 1 (better 2 or more)"),
            (
                "eval_ks",
                all(isinstance(k, int) and 1 <= k <= n for k in ks),
                f"between 1 and `eval_num_samples`, {n}, since more would be extrapolated",
            ),
            ("eval_alpha", 0 < self.eval_alpha < 1, "between 0 and 1"),
            ("eval_power", 0 < self.eval_power < 1, "between 0 and 1"),
            ("eval_bootstrap", self.eval_bootstrap >= 1, "at least 1"),
            ("eval_seed", self.eval_seed >= 0, "at least 0"),
            ("eval_fp_cost", all(cost >= 0 for cost in self.eval_fp_cost), "at least 0"),
            ("eval_lr_threshold", 0 < self.eval_lr_threshold <= 1, "above 0 and at most 1"),
            ("eval_temperature", self.eval_temperature is None or self.eval_temperature >= 0, "at least 0, or None"),
            ("eval_success_threshold", math.isfinite(self.eval_success_threshold), "a number"),
            ("eval_unscored", self.eval_unscored in ("wrong", "drop"), "'wrong' or 'drop'"),
        ):
            if not fine:
                raise ValueError(f"`{name}` must be {range_}, but is {getattr(self, name)!r}.")
        powers = [2**i for i in range(n.bit_length())]
        self.eval_ks = tuple(sorted({1, *ks})) if self.eval_ks is not None else tuple(powers)
        self.eval_fp_cost = tuple(self.eval_fp_cost)


class EvalStatsCallback(TrainerCallback):
    """
    Samples n completions of every held-out prompt at every evaluation of a [`MethodTrainer`], and logs what the score
    is worth. Training does not change: random states, metrics and counters stay as they were.

    It evaluates with the trainer (`eval_strategy`, `trainer.evaluate()`), before the first step with `eval_at_start`,
    and at the last step of a training in any case; never twice at a step of a training. Every number goes to
    `log_history`, the trackers, and the metrics of the evaluation, so that `metric_for_best_model="eval_stats/pass@1"`
    works. Logged as `eval_stats/...`, each score with `_low` and `_high` of its normal interval over prompts:

    - `pass@k`: chance that one of k samples is correct; for k = 1 also the bootstrap's `pass@1_boot_low`, `_high`.
    - `pass_hat@k` (k > 1): chance that all k are correct, written pass^k in the literature.
    - `maj@k` (k > 1, with `answer`): chance that the majority of k answers is right. Right is the answer in
      `eval_answer_column`; without that column, every answer of which more samples were scored correct than wrong.
    - `exact_match`, `levenshtein` (with `eval_answer_column`): share of answers that are the right one, or similar.
    - `sampling_variance`, `prompt_variance`: the squared standard error of `pass@1`, in two parts.
    - `detectable_difference`: smallest difference to another evaluation like this one, on other prompts, that would
      be found. On the same prompts `trl-ext compare` finds smaller ones.
    - `unscored`: share of samples without a reward. `monotonicity`: of `pass@1` over the evaluations so far.
    - `accepted_accuracy`, `best_k@cost_c`, `value@cost_c` (with `eval_weak_reward`): how good the samples are that the
      weak verifier accepts, and how often to sample if a wrong one costs c.

    What is undefined (an interval with one prompt, parts of the variance with one sample) is left out.

    `evaluations.jsonl` in `output_dir` has one line per evaluation: `step`, `score` (pass@1), `n`, `successes` and
    `counts` of every prompt, `prompts` (a fingerprint), `settings` and `summary`. The lines are part of `log_history`,
    so a resumed run goes on with those of its checkpoint, and later ones are dropped.

    Args:
        config ([`EvalStatsConfig`], *optional*):
            Settings.
        trainer ([`MethodTrainer`]):
            The trainer.
        dataset ([`~datasets.Dataset`], *optional*):
            The held-out prompts; the trainer's `eval_dataset` by default.
        answer (`Callable`, *optional*):
            Finds the answer in a completion's text: `str` to `str`, None if there is none. Answers are the same if
            these are equal. Needed for the majority and for short answers only.

    Raises:
        ValueError: if the trainer cannot sample outside a training step, or a setting does not fit the trainer.

    Example:
    ```python
    trainer = MethodTrainer(..., args=MethodConfig(..., eval_strategy="steps"), eval_dataset=held_out)
    trainer.add_callback(EvalStatsCallback(EvalStatsConfig(eval_num_samples=8), trainer))
    ```
    """

    def __init__(
        self,
        config: EvalStatsConfig | None = None,
        trainer=None,
        dataset: Dataset | None = None,
        answer: Callable | None = None,
    ):
        self.config = config = config or EvalStatsConfig()
        if not hasattr(trainer, "score_prompts"):
            raise ValueError(
                f"`trainer` must be a trl_ext.MethodTrainer, which can sample outside a training step, got "
                f"{type(trainer).__name__}. MethodTrainer without a method is TRL's GRPOTrainer, bit for bit."
            )
        dataset = trainer.eval_dataset if dataset is None else dataset
        if not isinstance(dataset, Dataset) or len(dataset) == 0 or "prompt" not in dataset.column_names:
            raise ValueError(
                "`dataset` must be one `Dataset` with at least one row and a column 'prompt', got "
                f"{type(dataset).__name__}: give the held-out prompts, or a trainer with such an `eval_dataset`."
            )
        column = config.eval_answer_column
        if column is not None and (answer is None or column not in dataset.column_names):
            raise ValueError(
                f"`eval_answer_column={column!r}` needs an `answer` function and a column of `dataset`, which has "
                f"{', '.join(dataset.column_names)}: give both, or leave it None."
            )
        self.trainer, self.dataset, self.answer = trainer, dataset, answer
        self._column = reward_column(trainer, config, "eval_reward")
        self._weak = None if config.eval_weak_reward is None else reward_column(trainer, config, "eval_weak_reward")
        check_temperature(trainer, config.eval_temperature)
        self._prompts, self._warned, self._before = fingerprint(dataset["prompt"]), set(), None
        if config.eval_num_samples == 1:
            self._warn(
                "`eval_num_samples` is 1: there is only pass@1, and no telling how much of its variance is sampling. "
                "Draw at least 2."
            )

    # --------------------------------------------------------------------------------------------------------- events

    def on_train_begin(self, args, state, control, **kwargs):
        # A new training starts a new history, but for what was evaluated right before it.
        if state.global_step == 0 and self._before is not None:
            state.log_history.append(self._before)
        self._before = None
        self._write(args, state)
        if self.config.eval_at_start and state.global_step == 0:
            self._evaluate(args, state)

    def on_evaluate(self, args, state, control, metrics=None, **kwargs):
        entry = self._evaluate(args, state)
        if metrics is not None:
            metrics.update(metrics_of(entry))

    def on_epoch_end(self, args, state, control, **kwargs):
        # Not `on_train_end`: the trackers have finished by then, and the best model may have been loaded.
        if state.global_step >= state.max_steps or control.should_training_stop:
            self._evaluate(args, state)

    def _evaluate(self, args, state) -> dict:
        """The entry of `log_history` for this step."""
        trainer = self.trainer
        past = {entry["step"]: entry for entry in state.log_history if RECORD in entry}
        if trainer.is_in_train and state.global_step in past:
            return past[state.global_step]
        record, summary = self._sample(state.global_step)
        if record["score"] is not None:
            scores = [json.loads(past[step][RECORD])["score"] for step in sorted(past) if step < state.global_step]
            scores = [score for score in (*scores, record["score"]) if score is not None]
            if len(scores) > 1:
                summary["monotonicity"] = monotonicity(scores)
        # TRL's `log` would print the sampled completions once more, and outside an evaluation empty its metrics.
        Trainer.log(trainer, {f"{PREFIX}{name}": value for name, value in summary.items()})
        entry = state.log_history[-1]
        entry[RECORD] = json.dumps(record, allow_nan=False)  # after logging: trackers want numbers
        if state.global_step == 0 and not trainer.is_in_train:
            self._before = entry
        self._write(args, state)
        return entry

    def _write(self, args, state) -> None:
        if not state.is_world_process_zero:
            return
        path = os.path.join(args.output_dir, HISTORY)
        lines = {}
        if not self.trainer.is_in_train and os.path.isfile(path):  # of the training that went before
            with open(path) as file:
                lines = {json.loads(line)["step"]: line.strip() for line in file}
        lines |= {entry["step"]: line_of(entry) for entry in state.log_history if RECORD in entry}
        os.makedirs(args.output_dir, exist_ok=True)
        with open(f"{path}.partial", "w") as file:
            file.writelines(f"{lines[step]}\n" for step in sorted(lines))
        os.replace(f"{path}.partial", path)

    def _warn(self, message: str) -> None:
        """Once per kind, on the main process."""
        if self.trainer.accelerator.is_main_process and message not in self._warned:
            self._warned.add(message)
            warnings.warn(message, stacklevel=3)

    # ------------------------------------------------------------------------------------------------- an evaluation

    def _sample(self, step: int) -> tuple[dict, dict[str, float]]:
        """Sample and score: what the history keeps, and the numbers to log."""
        config, n = self.config, self.config.eval_num_samples
        with evaluating(self.trainer.model), temperature_of(self.trainer, config.eval_temperature):
            rewards, found = self.trainer.score_prompts(
                torch.arange(len(self.dataset)), n, dataset=self.dataset, measure=self._measure, seed=step
            )
        rewards = rewards.double().cpu().numpy()
        scored = ~np.isnan(rewards[:, :, self._column])
        correct = rewards[:, :, self._column] > config.eval_success_threshold  # False for NaN
        used = scored if config.eval_unscored == "drop" else np.ones_like(scored)
        successes, counts = correct.sum(1), used.sum(1)
        if n > 1 and all(same for same, _ in found):
            self._warn(
                f"All {n} samples of every prompt are the same text, so they are not independent and say no more than "
                "one each: raise `eval_temperature` (or `temperature`), or set `eval_num_samples` to 1."
            )
        if not scored.any():
            self._warn("No sample was scored: see that the reward function of `eval_reward` returns numbers.")
        summary = summarise(successes, counts, config, step) | {"unscored": 1 - float(scored.mean())}
        if self.answer is not None:
            summary |= self._answers([answers for _, answers in found], correct, used, step)
        if self._weak is not None:
            accepted = rewards[:, :, self._weak] > config.eval_success_threshold
            costs = config.eval_fp_cost
            values, _ = simulate_verifier(
                correct, accepted, loss=[-cost for cost in costs], seed=[config.eval_seed, step]
            )
            if accepted.any():
                summary["accepted_accuracy"] = float(correct[accepted].mean())
            for cost, value in zip(costs, values, strict=True):
                best = best_attempts(value)
                summary[f"best_k@cost_{cost:g}"] = best
                summary[f"value@cost_{cost:g}"] = float(value[best - 1]) if best else 0.0
        settings = {
            "num_samples": n,
            "temperature": self.trainer.temperature if config.eval_temperature is None else config.eval_temperature,
            "reward": self.trainer.reward_func_names[self._column],
            "success_threshold": config.eval_success_threshold,
            "unscored": config.eval_unscored,
        }
        record = {
            "step": step,
            "score": summary.get("pass@1"),
            "n": n,
            "successes": successes.tolist(),
            "counts": counts.tolist(),
            "prompts": self._prompts,
            "settings": settings,
        }
        return record, summary

    def _measure(self, row: int, samples: list) -> tuple[bool, list | None]:
        """Whether a prompt's samples are all the same text, and their answers."""
        texts = [completion_text(sample.completion) or "" for sample in samples]
        if self.answer is None:
            return len({*texts}) == 1, None
        answers = [self.answer(text) for text in texts]
        return len({*texts}) == 1, [None if answer is None else str(answer) for answer in answers]

    def _answers(self, answers: list[list], correct: np.ndarray, used: np.ndarray, step: int) -> dict[str, float]:
        """Majorities and short answers."""
        config, votes, same, similar = self.config, {k: [] for k in self.config.eval_ks if k > 1}, [], []
        golds = None if config.eval_answer_column is None else self.dataset[config.eval_answer_column]
        for q, given in enumerate(answers):
            kept = [
                (answer, bool(right)) for answer, right, use in zip(given, correct[q], used[q], strict=True) if use
            ]
            if golds is None:
                balance = {}
                for answer, right in kept:
                    balance[answer] = balance.get(answer, 0) + (1 if right else -1)
                gold = {answer for answer, difference in balance.items() if difference > 0}
            else:
                gold = str(golds[q])
                if kept:
                    same.append(np.mean([a is not None and exact_match(a, gold) for a, _ in kept]))
                    ratios = [levenshtein_ratio(answer or "", gold) for answer, _ in kept]
                    similar.append(np.mean([ratio >= config.eval_lr_threshold for ratio in ratios]))
            for k in votes:
                if k <= len(kept):
                    votes[k].append(maj_at_k([a for a, _ in kept], gold, k, [config.eval_seed, step, q]))
        named = {f"maj@{k}": values for k, values in votes.items()} | {"exact_match": same, "levenshtein": similar}
        return {key: x for name, values in named.items() for key, x in with_interval(name, values, config).items()}


def summarise(successes, counts, config: EvalStatsConfig, step: int = 0) -> dict[str, float]:
    """
    The numbers that are logged of an evaluation, as far as they follow from what was correct.

    Args:
        successes (sequence of `int`), counts (sequence of `int`):
            Correct samples, and samples, of every prompt, shape `(Q,)`; a prompt without samples is left out.
        config ([`EvalStatsConfig`]):
            Settings.
        step (`int`, *optional*, defaults to `0`):
            Joins the seed of the bootstrap.

    Returns:
        `dict[str, float]`: numbers by name; those that are undefined are left out.
    """
    successes, counts = np.asarray(successes), np.asarray(counts)
    successes, counts = successes[counts > 0], counts[counts > 0]
    if not len(counts):
        return {}
    rates = successes / counts
    low, high = bootstrap_interval(rates, config.eval_alpha, config.eval_bootstrap, [config.eval_seed, step])
    numbers = {**with_interval("pass@1", rates, config), "pass@1_boot_low": low, "pass@1_boot_high": high}
    for k in config.eval_ks:
        enough = counts >= k
        if k > 1 and enough.any():
            for name, score in (("pass", pass_at_k), ("pass_hat", pass_hat_k)):
                numbers |= with_interval(f"{name}@{k}", score(counts[enough], successes[enough], k), config)
    split = variance_split([[1] * c + [0] * (n - c) for c, n in zip(successes, counts, strict=True)])
    numbers |= {"sampling_variance": split.sampling, "prompt_variance": split.prompt}
    numbers["detectable_difference"] = detectable_difference(
        math.sqrt(split.total), 1, config.eval_alpha, config.eval_power
    )
    return {name: value for name, value in numbers.items() if math.isfinite(value)}


def with_interval(name: str, values, config: EvalStatsConfig) -> dict[str, float]:
    """A mean over prompts with its bounds, by name; what is undefined is left out."""
    if not len(values):
        return {}
    mean = float(np.mean(values))
    low, high = normal_interval(mean, clustered_se(values), config.eval_alpha)
    return {name: mean} if math.isnan(low) else {name: mean, f"{name}_low": low, f"{name}_high": high}


def metrics_of(entry: dict) -> dict[str, float]:
    """The numbers of an evaluation in an entry of `log_history`."""
    return {name: value for name, value in entry.items() if name.startswith(PREFIX) and name != RECORD}


def line_of(entry: dict) -> str:
    """The line of the history that an entry of `log_history` makes."""
    summary = {name.removeprefix(PREFIX): value for name, value in metrics_of(entry).items()}
    return json.dumps({**json.loads(entry[RECORD]), "summary": summary}, allow_nan=False)


# ------------------------------------------------------------------------------------------------------ the trainer


def reward_column(trainer, config: EvalStatsConfig, field: str) -> int:
    """Column of the reward function that a setting names, the first one if None."""
    name = getattr(config, field)
    if name is not None and name not in trainer.reward_func_names:
        raise ValueError(
            f"`{field}` names the reward function {name!r}, which there is not: choose one of "
            f"{', '.join(map(repr, trainer.reward_func_names))}."
        )
    return 0 if name is None else trainer.reward_func_names.index(name)


@contextlib.contextmanager
def evaluating(model):
    """Inside, the model is in evaluation mode."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


def check_temperature(trainer, temperature: float | None) -> None:
    """Refuse a temperature of its own where it would have no effect."""
    if temperature is None:
        return
    if trainer.rollout_func is not None:
        raise ValueError(
            f"`eval_temperature={temperature}` cannot be handed to a `rollout_func`, which samples by itself: leave "
            "it None."
        )
    if trainer.use_vllm and "temperature" in (trainer.args.generation_kwargs or {}):
        raise ValueError(
            f"`eval_temperature={temperature}` would be overruled by the 'temperature' in `generation_kwargs`, which "
            "goes to vLLM: set TRL's `temperature` in its place, or leave `eval_temperature` None."
        )


@contextlib.contextmanager
def temperature_of(trainer, temperature: float | None):
    """Sample at another temperature inside."""
    if temperature is None:
        yield
        return
    if trainer.use_vllm:  # read at every generation, colocated or on a server
        engine, name, value = trainer.vllm_generation, "temperature", temperature
    else:
        engine, name, value = trainer, "generation_config", copy.deepcopy(trainer.generation_config)
        if temperature > 0:
            value.update(do_sample=True, temperature=temperature)
        else:  # what only sampling uses goes back to its defaults, which say nothing
            value.update(do_sample=False, temperature=1.0, top_p=1.0, top_k=50, min_p=None)
    before = getattr(engine, name)
    setattr(engine, name, value)
    try:
        yield
    finally:
        setattr(engine, name, before)
