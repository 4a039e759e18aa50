"""Configuration of a method: TRL's `GRPOConfig` plus the paper's own fields."""

import dataclasses
import importlib
import inspect
import os
import sys
from collections.abc import Callable
from dataclasses import MISSING, dataclass

from trl import GRPOConfig


class MixingError(TypeError):
    """Two methods cannot be combined; the message names both and says why."""


class Undecided:
    """
    Default of a field to which two mixed configs give different values. The class can be made (so the field shows up
    in `--help` and can be set from YAML), but an instance must be given the field.
    """

    def __init__(self, choices: dict[str, object]):
        self.choices = choices

    def __repr__(self) -> str:
        return "undecided: " + ", ".join(f"{value!r} in {name}" for name, value in self.choices.items())


class _One(int):
    # GRPOConfig refuses `num_generations < 2` in the middle of its checks; every other check must still run.
    def __lt__(self, other):
        return False


@dataclass
class MethodConfig(GRPOConfig):
    r"""
    Base class of every method's configuration.

    A subclass declares the paper's own fields, prefixed with the method's short name, and redeclares an inherited
    field only where the mechanism needs another default. Configs mix by inheritance (`class C(ClipCovConfig,
    SPOConfig)`): every field keeps the default of the class that declared it, and where two unrelated classes declare
    different defaults the field must be given, else [`MixingError`] is raised.

    It allows `num_generations=1`, which `GRPOConfig` refuses, for methods without a group baseline;
    [`MethodTrainer`] checks that the method is one.

    Parameters:
        save_between_generations (`bool`, *optional*, defaults to `False`):
            A checkpoint that is due inside a generation waits for its end, so that it holds no buffered rollouts
            (about 16 bytes per prompt token and 24 per completion token) and another number of processes can resume
            it. The end of the training, and `save_strategy="best"`, do not wait.
    """

    save_between_generations: bool = dataclasses.field(
        default=False, metadata={"help": "A checkpoint due inside a generation waits for its end."}
    )

    def __init_subclass__(cls, **kwargs):
        super().__init_subclass__(**kwargs)
        own = inspect.get_annotations(cls)
        cls._declared = frozenset(own)
        if sum(issubclass(base, MethodConfig) for base in cls.__bases__) < 2:
            return
        # Every dataclass carries copies of all the fields it inherits, so plain inheritance would take the copies of
        # the first base for decisions: SPO's `num_generations=1` would be lost in `C(ClipCovConfig, SPOConfig)`.
        inherited = {}
        for name, declarers in _declarations(cls.__mro__[1:]).items():
            if name in own:
                continue
            fields = {base.__name__: base.__dataclass_fields__[name] for base in declarers}
            field = next(iter(fields.values()))
            defaults = {base: _default(field) for base, field in fields.items()}
            if any(default != _default(field) for default in defaults.values()):
                new = dataclasses.field(default=Undecided(defaults), metadata=field.metadata)
            else:
                new = dataclasses.field(
                    default=field.default, default_factory=field.default_factory, metadata=field.metadata
                )
            inherited[name] = (field.type, new)
        for name, (_, field) in inherited.items():
            setattr(cls, name, field)
        cls.__annotations__ = {name: kind for name, (kind, _) in inherited.items()} | own

    def __post_init__(self):
        if "__dataclass_fields__" not in type(self).__dict__:
            raise TypeError(f"{type(self).__name__} must be decorated with @dataclass, or its fields are ignored.")
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if isinstance(value, Undecided):
                raise MixingError(
                    f"`{field.name}` must be given for {type(self).__name__}: its methods need different values "
                    f"({value!r})."
                )
        if self.num_generations == 1:
            self.num_generations = _One(1)
        super().__post_init__()
        self.num_generations = int(self.num_generations)

    def check_choices(self, *names: str) -> None:
        """Raise a `ValueError` unless each of these fields has one of the choices that its metadata lists."""
        for name in names:
            choices = self.__dataclass_fields__[name].metadata["choices"]
            self.check_range(name, getattr(self, name) in choices, " or ".join(map(repr, choices)))

    def check_range(self, name: str, valid: bool, need: str) -> None:
        """
        Raise a `ValueError` that names the field, its value and what is needed, unless `valid`.

        Args:
            name (`str`):
                Name of the field.
            valid (`bool`):
                Whether its value is acceptable.
            need (`str`):
                What is acceptable, to follow "must be".
        """
        if not valid:
            raise ValueError(f"`{name}` must be {need}, got {getattr(self, name)!r}.")


MethodConfig._declared = frozenset()


def import_function(path: str, setting: str) -> Callable:
    """
    The function at an import path.

    Args:
        path (`str`):
            `"package.module:function"`; modules in the working directory are found too.
        setting (`str`):
            Name of the setting, for the errors.

    Returns:
        `Callable`: the function.

    Raises:
        ValueError: if there is none; the message names the setting and the path.
    """
    module, _, name = path.partition(":")
    if not module or not name:
        raise ValueError(f"`{setting}` must be an import path such as 'my_task:function', got {path!r}.")
    if not {"", os.getcwd()} & set(sys.path):
        sys.path.insert(0, os.getcwd())
    try:
        function = importlib.import_module(module)
        for part in name.split("."):
            function = getattr(function, part, None)
    except ImportError as error:
        raise ValueError(
            f"`{setting}` is {path!r}, but the module {module!r} could not be imported ({error}): run from the "
            "directory that holds it, or install it."
        ) from error
    if not callable(function):
        raise ValueError(f"`{setting}` is {path!r}, but the module {module!r} has no function {name!r}.")
    return function


def _declarations(mro) -> dict[str, list[type]]:
    """The classes whose own body declares each field, without those that a subclass of theirs overrules."""
    declarers: dict[str, list[type]] = {}
    for base in mro:  # subclasses come first
        for name in base._declared if issubclass(base, MethodConfig) else ():
            known = declarers.setdefault(name, [])
            if not any(issubclass(other, base) for other in known):
                known.append(base)
    return declarers


def _default(field: dataclasses.Field):
    return field.default if field.default is not MISSING else field.default_factory
