"""Where prompts and rewards come from: the embedded sums, reasoning_gym, local files and the Hub."""

import difflib
import importlib
import json
import os
import random
import re
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from .bounded import SECONDS, WORKER, MathReward, evaluated_by, harmless
from .embedded import TRAIN_SIZE, arithmetic, completion_text, exact_match


BUILDERS = {".json": "json", ".jsonl": "json", ".parquet": "parquet", ".csv": "csv"}
# Endings of names that are meant as files, although no loader takes them.
OTHER_ENDINGS = {".arrow", ".gz", ".pickle", ".pkl", ".tsv", ".txt", ".xlsx", ".xml", ".yaml", ".yml", ".zip", ".zst"}
REASONING_GYM = "reasoning_gym:"
TRL_REWARDS = (
    "accuracy_reward",
    "reasoning_accuracy_reward",
    "think_format_reward",
    "get_soft_overlong_punishment",
)


@dataclass(frozen=True)
class Task:
    """
    What a recipe trains on.

    Args:
        name (`str`):
            The name that was loaded.
        train (`datasets.Dataset`):
            Training prompts, in the column `prompt`, with the columns that the rewards need.
        test (`datasets.Dataset`, *optional*):
            Held-out prompts; `None` if the data has a single prompt.
        rewards (`list[Callable]`, *optional*, defaults to `[]`):
            The data's own reward functions; empty for files and Hub data sets, see [`load_rewards`].
    """

    name: str
    train: Any
    test: Any = None
    rewards: list[Callable] = field(default_factory=list)


def load_data(
    name: str = "arithmetic",
    *,
    config: str | None = None,
    train_split: str = "train",
    test_split: str | None = None,
    size: int = TRAIN_SIZE,
    seed: int = 0,
    prompt_column: str = "prompt",
    conversational: bool = False,
    task_config: dict[str, Any] | None = None,
) -> Task:
    """
    Load prompts and, where the data has them, rewards.

    Args:
        name (`str`, *optional*, defaults to `"arithmetic"`):
            One of:

            - `"arithmetic"`: the embedded sums ([`arithmetic`]), rewarded by [`exact_match`];
            - `"reasoning_gym:<task>"`, for example `"reasoning_gym:chain_sum"`: questions made by reasoning_gym,
              rewarded by the task's own verifier ([`ReasoningGymReward`]);
            - the path of a `.json`, `.jsonl`, `.parquet` or `.csv` file;
            - anything else: id of a data set on the Hub, or a local directory that `datasets.load_dataset` reads.
        config (`str`, *optional*):
            Configuration of a Hub data set.
        train_split (`str`, *optional*, defaults to `"train"`):
            Split of a Hub data set to train on. Other sources have the split `"train"` only.
        test_split (`str`, *optional*):
            Held-out split of a Hub data set. By default a seeded tenth of the train split's unique prompts is held
            out. The embedded sums and reasoning_gym have their own held-out prompts, `"test"`.
        size (`int`, *optional*, defaults to `4500`):
            Number of train prompts of the embedded sums (at most 4,500) and of reasoning_gym tasks, which have a
            quarter as many, at most 500, held-out prompts. A task with fewer different questions gives what it has.
            Files and Hub data sets are taken whole.
        seed (`int`, *optional*, defaults to `0`):
            Seed of made prompts and of what is held out.
        prompt_column (`str`, *optional*, defaults to `"prompt"`):
            Column that becomes `prompt`. Another column of that name is dropped.
        conversational (`bool`, *optional*, defaults to `False`):
            Whether to wrap plain prompts as one user message. Prompts that already are messages stay as they are.
        task_config (`dict`, *optional*):
            Settings of the reasoning_gym task. Those of `composite`, which mixes tasks, are
            `{"datasets": [{"name": ..., "weight": ..., "config": {...}}, ...]}`.

    Returns:
        [`Task`]: no prompt that was held out here is in `train`.

    Example:

    ```python
    >>> from trl_ext.tasks import load_data

    >>> task = load_data("arithmetic")
    >>> len(task.train), len(task.test)
    (4500, 500)
    ```
    """
    if not isinstance(name, str) or not name.strip():
        raise ValueError(
            f"name={name!r}: must be 'arithmetic', 'reasoning_gym:<task>', the path of a file or a Hub data set id."
        )
    if isinstance(size, bool) or not isinstance(size, int) or size < 1:
        raise ValueError(f"size={size!r}: must be a whole number of at least 1.")
    if task_config is not None and not name.startswith(REASONING_GYM):
        raise ValueError(
            f"task_config={task_config!r}: only names 'reasoning_gym:<task>' have settings, not "
            f"name={name!r}. Remove it."
        )
    path = _as_file(name)
    made = name == "arithmetic" or name.startswith(REASONING_GYM)
    if config is not None and (made or path is not None):
        raise ValueError(f"config={config!r}: only Hub data sets have configurations, not name={name!r}. Remove it.")

    test = None
    if made:
        _check_split("train_split", train_split, ["train"], name)
        _check_split("test_split", test_split or "test", ["test"], name)
        train, test, rewards = (
            _arithmetic(size, seed) if name == "arithmetic" else _reasoning_gym(name, size, seed, task_config)
        )
    else:
        splits = _read_file(path) if path is not None else _read_hub(name, config)
        _check_split("train_split", train_split, list(splits), name)
        train, rewards = splits[train_split], []
        if test_split is not None:
            _check_split("test_split", test_split, list(splits), name)
            if test_split == train_split:
                raise ValueError(
                    f"test_split={test_split!r}: is the split to train on. Name another one of {list(splits)}, or "
                    "leave test_split out to hold out a tenth of the prompts."
                )
            test = splits[test_split]
            if len(test) == 0:
                raise ValueError(f"test_split={test_split!r}: this split of name={name!r} is empty. Name another one.")
    if len(train) == 0:
        raise ValueError(f"name={name!r}: split {train_split!r} is empty. Give data with at least one row.")

    train = _prepare(train, prompt_column, conversational, name)
    if test is not None:
        test = _prepare(test, prompt_column, conversational, name)
        common = set(_keys(train)) & set(_keys(test))
        if common:
            warnings.warn(
                f"test_split={test_split!r}: {len(common)} of its prompts are in train_split={train_split!r} too.",
                stacklevel=2,
            )
    else:
        train, test = _hold_out(train, seed)
    return Task(name=name, train=train, test=test, rewards=rewards)


def _check_split(field_name: str, value: str, known: list[str], name: str) -> None:
    if value not in known:
        raise ValueError(f"{field_name}={value!r}: name={name!r} has no such split. Use one of {known}.")


# ---------------------------------------------------------------------------------------------------------------------
# Sources


def _arithmetic(size: int, seed: int):
    if size > TRAIN_SIZE:
        raise ValueError(
            f"size={size!r}: the embedded sums are {TRAIN_SIZE}. Use at most that, or name='reasoning_gym:<task>'."
        )
    return arithmetic("train", seed=seed).select(range(size)), arithmetic("test"), [exact_match]


def _reasoning_gym_task(name: str, task_config: dict[str, Any] | None, seed: int, size: int):
    try:
        import reasoning_gym
        from reasoning_gym.factory import DATASETS
    except ImportError as error:
        raise ValueError(
            f"name={REASONING_GYM + name!r}: reasoning_gym is not installed ({error}). "
            'Run: pip install "trl-ext[reasoning]"'
        ) from error
    if name not in DATASETS:
        close = difflib.get_close_matches(name, DATASETS, n=5, cutoff=0.4)
        hint = f"Did you mean one of {close}?" if close else f"Tasks: {', '.join(sorted(DATASETS))}."
        raise ValueError(f"name={REASONING_GYM + name!r}: reasoning_gym has no task {name!r}. {hint}")
    known = [setting.name for setting in fields(DATASETS[name][1]) if setting.name not in ("seed", "size")]
    settings = {} if task_config is None else task_config
    if not isinstance(settings, dict):
        raise ValueError(f"task_config={task_config!r}: must be a dict of settings of {name!r}: {known}.")
    for setting in settings:
        if setting in ("seed", "size"):
            raise ValueError(
                f"task_config={task_config!r}: {setting} is no setting of a task here. Give "
                f"{setting}=... to load_data."
            )
        if setting not in known:
            raise ValueError(
                f"task_config={task_config!r}: {name!r} has no setting {setting!r}. Its settings are {known}."
            )
    try:
        if name == "composite" and "datasets" in settings:  # its parts as plain dicts, as recipes write them
            from reasoning_gym.composite import DatasetSpec

            parts = [DatasetSpec(**part) if isinstance(part, dict) else part for part in settings["datasets"]]
            settings = {**settings, "datasets": parts}
        return reasoning_gym.create_dataset(name, seed=seed, size=size, **settings)
    except Exception as error:
        raise ValueError(
            f"task_config={task_config!r}: {name!r} refuses these settings ({type(error).__name__}: {error}). "
            f"Correct them; its settings are {known}."
        ) from error


def _draw_entries(source, wanted: int) -> dict[str, dict]:
    """Entries by question, each question once, in the order drawn."""
    entries = {}
    for i in range(source.size):
        entry = source[i]
        entries.setdefault(entry["question"], entry)
        if len(entries) == wanted:
            break
    return entries


def _reasoning_gym(name: str, size: int, seed: int, task_config: dict[str, Any] | None):
    from datasets import Dataset

    task = name.removeprefix(REASONING_GYM)
    wanted = min(max(size // 4, 1), 500)
    rng = random.Random(f"{task} {seed}")
    # Entry i of a task depends on the sum of its seed and i, so neighbouring seeds would share most entries.
    source = _reasoning_gym_task(task, task_config, rng.randrange(2**30), 3 * (size + wanted) + 100)
    entries = _draw_entries(source, size + wanted)
    if len(entries) < 2:
        raise ValueError(
            f"task_config={task_config!r}: {task!r} makes only one question with these settings, so that none can be "
            "held out. Choose settings with more questions."
        )
    # Held out at random from one stream: two streams would share the common questions, and lose them on one side only.
    held_out = rng.sample(list(entries), min(wanted, max(len(entries) // 5, 1)))
    test = {question: entries.pop(question) for question in held_out}
    train = dict(list(entries.items())[:size])

    def dataset(entries):
        return Dataset.from_dict(
            {
                "prompt": list(entries),
                "answer": [None if e.get("answer") is None else str(e["answer"]) for e in entries.values()],
                "entry": [encode_entry(entry) for entry in entries.values()],
            }
        )

    return dataset(train), dataset(test), [ReasoningGymReward(task, task_config)]


def _as_file(name: str) -> Path | None:
    """The path that `name` means, or `None` if it is not meant as a file."""
    path = Path(name).expanduser()
    suffix = path.suffix.lower()
    if path.is_dir():
        return None
    if path.is_file() or suffix in BUILDERS or suffix in OTHER_ENDINGS or name.startswith(("/", "./", "../", "~")):
        if suffix not in BUILDERS:
            raise ValueError(
                f"name={name!r}: files ending in {path.suffix!r} cannot be read. Convert it to one of "
                f"{', '.join(BUILDERS)}."
            )
        if not path.is_file():
            raise FileNotFoundError(
                f"name={name!r}: there is no such file (current directory: {Path.cwd()}). Correct the path."
            )
        return path
    return None


def _read_file(path: Path):
    from datasets import load_dataset

    if path.stat().st_size == 0:
        raise ValueError(f"name={str(path)!r}: the file is empty. Give data with at least one row.")
    try:
        return load_dataset(BUILDERS[path.suffix.lower()], data_files=str(path))
    except Exception as error:
        reason = error.__cause__ or error
        raise ValueError(
            f"name={str(path)!r}: could not be read as {path.suffix} ({type(reason).__name__}: {reason}). Repair the "
            "file, and check that it has at least one row."
        ) from error


def _read_hub(name: str, config: str | None):
    from datasets import DatasetDict, load_dataset
    from datasets.exceptions import DatasetNotFoundError

    try:
        loaded = load_dataset(name, config)
    except DatasetNotFoundError as error:
        raise FileNotFoundError(
            f"name={name!r}: neither a file nor a data set on the Hub that you can read ({error}). Correct the name, "
            "or run `hf auth login` for a private or gated one."
        ) from error
    except ConnectionError as error:
        raise FileNotFoundError(
            f"name={name!r}: not a file here, and the Hub could not be reached ({error}). Check the network and "
            "HF_HUB_OFFLINE, or use a local file, 'arithmetic' or 'reasoning_gym:<task>'."
        ) from error
    except Exception as error:
        raise ValueError(
            f"name={name!r}, config={config!r}: the Hub data set could not be loaded ({type(error).__name__}: "
            f"{error}). Correct name or config."
        ) from error
    if not isinstance(loaded, DatasetDict):
        raise ValueError(
            f"name={name!r}: datasets.load_dataset gave a {type(loaded).__name__} instead of splits. Name a map-style "
            "data set."
        )
    return loaded


# ---------------------------------------------------------------------------------------------------------------------
# Prompts


def _is_messages(prompt) -> bool:
    return (
        isinstance(prompt, list)
        and len(prompt) > 0
        and all(isinstance(message, dict) and "role" in message and "content" in message for message in prompt)
    )


def _prepare(dataset, prompt_column: str, conversational: bool, name: str):
    """The data set with a checked column `prompt`."""
    if prompt_column not in dataset.column_names:
        raise ValueError(
            f"prompt_column={prompt_column!r}: name={name!r} has no such column. Use one of {dataset.column_names}."
        )
    if prompt_column != "prompt":
        if "prompt" in dataset.column_names:
            dataset = dataset.remove_columns("prompt")
        dataset = dataset.rename_column(prompt_column, "prompt")
    plain = False
    for row, prompt in enumerate(dataset["prompt"]):
        if not isinstance(prompt, str) and not _is_messages(prompt):
            raise ValueError(
                f"prompt_column={prompt_column!r}: row {row} of name={name!r} holds {prompt!r:.200}. Every prompt "
                "must be text or a list of messages with 'role' and 'content'."
            )
        plain = isinstance(prompt, str)
    if conversational and plain:
        prompts = [[{"role": "user", "content": prompt}] for prompt in dataset["prompt"]]
        dataset = dataset.remove_columns("prompt").add_column("prompt", prompts)
    return dataset


def _keys(dataset) -> list[str]:
    return [json.dumps(prompt, sort_keys=True, default=str) for prompt in dataset["prompt"]]


def _hold_out(dataset, seed: int):
    """Split off a tenth of the unique prompts, at least one."""
    keys = _keys(dataset)
    unique = list(dict.fromkeys(keys))
    if len(unique) < 2:
        return dataset, None
    held_out = set(random.Random(seed).sample(unique, max(1, len(unique) // 10)))
    return (
        dataset.select([row for row, key in enumerate(keys) if key not in held_out]),
        dataset.select([row for row, key in enumerate(keys) if key in held_out]),
    )


# ---------------------------------------------------------------------------------------------------------------------
# Rewards


def _pack(value):
    if isinstance(value, tuple):
        return {"__tuple__": [_pack(item) for item in value]}
    if isinstance(value, list):
        return [_pack(item) for item in value]
    if isinstance(value, dict):
        if all(isinstance(key, str) and not key.startswith("__") for key in value):
            return {key: _pack(item) for key, item in value.items()}
        return {"__items__": [[_pack(key), _pack(item)] for key, item in value.items()]}
    if hasattr(value, "tolist"):  # NumPy scalars and arrays
        return _pack(value.tolist())
    return value


def _unpack(value):
    if isinstance(value, list):
        return [_unpack(item) for item in value]
    if isinstance(value, dict):
        if value.keys() == {"__tuple__"}:
            return tuple(_unpack(item) for item in value["__tuple__"])
        if value.keys() == {"__items__"}:
            return {_unpack(key): _unpack(item) for key, item in value["__items__"]}
        return {key: _unpack(item) for key, item in value.items()}
    return value


def encode_entry(entry: dict) -> str:
    """A reasoning_gym entry as JSON text. Tuples and keys that are not text survive [`decode_entry`]."""
    return json.dumps(_pack(entry), default=str)


def decode_entry(text: str) -> dict:
    """The entry that [`encode_entry`] wrote."""
    return _unpack(json.loads(text))


class ReasoningGymReward:
    """
    TRL reward function: the verifier of a reasoning_gym task. It can be pickled.

    A completion with `<answer>...</answer>` is scored by what its last such pair encloses, any other one by its whole
    text; surrounding white space does not count. An answer on which the verifier fails scores 0.0.

    Verifiers run in a process of their own: an answer that uses up its time or memory scores 0.0. Some of them call
    `eval` on the answer; they see only literals and formulas, and any other answer as none.

    Args:
        task (`str`):
            Name of the task, for example `"chain_sum"`.
        task_config (`dict`, *optional*):
            Its settings.
        seconds (`float`, *optional*, defaults to `5.0`):
            Computing time per completion.
    """

    _TAGGED = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)

    def __init__(self, task: str, task_config: dict[str, Any] | None = None, seconds: float = SECONDS):
        self.task, self.task_config, self.seconds = task, task_config, seconds
        self.__name__ = task
        self._source = None

    def __getstate__(self):
        return {**self.__dict__, "_source": None}

    def __call__(self, completions: list, entry: list[str], **kwargs) -> list[float]:
        """
        Args:
            completions (`list[str]` or `list[list[dict]]`):
                Completions, plain or conversational.
            entry (`list[str]`):
                Column `entry` of the data set, one per completion.
            kwargs:
                Further columns; ignored.

        Returns:
            `list[float]`: scores between 0.0 and 1.0.
        """
        arguments = [self.task, self.task_config, type(self.source).__module__]
        texts = [*map(completion_text, completions)]
        scores = WORKER.score(f"{__name__}:reasoning_gym_scorer", arguments, texts, entry, self.seconds)
        return [score or 0.0 for score in scores]

    @property
    def source(self):
        """The task, which scores; made when it is first needed."""
        if self._source is None:
            self._source = _reasoning_gym_task(self.task, self.task_config, seed=0, size=1)
        return self._source

    def score(self, text: str | None, entry: str) -> float:
        """One completion's score, in this process, and for as long as it takes."""
        decoded, source = decode_entry(entry), self.source
        while hasattr(source, "datasets"):  # a mixture
            source = source.datasets[decoded["metadata"]["source_dataset"]]
        if text is not None:
            tagged = self._TAGGED.findall(text)
            text = (tagged[-1] if tagged else text).strip()
            if not harmless(text, evaluated_by(type(source).score_answer), str(decoded.get("answer"))):
                text = None
        try:
            score = float(source.score_answer(text, decoded))
        except Exception:  # verifiers parse what the model wrote, and some do not guard against all of it
            return 0.0
        return score if score == score else 0.0


def reasoning_gym_scorer(task: str, task_config: dict[str, Any] | None, module: str) -> Callable:
    importlib.import_module(module)  # where a task that is not reasoning_gym's own is registered
    reward = ReasoningGymReward(task, task_config)
    reward.source  # noqa: B018 (the time to make it is not the first completion's)
    return reward.score


def load_rewards(names: list[str]) -> list[Callable]:
    """
    Reward functions by name.

    Args:
        names (`list[str]`):
            Each one of:

            - `"exact_match"`: [`exact_match`];
            - a reward of TRL: `"accuracy_reward"` and `"reasoning_accuracy_reward"` (in bounded time, see
              [`MathReward`]), `"think_format_reward"` or `"get_soft_overlong_punishment"` (with
              `max_completion_len=1280` and `soft_punish_cache=256`);
            - the import path of a function, for example `"my_rewards.brevity"`, also from the current directory.

    Returns:
        `list[Callable]`: in the order of `names`.
    """
    return [_load_reward(name) for name in ([names] if isinstance(names, str) else names)]


def _load_reward(name: str) -> Callable:
    if name == "exact_match":
        return exact_match
    if name in ("accuracy_reward", "reasoning_accuracy_reward"):
        return MathReward(name)
    if name in TRL_REWARDS:
        reward = getattr(importlib.import_module("trl.rewards"), name)
        if name == "get_soft_overlong_punishment":
            reward = reward(max_completion_len=1280, soft_punish_cache=256)
        return reward
    known = ["exact_match", *TRL_REWARDS]
    module_name, _, function = name.rpartition(".") if isinstance(name, str) else ("", "", "")
    if not module_name or not function or name.startswith("."):
        raise ValueError(
            f"rewards={name!r}: unknown reward. Use one of {known}, or the import path of a function such as "
            "'my_rewards.brevity'."
        )
    if not {"", os.getcwd()} & set(sys.path):
        sys.path.insert(0, os.getcwd())
    try:
        module = importlib.import_module(module_name)
    except Exception as error:
        raise ValueError(
            f"rewards={name!r}: module {module_name!r} could not be imported ({type(error).__name__}: {error}). Run "
            f"from the directory that holds it or install it, or use one of {known}."
        ) from error
    if not callable(getattr(module, function, None)):
        there = sorted(key for key, value in vars(module).items() if callable(value) and not key.startswith("_"))
        raise ValueError(f"rewards={name!r}: {module_name!r} has no function {function!r}. It has {there}.")
    return getattr(module, function)
