"""Which prompts a generation draws: TRL's own order as a function of the generation counter, and weighted draws."""

import hashlib

import pyarrow as pa
import pyarrow.compute as pc
import torch


def check_prompts(dataset, empty_text: bool) -> None:
    """
    Refuse a training set with prompts that cannot be generated from, before anything is spent on the others.

    Args:
        dataset ([`~datasets.Dataset`]):
            The training set.
        empty_text (`bool`):
            Whether the tokenizer makes a token of an empty text (a beginning-of-sequence token).

    Raises:
        ValueError: if it has no rows or no prompts; the message names the row, the value and the remedy.
    """
    if len(dataset) == 0:
        raise ValueError("`train_dataset` has no rows: give at least one prompt.")
    if dataset.format["type"] == "custom":  # rows are made when they are read
        return
    if "prompt" not in dataset.column_names:
        raise ValueError(
            f"`train_dataset` has no column 'prompt', only {dataset.column_names}: rename the one that holds the "
            "prompts, `dataset.rename_column(name, 'prompt')`."
        )
    column = dataset.with_format("arrow")["prompt"]
    kind, remedy = column.type, "drop such rows, for example by `dataset.filter(lambda row: row['prompt'])`."
    if pa.types.is_primitive(kind) and not pa.types.is_null(kind):
        raise ValueError(
            f"`train_dataset` has {column[0].as_py()!r} as the prompt of row 0: make "
            "every prompt a text or a list of messages."
        )
    bad = pc.is_null(column)
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        bad = pc.or_(bad, pc.equal(pc.fill_null(pc.list_value_length(column), 1), 0))
    elif not empty_text and (pa.types.is_string(kind) or pa.types.is_large_string(kind)):
        bad = pc.or_(bad, pc.equal(pc.fill_null(pc.binary_length(column), 1), 0))
    if (row := pc.index(bad, True).as_py()) >= 0:
        raise ValueError(
            f"`train_dataset` has {column[row].as_py()!r} as the prompt of row {row}, with no token: {remedy}"
        )


def make_generator(seed: int, purpose: str, *keys: int) -> torch.Generator:
    """
    A generator whose draws depend on nothing but its arguments, so every process and every resumed run draws the same.

    Args:
        seed (`int`):
            The run's seed.
        purpose (`str`):
            What is drawn; different purposes draw independently.
        keys (`int`):
            Generation counter, group id, ...

    Returns:
        `torch.Generator`: on the CPU.
    """
    digest = hashlib.sha256(repr((seed, purpose, keys)).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)


class ShuffledOrder:
    """
    The order in which TRL's `RepeatSampler` visits prompts, as a function of the generation counter: one permutation
    per epoch, drawn one after the other from one seed, cut into chunks; what does not fill a chunk is left out. Fewer
    prompts than a chunk (TRL would not train at all) are repeated.

    Args:
        size (`int`):
            Number of prompts P.
        chunk (`int`):
            Prompts per generation.
        shuffle (`bool`):
            False keeps the order of the data set.
        seed (`int`):
            TRL's seed.
    """

    def __init__(self, size: int, chunk: int, shuffle: bool, seed: int):
        self.size, self.chunk, self.shuffle, self.seed = size, chunk, shuffle, seed
        self._epoch = -1

    def rows(self, generation: int) -> torch.Tensor:
        """Rows that generation number `generation` draws, shape `(chunk,)`."""
        epoch, position = divmod(generation, max(1, self.size // self.chunk))
        if epoch < self._epoch or self._epoch < 0:
            self._epoch, self._generator = -1, torch.Generator().manual_seed(self.seed)
        while self._epoch < epoch:
            self._epoch += 1
            self._order = (
                torch.randperm(self.size, generator=self._generator) if self.shuffle else torch.arange(self.size)
            )
        order = self._order.repeat(-(-self.chunk // self.size)) if self.size < self.chunk else self._order
        return order[position * self.chunk : (position + 1) * self.chunk]


def usable_weights(weights: torch.Tensor) -> torch.Tensor:
    """
    Prompt weights in float64 on the CPU.

    Args:
        weights (`torch.Tensor`):
            Shape `(P,)`.

    Raises:
        ValueError: if a weight is negative, NaN or infinite, or all are 0.
    """
    weights = weights.double().cpu()
    if not (weights.isfinite() & (weights >= 0)).all() or not (weights > 0).any():
        raise ValueError(
            "prompt weights must be finite, at least 0 and not all 0; got a minimum of "
            f"{weights.min().item()} and a maximum of {weights.max().item()}."
        )
    return weights


def draw_rows(weights: torch.Tensor, n: int, generator: torch.Generator) -> torch.Tensor:
    """
    Draw prompts with probability proportional to their weights.

    Args:
        weights (`torch.Tensor`):
            Non-negative weights, shape `(P,)`.
        n (`int`):
            Number of prompts to draw.
        generator (`torch.Generator`):
            Source of randomness, on the CPU.

    Returns:
        `torch.Tensor`: `n` rows, without replacement; with replacement only if fewer than `n` weights are positive.

    Raises:
        ValueError: as [`usable_weights`].
    """
    weights = usable_weights(weights)
    replacement = int((weights > 0).sum()) < n
    return torch.multinomial(weights, n, replacement=replacement, generator=generator)


def top_rows(scores: torch.Tensor, n: int) -> torch.Tensor:
    """
    The prompts of largest score.

    Args:
        scores (`torch.Tensor`):
            Shape `(P,)`, without NaN.
        n (`int`):
            Number of prompts to take.

    Returns:
        `torch.Tensor`: `n` rows, ascending; equal scores to the lower row. With fewer prompts than `n` all of them,
        as often as they fit, and then the best once more.
    """
    rounds, rest = divmod(n, len(scores))
    rows = torch.arange(len(scores)).repeat(rounds)
    if rest == 0:
        return rows
    least = scores.topk(rest).values[-1]
    best = (scores >= least).nonzero().squeeze(1)
    above = scores[best] > least
    return torch.cat([rows, best[above | ((~above).cumsum(0) <= rest - above.sum())]])


def draw_by_deficit(deficits: torch.Tensor, target: torch.Tensor, n: int) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Draw prompts such that the counts stay close to what a target distribution expects, closer than independent draws:
    each time the prompt with the largest deficit, its expected minus its actual count.

    Args:
        deficits (`torch.Tensor`):
            Of all draws before, shape `(P,)`, in float64.
        target (`torch.Tensor`):
            Probability of each prompt, shape `(P,)`.
        n (`int`):
            Number of prompts to draw.

    Returns:
        `tuple[torch.Tensor, torch.Tensor]`: `n` rows, equal deficits to the lower row; and the deficits after them.
    """
    # Equal deficits differ by their rounding: 1/3 added three times is not 1. They are compared in steps of 2^-30.
    first = deficits + target
    best = top_rows((first * 2**30).round(), min(n, len(target)))
    # Nobody else can be drawn unless it grows faster than one of these, and passes the last of them in time.
    others = (target > target[best].min()) & (deficits + n * target >= first[best].min() - 2**-29)
    others[best] = True
    rows = others.nonzero().squeeze(1)
    growth, current, drawn = target[rows].numpy(), deficits[rows].numpy().copy(), []
    for _ in range(n):
        current += growth
        drawn.append(int((current * 2**30).round().argmax()))
        current[drawn[-1]] -= 1
    drawn = rows[drawn]
    return drawn, deficits + n * target - torch.bincount(drawn, minlength=len(target))
