import json
import math

import numpy as np
import pytest

from trl_ext.cli import main
from trl_ext.compare import compare_evaluations, describe, read_evaluation
from trl_ext.evaluation import (
    clustered_se,
    detectable_difference,
    normal_interval,
    paired_comparison,
    runs_needed,
    sign_test,
    variance_split,
    z_sum,
)


def evaluation(successes, n=4, step=10, prompts="p", **settings):
    counts = n if isinstance(n, list) else [n] * len(successes)
    record = {"step": step, "n": max(counts), "successes": list(map(int, successes)), "counts": counts}
    return record | {"prompts": prompts, "settings": {"temperature": 1.0} | settings}


def save(folder, *records):
    folder.mkdir()
    (folder / "evaluations.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(folder)


def words(found):
    return " ".join(describe(found))


def test_one_run_a_side():
    generator = np.random.default_rng(0)
    rates = generator.beta(1, 1, 80)
    a, b = generator.binomial(4, np.minimum(rates + 0.15, 1)), generator.binomial(4, rates)
    found = compare_evaluations([evaluation(a)], [evaluation(b)])
    assert found.paired == paired_comparison(a / 4, b / 4)
    assert found.scores[0] == ((a / 4).mean(), *normal_interval((a / 4).mean(), clustered_se(a / 4)))
    assert found.real
    assert found.p_value is found.over_runs is found.runs_needed is None
    assert found.detectable == pytest.approx(z_sum() * found.paired.se)
    assert (found.prompts, found.samples) == (80, 4)
    assert "A is better by" in words(found) and "nothing of other seeds" in words(found)
    assert "B is better by" in words(compare_evaluations([evaluation(b)], [evaluation(a)]))
    assert not compare_evaluations([evaluation(a)], [evaluation(b)], alpha=1e-9).real


def test_what_it_takes_to_see_a_difference():
    generator = np.random.default_rng(3)
    a, b = (generator.binomial(4, 0.5 + shift, 40) for shift in (0.08, 0.0))
    found = compare_evaluations([evaluation(a)], [evaluation(b)])
    assert not found.real
    target = abs(found.paired.difference) / z_sum()
    needed = found.prompts_needed
    assert found.paired.se * math.sqrt(40 / needed) <= target < found.paired.se * math.sqrt(40 / (needed - 1))
    # samples reduce their own part only
    rows = [[[1] * c + [0] * (4 - c) for c in side] for side in (a, b)]
    sampling = sum(variance_split(side).sampling for side in rows)
    rest = max(found.paired.se**2 - sampling, 0)
    enough = [rest + sampling * 4 / n <= target**2 for n in (found.samples_needed - 1, found.samples_needed)]
    assert enough == [False, True]
    assert f"takes {needed} prompts" in words(found) and f"{found.samples_needed} samples each on these" in words(
        found
    )


def test_samples_do_not_help_where_prompts_differ():
    # Every prompt is always answered by one of the two: nothing is left to sampling.
    a = [4] * 21 + [0] * 19
    found = compare_evaluations([evaluation(a)], [evaluation([4 - c for c in a])])
    assert math.isinf(found.samples_needed) and not found.real
    assert "no number of samples on these" in words(found)


def test_a_single_sample_is_judged_by_the_exact_test():
    a, b = [1] * 9 + [0] * 31, [0] * 8 + [1] + [0] * 31
    found = compare_evaluations([evaluation(a, 1)], [evaluation(b, 1)])
    assert found.p_value == sign_test(8, 0)
    assert found.real and "exact sign test says p = 0.00781" in words(found)
    assert found.samples_needed is None and found.prompts_needed is not None
    # the normal interval leaves out 0, but 5 of 5 prompts may be luck
    close = compare_evaluations([evaluation([1] * 5 + [0] * 35, 1)], [evaluation([0] * 40, 1)])
    assert close.paired.real and close.p_value == 0.0625 and not close.real


def test_no_difference_and_one_prompt():
    same = compare_evaluations([evaluation([1, 2] * 20)], [evaluation([1, 2] * 20)])
    assert not same.real and same.prompts_needed is None
    assert "correct equally often on every prompt" in words(same)
    one = compare_evaluations([evaluation([4])], [evaluation([0])])
    assert one.real is None
    assert "cannot be told from a single prompt" in words(one)


def seeds(generator, mean, runs, std=0.05):
    """Runs that differ by more than sampling."""
    return [evaluation(generator.binomial(8, np.full(60, mean + generator.normal(0, std))), 8) for _ in range(runs)]


def test_several_runs_a_side():
    generator = np.random.default_rng(2)
    a, b = seeds(generator, 0.6, 3), seeds(generator, 0.4, 4)
    found = compare_evaluations(a, b)
    scores = [np.array([np.mean(run["successes"]) / 8 for run in side]) for side in (a, b)]
    difference = scores[0].mean() - scores[1].mean()
    assert found.paired.difference == pytest.approx(difference)
    sigma = math.sqrt((2 * scores[0].var(ddof=1) + 3 * scores[1].var(ddof=1)) / 5)
    width = 2.570582 * sigma * math.sqrt(1 / 3 + 1 / 4)  # Student's t, 5 degrees of freedom
    assert found.over_runs == pytest.approx((difference - width, difference + width), abs=1e-6)
    assert found.detectable == pytest.approx(detectable_difference(sigma, 2 / (1 / 3 + 1 / 4)))
    assert found.runs_needed == runs_needed(sigma, difference)
    assert found.prompts_needed is None and found.real
    assert f"takes {found.runs_needed} runs a side" in words(found)


def test_false_differences_between_seeds():
    # What the interval over prompts takes for a difference is often one of seeds.
    generator, wrong, naive, repeats = np.random.default_rng(5), 0, 0, 300
    for _ in range(repeats):
        a, b = seeds(generator, 0.5, 3, 0.1), seeds(generator, 0.5, 3, 0.1)
        found = compare_evaluations(a, b, draws=1)
        wrong += found.real
        naive += found.paired.real
    assert 0.02 < wrong / repeats < 0.09
    assert naive / repeats > 0.3


def test_one_run_against_several():
    generator = np.random.default_rng(3)
    found = compare_evaluations(seeds(generator, 0.5, 1), seeds(generator, 0.5, 3))
    assert found.over_runs is not None and found.runs == (1, 3)


def test_prompts_that_were_not_scored_are_left_out():
    a, b = evaluation([4, 1, 0, 2], [4, 4, 0, 4]), evaluation([2, 1, 3, 0], [4, 2, 4, 4])
    found = compare_evaluations([a], [b])
    assert found.paired == paired_comparison([1, 0.25, 0.5], [0.5, 0.5, 0])
    assert found.samples == 2
    assert "1 prompts without a scored sample" in words(found)
    with pytest.raises(ValueError, match="no prompt was scored in all runs"):
        compare_evaluations([evaluation([0, 1], [0, 4])], [evaluation([1, 0], [4, 0])])


# --------------------------------------------------------------------------------------------------------- the command


def test_command(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    generator = np.random.default_rng(0)
    easy, hard = generator.binomial(4, 0.8, 50), generator.binomial(4, 0.4, 50)
    a = save(tmp_path / "a", evaluation(hard, step=5), evaluation(easy, step=10))
    b = save(tmp_path / "b", evaluation(hard, step=5, temperature=0.7), evaluation(hard, step=10, temperature=0.7))
    main(["compare", a, b])
    printed = capsys.readouterr().out
    assert "The difference is real at alpha = 0.05: A is better by" in printed
    assert f"{(easy - hard).mean() / 4:+.4f}" in printed and "95% interval" in printed
    assert "Note: The evaluations differ in `temperature`: 1.0, 0.7." in printed
    main(["compare", f"{a}/evaluations.jsonl", b, "--step", "5", "--alpha", "0.1"])
    printed = capsys.readouterr().out
    assert "The difference of 0.0000 is not real at alpha = 0.1" in printed and "90% interval" in printed


def test_command_with_seeds(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    generator = np.random.default_rng(2)
    runs = [save(tmp_path / str(i), run) for i, run in enumerate(seeds(generator, 0.6, 3) + seeds(generator, 0.4, 3))]
    main(["compare", ",".join(runs[:3]), ",".join(runs[3:])])
    printed = capsys.readouterr().out
    assert "over runs" in printed and "runs a side" in printed and f"B: {', '.join(runs[3:])}" in printed


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prompts": "other"}, "evaluated on different prompts"),
        ({"successes": [1, 2, 3], "counts": [4] * 3}, "evaluated on different prompts"),
        ({"step": 7}, "`step` 10 has no evaluation in .*choose one of 7"),
    ],
)
def test_runs_that_cannot_be_compared(tmp_path, capsys, change, message):
    a = save(tmp_path / "a", evaluation([1, 2]))
    b = save(tmp_path / "b", evaluation([1, 2]) | change)
    with pytest.raises(SystemExit) as stopped:
        main(["compare", a, b, "--step", "10"])
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("trl-ext: error: ")
    with pytest.raises(ValueError, match=message):
        raise ValueError(error)


def test_unusable_input(tmp_path, capsys):
    good = save(tmp_path / "good", evaluation([1, 2]))
    damaged = save(tmp_path / "damaged", evaluation([1, 2]))
    with open(f"{damaged}/evaluations.jsonl", "a") as file:
        file.write('{"step": 3\n')
    for arguments, message in (
        ((good, str(tmp_path / "nowhere")), "there is no"),
        ((good, str(tmp_path)), "there is no"),
        ((good, save(tmp_path / "empty")), "has no evaluation: evaluate the run first"),
        ((good, damaged), "line 2 of"),
        ((f"{good},{good}", good), "several different ones"),
        ((good, ","), "several different ones"),
        ((good, good, "--alpha", "2"), "`alpha` must be between 0 and 1, got 2"),
    ):
        with pytest.raises(SystemExit) as stopped:
            main(["compare", *arguments])
        assert stopped.value.code == 2
        assert message in capsys.readouterr().err


def test_the_last_line_is_the_default(tmp_path):
    run = save(tmp_path / "run", evaluation([1, 2], step=5), evaluation([3, 4], step=10))
    assert read_evaluation(run)["successes"] == [3, 4]
    assert read_evaluation(run, 5)["successes"] == [1, 2]
