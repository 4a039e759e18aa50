"""The benchmarks: which rows come next, what their table says, a tiny run, and the models of what scaling costs."""

import importlib.util
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch


def load(name):
    path = Path(__file__).parents[1] / "benchmarks" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(f"bench_{name}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def bench(tmp_path, monkeypatch):
    module = load("run")
    monkeypatch.setattr(module, "RESULTS", tmp_path)
    return module


def write(bench, row, end, start=0.3):
    row.path.parent.mkdir(parents=True, exist_ok=True)
    curve = [[0, start], [500, (start + end) / 2], [1000, end]]
    extras = {"entropy": 0.5, "no_signal": 0.25, "tokens": 4000.0, "total_seconds": 60.0}
    row.path.write_text(json.dumps({**row._asdict(), "budget": 1000, "curve": curve, **extras}))


def fill(bench, name, rates, finals):
    for rate, end in rates.items():
        for seed in bench.TUNING_SEEDS:
            write(bench, bench.Row("sums", name, rate, seed), end)
    best = max(rates, key=rates.get)
    for seed, end in finals.items():
        write(bench, bench.Row("sums", name, best, seed), end)


def test_rows_that_are_left(bench):
    def left():
        return [row for row in bench.next_rows(["spo"], ["sums"]) if bench.read(row) is None]

    assert {row.name for row in left()} == {"grpo", "spo"} and len(left()) == 12  # both grids, the baseline's first
    assert [row.name for row in left()][:6] == ["grpo"] * 6
    fill(bench, "grpo", {2.5e-5: 0.4, 5e-5: 0.5, 1e-4: 0.45}, {})
    assert [(row.learning_rate, row.seed) for row in left()[:5]] == [(5e-5, seed) for seed in range(5)]
    # A method that acts only off-policy is compared with a baseline that is.
    assert next(row.name for row in bench.next_rows(["gppo"], ["sums"])) == "grpo x2"
    assert (bench.iterations("gppo"), bench.iterations("spo"), bench.iterations("gppo+spo")) == (2, 1, 2)


def test_the_table(bench):
    rates = {2.5e-5: 0.4, 5e-5: 0.5, 1e-4: 0.45}
    fill(bench, "grpo", rates, {0: 0.5, 1: 0.6})
    fill(bench, "spo", {2.5e-5: 0.4, 5e-5: 0.3, 1e-4: 0.6}, {0: 0.8, 1: 0.7})
    fill(bench, "ngrpo", rates, {0: 0.4})
    (bench.RESULTS / "time.json").write_text(json.dumps({"rows": {"spo": {"median": 1.25}}}))
    text = bench.table(["sums", "sparse"])
    rows = [line.split(" | ") for line in text.splitlines() if line.startswith("| ")][1:]
    assert [row[0] for row in rows] == ["| spo", "| grpo", "| ngrpo"] and "## sparse" not in text
    spo, grpo, ngrpo = rows
    assert spo[1:4] == ["2", "0.0001", "0.750 ± 0.635"]  # 12.706 * 0.0707 / sqrt(2)
    assert spo[4] == "0.200 ± 1.271" and grpo[4] == "-" and ngrpo[4] == "-0.100"
    # From 0.3 to 0.75, GRPO's end of 0.55 is reached after 5/9 of its rollouts; of seed 0 alone after 2/5, of seed 1
    # alone after 3/4.
    assert spo[6] == "0.56 (0.40 to 0.75)" and grpo[6] == "1.00 (1.00 to 1.00)"
    assert ngrpo[6] == "not reached (not reached to not reached)"
    assert spo[10:] == ["1.25", "- |"] and grpo[10:] == ["-", "- |"]
    assert "`kdrl` needs a better teacher" in text


def test_the_search_for_a_mix(bench):
    for name, end in {"spo": 0.5, "ngrpo": 0.6, "dcpo": 0.4, "clip_cov": 0.7}.items():
        fill(
            bench, name, {2.5e-5: 0.1, 5e-5: end, 1e-4: 0.2} if name != "spo" else {2.5e-5: end, 5e-5: 0, 1e-4: 0}, {}
        )
    bench.BEST = 3
    rows = bench.mixes()
    # Not with DCPO, which is the worst, nor SPO with NGRPO, as both replace the advantages.
    assert [(row.name, row.learning_rate) for row in rows] == [
        ("clip_cov+ngrpo", 5e-5),
        ("clip_cov+ngrpo", 5e-5),
        ("clip_cov+spo", 2.5e-5),
        ("clip_cov+spo", 2.5e-5),
    ]
    assert {row.budget for row in rows} == {bench.BUDGET // 3} and rows[0].path.parent.name == "sums_4266"
    write(bench, rows[0], 0.54)
    text = bench.table(["sums"])
    assert "| clip_cov+ngrpo | 5e-05 | 1 | 0.480 |" in text and text.count("clip_cov+ngrpo") == 1


def test_rows_once_more(bench, monkeypatch, capsys):
    fill(bench, "grpo", {2.5e-5: 0.1, 5e-5: 0.5, 1e-4: 0.2}, {0: 0.5, 1: 0.52, 2: 0.54})
    monkeypatch.setattr(bench, "train", lambda row: {"curve": [[0, 0.3], [row.budget, 0.53]]})
    assert bench.again(["grpo"], ["sums"], 2) and capsys.readouterr().out.count("again 0.530; seeds 0.520") == 2
    monkeypatch.setattr(bench, "train", lambda row: {"curve": [[0, 0.3], [row.budget, 0.6]]})
    assert not bench.again(["grpo"], ["sums"], 1) and capsys.readouterr().out.endswith(" !\n")


def test_numbers(bench):
    curve = np.array([[0, 0.2], [100, 0.4], [200, 0.3], [300, 0.8]])
    assert bench.rollouts_to(curve, 0.1) == 0 and bench.rollouts_to(curve, 0.3) == pytest.approx(50)
    assert bench.rollouts_to(curve, 0.55) == pytest.approx(250) and bench.rollouts_to(curve, 0.9) == math.inf
    assert bench.area({"curve": [[0, 0.0], [50, 0.2], [100, 0.4]]}) == pytest.approx(0.2)
    assert bench.late({"budget": 100, "curve": [[0, 0.0], [50, 0.2], [100, 0.4]]}) == pytest.approx(0.3)
    assert bench.interval([0.5]) == "0.500" and bench.interval([]) == "-"


@pytest.mark.parametrize("name", ["grpo", "spo", "gppo"])
def test_a_row(bench, name):
    result = bench.train(bench.Row("sums", name, 1e-4, 0, budget=64), points=2, batch=16, prompts=4)
    spent = [rollouts for rollouts, _ in result["curve"]]
    assert spent[-1] >= 64 and all(0 <= accuracy <= 1 for _, accuracy in result["curve"])
    if name == "spo":  # the first estimates of the 512 prompts are paid for
        assert spent[-1] == 1040 and len(spent) == 2
    else:
        assert spent == [0, 32, 64] and result["steps"] == {"grpo": 4, "gppo": 8}[name]
    assert result["entropy"] > 0 and result["seconds"] < result["total_seconds"]


def test_waiting_for_groups_and_for_a_stream():
    barrier = load("barrier")
    times = torch.tensor([[[1.0, 9.0], [2.0, 3.0], [4.0, 5.0]]])
    ends, used = barrier.group_steps(times, 2)
    assert ends.tolist() == [5.0] and used.tolist() == [3.5]
    ends, used = barrier.stream_steps(times.flatten(1), 4)
    assert ends.tolist() == [4.0] and used.tolist() == [2.5]
    # Exponential times: the k-th of n ends after 1/n + ... + 1/(n-k+1), and so do groups, whose longest of 8 are as
    # many independent draws.
    generator = torch.Generator().manual_seed(0)
    exponential = -torch.rand(4000, 40, 8, generator=generator, dtype=torch.float64).log()
    ends, _ = barrier.stream_steps(exponential.flatten(1), 256)
    assert ends.mean().item() == pytest.approx(sum(1 / n for n in range(65, 321)), rel=0.01)
    ends, _ = barrier.group_steps(exponential, 40)
    assert ends.mean().item() == pytest.approx(sum(1 / n for n in range(1, 321)), rel=0.02)


def test_distributions_of_durations():
    barrier = load("barrier")
    found = barrier.distributions()
    halves = torch.tensor([0.5, 0.999999], dtype=torch.float64)
    assert found["code service"](halves).tolist()[0] == 13 and found["conversation service"](halves).tolist()[0] == 129
    generator = torch.Generator().manual_seed(0)
    drawn = found["log-normal, coefficient of variation 2"](barrier.uniforms(40, 0.5, generator))
    assert (drawn.std() / drawn.mean()).item() == pytest.approx(2, rel=0.1)
    uniform = barrier.uniforms(40, 0.5, generator)
    pair = torch.corrcoef(torch.special.ndtri(uniform[:, :, :2]).flatten(0, 1).T)[0, 1].item()
    assert pair == pytest.approx(0.5, abs=0.02) and uniform.mean().item() == pytest.approx(0.5, abs=0.01)
