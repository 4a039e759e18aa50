"""Rules for combining methods by inheritance, and `mix`, which does it by name."""

import importlib
import importlib.util
import math
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

from .config import MixingError


# Hooks that one method may answer alone (it lists them in `replaces`) while others refine its answer by `super()`.
ANSWERS = (
    "choose_prompts",
    "prompt_weights",
    "prompt_budgets",
    "edit_examples",
    "more_rollouts",
    "pick_rollouts",
    "shape_rewards",
    "compute_advantages",
    "select_rollouts",
    "token_mask",
    "kl_weight",
    "log_ratio",
    "clip_range",
    "policy_loss",
    "token_weights",
    "aggregate_loss",
)
# Hooks that every method adds to: leaving out `super()` would silence the others.
ADDITIONS = (
    "prepare",
    "regularizers",
    "observe",
    "carry",
    "prompt_table",
    "method_state",
    "load_method_state",
    "local_state",
    "load_local_state",
)
HOOKS = ANSWERS + ADDITIONS


class Mix(NamedTuple):
    """What `mix` returns: a trainer class and its config class."""

    Trainer: type
    Config: type


def methods_of(cls: type) -> list[type]:
    """The methods that `cls` is made of, outermost first: classes that bring a hook or a declaration."""
    from .trainer import MethodTrainer

    bases = cls.__mro__[: cls.__mro__.index(MethodTrainer)]
    marks = (*HOOKS, "needs", "ignores", "contradicts", "whole_groups", "_paper")
    return [base for base in bases if any(name in base.__dict__ for name in marks)]


def joints_of(cls: type) -> list[str]:
    """The joints of the step that a method's own class changes, in the order of a step."""
    return [hook for hook in (*ANSWERS, "regularizers") if hook in cls.__dict__]


def mix(*methods: "str | type", blend: dict[str, float] | None = None) -> Mix:
    """
    Combine methods into one trainer.

    Args:
        methods (`str` or `type`):
            Names of methods (`"clip_cov"`: the file in `trl_ext/methods`) or [`MethodTrainer`] subclasses. Their
            order does not matter.
        blend (`dict[str, float]`, *optional*):
            Weight of each method that has its own advantages, by name; `"grpo"` stands for TRL's. The advantages are
            the weighted sum of theirs, each normalised in its own way, where otherwise only one could answer.

    Returns:
        `Mix`: the pair `(Trainer, Config)`. Both can be pickled, and the same methods always give the same classes.

    Raises:
        MixingError: if two of the methods contradict each other or replace the same hook; the message names both and
            the reason.
        ValueError: for an unknown name, or a weight that does not fit.

    Example:
    ```python
    >>> Trainer, Config = mix("clip_cov", "spo")
    >>> Trainer.__name__
    'ClipCovSPOTrainer'
    >>> mix("spo", "bnpo", blend={"spo": 0.5, "bnpo": 0.5}).Trainer.__name__
    'BNPOSPOBlendTrainer'
    ```
    """
    trainers = [find_method(method) if isinstance(method, str) else method for method in methods]
    if not trainers:
        raise ValueError("`mix` needs at least one method.")
    if len(set(trainers)) < len(trainers):
        raise MixingError(f"a method is named twice: {', '.join(t.__name__ for t in trainers)}.")
    if blend is not None:
        return _mix(frozenset(trainers), frozenset(_checked_blend(trainers, blend).items()))
    if len(trainers) == 1:
        return Mix(trainers[0], trainers[0].config_class)
    return _mix(frozenset(trainers))


def _checked_blend(trainers: list[type], blend: dict[str, float]) -> dict[str, float]:
    by_slug = {trainer.slug: trainer for trainer in trainers}
    estimators = [slug for slug, cls in by_slug.items() if "compute_advantages" in cls.__dict__.get("replaces", ())]
    for slug, weight in blend.items():
        if slug not in (*estimators, "grpo"):
            raise ValueError(
                f"`blend` weighs {slug!r}, which has no advantages of its own in this mix; it may weigh "
                f"{', '.join(map(repr, [*estimators, 'grpo']))}."
            )
        if not isinstance(weight, (int, float)) or not math.isfinite(weight):
            raise ValueError(f"`blend` must map names to finite numbers, got {weight!r} for {slug!r}.")
    if missing := [slug for slug in estimators if slug not in blend]:
        raise ValueError(f"`blend` must weigh every method with advantages of its own; {missing[0]!r} is missing.")
    if len(blend) < 2:
        raise ValueError(f"`blend` must weigh at least two estimators, got {blend!r}.")
    return {slug: float(blend[slug]) for slug in sorted(blend)}


def _blended(trainers: list[type], blend: dict[str, float], key: str) -> type:
    """One class out of several with advantages of their own."""
    from .hooks import Hooks

    bases = tuple(_ordered([trainer for trainer in trainers if trainer.slug in blend]))
    estimators = {base.slug: base.compute_advantages for base in bases} | {"grpo": Hooks.compute_advantages}

    def compute_advantages(self, rollouts):
        parts = []
        for slug, weight in blend.items():
            parts.append(weight * estimators[slug](self, rollouts))
            self.log_metric(f"blend/{slug}", weight)
        if any(part.dim() == 2 for part in parts):  # per token, and local
            parts = [part[rollouts.local].unsqueeze(1) if part.dim() == 1 else part for part in parts]
        return sum(parts)

    name = "".join(base.__name__.removesuffix("Trainer") for base in bases) + "Blend"
    return type(
        f"{name}Trainer",
        bases,
        {
            "__module__": __name__,
            "__doc__": f"Weighted sum of advantages: {', '.join(f'{w:g} {slug}' for slug, w in blend.items())}.",
            "slug": "+".join(base.slug for base in bases),
            "_name": f"blend of {', '.join(f'{w:g} {slug}' for slug, w in blend.items())}",
            "_tag_names": list(dict.fromkeys(tag for base in bases for tag in base._tag_names)),
            "config_class": mixed_config(bases, f"{name}Config", __name__, f"{key}+Config"),
            "blend": blend,
            "compute_advantages": compute_advantages,
            "replaces": ("compute_advantages",),
        },
    )


@cache
def _mix(trainers: frozenset[type], blend: frozenset[tuple[str, float]] = frozenset()) -> Mix:
    weights = dict(sorted(blend))
    key = "+".join(sorted(_reference(trainer) for trainer in trainers))
    for slug, weight in weights.items():  # a pickled name has no dots, and names are joined by plus signs
        key += f"+{slug}@{weight!r}".replace(".", "/").replace("e+", "e")
    if weights:
        trainers = [t for t in trainers if t.slug not in weights] + [_blended(list(trainers), weights, key)]
    bases = tuple(_ordered(trainers))
    stem = "".join(base.__name__.removesuffix("Trainer") for base in bases)
    config = mixed_config(bases, f"{stem}Config", __name__, f"{key}+Config")
    trainer = type(
        f"{stem}Trainer",
        bases,
        {
            "__module__": __name__,
            "__qualname__": f"{key}+Trainer",
            "__doc__": f"Mix of {', '.join(base._name for base in bases)}.",
            "config_class": config,
            "slug": "+".join(base.slug for base in bases),
            "_name": " + ".join(base._name for base in bases),
            "_tag_names": list(dict.fromkeys(tag for base in bases for tag in base._tag_names)),
        },
    )
    return Mix(trainer, config)


def mixed_config(trainers: tuple[type, ...], name: str, module: str, qualname: str) -> type:
    """The config class that inherits from those of `trainers`."""
    bases = []
    for config in dict.fromkeys(trainer.config_class for trainer in trainers):
        if not any(issubclass(other.config_class, config) and other.config_class is not config for other in trainers):
            bases.append(config)
    if len(bases) == 1:
        return bases[0]
    return dataclass(type(name, tuple(bases), {"__module__": module, "__qualname__": qualname}))


def __getattr__(name: str):
    # Unpickling a mixed class in a new process, where it has not been made yet. The name lists its methods.
    *methods, kind = name.split("+")
    if methods and kind in ("Trainer", "Config"):
        blend = {
            slug: float(weight.replace("/", ".")) for slug, _, weight in (m.partition("@") for m in methods) if weight
        }
        return getattr(mix(*(_resolve(m) for m in methods if "@" not in m), blend=blend or None), kind)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def _reference(trainer: type) -> str:
    # Pickle splits names at dots.
    if trainer.__module__.startswith("trl_ext.methods."):
        return trainer.slug
    return f"{trainer.__module__}:{trainer.__qualname__}".replace(".", "/")


def _resolve(reference: str) -> "str | type":
    if ":" not in reference:
        return reference
    module, _, qualname = reference.replace("/", ".").partition(":")
    found = importlib.import_module(module)
    for part in qualname.split("."):
        found = getattr(found, part)
    return found


def find_method(slug: str) -> type:
    """
    The trainer class of a method.

    Args:
        slug (`str`):
            Name of its file in `trl_ext/methods`.

    Returns:
        `type`: the [`MethodTrainer`] subclass that the file defines.

    Raises:
        ValueError: for an unknown name; the message lists the known ones.
    """
    from .trainer import MethodTrainer

    if slug not in list_methods():
        raise ValueError(f"unknown method {slug!r}; known methods: {', '.join(list_methods())}.")
    module = importlib.import_module(f"trl_ext.methods.{slug}")
    (trainer,) = [
        value
        for value in vars(module).values()
        if isinstance(value, type) and issubclass(value, MethodTrainer) and value.__module__ == module.__name__
    ]
    return trainer


@cache
def list_methods() -> list[str]:
    """Names of all methods: the files in `trl_ext/methods`."""
    import pkgutil

    import trl_ext.methods

    return sorted(m.name for m in pkgutil.iter_modules(trl_ext.methods.__path__) if not m.name.startswith("_"))


def check_method(cls: type) -> None:
    """
    Check one class's own hooks: an override that does not call `super()` must be declared in `replaces`.

    Raises:
        TypeError: naming the class, the hook and the remedy.
    """
    replaces = cls.__dict__.get("replaces", ())
    for hook in replaces:
        if hook not in ANSWERS:
            raise TypeError(
                f"{cls.__name__}.replaces names {hook!r}, which cannot be replaced; choose from {', '.join(ANSWERS)}."
            )
    for hook in HOOKS:
        override = cls.__dict__.get(hook)
        if override is None or "__class__" in override.__code__.co_freevars:
            continue
        if hook in ADDITIONS:
            raise TypeError(f"{cls.__name__}.{hook} must call super().{hook}(...), or it silences mixed methods.")
        if hook not in replaces:
            raise TypeError(
                f"{cls.__name__}.{hook} does not call super(): declare `replaces = ({hook!r},)` or refine the result "
                "of super()."
            )


def check_mix(cls: type) -> None:
    """
    Check that the methods in a class's MRO can work together.

    Raises:
        MixingError: naming both methods and the reason.
    """
    methods = methods_of(cls)
    for first in methods:
        for second in methods:
            if issubclass(first, second) or issubclass(second, first):
                continue
            if second.slug in first.contradicts:
                raise MixingError(
                    f"{first.__name__} and {second.__name__} contradict each other: {first.contradicts[second.slug]}."
                )
            for hook in first.ignores:
                if hook in second.__dict__:
                    raise MixingError(
                        f"{first.__name__} and {second.__name__} cannot be mixed: {first.__name__} does not look at "
                        f"`{hook}`, which {second.__name__} provides."
                    )
    for hook in ANSWERS:
        replacer = None
        for method in methods:
            if hook not in method.__dict__:
                continue
            if replacer is not None and not issubclass(replacer, method):
                if hook in method.__dict__.get("replaces", ()):
                    raise MixingError(f"{replacer.__name__} and {method.__name__} both replace `{hook}`; choose one.")
                raise MixingError(
                    f"{replacer.__name__} replaces `{hook}`, so {method.__name__} behind it would never run: name "
                    f"{method.__name__} first among the bases, or use trl_ext.mix, which finds the order."
                )
            if hook in method.__dict__.get("replaces", ()):
                replacer = replacer or method


def _ordered(trainers) -> list[type]:
    """Refiners before replacers of the same hook, `runs_after` respected, else by name."""
    before = {trainer: set() for trainer in trainers}  # the bases that must stand in front of each
    parts = {trainer: methods_of(trainer) for trainer in trainers}
    for outer in trainers:
        for inner in trainers:
            if outer is inner:
                continue
            replaced = {hook for part in parts[inner] for hook in part.__dict__.get("replaces", ())}
            refined = {hook for part in parts[outer] for hook in ANSWERS if hook in part.__dict__} - {
                hook for part in parts[outer] for hook in part.__dict__.get("replaces", ())
            }
            # What runs later in the step wraps the other's answer, so it stands in front.
            if replaced & refined or inner.slug in outer.runs_after:
                before[inner].add(outer)
    ordered = []
    while len(ordered) < len(before):
        free = [t for t in before if t not in ordered and before[t] <= set(ordered)]
        if not free:
            stuck = sorted(t.__name__ for t in before if t not in ordered)
            raise MixingError(f"{' and '.join(stuck)} cannot be ordered: each would have to run after the other.")
        ordered.append(min(free, key=lambda t: t.slug))
    return ordered
