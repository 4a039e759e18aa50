"""Run under torchrun: two processes stop together, though only one of them sees a reason to."""

import json
import sys
import warnings
from pathlib import Path


sys.path.insert(0, str(Path(__file__).parents[1]))

from harness import build, scripted
from transformers import TrainerCallback
from trl import GRPOConfig, GRPOTrainer

from trl_ext import EntropyLawCallback, EntropyLawConfig


class Fake(TrainerCallback):
    """Gives the main process a collapsing entropy, the other a steady one."""

    def on_log(self, args, state, control, **kwargs):
        if "entropy" in state.log_history[-1]:
            falling = args.process_index == 0 and state.global_step >= 4
            state.log_history[-1]["entropy"] = 0.01 if falling else 1.0


if __name__ == "__main__":
    trainer = build(
        GRPOTrainer, GRPOConfig, out=sys.argv[1], rollout_func=scripted, max_steps=8, per_device_train_batch_size=4
    )
    assert trainer.accelerator.num_processes == 2
    trainer.add_callback(Fake())
    trainer.add_callback(EntropyLawCallback(EntropyLawConfig(alarm_window=1, stop_on="collapse")))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.train()
    said = sum("Entropy collapse at step 4" in str(w.message) for w in caught)
    result = {"step": trainer.state.global_step, "warnings": said}
    Path(sys.argv[1], f"result_{trainer.accelerator.process_index}.json").write_text(json.dumps(result))
