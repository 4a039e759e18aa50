"""
D3S: does the time of the forward and backward passes fall with the share of rollouts that is kept?

Trains on scripted completions of 128 tokens with a constant schedule and times everything in a training step but the
generation and scoring. Prints the median time relative to keeping everything, for each share.
"""

import json
import os
import statistics
import tempfile
import time
from pathlib import Path

import torch
from transformers import PrinterCallback

from trl_ext import D3SConfig, D3STrainer
from trl_ext.tasks import POLICY_PATH, arithmetic


os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")


class Timed(D3STrainer):
    config_class = D3SConfig

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.seconds, self.preparing = [], 0.0

    def _prepare_inputs(self, inputs):
        start = time.perf_counter()
        result = super()._prepare_inputs(inputs)
        self.preparing = time.perf_counter() - start
        return result

    def training_step(self, *args, **kwargs):
        start = time.perf_counter()
        loss = super().training_step(*args, **kwargs)
        self.seconds.append(time.perf_counter() - start - self.preparing)
        return loss


def long_completions(prompts, trainer):
    ids = trainer.processing_class(list(prompts))["input_ids"]
    generator = torch.Generator().manual_seed(trainer.state.global_step)
    completions = [torch.randint(10, 200, (128,), generator=generator).tolist() for _ in ids]
    return {"prompt_ids": ids, "completion_ids": completions, "logprobs": None}


def reward(completions, **kwargs):
    return [float(len(text) % 2) for text in completions]


def run(kept: int, folder: str) -> list[float]:
    args = D3SConfig(
        folder,
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
        num_generations=8,
        per_device_train_batch_size=32,
        max_completion_length=128,
        max_steps=12,
        d3s_n_init=kept,
        d3s_k_init=1.0,
        d3s_schedule="constant",
    )
    trainer = Timed(POLICY_PATH, reward, args, arithmetic(), rollout_func=long_completions)
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    return trainer.seconds[2:]


def main():
    torch.set_num_threads(1)
    shares = [8, 6, 4, 2]
    times = {kept: [] for kept in shares}
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(3):  # in turn, so that a change of the machine's speed meets all of them
            for kept in shares:
                times[kept] += run(kept, folder)
    whole = statistics.median(times[8])
    ratios = {f"{kept}/8": round(statistics.median(times[kept]) / whole, 3) for kept in shares}
    for share, ratio in ratios.items():
        print(f"kept {share}: {ratio:.3f} of the forward and backward time")
    path = Path(__file__).parents[1] / "results" / "d3s.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps({"forward and backward time by share of rollouts kept": ratios}, indent=2) + "\n")


if __name__ == "__main__":
    main()
