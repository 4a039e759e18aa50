"""One, two and four processes (gloo) give the same prompts, advantages, states and parameters."""

from pathlib import Path

import pytest
import torch
from distributed_worker import CASES
from harness import launch

from trl_ext.core.mixing import list_methods


pytestmark = pytest.mark.xdist_group("distributed")  # one worker, since all tests share the launches
WORKER = Path(__file__).with_name("distributed_worker.py")


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
    folder, launched = tmp_path_factory.mktemp("distributed"), set()

    def load(name, processes):
        """What every process saw; all quick cases, or all others, run in one launch."""
        quick = name in QUICK
        if (quick, processes) not in launched:
            launched.add((quick, processes))
            launch(WORKER, processes, folder, *(name for name in CASES if (name in QUICK) == quick), timeout=900)
        files = [folder / f"{name}_{processes}_{process}.pt" for process in range(processes)]
        return [torch.load(file, weights_only=True) for file in files]

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
    "gvm": ("state", 3e-5),  # norms of gradients, of 15 to 70, where a float32 has steps of up to 8e-6
    "knapsack_rl + empg + llds": ("logged", 1e-5),
}


def alone(name: str) -> str | None:
    """The method that a case is about, None if it is not about one."""
    method = name.split(",")[0].split()[0]
    return method if method in list_methods() and "+" not in name else None


# What is per micro-batch, and so differs with the number of processes, is left out of these cases.
WITHOUT = {
    "clip_cov global": "with `clip_cov_scope='global'`; else its covariances are per micro-batch",
    "disco": "without its constraint (`disco_beta=0`), which is per micro-batch",
    "gppo": "without its likelihood term (`gppo_pos_coef=0`), which is per micro-batch",
    "high_entropy_tokens global": "with `het_scope='global'`; else its threshold is per micro-batch",
    "kl_cov global": "with `kl_cov_scope='global'`; else its covariances are per micro-batch",
    "one_shot_rlvr": "without TRL's entropy bonus (`entropy_coef=0`), which is per micro-batch",
}


def check(name, results, processes, record_property):
    if name in WITHOUT:
        record_property("refused", WITHOUT[name])
    (one,), all_of_them = results(name, 1), results(name, processes)
    assert len(one["seen"]) >= 2 and len(all_of_them) == processes
    gaps = {key: gap(one[key], all_of_them[0][key]) for key in ("seen", "state", "watched", "logged", "parameters")}
    if name in FLOAT32:
        part, tolerance = FLOAT32[name]
        assert gaps.pop(part) <= tolerance
    assert all(value <= 1e-6 for value in gaps.values()), gaps
    assert all(gap(all_of_them[0], other) == 0.0 for other in all_of_them[1:])
    if one["seen"][0]["advantages"] is not None:  # else per token, and local
        assert max(abs(a) for seen in one["seen"] for a in seen["advantages"]) > 0.1


@pytest.mark.shows("two processes", alone)
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name in QUICK else pytest.mark.slow) for name in CASES]
)
def test_two_processes_equal_one(results, name, record_property):
    check(name, results, 2, record_property)


@pytest.mark.slow
@pytest.mark.shows("four processes", alone)
@pytest.mark.parametrize("name", CASES)
def test_four_processes_equal_one(results, name, record_property):
    check(name, results, 4, record_property)


def test_every_method_has_a_case_of_its_own():
    assert set(list_methods()) <= {alone(name) for name in CASES}
