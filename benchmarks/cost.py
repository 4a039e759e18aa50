"""
What each method costs against plain TRL: step time, interleaved in one process, and peak memory of live tensors, one
fresh process per method. Prints a table and writes `benchmarks/results/<time|memory|choose>.json`.

```bash
python benchmarks/cost.py time [method ...]      # names as in trl_ext.mix; "a+b" is a mix
python benchmarks/cost.py memory [method ...]
python benchmarks/cost.py choose [method ...]    # milliseconds to choose 128 of 100,000 prompts, megabytes of state
```

Only the ratios mean anything: both sides of each come from the same run on the same machine.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
import weakref
from importlib.metadata import version
from pathlib import Path

import torch
from datasets import Dataset
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import PrinterCallback, Qwen2Config, Qwen2ForCausalLM
from trl import GRPOConfig, GRPOTrainer

from trl_ext import MethodConfig, MethodTrainer, mix
from trl_ext.core.mixing import list_methods
from trl_ext.tasks import POLICY_PATH, arithmetic, exact_match


RESULTS = Path(__file__).parent / "results"
HINTS = ["add the units", "carry"]
QUIET = {
    "use_cpu": True,
    "bf16": False,
    "gradient_checkpointing": False,
    "report_to": [],
    "save_strategy": "no",
    "disable_tqdm": True,
}
# What a method cannot do without, and settings that keep one-off costs out of the steps.
SETTINGS = {
    "kdrl": {"kd_teacher": POLICY_PATH},
    "scaf_grpo": {"scaf_exempt_steps": 0},
    "spo": {"spo_offline_n": 0},
    "spo constant": {"spo_offline_n": 0, "spo_rho_mode": "constant"},
    "vas": {"vas_scoring": "online"},
}
OFF_POLICY = {"bapo", "dcpo", "gppo", "kl_cov", "llds"}
KL = {"grpo_d", "one_shot_rlvr"}  # have a KL term, so TRL gets one beside them


def classes(name):
    if name == "trl":
        return GRPOTrainer, GRPOConfig
    if name == "neutral":
        return MethodTrainer, MethodConfig
    return mix(*name.split(" ")[0].split("+"))


def build(name, folder, model=POLICY_PATH, data=None, **settings):
    trainer_class, config_class = classes(name)
    for part in name.split("+"):
        settings |= SETTINGS.get(part, {})
    args = config_class(folder, logging_steps=1, seed=1, **QUIET, **settings)
    data = arithmetic() if data is None else data
    data = data.add_column("solution", [HINTS] * len(data)).add_column("duration", [1.0] * len(data))
    trainer = trainer_class(model, exact_match, args, data)
    trainer.remove_callback(PrinterCallback)
    return trainer


def measure_time(names, rounds, steps):
    """Median step time of short runs in turn: plain TRL next to every method, in every round."""
    ratios = {name: [] for name in names}
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(rounds):
            for name in names:
                off_policy = {"num_iterations": 2} if name in OFF_POLICY else {}
                pair = {}
                for side in ("trl", name):
                    beta = {"beta": 0.01} if side == "trl" and name in KL else {}
                    trainer = build(
                        side,
                        folder,
                        per_device_train_batch_size=64,
                        max_completion_length=8,
                        max_steps=steps,
                        learning_rate=1e-5,
                        **off_policy,
                        **beta,
                    )
                    trainer.train()
                    times = [log["step_time"] for log in trainer.state.log_history if "step_time" in log]
                    pair[side] = statistics.fmean(sorted(times[4:])[: len(times[4:]) * 3 // 4])
                ratios[name].append(pair[name] / pair["trl"])
    return {name: {"median": statistics.median(v), "all": [round(x, 4) for x in v]} for name, v in ratios.items()}


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of tensor storages that are alive, and their peak."""

    def __init__(self):
        super().__init__()
        self.now = self.peak = 0
        self.known = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor) and leaf.layout == torch.strided:  # a sparse one has no storage
                self.see(leaf.untyped_storage())
        return result

    def see(self, storage):
        key = storage._cdata
        if key not in self.known:
            size = storage.nbytes()
            self.known.add(key)
            self.now += size
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self.forget, key, size)

    def forget(self, key, size):
        self.known.discard(key)
        self.now -= size


def scripted(name, folder, vocabulary=32_768, length=512, batch=8, base=None):
    """
    A method's trainer over a random model, with completions that are given: nothing is generated.

    Args:
        name (`str`):
            As in [`classes`].
        folder (`str`):
            Where the model is put.
        vocabulary (`int`), length (`int`), batch (`int`):
            Sizes: of the head, tokens per completion, and rollouts per step.
        base (`Callable`, *optional*):
            Derives the trainer class to use from the method's.

    Returns:
        `GRPOTrainer`: for two steps on one generation.
    """
    from transformers import AutoTokenizer

    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=vocabulary,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
    )
    AutoTokenizer.from_pretrained(POLICY_PATH).save_pretrained(folder)
    Qwen2ForCausalLM(config).save_pretrained(folder)

    def answers(prompts, trainer):
        ids = trainer.processing_class(list(prompts))["input_ids"]
        generator = torch.Generator().manual_seed(0)
        # Letters and signs: other bytes would become three when text is made of them and read again.
        completions = [torch.randint(10, 100, (length,), generator=generator).tolist() for _ in ids]
        return {"prompt_ids": ids, "completion_ids": completions, "logprobs": None}

    trainer_class, config_class = classes(name)
    used = trainer_class if base is None else base(trainer_class)
    used.__name__ = trainer_class.__name__
    settings = SETTINGS.get(name, {}) | ({"kd_teacher": folder} if name == "kdrl" else {})
    args = config_class(
        folder,
        per_device_train_batch_size=batch,
        num_generations=4,
        max_completion_length=length,
        max_steps=2,
        num_iterations=2,
        **QUIET,
        **settings,
    )
    data = Dataset.from_list(list(arithmetic().select(range(16)))).add_column("solution", [HINTS] * 16)
    data = data.add_column("duration", [1.0] * 16)
    os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"
    trainer = used(
        folder,
        lambda completions, **kw: [float(i % 2) for i in range(len(completions))],
        args,
        data,
        rollout_func=answers,
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def memory_of_one(name):
    """Peak of live tensor bytes in the forward and backward passes of one step, beyond the model itself."""
    peaks = []

    def measured(trainer_class):
        class Measured(trainer_class):
            config_class = getattr(trainer_class, "config_class", None)

            def training_step(self, model, inputs, num_items_in_batch=None):
                if self._buffered_inputs is None:
                    model.train()
                    self._prepare_inputs(inputs)  # generation and scoring apart
                mode = LiveBytes()
                with mode:
                    loss = super().training_step(model, inputs, num_items_in_batch)
                peaks.append(mode.peak)
                return loss

        return Measured

    with tempfile.TemporaryDirectory() as folder:
        scripted(name, folder, base=measured).train()
    return max(peaks)


def measure_memory(names):
    def run(name):
        command = [sys.executable, __file__, "memory-of-one", name]
        printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        return int(printed.strip().splitlines()[-1])

    plain = run("trl")
    peaks = {name: run(name) for name in names}
    return {name: {"ratio": peak / plain, "bytes": peak, "bytes of trl": plain} for name, peak in peaks.items()}


def measure_choice(names, prompts=100_000, chosen=128):
    """Time to choose a generation's prompts and budgets, and size of the saved state, for methods that choose."""
    data = Dataset.from_dict({"prompt": [f"{i}+1=" for i in range(prompts)], "answer": ["0"] * prompts})
    results = {}
    with tempfile.TemporaryDirectory() as folder:
        for name in names:
            trainer_class, _ = classes(name)
            if not trainer_class._overrides("choose_prompts", "prompt_weights", "prompt_budgets"):
                continue
            trainer = build(
                name, folder, data=data, num_generations=2, generation_batch_size=2 * chosen, max_completion_length=4
            )
            times = []
            for _ in range(21):
                start = time.perf_counter()
                trainer._plan()
                times.append(1000 * (time.perf_counter() - start))
            torch.save(trainer.method_state(), f"{folder}/state.pt")
            megabytes = Path(folder, "state.pt").stat().st_size / 2**20
            results[name] = {"milliseconds": round(statistics.median(times[1:]), 1), "megabytes": round(megabytes, 1)}
            print(f"{name}: {results[name]['milliseconds']} ms, {results[name]['megabytes']} MB", flush=True)
    return results


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("what", choices=["time", "memory", "memory-of-one", "choose"])
    parser.add_argument("methods", nargs="*", help="default: neutral and all methods")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=24)
    options = parser.parse_args()
    torch.set_num_threads(1)
    names = options.methods or ["neutral", *list_methods(), "spo constant"]
    if options.what == "memory-of-one":
        print(memory_of_one(names[0]))
        return
    if options.what == "time":
        rows = measure_time(names, options.rounds, options.steps)
    else:
        rows = {"memory": measure_memory, "choose": measure_choice}[options.what](names)
    RESULTS.mkdir(exist_ok=True)
    versions = {name: version(name) for name in ("trl-ext", "trl", "transformers", "torch")}
    machine = {"machine": platform.machine(), "cores": os.cpu_count(), "threads": torch.get_num_threads()}
    path = RESULTS / f"{options.what}.json"
    known = json.loads(path.read_text())["rows"] if path.exists() else {}
    path.write_text(json.dumps({"versions": versions, **machine, "rows": known | rows}, indent=2) + "\n")
    for name, row in rows.items():
        print(f"{name:24} {row.get('median', row.get('ratio', row.get('milliseconds'))):.3f}")


if __name__ == "__main__":
    main()
