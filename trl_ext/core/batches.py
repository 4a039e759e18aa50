"""Rows of data sets and of TRL's batches, taken and put together anew."""

import itertools

import torch
from datasets import Dataset
from trl.trainer.utils import split_pixel_values_by_grid, unsplit_pixel_values_by_grid


def take_examples(dataset: Dataset, rows: torch.Tensor) -> list[dict]:
    """The examples in some rows of a data set, each a dict of its own, since TRL writes into them."""
    unique, inverse = torch.as_tensor(rows).unique(return_inverse=True)
    columns = dataset[unique.tolist()]
    examples = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
    return [dict(examples[i]) for i in inverse.tolist()]


def masked(batch: dict) -> torch.Tensor:
    """The mask of the tokens that enter the loss."""
    return batch["completion_mask"] * batch["tool_mask"] if "tool_mask" in batch else batch["completion_mask"]


def merge_rows(batches: list[dict]) -> dict:
    """Join micro-batches into one batch; images become lists with one entry per row."""
    batches = [split_pixel_values_by_grid(batch) for batch in batches]
    merged = {}
    for key, first in batches[0].items():
        parts = [batch[key] for batch in batches]
        if isinstance(first, list):
            merged[key] = list(itertools.chain(*parts))
        else:
            merged[key] = torch.cat(parts) if isinstance(first, torch.Tensor) and first.ndim > 0 else first
    return merged


def take_rows(batch: dict, rows: list[int]) -> dict:
    """Some rows of a merged batch, as TRL's loss wants them."""
    taken = {}
    for key, value in batch.items():
        if isinstance(value, list):
            taken[key] = [value[row] for row in rows]
        else:
            taken[key] = value[rows] if isinstance(value, torch.Tensor) and value.ndim > 0 else value
    return unsplit_pixel_values_by_grid(taken)


def trim(batch: dict) -> dict:
    """Cut padding that no row of a text batch needs."""
    if any("pixel" in key or key.endswith("token_type_ids") for key in batch):
        return batch
    width, used = batch["completion_mask"].shape[1], batch["completion_mask"].any(0).nonzero()
    end = int(used[-1]) + 1 if len(used) else 1
    start = int(batch["prompt_mask"].any(0).nonzero()[0])
    trimmed = {}
    for key, value in batch.items():
        if key in ("prompt_ids", "prompt_mask"):
            value = value[:, start:]
        elif isinstance(value, torch.Tensor) and value.ndim == 2 and value.shape[1] == width:
            value = value[:, :end]
        trimmed[key] = value
    return trimmed
