"""Whether two runs differ, from the evaluations that [`EvalStatsCallback`] kept: the command `trl-ext compare`."""

import json
import math
import os
from dataclasses import dataclass

import numpy as np

from .evaluation import (
    PairedComparison,
    clustered_se,
    detectable_difference,
    normal_interval,
    paired_comparison,
    runs_needed,
    seed_statistics,
    sign_test,
    student_quantile,
    variance_split,
    z_sum,
)


HISTORY = "evaluations.jsonl"  # in a run's `output_dir`


@dataclass(frozen=True)
class Comparison:
    """
    Two sides of one or several runs (seeds) each, on the same prompts.

    Attributes:
        scores (`tuple[tuple[float, float, float], ...]`):
            pass@1 of A and of B with the bounds of its clustered interval over prompts.
        runs (`tuple[int, int]`), prompts (`int`), samples (`int`):
            Runs of each side, prompts that all runs scored, and the fewest samples per prompt.
        paired (`PairedComparison`):
            Difference prompt by prompt, of the means over each side's runs.
        over_runs (`tuple[float, float]`, *optional*):
            With several runs, the interval of the difference over runs of these prompts (Student's t, pooled).
        p_value (`float`, *optional*):
            Of the exact sign test, with one run a side and one sample per prompt.
        real (`bool`, *optional*):
            Whether the difference is real at `alpha`: by the runs' interval if there is one, else by the exact test if
            there is one, else by the paired interval. None where that is undefined.
        detectable (`float`):
            Smallest difference that a comparison like this finds with the given power.
        runs_needed (`int`, *optional*), prompts_needed (`int`, *optional*), samples_needed (`float`, *optional*):
            What would find the observed difference with the given power: runs per side if there are several, else
            prompts with as many samples, or samples on as many prompts (infinite: no number would). None where it
            cannot be known.
        notes (`tuple[str, ...]`):
            What to keep in mind.
    """

    scores: tuple
    runs: tuple[int, int]
    prompts: int
    samples: int
    paired: PairedComparison
    over_runs: tuple[float, float] | None
    p_value: float | None
    real: bool | None
    detectable: float
    runs_needed: int | None
    prompts_needed: int | None
    samples_needed: float | None
    notes: tuple[str, ...]


def read_evaluation(run: str, step: int | None = None) -> dict:
    """
    Read one evaluation of a run.

    Args:
        run (`str`):
            The run's `output_dir`, or its `evaluations.jsonl`.
        step (`int`, *optional*):
            Optimizer step of the evaluation; the last one if None.

    Returns:
        `dict`: the line of the history.

    Raises:
        FileNotFoundError: if there is no history.
        ValueError: if the history is empty or damaged, or has no evaluation at that step.
    """
    path = os.path.join(run, HISTORY) if os.path.isdir(run) else run
    if not os.path.isfile(path):
        raise FileNotFoundError(f"there is no {path}: name the output_dir of a run with an EvalStatsCallback.")
    lines = {}
    with open(path, encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            try:
                record = json.loads(line)
                lines[record["step"]] = {k: record[k] for k in ("step", "successes", "counts", "prompts", "settings")}
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(f"line {number} of {path} is not an evaluation: restore it or remove it.") from error
    if not lines:
        raise ValueError(f"{path} has no evaluation: evaluate the run first, for example with `eval_strategy`.")
    if step is not None and step not in lines:
        raise ValueError(f"`step` {step} has no evaluation in {path}: choose one of {', '.join(map(str, lines))}.")
    return lines[list(lines)[-1] if step is None else step]


def compare_evaluations(
    a: list[dict], b: list[dict], alpha: float = 0.05, power: float = 0.8, draws: int = 1000, seed: int = 0
) -> Comparison:
    """
    Compare the evaluations of two sides.

    Args:
        a (`list[dict]`), b (`list[dict]`):
            Lines of the histories, one for each run of the side.
        alpha (`float`, *optional*, defaults to `0.05`), power (`float`, *optional*, defaults to `0.8`):
            Chance of finding a difference where there is none, and of finding one of the size called detectable.
        draws (`int`, *optional*, defaults to `1000`), seed (`int`, *optional*, defaults to `0`):
            Resamples of the bootstrap, and its seed.

    Returns:
        [`Comparison`]: the findings.

    Raises:
        ValueError: if the evaluations are not of the same prompts, or no prompt is scored in all of them.
    """
    z = z_sum(alpha, power)
    records, sides = [*a, *b], (len(a), len(b))
    if len({(record["prompts"], len(record["counts"])) for record in records}) > 1:
        raise ValueError(
            "the runs were evaluated on different prompts, so they cannot be compared: evaluate them on the same data "
            "set, in the same order."
        )
    counts = np.array([record["counts"] for record in records])
    used = (counts > 0).all(0)
    if not used.any():
        raise ValueError(
            "no prompt was scored in all runs, so there is nothing to compare: check the reward function."
        )
    successes, counts = np.array([record["successes"] for record in records])[:, used], counts[:, used]
    rates, prompts, samples = successes / counts, int(used.sum()), int(counts.min())
    means = rates[: sides[0]].mean(0), rates[sides[0] :].mean(0)
    paired = paired_comparison(*means, alpha, draws, seed)
    scores = tuple((float(m.mean()), *normal_interval(float(m.mean()), clustered_se(m), alpha)) for m in means)
    size = abs(paired.difference)
    over_runs = p_value = needed_runs = needed_prompts = needed_samples = None
    real = None if math.isnan(paired.se) else paired.real
    if len(records) > 2:
        stats = [seed_statistics(part.mean(1)) for part in (rates[: sides[0]], rates[sides[0] :])]
        free = len(records) - 2
        sigma = math.sqrt(sum((s.runs - 1) * s.std**2 for s in stats if s.runs > 1) / free)
        width = student_quantile(1 - alpha, free) * sigma * math.sqrt(sum(1 / s.runs for s in stats))
        over_runs = paired.difference - width, paired.difference + width
        real = over_runs[0] > 0 or over_runs[1] < 0
        detectable = detectable_difference(sigma, 2 / sum(1 / s.runs for s in stats), alpha, power)
        needed_runs = runs_needed(sigma, size, alpha, power) if size and sigma else None
    else:
        if counts.max() == 1:
            p_value = sign_test(*(int((x > y).sum()) for x, y in (rates, rates[::-1])))
            real = p_value < alpha
        detectable = z * paired.se
        if size and prompts > 1:
            needed_prompts = max(2, math.ceil(prompts * (z * paired.se / size) ** 2))
            needed_samples = _samples_needed(successes, counts, paired.se, size / z)
    return Comparison(
        scores,
        sides,
        prompts,
        samples,
        paired,
        over_runs,
        p_value,
        real,
        detectable,
        needed_runs,
        needed_prompts,
        needed_samples,
        tuple(_notes(records, sides, int((~used).sum()), prompts)),
    )


def _samples_needed(successes, counts, se: float, target: float) -> float | None:
    """Samples per prompt that bring the standard error of a paired difference down to a target on the same prompts."""
    sampling = sum(
        variance_split([[1] * s + [0] * (n - s) for s, n in zip(*run, strict=True)]).sampling
        for run in zip(successes, counts, strict=True)
    )
    if math.isnan(sampling):  # a single sample does not tell
        return None
    room = target**2 - max(se**2 - sampling, 0.0)  # what sampling may add to the differences between prompts
    return math.inf if room <= 0 else max(1, math.ceil(counts.mean() * sampling / room))


def _notes(records: list[dict], sides: tuple[int, int], dropped: int, prompts: int):
    if sides == (1, 1):
        yield "One run a side: this says nothing of other seeds. Give several runs a side, joined by commas."
    if len({tuple(record["successes"]) for record in records}) < len(records):
        yield "Two runs are correct equally often on every prompt: are they different runs, with different seeds?"
    if prompts < 30:
        yield f"With {prompts} prompts the intervals over prompts are too narrow: use 30 or more."
    if dropped:
        yield f"{dropped} prompts without a scored sample in some run are left out."
    if len({record["step"] for record in records}) > 1:
        yield f"The evaluations are of different steps: {', '.join(str(record['step']) for record in records)}."
    for name in sorted({name for record in records for name in record["settings"]}):
        values = list(dict.fromkeys(str(record["settings"].get(name)) for record in records))
        if len(values) > 1:
            yield f"The evaluations differ in `{name}`: {', '.join(values)}."


def compare_runs(
    run_a: str, run_b: str, step: int | None = None, alpha: float = 0.05, power: float = 0.8
) -> Comparison:
    """
    Compare runs, and print the findings in words.

    Args:
        run_a (`str`), run_b (`str`):
            The output_dir of a run, or those of several seeds, joined by commas.
        step (`int`, *optional*):
            Optimizer step of the evaluations; the last one of each run if None.
        alpha (`float`, *optional*, defaults to `0.05`), power (`float`, *optional*, defaults to `0.8`):
            As in [`compare_evaluations`].

    Returns:
        [`Comparison`]: the findings.

    Raises:
        FileNotFoundError: if a run has no history.
        ValueError: if the runs cannot be compared.
    """
    from rich.console import Console
    from rich.table import Table

    sides = [[run for run in runs.split(",") if run] for runs in (run_a, run_b)]
    for runs in sides:
        if not runs or len({os.path.realpath(run) for run in runs}) < len(runs):
            raise ValueError(f"a side needs one run, or several different ones, got {','.join(runs)!r}.")
    records = [[read_evaluation(run, step) for run in runs] for runs in sides]
    found = compare_evaluations(*records, alpha, power)
    paired = found.paired
    table = Table("", "pass@1", f"{1 - alpha:.0%} interval", "bootstrap", "runs", "step")
    for name, score, runs, lines in zip("AB", found.scores, sides, records, strict=True):
        steps = ", ".join(str(s) for s in dict.fromkeys(line["step"] for line in lines))
        table.add_row(name, f"{score[0]:.4f}", _interval(score[1:]), "", str(len(runs)), steps)
    table.add_row(
        "A - B", f"{paired.difference:+.4f}", _interval((paired.low, paired.high)), _interval(paired.bootstrap)
    )
    if found.over_runs is not None:
        table.add_row("over runs", f"{paired.difference:+.4f}", _interval(found.over_runs))
    Console().print(table)
    for name, runs in zip("AB", sides, strict=True):
        print(f"{name}: {', '.join(runs)}")
    for sentence in describe(found, alpha, power):
        print(sentence)
    return found


def describe(found: Comparison, alpha: float = 0.05, power: float = 0.8):
    """
    The findings in words.

    Args:
        found ([`Comparison`]):
            From [`compare_evaluations`].
        alpha (`float`, *optional*, defaults to `0.05`), power (`float`, *optional*, defaults to `0.8`):
            Those of the comparison.

    Yields:
        `str`: sentences.
    """
    size = abs(found.paired.difference)
    if found.over_runs is not None:
        basis = f"the interval over runs of these prompts is {_interval(found.over_runs)}"
        setup = f"{found.runs[0]} and {found.runs[1]} runs"
    else:
        basis = f"the interval over prompts is {_interval((found.paired.low, found.paired.high))}"
        if found.p_value is not None:
            basis = f"the exact sign test says p = {found.p_value:.3g}"
        setup = f"{found.prompts} prompts and {found.samples} sample{'s' * (found.samples > 1)} each"
    if found.real is None:
        yield f"Whether the difference of {size:.4f} is real cannot be told from a single prompt."
        return
    better = "A" if found.paired.difference > 0 else "B"
    if found.real:
        yield f"The difference is real at alpha = {alpha:g}: {better} is better by {size:.4f}; {basis}."
    else:
        yield f"The difference of {size:.4f} is not real at alpha = {alpha:g}: {basis}."
    if found.detectable > 0:
        yield f"With {setup}, a difference of {found.detectable:.4f} is found in {power:.0%} of cases."
    if found.runs_needed is not None:
        yield f"To find {size:.4f} as surely takes {found.runs_needed} runs a side."
    if found.prompts_needed is not None:
        words = f"To find {size:.4f} as surely takes {found.prompts_needed} prompts with as many samples each"
        if found.samples_needed is not None:
            number = found.samples_needed
            words += ", or, as far as the variance can be split, "
            words += "no number of samples on these" if math.isinf(number) else f"{number} samples each on these"
        yield f"{words}."
    for note in found.notes:
        yield f"Note: {note}"


def _interval(bounds: tuple[float, float]) -> str:
    return "undefined" if math.isnan(bounds[0]) else f"{bounds[0]:.4f} to {bounds[1]:.4f}"
