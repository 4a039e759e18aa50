"""Trains, and is killed without a warning while it writes a checkpoint."""

import os
import shutil
import signal
import sys
from pathlib import Path


sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from harness import train
from transformers import TrainerState

from trl_ext import SPOTrainer
from trl_ext.core import state


torch.set_num_threads(1)
SETTINGS = {
    "spo_offline_n": 0,
    "num_iterations": 2,  # every other checkpoint lies inside a generation
    "save_strategy": "steps",
    "save_steps": 1,
    "max_steps": 6,
}


def die(*args, **kwargs):
    os.kill(os.getpid(), signal.SIGKILL)


def main(folder: str, moment: str, step: int) -> None:
    def dying(function, when=lambda *args, **kwargs: True, before=None):
        """The function, in whose place the process dies once it writes the checkpoint of that step."""

        def call(*args, **kwargs):
            if when(*args, **kwargs):
                if before:
                    before(*args, **kwargs)
                die()
            return function(*args, **kwargs)

        return call

    here = f"checkpoint-{step}"
    if moment == "model":
        SPOTrainer._save_optimizer_and_scheduler = dying(
            SPOTrainer._save_optimizer_and_scheduler, lambda self, output: here in output
        )
    elif moment == "state":
        state.write = dying(state.write, lambda value, path: here in path and path.endswith(state.SHARED))
    elif moment == "marker":
        TrainerState.save_to_json = dying(TrainerState.save_to_json, lambda self, path: here in path)
    elif moment == "half of the last file":
        TrainerState.save_to_json = dying(
            TrainerState.save_to_json, lambda self, path: here in path, lambda self, path: Path(path).write_text('{"a')
        )
    elif moment == "rotation":
        shutil.rmtree = dying(shutil.rmtree, lambda path, *args, **kwargs: f"checkpoint-{step - 1}" in str(path))
    train(SPOTrainer, out=folder, save_total_limit=1 if moment == "rotation" else None, **SETTINGS)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]))
