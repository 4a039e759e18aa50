"""Started by torchrun: one process of trainings with engines of their own. Writes how far the engines are off."""

import json
import sys
from pathlib import Path


sys.path.insert(0, str(Path(__file__).parents[1]))

import pytest
import torch
from real_engine import COLOCATE, share_engine
from watched import Watched


def main(folder, processes, sharing, dtype):
    torch.set_num_threads(1)
    gaps, ratios = [], []
    with pytest.MonkeyPatch.context() as patch:
        share_engine(patch, dtype)
        for names in (("clip_cov", "spo"), ("knapsack_rl", "scaf_grpo")):
            watched = Watched()
            trainer = watched.run(
                *names,
                **COLOCATE,
                vllm_tensor_parallel_size=int(sharing),
                per_device_train_batch_size=16 // int(processes),
                temperature=1.5,
                out=f"{folder}/unused",
            )
            assert trainer.accelerator.num_processes == int(processes)
            watched.check(trainer)
            gaps += [call.gap for call in watched.calls]
            for entry in trainer.state.log_history:
                ratios += [value for name, value in entry.items() if "importance_sampling_ratio" in name]
    Path(folder, f"{trainer.accelerator.process_index}.json").write_text(json.dumps([gaps, ratios]))


if __name__ == "__main__":
    main(*sys.argv[1:])
