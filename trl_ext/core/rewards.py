"""What reward functions may return, and what becomes of it."""

import functools
import inspect
import math
import warnings
from collections.abc import Callable, Iterable, Mapping, Set

import numpy as np
import torch


LARGEST = 1e15  # a sum of squares over any batch is then far below float32's 3.4e38, and so is a gradient's norm
FLOAT32_MAX = torch.finfo(torch.float32).max


def reward_list(values, name: str) -> list[float | None]:
    """
    Rewards as plain numbers, whatever kind of numbers a reward function returned.

    Args:
        values (`Iterable`):
            One number, scalar tensor or array, or None per completion.
        name (`str`):
            The reward function's name, for the errors.

    Returns:
        `list[float | None]`: within float32, but infinite or NaN where they were.

    Raises:
        TypeError: if that is no list of numbers; the message names the function, the value and the remedy.
    """
    if isinstance(values, (torch.Tensor, np.ndarray)):
        values = values.tolist()
    remedy = "return a list with one number, or None for 'not scored', per completion."
    if isinstance(values, (str, bytes, Mapping, Set)) or not isinstance(values, Iterable):
        raise TypeError(
            f"The reward function '{name}' returned {values!r:.100}, of type {type(values).__name__}: {remedy}"
        )
    rewards = []
    for i, value in enumerate(values):
        try:
            if isinstance(value, (str, bytes)):
                raise TypeError
            number = None if value is None else float(value.item() if hasattr(value, "item") else value)
        except OverflowError:  # an integer beyond float64
            number = FLOAT32_MAX if value > 0 else -FLOAT32_MAX
        except (TypeError, ValueError, RuntimeError):
            raise TypeError(
                f"The reward function '{name}' returned {value!r:.100}, of type {type(value).__name__}, for "
                f"completion {i}: {remedy}"
            ) from None
        if number is not None and math.isfinite(number):
            number = max(-FLOAT32_MAX, min(number, FLOAT32_MAX))
        rewards.append(number)
    return rewards


def checked(function: Callable, name: str) -> Callable:
    """A reward function, synchronous or not, whose result goes through [`reward_list`]; a reward model stays as is."""
    if isinstance(function, torch.nn.Module):
        return function
    inner = function
    while isinstance(inner, functools.partial):
        inner = inner.func
    if inspect.iscoroutinefunction(inner) or inspect.iscoroutinefunction(inner.__call__):

        async def call(**kwargs):
            return reward_list(await function(**kwargs), name)

    else:

        def call(**kwargs):
            return reward_list(function(**kwargs), name)

    return call


def usable_rewards(matrix: torch.Tensor, names: list[str]) -> torch.Tensor:
    """
    Refuse infinite rewards, and leave out those with which float32 cannot compute.

    Args:
        matrix (`torch.Tensor`):
            Rewards of the K functions, shape `(N, K)`, NaN = not scored.
        names (`list[str]`):
            Names of the K functions.

    Returns:
        `torch.Tensor`: Shape `(N, K)`, NaN ("not scored") where a reward was beyond `LARGEST` in size, with a warning.

    Raises:
        ValueError: if a reward is infinite.
    """
    infinite = matrix.isinf().any(dim=0)
    if infinite.any():
        raise ValueError(
            f"The reward function '{names[int(infinite.nonzero()[0])]}' returned an infinite reward, which would "
            "erase the advantages of its whole group: return a finite number, or None for a completion that cannot be "
            "scored."
        )
    large = matrix.abs() > LARGEST
    for column in large.any(dim=0).nonzero().flatten().tolist():
        found = matrix[large[:, column], column]
        warnings.warn(
            f"The reward function '{names[column]}' returned {len(found)} rewards beyond {LARGEST:g} in size (such as "
            f"{found[0].item():g}), with which float32 cannot compute an advantage: they count as not scored. Return "
            "smaller numbers, or None.",
            stacklevel=2,
        )
    return matrix.masked_fill(large, torch.nan) if large.any() else matrix
