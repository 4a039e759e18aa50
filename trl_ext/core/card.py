"""The part of a model card that TRL does not write: methods, papers, settings, command, curve and evaluation."""

import contextlib
import dataclasses
import os
import re
import shlex
import sys
from importlib.metadata import version
from pathlib import Path

import psutil
from huggingface_hub import ModelCard

from . import mixing
from .config import MethodConfig


CURVE = "training_curve.png"


def add_methods(trainer) -> None:
    """
    Complete `README.md`, which TRL has just written: the methods and what each changes, the settings that differ from
    TRL's defaults, the curve, the last evaluation of an [`EvalStatsCallback`], command and versions, and the citations
    of all papers; in the metadata `trl-ext` and the methods' names as tags.

    Args:
        trainer ([`MethodTrainer`]):
            The trainer.
    """
    folder = trainer.args.output_dir
    path = os.path.join(folder, "README.md")
    model_card = ModelCard.load(path)
    methods = [cls for cls in mixing.methods_of(type(trainer)) if "_paper" in cls.__dict__]
    # TRL's order is that of a set.
    model_card.data.tags = sorted({*model_card.data.tags, "trl-ext", *(cls.slug for cls in methods)})
    name = model_card.data.to_dict().get("model_name") or Path(folder).resolve().name
    # TRL names models of the Hub only.
    text = model_card.text.replace("[None](https://huggingface.co/None)", "a local model")
    text = text.replace('model="None"', f'model="{name}"').replace("Model Card for None", f"Model Card for {name}")

    lines = ["", "## Methods", ""]
    if methods:
        lines += ["| method | paper | joints of the step it changes |", "|---|---|---|"]
    for cls in methods:
        hooks = ", ".join(f"`{hook}`" for hook in mixing.joints_of(cls))
        paper = f"[{cls._paper['title']}](https://huggingface.co/papers/{cls._paper['id']})"
        lines.append(f"| {cls._name} | {paper} | {hooks} |")
    settings = changed_settings(trainer.args)
    lines += ["", "### Settings that differ from TRL's defaults", "", "| setting | value |", "|---|---|"]
    lines += [f"| `{name}` | `{value}` |" for name, value in settings.items()]
    lines += ["", "### The run", "", f"{trainer.state.global_step} steps, {trainer.rollouts_spent:,} rollouts,"]
    lines += [f"processes: {trainer.accelerator.num_processes}, seed {trainer.args.seed}.", ""]
    lines += ["```bash", trainer.command or command_line(), "```", ""]
    lines += ["Versions: " + ", ".join(f"{name} {number}" for name, number in versions().items()) + "."]
    if draw_curve(trainer.state.log_history, type(trainer)._name or "", os.path.join(folder, CURVE)):
        lines += ["", f"![Reward over rollouts]({CURVE})"]
    lines += _evaluation(trainer.state.log_history)
    if methods[1:]:  # TRL's part cites the first
        lines += ["", "### Citations of the methods"]
        for cls in methods:
            lines += ["", f"Cite {cls._name} as:", "", "```bibtex", cls._paper["citation"].strip(), "```"]
    model_card.text = text.rstrip() + "\n" + "\n".join(lines) + "\n"
    model_card.save(path)


def versions() -> dict[str, str]:
    """Of Python and the packages that decide what a run computes."""
    names = ("trl-ext", "trl", "transformers", "accelerate", "torch")
    return {"python": sys.version.split()[0], **{name: version(name) for name in names}}


def command_line(argv: list[str] | None = None) -> str:
    """
    The command that started this process, without tokens, keys and passwords.

    Args:
        argv (`list[str]`, *optional*):
            Its arguments; those of the process by default.

    Returns:
        `str`: The command, as a shell takes it.
    """
    argv = sys.argv[1:] if argv is None else argv
    script, launcher = sys.argv[0], ["python"]
    if "ACCELERATE_MIXED_PRECISION" in os.environ or "TORCHELASTIC_RUN_ID" in os.environ:
        with contextlib.suppress(psutil.Error):
            parent = psutil.Process().parent().cmdline()
            if script in parent:
                launcher = parent[: parent.index(script)]
                if launcher[1:] and not launcher[1].startswith("-"):  # python .../accelerate launch
                    launcher = launcher[1:]
                launcher[0] = Path(launcher[0]).name
    if os.path.isabs(script) and not os.path.relpath(script).startswith(".."):
        script = os.path.relpath(script)
    return without_secrets([*launcher, script, *argv])


def without_secrets(words: list[str]) -> str:
    """A command without the values of options that name a token of the Hub, a key, a password or a secret."""
    secret = re.compile(r"(?i)--?[\w-]*(hub[-_]?token|api[-_]?key|password|secret)[\w-]*")
    words = list(words)
    for i, word in enumerate(words):
        name, equals, _ = word.partition("=")
        if i and secret.fullmatch(words[i - 1]):
            words[i] = "..."
        elif equals and secret.fullmatch(name):
            words[i] = f"{name}=..."
    return shlex.join(words)


def reward_curve(log_history: list[dict]) -> list[dict]:
    """Rollouts spent, reward and entropy of every training log with a reward."""
    return [
        {"rollouts": row.get("num_rollouts"), "reward": row["reward"], "entropy": row.get("entropy")}
        for row in log_history
        if row.get("reward") is not None
    ]


def draw_curve(log_history: list[dict], title: str, path: str) -> bool:
    """
    Draw reward and, where it was logged, entropy over rollouts.

    Args:
        log_history (`list[dict]`):
            Of the trainer.
        title (`str`):
            Of the picture.
        path (`str`):
            Where to write it.

    Returns:
        `bool`: whether there was anything to draw.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    curve = reward_curve(log_history)
    if not curve:
        return False
    names = ["reward"] + (["entropy"] if any(row["entropy"] is not None for row in curve) else [])
    figure = Figure(figsize=(6, 2.6 * len(names)), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, name in zip(figure.subplots(len(names), squeeze=False, sharex=True)[:, 0], names, strict=True):
        points = [(row["rollouts"], row[name]) for row in curve if row[name] is not None]
        axes.plot(*zip(*points, strict=True), marker="." if len(points) < 20 else None)
        axes.set_ylabel(name)
        axes.grid(alpha=0.3)
    axes.set_xlabel("rollouts")
    figure.suptitle(title)
    figure.savefig(path, dpi=120)
    return True


def _evaluation(log_history: list[dict]) -> list[str]:
    """A table of the last evaluation with intervals, as an [`EvalStatsCallback`] logged it."""
    prefix = "eval_stats/"
    entry = next((entry for entry in reversed(log_history) if f"{prefix}pass@1" in entry), None)
    if entry is None:
        return []
    lines = ["", "### Evaluation", "", f"At step {entry['step']}, with intervals over prompts.", ""]
    lines += ["| metric | value | interval |", "|---|---|---|"]
    for name, value in entry.items():
        if name.startswith(prefix) and f"{name}_low" in entry:
            interval = f"{entry[f'{name}_low']:.3f} to {entry[f'{name}_high']:.3f}"
            lines.append(f"| {name.removeprefix(prefix)} | {value:.3f} | {interval} |")
    return lines


# Where a run wrote and logged says nothing about the model.
_PLACES = {
    "output_dir",
    "logging_dir",
    "run_name",
    "hub_token",
    "push_to_hub",
    "hub_model_id",
    "report_to",
    "use_cpu",
    "dataloader_pin_memory",
    "disable_tqdm",
    "logging_steps",
    "logging_first_step",
    "resume_from_checkpoint",
}


def changed_settings(args) -> dict:
    """
    Settings whose value is not TRL's default, without those that only say where a run wrote.

    Args:
        args (`TrainingArguments`):
            The run's settings, of any TRL trainer.

    Returns:
        `dict`: value by name; a method's own fields are all in it.
    """
    bases = type(args).__mro__
    base = next(cls for cls in bases if cls is MethodConfig or cls.__module__.startswith(("trl.", "transformers.")))
    defaults = {
        field.name: field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
        for field in dataclasses.fields(base)
    }
    names = [field.name for field in dataclasses.fields(args) if field.init and field.name not in _PLACES]
    values = {name: getattr(args, name) for name in names if not name.endswith("_token")}
    return {
        name: value
        for name, value in values.items()
        if isinstance(value, (bool, int, float, str, list, dict))
        # Empty is empty, whatever the type that a config makes of it.
        and (name not in defaults or (value != defaults[name] and (value or defaults[name])))
    }
