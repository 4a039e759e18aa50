"""What all recipes share: their options, and a run from the data to the saved model with its report."""

import argparse
import difflib
import json
import math
import os
import random
import shlex
import sys
import time
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import torch
import yaml
from huggingface_hub import EvalResult, ModelCard
from packaging.version import Version
from transformers import ProgressCallback, TrainerCallback
from transformers.integrations import is_trackio_available
from transformers.trainer_callback import PrinterCallback
from trl import GRPOConfig, ModelConfig, TrlParser, get_peft_config, get_quantization_config

from .callbacks.difficulty import DifficultyCallback
from .callbacks.entropy_law import EntropyLawCallback
from .callbacks.token_entropy import TokenEntropyCallback
from .core import MethodConfig, MethodTrainer, MixingError, card, mix
from .core.mixing import Mix
from .core.state import newest_complete
from .report import RunReportCallback, write_report
from .tasks.data import load_data, load_rewards
from .tasks.embedded import POLICY_PATH, TRAIN_SIZE


# Settings of a run with the embedded policy: one to two minutes on two CPU cores.
EMBEDDED = {
    "max_steps": 400,
    "per_device_train_batch_size": 64,
    "max_completion_length": 8,
    "learning_rate": 2e-4,
    "gradient_checkpointing": False,
    "bf16": False,
    "logging_steps": 5,
    "logging_first_step": True,
    "spo_offline_n": 2,  # of 4,500 prompts; the paper's 8 would cost more rollouts than the training
}


@dataclass
class RecipeArguments:
    r"""
    Options of every recipe, beside those of the methods' config and of [`~trl.ModelConfig`].

    Parameters:
        methods (`list[str]`, *optional*, defaults to `[]`):
            Methods to train with, by the names of their files; none is GRPO as TRL has it.
        blend (`list[str]`, *optional*, defaults to `[]`):
            Weights of the methods that have advantages of their own, such as `spo=0.5 bnpo=0.5`.
        paper (`bool`, *optional*, defaults to `False`):
            Whether to use the settings of the published runs, `recipes/configs/<method>.yaml`, of every method.
        dataset (`str`, *optional*, defaults to `"arithmetic"`):
            `"arithmetic"`, `"reasoning_gym:<task>"`, the path of a file, or the id of a data set on the Hub.
        dataset_config (`str`, *optional*):
            Configuration of a Hub data set.
        dataset_train_split (`str`, *optional*, defaults to `"train"`):
            Split to train on.
        dataset_test_split (`str`, *optional*):
            Held-out split; by default what the data holds out, or a tenth of the training prompts.
        dataset_size (`int`, *optional*, defaults to `4500`):
            Number of training prompts where they are made.
        prompt_column (`str`, *optional*, defaults to `"prompt"`):
            Column that holds the prompts.
        conversational (`bool`, *optional*, defaults to `False`):
            Whether to turn plain prompts into a user message.
        task_config (`dict`, *optional*):
            Settings of a reasoning_gym task; JSON on the command line.
        rewards (`list[str]`, *optional*, defaults to `[]`):
            Rewards by name or import path; none takes the data's own.
        eval_samples (`int`, *optional*, defaults to `4`):
            Samples per held-out prompt, before and after training.
        eval_prompts (`int`, *optional*, defaults to `200`):
            Most held-out prompts to use; 0 leaves the evaluation out.
        watch (`bool`, *optional*, defaults to `True`):
            Whether to follow the entropy, and the difficulty of the prompts, and to write `report.html` at the end.
    """

    methods: list[str] = field(default_factory=list, metadata={"help": "Methods by name; none is TRL's GRPO."})
    blend: list[str] = field(default_factory=list, metadata={"help": "Weights of advantages: spo=0.5 bnpo=0.5."})
    paper: bool = field(default=False, metadata={"help": "Use the settings of the methods' published runs."})
    dataset: str = field(
        default="arithmetic",
        metadata={"help": "'arithmetic', 'reasoning_gym:<task>', the path of a file or a Hub data set id."},
    )
    dataset_config: str | None = field(default=None, metadata={"help": "Configuration of a Hub data set."})
    dataset_train_split: str = field(default="train", metadata={"help": "Split to train on."})
    dataset_test_split: str | None = field(default=None, metadata={"help": "Held-out split."})
    dataset_size: int = field(default=TRAIN_SIZE, metadata={"help": "Number of training prompts where they are made."})
    prompt_column: str = field(default="prompt", metadata={"help": "Column that holds the prompts."})
    conversational: bool = field(default=False, metadata={"help": "Turn plain prompts into a user message."})
    task_config: dict | str | None = field(
        default=None, metadata={"help": "Settings of a reasoning_gym task, as JSON."}
    )
    rewards: list[str] = field(
        default_factory=list, metadata={"help": "Rewards by name or import path; none takes the data's own."}
    )
    eval_samples: int = field(default=4, metadata={"help": "Samples per held-out prompt."})
    eval_prompts: int = field(default=200, metadata={"help": "Most held-out prompts to use; 0: no evaluation."})

    watch: bool = field(default=True, metadata={"help": "Follow entropy and prompts, and write a report."})

    def __post_init__(self):
        if isinstance(self.task_config, str):
            text = self.task_config
            try:
                self.task_config = json.loads(text)
            except json.JSONDecodeError as error:
                raise ValueError(
                    f"`task_config` must be JSON such as '{{\"max_terms\": 3}}', got {text!r} ({error})."
                ) from error
        if self.task_config is not None and not isinstance(self.task_config, dict):
            raise ValueError(f"`task_config` must be a mapping of settings, got {self.task_config!r}.")
        if self.eval_samples < 1:
            raise ValueError(f"`eval_samples` must be at least 1, got {self.eval_samples}.")
        if self.eval_prompts < 0:
            raise ValueError(f"`eval_prompts` must be at least 0, got {self.eval_prompts}.")


# ------------------------------------------------------------------------------------------------------------- parsing


class Parsed(NamedTuple):
    """What a command line and its files say."""

    Trainer: type
    recipe: RecipeArguments
    args: GRPOConfig
    model: ModelConfig


class _Parser(TrlParser):
    def error(self, message):
        self.exit(2, f"{self.prog}: error: {message}\n")


def parse(
    methods: list[str] | None = None, defaults: dict[str, Any] | None = None, argv: list[str] | None = None
) -> Parsed:
    """
    Read the options. Command line > `--config` > `--paper` > `defaults` > settings for the embedded policy > defaults
    of the config classes.

    Args:
        methods (`list[str]`, *optional*):
            Methods unless others are named.
        defaults (`dict[str, Any]`, *optional*):
            The recipe's own defaults.
        argv (`list[str]`, *optional*):
            Command line; that of the process by default.

    Returns:
        `Parsed`: trainer class, recipe options, training config and model config.

    Raises:
        ValueError: naming the option, its value and the remedy.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    # The methods decide which options there are.
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False, prog=_prog())
    first.add_argument("--config")
    first.add_argument("--methods", nargs="*")
    first.add_argument("--blend", nargs="*")
    named, rest = first.parse_known_args(argv)
    file = {} if named.config is None else _read_yaml(named.config, "config")
    for name, value in _mapping(file.pop("env", {}), "env", named.config).items():
        os.environ[name] = str(value)
    own = list(methods or [])
    chosen = named.methods if named.methods is not None else file.pop("methods", own)
    file.pop("methods", None)
    chosen = [chosen] if isinstance(chosen, str) else list(chosen or [])
    blend = named.blend if named.blend is not None else file.pop("blend", [])
    file.pop("blend", None)
    if isinstance(blend, dict):  # as YAML has it
        blend = [f"{name}={weight}" for name, weight in blend.items()]
    blend = [blend] if isinstance(blend, str) else list(blend or [])
    weights = _weights(blend)
    if weights and not chosen:
        raise ValueError(f"`blend` weighs {', '.join(weights)}, but no method is named: give --methods.")
    Trainer, Config = mix(*chosen, blend=weights) if chosen else Mix(MethodTrainer, MethodConfig)  # noqa: N806

    types = (RecipeArguments, Config, ModelConfig)
    options = {"allow_abbrev": False, "prog": _prog(), "usage": "%(prog)s [--config FILE] [--option value ...]"}
    parser = _Parser(types, **options)
    given = _given(_Parser(types, add_help=False, **options), rest)
    file = _converted(parser, file, named.config)
    papers = {}
    if given.get("paper", file.get("paper", (defaults or {}).get("paper", False))):
        papers = {name: _converted(parser, *_paper_settings(name)) for name in chosen}
        if not papers:
            raise ValueError(
                "`paper` asks for the settings of published runs, but no method is named: give --methods."
            )
    if sorted(chosen) != sorted(own):  # the recipe's defaults may be those of its own methods
        known = {action.dest for action in parser._actions}
        defaults = {name: value for name, value in (defaults or {}).items() if name in known}

    layers = [
        file,
        _merged(papers, decided=given.keys() | file.keys()),
        _converted(parser, defaults or {}, "the recipe's defaults"),
    ]
    settings = {}
    for layer in reversed(layers):
        settings = _override(settings, layer)
    settings = {name: value for name, value in settings.items() if name in _override(settings, given)}
    everything = settings | given
    if everything.get("hub_strategy", "end") != "end":
        raise ValueError(f"`hub_strategy` must be 'end', got {everything['hub_strategy']!r}: recipes upload once.")
    below = {"output_dir": f"runs/{'+'.join(sorted(chosen)) or 'grpo'}"}
    if is_trackio_available():
        below |= {"report_to": "trackio", "project": "trl-ext"}
    below["use_cpu"] = everything.get("use_cpu", not torch.accelerator.is_available())
    if below["use_cpu"]:
        below["bf16"] = False
    if is_embedded(everything.setdefault("model_name_or_path", POLICY_PATH)):
        known = {action.dest for action in parser._actions}
        below |= {name: value for name, value in EMBEDDED.items() if name in known}
        below["model_name_or_path"] = POLICY_PATH
        if "num_train_epochs" in everything:
            del below["max_steps"]
    parser.set_defaults_with_config(**below | settings | {"methods": chosen, "blend": blend})
    recipe, args, model = parser.parse_args_and_config(rest)
    args.run_name = args.run_name or Path(args.output_dir).name
    return Parsed(Trainer, recipe, args, model)


def _weights(blend: list[str]) -> dict[str, float] | None:
    weights = {}
    for part in blend:
        name, _, weight = str(part).partition("=")
        try:
            weights[name] = float(weight)
        except ValueError:
            raise ValueError(f"`blend` must be name=number for every estimator, got {part!r}.") from None
    return weights or None


def is_embedded(model: str) -> bool:
    """Whether a model is the embedded policy."""
    return os.path.realpath(model) == os.path.realpath(POLICY_PATH)


def _prog() -> str:
    return Path(sys.argv[0]).name


def _read_yaml(path: str, option: str) -> dict:
    try:
        content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"`{option}` {path!r} cannot be read ({error.strerror}): correct the path.") from error
    except yaml.YAMLError as error:
        raise ValueError(f"`{option}` {path!r} is not YAML: {error}") from error
    return _mapping(content, option, path)


def _mapping(content, option: str, path: str | None) -> dict:
    if not isinstance(content or {}, dict):
        raise ValueError(f"`{option}` in {path!r} must be lines of 'key: value', got {content!r:.100}.")
    return content or {}


def _paper_settings(method: str) -> tuple[dict, str]:
    name = f"{method}.yaml"
    package = Path(__file__).resolve().parent  # a wheel holds the files too
    folders = (Path(sys.argv[0]).resolve().parent / "configs", package.parent / "recipes/configs", package / "configs")
    for folder in folders:
        if (folder / name).is_file():
            return _read_yaml(str(folder / name), "paper"), name
    raise ValueError(
        f"`paper` asks for the settings of {method!r}, but there is no configs/{name} beside the recipe: run a recipe "
        "from a checkout of trl-ext, or leave --paper out."
    )


def _given(parser: TrlParser, argv: list[str]) -> dict:
    """The options that a command line really names, with their values."""
    for action in parser._actions:
        action.default = argparse.SUPPRESS
    given, unknown = parser.parse_known_args(argv)
    if unknown := [word for word in unknown if word not in ("-h", "--help")]:
        known = {option for action in parser._actions for option in action.option_strings}
        raise ValueError(f"unknown option {unknown[0]!r}{_hint(unknown[0].split('=')[0], known)}")
    return vars(given)


def _hint(name: str, known) -> str:
    close = difflib.get_close_matches(name, known, n=3)
    return f": did you mean {' or '.join(close)}?" if close else "; --help lists all of them."


def _converted(parser: TrlParser, settings: dict, source: str | None) -> dict:
    """Settings from a file, checked and converted as if they stood on the command line."""
    actions = {action.dest: action for action in parser._actions}
    converted = {}
    for name, value in settings.items():
        if name not in actions or name in ("help", "config"):
            raise ValueError(f"unknown key {name!r} in {source}{_hint(str(name), actions)}")
        action = actions[name]
        try:
            if action.nargs == "+" and value is not None:
                value = [_scalar(action, part) for part in (value if isinstance(value, list) else [value])]
            elif not isinstance(value, list):
                value = _scalar(action, value)
        except (TypeError, ValueError, argparse.ArgumentTypeError) as error:
            choices = f"; choose from {', '.join(map(str, action.choices))}" if action.choices else ""
            kind = getattr(action.type, "__name__", str(action.type))
            raise ValueError(f"`{name}` in {source} must be of type {kind}, got {value!r}{choices}.") from error
        converted[name] = value
    return converted


def _scalar(action: argparse.Action, value):
    if value is None or isinstance(value, dict) or (action.type is str and isinstance(value, bool)):
        return value
    value = str(value) if action.type is None else action.type(str(value))
    if action.choices is not None and value not in action.choices:
        raise ValueError
    return value


def _override(lower: dict, upper: dict) -> dict:
    """Lay settings over others. TRL takes the batch of a generation from one of two fields and refuses both."""
    dropped = set()
    for pair in (("generation_batch_size", "steps_per_generation"), ("steps_per_generation", "generation_batch_size")):
        if pair[0] in upper:
            dropped.add(pair[1])
    return {name: value for name, value in lower.items() if name not in dropped} | upper


def _merged(papers: dict[str, dict], decided) -> dict:
    """Join the settings of several papers; what they disagree on must be decided by the user."""
    merged, owner = {}, {}
    for method, settings in papers.items():
        for name, value in settings.items():
            if name in merged and merged[name] != value and name not in decided:
                raise ValueError(
                    f"`{name}` is {merged[name]!r} in the paper settings of {owner[name]} and {value!r} in those of "
                    f"{method}: choose with --{name} or in the --config file."
                )
            merged[name], owner[name] = value, method
    return merged


# ---------------------------------------------------------------------------------------------------------- evaluation


class Estimate(NamedTuple):
    """A mean over prompts and half the width of its 95% interval (None if there is only one prompt)."""

    mean: float
    margin: float | None


def evaluate(trainer: MethodTrainer, dataset, n: int) -> torch.Tensor:
    """
    Sample and score held-out prompts. Every process must call it.

    Args:
        trainer ([`MethodTrainer`]):
            The trainer.
        dataset ([`~datasets.Dataset`]):
            Held-out prompts, P rows.
        n (`int`):
            Samples per prompt.

    Returns:
        `torch.Tensor`: Weighted sums of the rewards, shape `(P, n)`, the same on every process; NaN if unscored.
    """
    matrix = trainer.score_prompts(torch.arange(len(dataset)), n, dataset=dataset).double().cpu()
    rewards = (matrix * trainer.reward_weights.double().cpu()).nansum(-1)
    return torch.where(matrix.isnan().all(-1), torch.nan, rewards)


def estimate(values: torch.Tensor) -> Estimate:
    """
    Mean with a 95% interval, prompts being the independent units.

    Args:
        values (`torch.Tensor`):
            One mean per prompt, shape `(P,)`; NaN is left out.

    Returns:
        `Estimate`: the mean and half the interval's width.
    """
    values = values[~values.isnan()]
    margin = None if len(values) < 2 else 1.96 * values.std().item() / math.sqrt(len(values))
    return Estimate(values.mean().item(), margin)


class _Before(TrainerCallback):
    """Evaluates the starting policy once the model is ready for the device and the processes."""

    def __init__(self, trainer, dataset, n: int):
        self.trainer, self.dataset, self.n = trainer, dataset, n
        self.rewards, self.step, self.seconds = None, 0, 0.0

    def on_train_begin(self, args, state, control, **kwargs):
        start = time.perf_counter()
        self.step = state.global_step
        if self.dataset is not None:
            self.rewards = evaluate(self.trainer, self.dataset, self.n)
        self.seconds = time.perf_counter() - start


class _Bar(ProgressCallback):
    """The progress bar, with the reward beside it instead of a printed line per log."""

    def on_log(self, args, state, control, logs=None, **kwargs):
        if self.training_bar is not None and "reward" in (logs or {}):
            self.training_bar.set_postfix(reward=f"{logs['reward']:.3f}")


# -------------------------------------------------------------------------------------------------------------- report


def _summary(trainer, parsed: Parsed, before: _Before, after, seconds: float, command: str) -> dict:
    recipe = parsed.recipe
    model = parsed.model.model_name_or_path
    summary = {
        "methods": recipe.methods,
        "trainer": type(trainer).__name__,
        "model": "embedded policy" if is_embedded(model) else model,
        "dataset": recipe.dataset,
        "rewards": trainer.reward_func_names,
        "seed": trainer.args.seed,
        "processes": trainer.accelerator.num_processes,
        "start_step": before.step,
        "steps": trainer.state.global_step,
        "rollouts": trainer.rollouts_spent,
        "minutes": seconds / 60,
        "metric": None,
        "eval_prompts": 0,
        "eval_samples": recipe.eval_samples,
        "before": None,
        "after": None,
        "gain": None,
        "command": command,
        "versions": card.versions(),
        "curve": card.reward_curve(trainer.state.log_history),
    }
    if after is not None and before.rewards is not None:
        scores = torch.cat([before.rewards, after])
        binary = bool(((scores == 0) | (scores == 1) | scores.isnan()).all())
        per_prompt = [rewards.nanmean(1) for rewards in (before.rewards, after)]
        summary |= {"metric": "accuracy" if binary else "mean reward", "eval_prompts": len(after)}
        for name, values in zip(
            ("before", "after", "gain"), (*per_prompt, per_prompt[1] - per_prompt[0]), strict=True
        ):
            summary[name] = estimate(values)._asdict()
    return summary


def _cells(summary: dict) -> dict[str, str]:
    """The results in words, by column."""

    def show(part: dict | None, sign: str = "") -> str:
        if part is None or math.isnan(part["mean"]):
            return "-"
        scale, digits = (100, 1) if summary["metric"] == "accuracy" else (1, 3)
        unit = (" points" if sign else "%") if summary["metric"] == "accuracy" else ""
        margin = "" if part["margin"] is None else f" ± {scale * part['margin']:.{digits}f}"
        return f"{scale * part['mean']:{sign}.{digits}f}{margin}{unit}"

    label = f"held-out {summary['metric'] or 'reward'}"
    return {
        f"{label} before": show(summary["before"]),
        "after": show(summary["after"]),
        "gain": show(summary["gain"], "+"),
        "rollouts": f"{summary['rollouts']:,}",
        "minutes": f"{summary['minutes']:.1f}",
    }


def _append_results(folder: str, summary: dict) -> None:
    """Add the results to the model card that the trainer has written."""
    cells = _cells(summary)
    lines = ["", "## Results", "", "| " + " | ".join(cells) + " |", "|---" * len(cells) + "|"]
    lines += ["| " + " | ".join(cells.values()) + " |", ""]
    if summary["after"] is not None:
        lines += [
            f"{summary['eval_prompts']} held-out prompts of `{summary['dataset']}`, {summary['eval_samples']} samples "
            "each; 95% intervals over prompts. Seed "
            f"{summary['seed']}, {summary['steps']} steps, processes: {summary['processes']}.",
            "",
        ]
    path = os.path.join(folder, "README.md")
    model_card = ModelCard.load(path)
    model_card.text = model_card.text.rstrip() + "\n" + "\n".join(lines) + "\n"
    if summary["after"] is not None and not math.isnan(summary["after"]["mean"]):
        model_card.data.model_name = model_card.data.to_dict().get("model_name") or Path(folder).resolve().name
        model_card.data.eval_results = [
            EvalResult(
                task_type="text-generation",
                dataset_type=summary["dataset"],
                dataset_name=summary["dataset"],
                metric_type=summary["metric"].replace(" ", "_"),
                metric_name=f"held-out {summary['metric']}",
                metric_value=summary["after"]["mean"],
            )
        ]
    model_card.save(path)


def _print_table(summary: dict) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"{summary['trainer']} on {summary['dataset']}")
    for name in (cells := _cells(summary)):
        table.add_column(name, justify="right")
    table.add_row(*cells.values())
    Console().print(table)


# ----------------------------------------------------------------------------------------------------------------- run


def main(
    methods: list[str] | None = None, defaults: dict[str, Any] | None = None, argv: list[str] | None = None
) -> None:
    """
    Run a recipe: parse the options, train, evaluate before and after, save the model with its card, curve and numbers.

    Args:
        methods (`list[str]`, *optional*):
            Methods unless the command line or its file names others; none is GRPO as TRL has it.
        defaults (`dict[str, Any]`, *optional*):
            The recipe's own defaults.
        argv (`list[str]`, *optional*):
            Command line; that of the process by default.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    try:
        parsed = parse(methods, defaults, argv)
        push = _check_upload(parsed.args)
        trainer, held_out = _build(parsed)
    except (ValueError, MixingError, OSError) as error:
        raise SystemExit(f"{_prog()}: error: {error}") from error
    args, accelerator = trainer.args, trainer.accelerator
    trainer.command = card.command_line(argv)
    _quieten(trainer)
    if parsed.recipe.watch:
        facts = {"data set": parsed.recipe.dataset}
        trainer.add_callback(DifficultyCallback(trainer))
        trainer.add_callback(EntropyLawCallback(trainer=trainer))
        trainer.add_callback(TokenEntropyCallback(trainer))
        trainer.add_callback(RunReportCallback(trainer, facts=facts, at_end=False))
    before = _Before(trainer, held_out, parsed.recipe.eval_samples)
    trainer.add_callback(before)
    start = time.perf_counter()
    trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
    seconds = time.perf_counter() - start - before.seconds
    after = None if held_out is None else evaluate(trainer, held_out, parsed.recipe.eval_samples)
    summary = _summary(trainer, parsed, before, after, seconds, trainer.command)

    folder = args.output_dir
    trainer.save_model(folder)
    trainer.save_state_of_method(folder)
    name = parsed.recipe.dataset
    on_hub = name != "arithmetic" and ":" not in name and not os.path.exists(name)
    trainer.create_model_card(model_name=Path(folder).name, dataset_name=name if on_hub else None)
    failure = None
    if accelerator.is_main_process:
        _append_results(folder, summary)
        with open(os.path.join(folder, "results.json"), "w", encoding="utf-8") as file:
            json.dump(summary, file, indent=2)
            file.write("\n")
        _print_table(summary)
        if parsed.recipe.watch:
            write_report(folder)
        print(f"Model, card, curve{', report.html' * parsed.recipe.watch} and results.json are in {folder}.")
        failure = _upload(args, push) if push else None
    accelerator.wait_for_everyone()
    if Version(version("transformers")) >= Version("5.18.0"):
        trainer.end()
    if failure:
        raise SystemExit(failure)


def _build(parsed: Parsed):
    """The trainer, and the held-out prompts to evaluate on or None."""
    recipe, args, model = parsed.recipe, parsed.args, parsed.model
    _check_embedded(args, model)
    checkpoint = args.resume_from_checkpoint
    if checkpoint is not None and str(checkpoint).lower() == "true":
        args.resume_from_checkpoint = newest_complete(args.output_dir)
    elif checkpoint is not None and not os.path.isdir(checkpoint):
        raise ValueError(
            f"`resume_from_checkpoint` must be a checkpoint's folder, or 'true' for the last one in `output_dir`; "
            f"there is no folder {checkpoint!r}."
        )
    task = load_data(
        recipe.dataset,
        config=recipe.dataset_config,
        train_split=recipe.dataset_train_split,
        test_split=recipe.dataset_test_split,
        size=recipe.dataset_size,
        seed=args.seed,
        prompt_column=recipe.prompt_column,
        conversational=recipe.conversational,
        task_config=recipe.task_config,
    )
    rewards = load_rewards(recipe.rewards) if recipe.rewards else task.rewards
    if not rewards:
        raise ValueError(
            f"`rewards` is empty, and `dataset` {recipe.dataset!r} has no reward of its own: name one, for example "
            "--rewards exact_match, accuracy_reward or my_rewards.brevity (an import path)."
        )
    args.model_init_kwargs = {
        "revision": model.model_revision,
        "trust_remote_code": args.trust_remote_code,
        "attn_implementation": model.attn_implementation,
        "dtype": model.dtype,
        **(args.model_init_kwargs or {}),
    }
    trainer = parsed.Trainer(
        model=model.model_name_or_path,
        reward_funcs=rewards,
        args=args,
        train_dataset=task.train,
        eval_dataset=task.test if args.eval_strategy != "no" else None,
        peft_config=get_peft_config(model),
        quantization_config=get_quantization_config(model),
    )
    held_out = task.test if recipe.eval_prompts else None
    if held_out is not None and len(held_out) > recipe.eval_prompts:
        # The same for every seed, and not the first ones: a file may be sorted.
        held_out = held_out.select(sorted(random.Random(0).sample(range(len(held_out)), recipe.eval_prompts)))
    return trainer, held_out


def _check_embedded(args, model: ModelConfig) -> None:
    if not is_embedded(model.model_name_or_path):
        return
    config = json.loads(Path(POLICY_PATH, "config.json").read_text())
    longest = config["max_position_embeddings"]
    if args.max_completion_length >= longest:
        raise ValueError(
            f"`max_completion_length` is {args.max_completion_length}, but the embedded policy reads at most "
            f"{longest} tokens: give a real model by --model_name_or_path, or shorter completions."
        )


def _quieten(trainer) -> None:
    trainer.remove_callback(PrinterCallback)
    if trainer.pop_callback(ProgressCallback) is not None:
        trainer.add_callback(_Bar)


def _check_upload(args) -> bool:
    """Whether to upload at the end; fails now if that could not work."""
    if not args.push_to_hub:
        return False
    from huggingface_hub import HfApi

    try:
        HfApi(token=args.hub_token).whoami()
    except Exception as error:  # whatever it is, it would fail again after hours of training
        reason = (str(error).splitlines() or [""])[0]
        raise ValueError(
            f"`push_to_hub` is set, but the Hub does not know you ({type(error).__name__}: {reason}). Log in with "
            "`hf auth login` and check the network, or leave --push_to_hub out and upload later with `hf upload`."
        ) from error
    args.push_to_hub = False  # one upload at the end, with the card and the results
    return True


def _upload(args, push: bool) -> str | None:
    """Upload the folder; returns what to say if that failed."""
    from huggingface_hub import HfApi

    api, folder = HfApi(token=args.hub_token), args.output_dir
    repo = args.hub_model_id or Path(folder).resolve().name
    try:
        url = api.create_repo(repo, private=args.hub_private_repo, exist_ok=True)
        api.upload_folder(
            repo_id=url.repo_id,
            folder_path=folder,
            revision=args.hub_revision,
            commit_message="Trained with trl-ext",
            ignore_patterns=["checkpoint-*/**", "trl_ext_*.pt"],
        )
    except Exception as error:
        return (
            f"{_prog()}: error: everything is in {folder}, but uploading it failed ({type(error).__name__}: {error}). "
            f"Upload it with:\nhf upload {shlex.quote(repo)} {shlex.quote(folder)} . --exclude 'checkpoint-*/**'"
        )
    print(f"Uploaded to {url}.")
    return None
