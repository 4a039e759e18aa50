"""Run under torchrun: both processes resume from the newest complete checkpoint, inside a generation."""

import json
import os
import shutil
import sys
import warnings
from pathlib import Path


sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from harness import difference, scripted, train

from trl_ext import mix


torch.set_num_threads(1)


def main(folder: str) -> None:
    run = Path(folder, "run")
    settings = {"spo_offline_n": 0, "clip_cov_ratio": 0.2, "clip_cov_low": 1e-3, "num_iterations": 2, "max_steps": 6}
    settings |= {"out": run, "save_strategy": "steps", "save_steps": 1, "rollout_func": scripted}
    whole = train(*mix("clip_cov", "spo"), **settings)
    process = whole.accelerator.process_index
    whole.accelerator.wait_for_everyone()
    if process == 0:  # as if the run had been killed while it wrote the fourth
        shutil.rmtree(run / "checkpoint-6")
        shutil.rmtree(run / "checkpoint-5")
        os.remove(run / "checkpoint-4" / "trainer_state.json")
    whole.accelerator.wait_for_everyone()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        resumed = train(*mix("clip_cov", "spo"), resume=True, **settings)
    said = [str(warning.message) for warning in caught if "passed over" in str(warning.message)]
    result = {"processes": whole.accelerator.num_processes, "gap": difference(whole, resumed), "said": said}
    Path(folder, f"result_{process}.json").write_text(json.dumps(result))


if __name__ == "__main__":
    main(sys.argv[1])
