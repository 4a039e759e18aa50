"""One and two processes (gloo) give the same prompts, advantages, states and parameters."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from distributed_worker import CASES


pytestmark = pytest.mark.xdist_group("distributed")  # one worker, since all tests share the launches
WORKER = Path(__file__).with_name("distributed_worker.py")


def launch(folder, processes, names=()):
    command = [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={processes}", "--master_port=0"]
    command += ["--rdzv_backend=c10d", "--rdzv_endpoint=localhost:0", str(WORKER), str(folder), *names]
    result = subprocess.run(command, capture_output=True, text=True, timeout=900, check=False)
    assert result.returncode == 0, result.stderr[-4000:]


# One case for every part of the core, and for what is hardest to get right; the others are slow tests.
QUICK = [
    "neutral",
    "dropping, dapo",
    "budgets",
    "rounds",
    "measuring",
    "spo",
    "clip_cov global",
    "capo",
    "dcpo",
    "vade",
]
QUICK += ["knapsack_rl + empg + llds", "dynamic_sampling + d3s + clip_cov", "blend of bnpo and spo"]


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folders = {}

    def load(name, processes, process):
        quick = name in QUICK
        if quick not in folders:
            folders[quick] = tmp_path_factory.mktemp("distributed")
            for count in (1, 2):
                launch(folders[quick], count, [name for name in CASES if (name in QUICK) == quick])
        return torch.load(folders[quick] / f"{name}_{processes}_{process}.pt", weights_only=True)

    return load


def gap(a, b) -> float:
    """Largest difference between two nested results; infinite if they differ in anything but numbers."""
    if isinstance(a, dict):
        return max((gap(a[key], b[key]) for key in a), default=0.0) if a.keys() == b.keys() else float("inf")
    if isinstance(a, list):
        return max((gap(x, y) for x, y in zip(a, b, strict=True)), default=0.0) if len(a) == len(b) else float("inf")
    if a is None or isinstance(a, (str, bool)):
        return 0.0 if a == b else float("inf")
    return (torch.as_tensor(a).double() - torch.as_tensor(b).double()).abs().max().item()


# Log-probabilities and entropies are float32 whatever the model, and differ by an ulp with the padding of a batch. One
# ulp moves SPO's drift by 1e-6 and the share of evidence that it keeps by 1e-5, where that is not clipped.
FLOAT32 = {
    "clip_cov + spo": ("state", 3e-5),
    "empg": ("logged", 1e-5),
    "gvm": ("state", 1e-5),  # norms of gradients
    "knapsack_rl + empg + llds": ("logged", 1e-5),
}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name in QUICK else pytest.mark.slow) for name in CASES]
)
def test_two_processes_equal_one(results, name):
    one, first, second = results(name, 1, 0), results(name, 2, 0), results(name, 2, 1)
    assert len(one["seen"]) >= 2
    gaps = {key: gap(one[key], first[key]) for key in ("seen", "state", "watched", "logged", "parameters")}
    if name in FLOAT32:
        part, tolerance = FLOAT32[name]
        assert gaps.pop(part) <= tolerance
    assert all(value <= 1e-6 for value in gaps.values()), gaps
    assert gap(first, second) == 0.0
    if one["seen"][0]["advantages"] is not None:  # else per token, and local
        assert max(abs(a) for seen in one["seen"] for a in seen["advantages"]) > 0.1


# Methods that choose prompts or deal rollouts.
CHOOSING = [
    "spo constant",
    "knapsack_rl",
    "dynamic_sampling",
    "vade",
    "vas",
    "gvm",
    "deficit_sampler + spo",
    "budgets",
]


@pytest.mark.slow
def test_four_processes_choose_the_same_prompts(tmp_path):
    for processes in (1, 4):
        launch(tmp_path, processes, CHOOSING)
    for name in CHOOSING:
        one, *four = (
            torch.load(tmp_path / f"{name}_{processes}_{process}.pt", weights_only=True)
            for processes, process in [(1, 0), *((4, process) for process in range(4))]
        )
        for part in four:
            assert [seen["prompts"] for seen in part["seen"]] == [seen["prompts"] for seen in one["seen"]], name
            assert all(len(seen["prompts"]) == 16 for seen in part["seen"])
            assert gap(part["state"], one["state"]) <= 1e-5 and gap(part["parameters"], one["parameters"]) <= 1e-6, (
                name
            )
