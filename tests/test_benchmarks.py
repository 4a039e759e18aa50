"""The benchmarks: which rows come next, what their table says, a tiny run, and the models of what scaling costs."""

import importlib.util
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from trl_ext.tasks import POLICY_PATH


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


def fill(bench, name, rates, finals, tasks=("sums",)):
    for rate, end in rates.items():
        for seed in bench.TUNING_SEEDS:
            write(bench, bench.Row("sums", name, rate, seed), end)
    best = max(rates, key=rates.get)
    for task in tasks:
        for seed, end in finals.items():
            write(bench, bench.Row(task, name, best, seed), end)


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
    assert spo[5:7] == ["0.525 ± 0.318", "0.100 ± 0.635"] and grpo[6] == "-"  # (0.3 + 0.75) / 2
    assert spo[7] == "0.56 (0.40 to 0.75)" and grpo[7] == "1.00 (1.00 to 1.00)"
    assert ngrpo[7] == "not reached (not reached to not reached)"
    assert spo[11:] == ["1.25", "- |"] and grpo[11:] == ["-", "- |"]
    assert "`kdrl` needs a better teacher" in text


def test_all_tasks_together(bench):
    rates, seeds = {2.5e-5: 0.4, 5e-5: 0.5, 1e-4: 0.45}, range(5)
    # GRPO's mean over rollouts is 0.1 above the start of 0.3 on one task and 0.2 on the other.
    fill(bench, "grpo", rates, dict.fromkeys(seeds, 0.5))
    fill(bench, "grpo", rates, dict.fromkeys(seeds, 0.7), tasks=["sparse"])
    fill(bench, "spo", rates, dict.fromkeys(seeds, 0.6))
    fill(bench, "spo", rates, dict.fromkeys(seeds, 0.68), tasks=["sparse"])
    fill(bench, "ngrpo", rates, dict.fromkeys(seeds, 0.5))
    fill(bench, "vas", rates, dict.fromkeys(seeds, 0.5), tasks=["sums", "sparse"])
    bench.Row("sparse", "vas", 5e-5, 4).path.unlink()  # not finished
    fill(bench, "gppo", rates, dict.fromkeys(seeds, 0.5), tasks=["sums", "sparse"])  # its baseline has not run
    rows = [bench.rows_of(task) for task in ("sums", "sparse")]
    assert bench.on_all(rows) == {"spo": pytest.approx([0.225] * 5)}  # 0.5 and -0.05
    text = bench.table(["sums", "sparse"])
    assert text.count("## sums and sparse together") == 1 and "| spo | 0.225 ± 0.000 |" in text
    assert "together" not in bench.table(["sums"]) and "together" not in bench.table(["sums", "chain_sum"])


def test_the_best_and_the_search_for_a_mix(bench):
    for name, end in {"grpo": 0.4, "spo": 0.5, "ngrpo": 0.6, "grpo_lambda": 0.35, "clip_cov": 0.7}.items():
        rates = {2.5e-5: 0.1, 5e-5: 0.3, 1e-4: 0.2} if name != "spo" else {2.5e-5: 0.3, 5e-5: 0.0, 1e-4: 0.0}
        fill(bench, name, rates, {0: end, 1: end}, tasks=bench.ALL_ON)
    # DCPO is compared with a GRPO that goes over each generation twice, and learns a third of what that one does;
    # BNPO has not run on the second task.
    fill(bench, "grpo x2", {2.5e-5: 0.1, 5e-5: 0.3, 1e-4: 0.2}, {0: 0.9}, tasks=bench.ALL_ON)
    fill(bench, "dcpo", {2.5e-5: 0.1, 5e-5: 0.3, 1e-4: 0.2}, {0: 0.5}, tasks=bench.ALL_ON)
    fill(bench, "bnpo", {2.5e-5: 0.1, 5e-5: 0.3, 1e-4: 0.2}, {0: 0.9})
    assert bench.best(9) == ["clip_cov", "ngrpo", "spo", "grpo_lambda", "dcpo"] and len(bench.best(2)) == 2
    bench.BEST = 3
    rows = bench.mixes()
    # Their parts and the baseline first. Not with those behind, nor SPO with NGRPO, as both replace the advantages.
    assert [(row.name, row.task, row.learning_rate, row.seed) for row in rows] == [
        (name, task, rate, seed)
        for name, rate in {
            "grpo": 5e-5,
            "clip_cov": 5e-5,
            "ngrpo": 5e-5,
            "spo": 2.5e-5,
            "clip_cov+ngrpo": 5e-5,
            "clip_cov+spo": 2.5e-5,
        }.items()
        for task in ("sums", "sparse")
        for seed in bench.TUNING_SEEDS
    ]
    assert {row.budget for row in rows} == {bench.BUDGET // 3} and rows[0].path.parent.name == "sums_4266"
    on_sums, on_sparse = (next(row for row in rows if row[:2] == (task, "clip_cov+ngrpo")) for task in bench.ALL_ON)
    write(bench, on_sums, 0.54)
    assert "clip_cov+ngrpo" not in bench.table(["sums"])  # shown when it has run on both tasks
    write(bench, on_sparse, 0.34)
    text = bench.table(["sums"])
    assert "| clip_cov+ngrpo | 5e-05 | 0.420 | 0.320 |" in text and text.count("clip_cov+ngrpo") == 1


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


def test_a_row_is_trained_once(bench, monkeypatch, capsys):
    trained = []

    def train(row):
        trained.append(row.seed)
        if row.seed == 3:  # another process begins while this one is at it
            bench.main(["--methods", "grpo", "--tasks", "sparse"])
        return {**row._asdict(), "curve": [[0, 0.3], [1000, 0.5]], "total_seconds": 60.0}

    fill(bench, "grpo", {2.5e-5: 0.1, 5e-5: 0.5, 1e-4: 0.2}, {})
    monkeypatch.setattr(bench, "train", train)
    monkeypatch.setattr(bench, "table", lambda tasks: "")
    bench.main(["--methods", "grpo", "--tasks", "sparse"])
    assert trained == [0, 1, 2, 3, 4] and "at least 5 rows" in capsys.readouterr().err


def test_a_mix_that_needs_a_setting_is_passed_over(bench, capsys):
    row = bench.Row("sums", "epo+one_shot_rlvr", 1e-4, 0, budget=64)
    bench.run(row)
    assert bench.read(row) is None and "`entropy_coef` must be given" in capsys.readouterr().err


def test_the_sparse_task_wants_seven_more(bench):
    plain, sparse = bench.load("sums", 0), bench.load("sparse", 0)
    assert plain.train["prompt"] == sparse.train["prompt"] and len(sparse.train) == bench.TRAIN_PROMPTS
    assert [int(a) + 7 for a in plain.test["answer"]] == [*map(int, sparse.test["answer"])]


@pytest.mark.parametrize(("questions", "common"), [("chain_sum", 60), ("sums", 0)])
def test_a_shared_prefix_changes_nothing(bench, questions, common):
    share = load("shared_prefix")
    data = bench.load(questions, 0).train.select(range(12))
    tokenizer = AutoTokenizer.from_pretrained(POLICY_PATH)
    prompts = tokenizer(list(data["prompt"]), return_tensors="pt", padding=True, padding_side="left")
    generator = torch.Generator().manual_seed(0)
    answers = torch.randint(6, 100, (12, 8), generator=generator)
    lengths = torch.randint(1, 9, (12, 1), generator=generator)
    ids = torch.cat([prompts["input_ids"], answers], 1)
    mask = torch.cat([prompts["attention_mask"], (torch.arange(8) < lengths).long()], 1)
    starts, shared = share.find_prefix(ids, mask)
    assert shared == common
    positions = (torch.arange(ids.shape[1]) - starts[:, None]).clamp(min=0)
    results, widths = [], []
    for shares in (False, True):
        model = AutoModelForCausalLM.from_pretrained(POLICY_PATH, dtype=torch.float64)
        model.model.layers[0].register_forward_hook(lambda module, args, output: widths.append(args[0].shape[:2]))
        if shares:
            share.share_prefix(model)
        logits = model(input_ids=ids, attention_mask=mask, position_ids=positions).logits
        picked = logits[:, -9:-1].log_softmax(-1).gather(2, answers[..., None])[..., 0][mask[:, -8:] == 1]
        picked.sum().backward()
        torch.manual_seed(0)
        texts = model.generate(**prompts, max_new_tokens=8, do_sample=True, top_k=0, top_p=1.0)
        results.append((logits[mask == 1].detach(), texts, [p.grad for p in model.parameters()]))
    plain, other = results
    # Angles of rotary positions are float32, everything else is float64.
    torch.testing.assert_close(other[0], plain[0], atol=1e-5, rtol=0)
    assert torch.equal(other[1], plain[1])
    largest = max(gradient.abs().max().item() for gradient in plain[2])
    for mine, theirs in zip(other[2], plain[2], strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-6 * largest, rtol=0)
    # The prefix by itself, then what is left of every row, in training and when a cache is filled.
    assert widths.count((1, common)) == (2 if common else 0)


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
