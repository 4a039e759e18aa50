"""What a checkpoint holds beyond TRL's: one shared file, one file per process, and a marker after them."""

import contextlib
import hashlib
import json
import os
import re
import warnings

import torch
from accelerate.utils import broadcast_object_list
from datasets import Dataset
from transformers.trainer import TRAINER_STATE_NAME


FIELDS = {
    "format": int,
    "trainer": str,
    "processes": int,
    "micro_step": int,
    "generation": int,
    "rollouts_spent": int,
    "score_calls": int,
    "prompts": str,
    "methods": dict,
}  # of the shared file
SHARED, LOCAL, MARKER = "trl_ext_state.pt", "trl_ext_local_{}.pt", "trl_ext_complete.json"
PROMPTS = "trl_ext_prompts.parquet"


def save(folder: str, shared: dict, local: dict, accelerator) -> None:
    """
    Write a run's state. Every process must call it.

    Args:
        folder (`str`):
            An existing directory.
        shared (`dict`):
            State that is the same on every process; written by the main one.
        local (`dict`):
            State of this process.
        accelerator ([`~accelerate.Accelerator`]):
            Tells the process's index.
    """
    write(local, os.path.join(folder, LOCAL.format(accelerator.process_index)))
    if accelerator.is_main_process:
        write(shared, os.path.join(folder, SHARED))
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        with open(os.path.join(folder, MARKER), "w") as file:
            json.dump({"trainer": shared["trainer"], "processes": accelerator.num_processes}, file)


def load(folder: str, accelerator) -> tuple[dict, list[dict]]:
    """
    Read a run's state.

    Args:
        folder (`str`):
            A checkpoint.
        accelerator ([`~accelerate.Accelerator`]):
            Tells the process's index.

    Returns:
        `tuple[dict, list[dict]]`: the shared state, and the shares of the state per process that fall to this one.

    Raises:
        FileNotFoundError: if a file of the state is missing; the message names it.
        ValueError: if one cannot be read, or a field of it is not what it should be; the message names both.
    """
    for name in (MARKER, SHARED):
        if not os.path.isfile(os.path.join(folder, name)):
            raise FileNotFoundError(
                f"{folder} has no {name}: it was not written by trl_ext, or writing it was cut short. Resume from "
                "another checkpoint, or start anew from its weights."
            )
    shared = read(os.path.join(folder, SHARED), FIELDS)
    shares = []
    for process in range(accelerator.process_index, shared["processes"], accelerator.num_processes):
        path = os.path.join(folder, LOCAL.format(process))
        if not os.path.isfile(path):
            raise FileNotFoundError(
                f"{path} is missing, the state of process {process} of {shared['processes']}: copy it from the node "
                "that wrote it, or resume from another checkpoint."
            )
        shares.append(read(path, {"methods": dict}))
    return shared, shares


def mark_incomplete(folder: str) -> None:
    """Take the marks of a complete checkpoint from a folder, if it has any, before it is written anew."""
    for name in (MARKER, TRAINER_STATE_NAME):
        with contextlib.suppress(FileNotFoundError):
            os.remove(os.path.join(folder, name))


def missing_part(folder: str) -> str | None:
    """
    What a checkpoint lacks. The Trainer writes its own state last, after the marker, so a checkpoint that has both was
    written to its end.

    Args:
        folder (`str`):
            A checkpoint.

    Returns:
        `str` or `None`: name of the file that is missing or was cut short; None if the checkpoint is complete.
    """
    if not os.path.isfile(os.path.join(folder, MARKER)):
        return MARKER
    try:
        with open(os.path.join(folder, TRAINER_STATE_NAME), encoding="utf-8") as file:
            json.load(file)
    except (OSError, ValueError):
        return TRAINER_STATE_NAME
    return None


def newest_complete(output_dir: str) -> str:
    """
    The newest checkpoint of a run that was written to its end; the main process decides for all.

    Args:
        output_dir (`str`):
            The run's folder.

    Returns:
        `str`: Path of the checkpoint.

    Raises:
        FileNotFoundError: if there is none; the message says what the others lack.
    """
    names = os.listdir(output_dir) if os.path.isdir(output_dir) else []
    steps = sorted(
        (int(found[1]) for name in names if (found := re.fullmatch(r"checkpoint-(\d+)", name))), reverse=True
    )
    chosen, skipped = None, []
    for step in steps:
        folder = os.path.join(output_dir, f"checkpoint-{step}")
        if (missing := missing_part(folder)) is None:
            chosen = folder
            break
        skipped.append(f"checkpoint-{step} (no complete {missing})")
    chosen, skipped = broadcast_object_list([chosen, skipped])
    if chosen is None:
        found = f"it has only unfinished ones: {', '.join(skipped)}" if skipped else "it has none"
        raise FileNotFoundError(
            f"`resume_from_checkpoint` is True, but there is no complete checkpoint in {output_dir!r}: {found}. Start "
            "without it, or name a checkpoint."
        )
    if skipped:
        warnings.warn(
            f"Resuming from {chosen}; passed over as not written to the end: {', '.join(skipped)}.", stacklevel=3
        )
    return chosen


def write(value: dict, path: str) -> None:
    torch.save(value, f"{path}.partial")
    os.replace(f"{path}.partial", path)


def read(path: str, fields: dict[str, type]) -> dict:
    remedy = "resume from another checkpoint, or start anew from its weights."
    try:
        value = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch's loader raises a dozen kinds
        reason = str(error).split("\n")[0][:200]
        raise ValueError(
            f"{path} cannot be read ({type(error).__name__}: {reason}). It was cut short or changed after it was "
            f"written: {remedy}"
        ) from error
    for name, kind in fields.items():
        found = value.get(name) if isinstance(value, dict) else value
        if not isinstance(found, kind):
            raise ValueError(
                f"{path} should hold `{name}` as {kind.__name__}, but has {found!r:.100}. It was changed after it was "
                f"written, or another release wrote it: {remedy}"
            )
    return value


def fingerprint(prompts) -> str:
    """Identity of prompts in their order."""
    digest = hashlib.sha256()
    for prompt in prompts:
        digest.update(repr(prompt).encode("utf-8", "surrogatepass"))
    return digest.hexdigest()


def write_prompts(folder: str, prompts, columns: dict) -> None:
    """
    Write what is known of every prompt as a table: its row, the beginning of its text, and the methods' columns.

    Args:
        folder (`str`):
            An existing directory.
        prompts (`Iterable`):
            The prompts, texts or conversations.
        columns (`dict`):
            Tensors or lists with one entry per prompt.
    """
    texts = [prompt if isinstance(prompt, str) else str(prompt[-1].get("content")) for prompt in prompts]
    table = {"row": list(range(len(texts))), "prompt": [text[:300] for text in texts]}
    table |= {name: x.tolist() if isinstance(x, torch.Tensor) else list(x) for name, x in columns.items()}
    Dataset.from_dict(table).to_parquet(os.path.join(folder, f"{PROMPTS}.partial"))
    os.replace(os.path.join(folder, f"{PROMPTS}.partial"), os.path.join(folder, PROMPTS))


def to_device(value, device):
    """Move every tensor in nested lists and dicts."""
    if isinstance(value, torch.Tensor):
        return value.to(device)
    if isinstance(value, dict):
        return {key: to_device(part, device) for key, part in value.items()}
    return [to_device(part, device) for part in value] if isinstance(value, list) else value
