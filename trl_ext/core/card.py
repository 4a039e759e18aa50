"""The part of a model card that TRL does not write: the methods, their papers and settings."""

import dataclasses
import os
from importlib.metadata import version

from trl import GRPOConfig

from . import mixing
from .config import MethodConfig


def add_methods(trainer) -> None:
    """
    Append the methods, the settings that differ from TRL's defaults and the citations to `README.md`, which TRL has
    just written.

    Args:
        trainer ([`MethodTrainer`]):
            The trainer.
    """
    methods = [cls for cls in mixing.methods_of(type(trainer)) if "_paper" in cls.__dict__]
    lines = ["", "## Methods", "", f"Trained with trl-ext {version('trl-ext')}."]
    if methods:
        lines += ["", "| method | paper | joints of the step it changes |", "|---|---|---|"]
    for cls in methods:
        hooks = ", ".join(f"`{hook}`" for hook in mixing.joints_of(cls))
        paper = f"[{cls._paper['title']}](https://huggingface.co/papers/{cls._paper['id']})"
        lines.append(f"| {cls._name} | {paper} | {hooks} |")
    settings = changed_settings(trainer.args)
    lines += ["", "### Settings that differ from TRL's defaults", "", "| setting | value |", "|---|---|"]
    lines += [f"| `{name}` | `{value}` |" for name, value in settings.items()]
    if methods[1:]:  # TRL's part cites the first
        lines += ["", "### Citations of the methods"]
        for cls in methods:
            lines += ["", f"Cite {cls._name} as:", "", "```bibtex", cls._paper["citation"].strip(), "```"]
    with open(os.path.join(trainer.args.output_dir, "README.md"), "a", encoding="utf-8") as file:
        file.write("\n".join(lines) + "\n")


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


def changed_settings(args: GRPOConfig) -> dict:
    """
    Settings whose value is not TRL's default.

    Args:
        args ([`~trl.GRPOConfig`]):
            The run's settings.

    Returns:
        `dict`: value by name; a method's own fields are all in it.
    """
    defaults = {
        field.name: field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
        for field in dataclasses.fields(MethodConfig)
    }
    names = [field.name for field in dataclasses.fields(args) if field.init and field.name not in _PLACES]
    values = {name: getattr(args, name) for name in names}
    plain = (bool, int, float, str, list, type(None))
    return {
        name: value
        for name, value in values.items()
        if isinstance(value, plain)
        and value is not None
        # Empty is empty, whatever the type that a config makes of it.
        and (name not in defaults or (value != defaults[name] and (value or defaults[name])))
    }
