"""Run under torchrun: both processes train the same subnetwork, and log what the main one measures."""

import json
import sys
from pathlib import Path


sys.path.insert(0, str(Path(__file__).parents[1]))

from harness import build, scripted
from trl import GRPOConfig, GRPOTrainer

from trl_ext import SubnetworkMaskCallback, UpdateSparsityCallback, UpdateSparsityConfig
from trl_ext.callbacks.update_sparsity import copy_weights, weights_hash


if __name__ == "__main__":
    trainer = build(
        GRPOTrainer,
        GRPOConfig,
        out=sys.argv[1],
        rollout_func=scripted,
        max_steps=2,
        per_device_train_batch_size=4,
        weight_decay=0.5,
        gradient_accumulation_steps=2,
    )
    assert trainer.accelerator.num_processes == 2
    config = UpdateSparsityConfig(mask_source="random:0.3")
    start, mask = copy_weights(trainer.model), SubnetworkMaskCallback(config, trainer)
    trainer.add_callback(mask)
    trainer.add_callback(UpdateSparsityCallback(config, trainer))
    trainer.train()
    end = copy_weights(trainer.model)
    result = {
        "weights": weights_hash(end),
        "log": [e for e in trainer.state.log_history if "update_sparsity/nan" in e],
        "frozen_moved": sum(int((end[name] != start[name])[~mask.masks[name]].sum()) for name in end),
    }
    Path(sys.argv[1], f"result_{trainer.accelerator.process_index}.json").write_text(json.dumps(result))
