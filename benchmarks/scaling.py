"""
How the cost of a method grows: a model of its extra passes, traffic and state, checked at three sizes.

What a method does beyond plain TRL is counted, not timed, so that the numbers hold on any machine. Passes: floating
point operations beyond TRL's, in forward passes over the same completions, apart for what is done once per generation
and once per update (an update of TRL's is three such passes, and one more of the head). Batch, length and vocabulary
differ between the sizes; where the number of passes does not, the cost grows exactly as a forward pass does. It is the
first of several generations of two updates that is looked at: TRL's pass for the old log-probabilities is there in any
case (with one update EMPG makes it), and SPO's pass over earlier rollouts of prompts that it meets again, one at most,
comes later. ReST-GRPO's prompts contain beginnings of solutions, so that its passes are longer. Traffic: bytes per
rollout that a process hands to collective operations, beyond TRL's; P processes receive P times as much.
State: kilobytes in a checkpoint before the first step (histories that grow with visits come on top) and time to choose
the 128 prompts of a generation, with 1,000, 10,000 and 100,000 prompts.

```bash
python benchmarks/scaling.py passes [method ...]   # writes benchmarks/results/scaling_passes.json
python benchmarks/scaling.py state [method ...]    # writes benchmarks/results/scaling_state.json
```
"""

import argparse
import json
import pickle
import statistics
import tempfile
import time
from pathlib import Path

import accelerate.accelerator
import accelerate.utils
import torch
from torch.utils.flop_counter import FlopCounterMode, mm_flop, sdpa_backward_flop_count, sdpa_flop_count


sent = [0]  # bytes handed to collective operations


def counted(operation, size):
    def counting(value, *args, **kwargs):
        sent[0] += size(value)
        return operation(value, *args, **kwargs)

    return counting


def tensor_bytes(value) -> int:
    return sum(leaf.nbytes for leaf in torch.utils._pytree.tree_leaves(value))


operations = {
    "gather": counted(accelerate.utils.gather, tensor_bytes),
    "gather_object": counted(accelerate.utils.gather_object, lambda value: len(pickle.dumps(value))),
}
for module in (accelerate.utils, accelerate.accelerator):  # before the trainers import them by name
    for name, operation in operations.items():
        if hasattr(module, name):
            setattr(module, name, operation)

from cost import build, scripted  # noqa: E402

from trl_ext.core.mixing import list_methods  # noqa: E402


RESULTS = Path(__file__).parent / "results"
SIZES = ((4, 32, 1024), (8, 64, 8192), (16, 128, 32_768))  # rollouts, tokens per completion, vocabulary
PROMPTS = (1_000, 10_000, 100_000)
aten = torch.ops.aten
OPERATIONS = {  # PyTorch counts none of these: the gradients of TRL's chunked head, and attention on a CPU
    aten.addmm_: lambda total, a, b, *args, **kwargs: mm_flop(a, b),
    aten._scaled_dot_product_flash_attention_for_cpu: lambda q, k, v, *args, **kwargs: sdpa_flop_count(q, k, v),
    aten._scaled_dot_product_flash_attention_for_cpu_backward: lambda out, q, k, v, *args, **kwargs: (
        sdpa_backward_flop_count(out, q, k, v)
    ),
}


def count(name: str, batch: int, length: int, vocabulary: int) -> dict[str, float]:
    """Floating point operations per generation and per update, and bytes sent per generation, of two updates."""
    prepared, updates, traffic = [], [], []

    def counting(trainer_class):
        class Counting(trainer_class):
            config_class = getattr(trainer_class, "config_class", None)

            def _generate_and_score_completions(self, inputs):
                before = sent[0]
                with FlopCounterMode(display=False, custom_mapping=OPERATIONS) as counter:
                    outputs = super()._generate_and_score_completions(inputs)
                prepared.append(counter.get_total_flops())
                traffic.append(sent[0] - before)
                return outputs

            def training_step(self, model, inputs, num_items_in_batch=None):
                generations = len(prepared)
                with FlopCounterMode(display=False, custom_mapping=OPERATIONS) as counter:
                    loss = super().training_step(model, inputs, num_items_in_batch)
                updates.append(counter.get_total_flops() - sum(prepared[generations:]))
                return loss

        return Counting

    with tempfile.TemporaryDirectory() as folder:
        scripted(name, folder, vocabulary, length, batch, counting).train()
    return {"generation": prepared[-1], "update": updates[-1], "traffic": traffic[-1]}


def passes(names: list[str]) -> dict[str, dict[str, list[float]]]:
    """What a method adds to plain TRL at each of the sizes."""
    rows = {
        name: {"per generation": [], "per update": [], "bytes per rollout": []}
        for name in ("plain TRL, in all", *names)
    }
    for size in SIZES:
        plain = count("trl", *size)
        # TRL's own preparation of several updates on one generation: the old log-probabilities, a forward pass.
        forward = plain["generation"]
        for key, value in (
            ("per generation", 1.0),
            ("per update", plain["update"] / forward),
            ("bytes per rollout", plain["traffic"] / size[0]),
        ):
            rows["plain TRL, in all"][key].append(round(value, 3))
        for name in names:
            found = count(name, *size)
            for key in ("generation", "update"):
                rows[name][f"per {key}"].append(round((found[key] - plain[key]) / forward, 3))
            rows[name]["bytes per rollout"].append(round((found["traffic"] - plain["traffic"]) / size[0], 1))
    return rows


def state(names: list[str]) -> dict[str, dict[str, list[float]]]:
    """Kilobytes of a method's state and milliseconds to choose the prompts of a generation, by number of prompts."""
    from datasets import Dataset

    rows = {name: {"kilobytes": [], "milliseconds": []} for name in names}
    with tempfile.TemporaryDirectory() as folder:
        for prompts in PROMPTS:
            data = Dataset.from_dict({"prompt": [f"{i}+1=" for i in range(prompts)], "answer": ["0"] * prompts})
            for name in names:
                trainer = build(
                    name, folder, data=data, num_generations=8, generation_batch_size=1024, max_completion_length=4
                )
                times = []
                for _ in range(12):
                    start = time.perf_counter()
                    trainer._plan()
                    times.append(1000 * (time.perf_counter() - start))
                rows[name]["milliseconds"].append(round(statistics.median(times[1:]), 2))
                torch.save(trainer.method_state(), f"{folder}/state.pt")
                rows[name]["kilobytes"].append(round(Path(folder, "state.pt").stat().st_size / 1024, 1))
    return rows


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("what", choices=["passes", "state"])
    parser.add_argument("methods", nargs="*", help="default: neutral and all methods")
    options = parser.parse_args()
    torch.set_num_threads(1)
    names = options.methods or ["neutral", *list_methods()]
    rows = {"passes": passes, "state": state}[options.what](names)
    path = RESULTS / f"scaling_{options.what}.json"
    known = json.loads(path.read_text())["rows"] if path.exists() else {}
    sizes = SIZES if options.what == "passes" else PROMPTS
    path.write_text(json.dumps({"sizes": sizes, "rows": known | rows}, indent=2) + "\n")
    for name, row in rows.items():
        print(f"{name:24} " + "  ".join(f"{key} {values}" for key, values in row.items()))


if __name__ == "__main__":
    main()
