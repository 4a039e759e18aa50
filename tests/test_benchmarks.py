"""The benchmark of methods against plain GRPO: which rows come next, what the table says, and a tiny run."""

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest


@pytest.fixture
def bench(tmp_path, monkeypatch):
    path = Path(__file__).parents[1] / "benchmarks" / "run.py"
    spec = importlib.util.spec_from_file_location("bench_run", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "RESULTS", tmp_path)
    return module


def write(bench, row, end, start=0.3):
    row.path.parent.mkdir(parents=True, exist_ok=True)
    curve = [[0, start], [500, (start + end) / 2], [1000, end]]
    extras = {"entropy": 0.5, "no_signal": 0.25, "tokens": 4000.0, "total_seconds": 60.0}
    row.path.write_text(json.dumps({**row._asdict(), "curve": curve, **extras}))


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
    fill(bench, "grpo", {1e-4: 0.4, 2e-4: 0.5, 4e-4: 0.45}, {})
    assert [(row.learning_rate, row.seed) for row in left()[:5]] == [(2e-4, seed) for seed in range(5)]
    # A method that acts only off-policy is compared with a baseline that is.
    assert next(row.name for row in bench.next_rows(["gppo"], ["sums"])) == "grpo x2"
    assert (bench.iterations("gppo"), bench.iterations("spo"), bench.iterations("gppo+spo")) == (2, 1, 2)


def test_the_table(bench):
    rates = {1e-4: 0.4, 2e-4: 0.5, 4e-4: 0.45}
    fill(bench, "grpo", rates, {0: 0.5, 1: 0.6})
    fill(bench, "spo", {1e-4: 0.4, 2e-4: 0.3, 4e-4: 0.6}, {0: 0.8, 1: 0.7})
    fill(bench, "ngrpo", rates, {0: 0.4})
    rows = [line.split(" | ") for line in bench.table(["sums"]).splitlines() if line.startswith("| ")][1:]
    assert [row[0] for row in rows] == ["| spo", "| grpo", "| ngrpo"]
    spo, grpo, ngrpo = rows
    assert spo[1:4] == ["2", "0.0004", "0.750 ± 0.635"]  # 12.706 * 0.0707 / sqrt(2)
    assert spo[4] == "0.200 ± 1.271" and grpo[4] == "-" and ngrpo[4] == "-0.100"
    # From 0.3 to 0.75, GRPO's end of 0.55 is reached after 5/9 of its rollouts.
    assert spo[6] == "0.56" and grpo[6] == "1.00" and ngrpo[6] == "not reached"
    assert "`kdrl` needs a better teacher" in bench.table(["sums"])


def test_numbers(bench):
    curve = np.array([[0, 0.2], [100, 0.4], [200, 0.3], [300, 0.8]])
    assert bench.rollouts_to(curve, 0.1) == 0 and bench.rollouts_to(curve, 0.3) == pytest.approx(50)
    assert bench.rollouts_to(curve, 0.55) == pytest.approx(250) and bench.rollouts_to(curve, 0.9) is None
    assert bench.area({"curve": [[0, 0.0], [50, 0.2], [100, 0.4]]}) == pytest.approx(0.2)
    assert bench.interval([0.5]) == "0.500" and bench.interval([]) == "-"


@pytest.mark.parametrize("name", ["grpo", "spo", "gppo"])
def test_a_row(bench, name):
    result = bench.train(bench.Row("sums", name, 1e-4, 0), budget=64, points=2, batch=16, prompts=4)
    spent = [rollouts for rollouts, _ in result["curve"]]
    assert spent[-1] >= 64 and all(0 <= accuracy <= 1 for _, accuracy in result["curve"])
    if name == "spo":  # the first estimates of all prompts are paid for
        assert spent[-1] > 9000 and len(spent) == 2
    else:
        assert spent == [0, 32, 64] and result["steps"] == {"grpo": 4, "gppo": 8}[name]
    assert result["entropy"] > 0 and result["seconds"] < result["total_seconds"]
