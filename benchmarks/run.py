"""
Which method helps, on what, and at what cost: methods and mixes against plain GRPO on the embedded policy, from the
same start, at equal rollouts (those of estimates and further rounds included).

```bash
python benchmarks/run.py --hours 2          # the next rows of everything; prints how long all will take
python benchmarks/run.py --methods spo clip_cov+spo --tasks sums
python benchmarks/run.py --best 10 --tasks chain_sum basic_arithmetic
python benchmarks/run.py --mixes            # pairs of the best methods, at a third of the budget
python benchmarks/run.py --table            # benchmarks/results/runs.md from the rows that there are
python benchmarks/run.py --again 3          # runs three finished rows once more and compares
```

A row is one training: a task, a method, a learning rate, a seed. It is written to `benchmarks/results/runs/` when it
is finished, so stopping loses at most one, and rows that are there are not run again. Several processes share the
work: each takes the next row that no other is at. Learning rates are chosen for each method alike, plain GRPO
included: a small grid on seeds of its own and one task, by the mean of the held-out accuracy over all rollouts, which
scatters less than its end; everything else is the method's default. Methods that act only off-policy go over each
generation twice, and are compared with a GRPO that does so, too (`grpo x2`). All methods run on two tasks; the best of
them, by what they gain on that mean, on the other two. Mixes are searched among the pairs of the best methods, with
the smaller of their learning rates, on the tuning seeds of the first two tasks at a third of the budget, beside their
parts and the baselines; the best are then run as any method, on the tasks that they were not chosen on, too.
"""

import argparse
import contextlib
import dataclasses
import itertools
import json
import math
import os
import platform
import random
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from filelock import FileLock, Timeout
from transformers import PrinterCallback, TrainerCallback

from trl_ext import MethodConfig, MethodTrainer, mix
from trl_ext.core.config import MixingError
from trl_ext.core.mixing import find_method, list_methods
from trl_ext.evaluation import student_quantile
from trl_ext.tasks import POLICY_PATH, Task, load_data
from trl_ext.tasks.embedded import CHAIN_SUM_CONFIG


RESULTS = Path(__file__).parent / "results"
GRID, TUNING_SEEDS, SEEDS = (2.5e-5, 5e-5, 1e-4), (100, 101), (0, 1, 2, 3, 4)
BUDGET, POINTS, EVAL_PROMPTS, EVAL_SAMPLES, FINAL_SAMPLES = 12_800, 8, 200, 4, 12
TRAIN_PROMPTS = 512  # GRPO sees each three times: methods that remember prompts need to meet them again
# Name of the data, and settings of the task; beside them, what the policy solves at the start.
TASKS = {
    "sums": ("arithmetic", None),  # 0.35
    "sparse": ("arithmetic", None),  # 0.02, and 94% of the prompts are not solved in eight attempts: see `load`
    "chain_sum": ("reasoning_gym:chain_sum", CHAIN_SUM_CONFIG),  # 0.19
    "basic_arithmetic": (  # 0.03: questions in words that it has never seen
        "reasoning_gym:basic_arithmetic",
        {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1},
    ),
}
TUNED_ON, ALL_ON = "sums", ("sums", "sparse")  # the other tasks are for the best methods
BEST = 8  # methods of which all pairs are tried
SETTINGS = {
    "spo": {"spo_offline_n": 2},  # the code's 8 would cost a third of the rollouts
    "gvm": {"gvm_grad_params": None},
    "vas": {"vas_scoring": "online"},
    "rest_grpo": {"rest_on_empty": "unfiltered"},
}
# These tasks cannot show what the method does.
LEFT_OUT = {
    "duration_aware": "needs durations of rollouts",
    "empg": "needs several turns",
    "gdpo_nvidia": "needs several rewards",
    "kdrl": "needs a better teacher of the same vocabulary",
    "puct": "needs solutions that can be improved",
    "scaf_grpo": "needs hints",
    "stratified_grpo": "needs tool calls",
    "ttt_discover": "is for the best answer, not for the mean",
}


class Row(NamedTuple):
    """One training."""

    task: str
    name: str
    learning_rate: float
    seed: int
    budget: int = BUDGET

    @property
    def path(self) -> Path:
        folder = self.task if self.budget == BUDGET else f"{self.task}_{self.budget}"
        return RESULTS / "runs" / folder / f"{self.name.replace(' ', '_')}_{self.learning_rate:g}_{self.seed}.json"


class Curve(TrainerCallback):
    """Held-out accuracy at equal numbers of rollouts, and the end at the budget."""

    def __init__(self, trainer, dataset, budget: int, points: int):
        self.trainer, self.dataset, self.budget, self.every = trainer, dataset, budget, budget / points
        self.points, self.seconds = [], 0.0

    def _measure(self, samples: int = EVAL_SAMPLES) -> None:
        start = time.perf_counter()
        rows = torch.arange(len(self.dataset))
        rewards = self.trainer.score_prompts(rows, samples, dataset=self.dataset, seed=len(self.points))
        self.points.append([self.trainer.rollouts_spent, rewards[..., 0].nanmean().item()])
        self.seconds += time.perf_counter() - start

    def on_train_begin(self, args, state, control, **kwargs):
        self._measure()

    def on_step_end(self, args, state, control, **kwargs):
        spent = self.trainer.rollouts_spent
        if self.trainer._inside_generation:
            return
        control.should_training_stop = spent >= self.budget
        if spent >= self.every * len(self.points) or spent >= self.budget:
            self._measure(FINAL_SAMPLES if spent >= self.budget else EVAL_SAMPLES)


def load(name: str, seed: int) -> Task:
    """Data of a task. The sparse one wants seven more than the sum, which the policy is almost sure of not saying."""
    dataset, task_config = TASKS[name]
    task = load_data(dataset, size=TRAIN_PROMPTS, seed=seed, task_config=task_config)
    if name != "sparse":
        return task
    train, test = (part.map(lambda row: {"answer": str(int(row["answer"]) + 7)}) for part in (task.train, task.test))
    return dataclasses.replace(task, train=train, test=test)


def classes(name: str):
    if name.split()[0] == "grpo":
        return MethodTrainer, MethodConfig
    return mix(*name.split("+"))


def iterations(name: str) -> int:
    """How often a generation is gone over."""
    parts = [] if name.startswith("grpo") else name.split("+")
    return 2 if name.endswith(" x2") or any(find_method(part).needs_off_policy for part in parts) else 1


def baseline_of(name: str) -> str:
    return "grpo x2" if iterations(name) == 2 else "grpo"


def train(row: Row, points: int = POINTS, batch: int = 64, prompts: int = EVAL_PROMPTS) -> dict:
    """
    Run a row.

    Args:
        row ([`Row`]):
            What to run.
        points (`int`), batch (`int`), prompts (`int`):
            Evaluations after the first, rollouts per step, and held-out prompts.

    Returns:
        `dict`: what is kept of it.
    """
    from shared_prefix import share_prefix  # not beside the module where the documentation only reads rows

    task = load(row.task, row.seed)
    held_out = task.test.select(range(min(prompts, len(task.test))))
    trainer_class, config_class = classes(row.name)
    settings = {}
    for part in row.name.split("+"):
        settings |= SETTINGS.get(part, {})
    again = iterations(row.name)
    with tempfile.TemporaryDirectory() as folder:
        args = config_class(
            folder,
            per_device_train_batch_size=batch,
            max_completion_length=8,
            learning_rate=row.learning_rate,
            lr_scheduler_type="constant",
            num_iterations=again,
            max_steps=again * -(-row.budget // batch),
            logging_steps=1,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
            seed=row.seed,
            **settings,
        )
        trainer = trainer_class(POLICY_PATH, task.rewards, args, task.train)
        trainer.remove_callback(PrinterCallback)
        for model in filter(None, (trainer.model, trainer.ref_model)):
            share_prefix(model)
        curve = Curve(trainer, held_out, row.budget, points)
        trainer.add_callback(curve)
        start = time.perf_counter()
        trainer.train()
        seconds = time.perf_counter() - start - curve.seconds
    logs = trainer.state.log_history

    def mean(name, part=slice(None)):
        values = [entry[name] for entry in logs if entry.get(name) is not None][part]
        return statistics.fmean(values) if values else None

    return {
        **row._asdict(),
        "curve": curve.points,
        "steps": trainer.state.global_step,
        "entropy": mean("entropy", slice(-10, None)),
        "no_signal": mean("frac_reward_zero_std"),
        "tokens": mean("num_tokens", slice(-1, None)),
        "seconds": seconds,
        "total_seconds": seconds + curve.seconds,
        "versions": {name: version(name) for name in ("trl-ext", "trl", "transformers", "torch")},
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads",
    }


def read(row: Row) -> dict | None:
    return json.loads(row.path.read_text()) if row.path.is_file() else None


def final(result: dict) -> float:
    return result["curve"][-1][1]


def best_rate(name: str) -> float | None:
    """The learning rate with the best mean over rollouts; None before all rows of the grid are there."""
    scores = {}
    for rate in GRID:
        found = [read(Row(TUNED_ON, name, rate, seed)) for seed in TUNING_SEEDS]
        if None in found:
            return None
        scores[rate] = statistics.fmean(map(area, found))
    return max(scores, key=scores.get)


def next_rows(names: list[str], tasks: list[str], seeds=SEEDS):
    """Rows in the order in which they are wanted: of every method the grid, then its seeds, the baselines first."""
    names = list(dict.fromkeys([*map(baseline_of, names), *names]))
    for name in names:
        for rate in GRID:
            yield from (Row(TUNED_ON, name, rate, seed) for seed in TUNING_SEEDS)
        if (rate := best_rate(name)) is not None:
            for task in tasks:
                yield from (Row(task, name, rate, seed) for seed in seeds)


def best(count: int) -> list[str]:
    """Single methods with the largest gains on the mean over rollouts, as shares of what the baseline learns."""
    shares = shares_by_task([rows_of(task) for task in ALL_ON])
    ready = {
        name: statistics.fmean(map(statistics.fmean, shares[name])) for name in shares.keys() & set(list_methods())
    }
    return sorted(ready, key=ready.get, reverse=True)[:count]


def mixes() -> list[Row]:
    """Rows of the search for a mix: the baselines, the best methods, and their pairs that go together."""
    singles = best(BEST)
    pairs = map("+".join, itertools.combinations(singles, 2))
    rows = []
    for name in dict.fromkeys([*map(baseline_of, singles), *singles, *pairs]):
        try:
            classes(name)
        except MixingError:  # they replace the same thing
            continue
        rate = min(map(best_rate, name.split("+")))
        rows += [Row(task, name, rate, seed, BUDGET // 3) for task in ALL_ON for seed in TUNING_SEEDS]
    return rows


def half_width(values: list[float]) -> float:
    """Half of the width of a mean's 95% interval over seeds (Student's t)."""
    return student_quantile(0.95, len(values) - 1) * statistics.stdev(values) / math.sqrt(len(values))


def interval(values: list[float]) -> str:
    """Mean with the half width of its interval."""
    if len(values) < 2:
        return f"{statistics.fmean(values):.3f}" if values else "-"
    return f"{statistics.fmean(values):.3f} ± {half_width(values):.3f}"


def rollouts_to(curve: np.ndarray, goal: float) -> float:
    """Rollouts after which a curve, shape `(points, 2)`, first reaches a value; infinite if it does not."""
    if curve[0, 1] >= goal:
        return float(curve[0, 0])
    for (x0, y0), (x1, y1) in itertools.pairwise(curve):
        if y1 >= goal:
            return float(x0 + (x1 - x0) * (goal - y0) / (y1 - y0))
    return math.inf


def curves(results: list[dict]) -> np.ndarray:
    """Curves, shape `(seeds, points, 2)`, up to the rollouts of the shortest."""
    points = min(len(result["curve"]) for result in results)
    return np.array([result["curve"][:points] for result in results])


def share_needed(results: list[dict], base: list[dict], draws: int = 2000) -> tuple[float, float, float]:
    """
    Rollouts that a method needs to reach the baseline's accuracy at the end, over those of the baseline.

    Args:
        results (`list[dict]`), base (`list[dict]`):
            Rows of the method and of the baseline; those whose seeds both have count.
        draws (`int`, *optional*, defaults to `2000`):
            Draws of seeds with replacement, together for both, that the interval is taken from.

    Returns:
        `tuple[float, float, float]`: of the mean curves, and the ends of its 95% interval; infinite where the accuracy
        is not reached. Mean curves scatter too, so that the baseline reaches its own end a little before it.
    """
    seeds = sorted({r["seed"] for r in results} & {r["seed"] for r in base})
    mine, theirs = (curves([next(r for r in rows if r["seed"] == seed) for seed in seeds]) for rows in (results, base))

    def share(chosen):
        end = theirs[chosen].mean(0)[-1]
        return rollouts_to(mine[chosen].mean(0), end[1]) / end[0]

    generator = np.random.default_rng(0)
    drawn = [share(generator.integers(len(seeds), size=len(seeds))) for _ in range(draws)]
    low, high = np.quantile(drawn, (0.025, 0.975), method="nearest")
    return share(np.arange(len(seeds))), float(low), float(high)


def area(result: dict) -> float:
    """Mean accuracy over the rollouts spent."""
    x, y = np.array(result["curve"]).T
    return float(np.trapezoid(y, x) / (x[-1] - x[0]))


def gains(results: list[dict], base: list[dict], value: Callable[[dict], float]) -> list[float]:
    """How much more than the baseline a method reaches, seed by seed."""
    by_seed = {result["seed"]: value(result) for result in base}
    return [value(result) - by_seed[result["seed"]] for result in results if result["seed"] in by_seed]


def shares_gained(results: list[dict], base: list[dict]) -> list[float]:
    """Gains on the baseline's mean over rollouts, as shares of what the baseline learns, seed by seed."""
    learned = statistics.fmean(area(result) - result["curve"][0][1] for result in base)
    return [gain / learned for gain in gains(results, base, area)]


def shares_by_task(rows: list[dict[str, list[dict]]]) -> dict[str, list[list[float]]]:
    """The shares gained by methods and mixes that are in the rows of every task: per task a number for each seed."""
    names = set.intersection(*map(set, rows))
    return {
        name: [shares_gained(found[name], found[baseline_of(name)]) for found in rows]
        for name in names - set(map(baseline_of, names))
        if all(baseline_of(name) in found for found in rows)
    }


def on_all(rows: list[dict[str, list[dict]]]) -> dict[str, list[float]]:
    """The same where all seeds have run, as means of the tasks, seed by seed."""
    shares = shares_by_task(rows).items()
    return {name: np.mean(some, 0).tolist() for name, some in shares if {*map(len, some)} == {len(SEEDS)}}


def rows_of(task: str) -> dict[str, list[dict]]:
    """Rows of a task by method, at the learning rate that was chosen."""
    found = {}
    for name, rows in finished(task).items():
        rate = best_rate(name)
        if chosen := [row for row in rows if row["seed"] in SEEDS and row["learning_rate"] == rate]:
            found[name] = chosen
    return found


def finished(folder: str) -> dict[str, list[dict]]:
    """All rows in a folder of `benchmarks/results/runs`, by method."""
    found: dict[str, list[dict]] = {}
    for path in sorted((RESULTS / "runs" / folder).glob("*.json")):
        result = json.loads(path.read_text())
        found.setdefault(result["name"], []).append(result)
    return found


def costs(kind: str) -> dict[str, float]:
    """Step time or memory over plain TRL's by method, as benchmarks/cost.py found them."""
    path = RESULTS / f"{kind}.json"
    rows = json.loads(path.read_text())["rows"] if path.is_file() else {}
    return {name: row["median" if kind == "time" else "ratio"] for name, row in rows.items()}


def needed(value: float) -> str:
    return "not reached" if math.isinf(value) else f"{value:.2f}"


COLUMNS = (
    "method",
    "seeds",
    "learning rate",
    "accuracy at the end",
    "gain on GRPO",
    "mean over rollouts",
    "gain on GRPO's mean",
    "rollouts to GRPO's end",
    "entropy",
    "groups without a signal",
    "tokens",
    "step time",
    "memory",
)


def table(tasks: list[str]) -> str:
    """The rows that there are, as Markdown."""
    lines = ["# Methods against plain GRPO at equal rollouts", "", "Written by `benchmarks/run.py --table`.", ""]
    time_of, memory_of = costs("time"), costs("memory")
    rows = {task: rows_of(task) for task in tasks}
    for task, found in rows.items():
        if not found:
            continue
        lines += [f"## {task}", "", "| " + " | ".join(COLUMNS) + " |", "|---" * len(COLUMNS) + "|"]
        for name in sorted(found, key=lambda name: -statistics.fmean(map(area, found[name]))):
            results, base = found[name], found.get(baseline_of(name), [])
            at_end, on_mean = (gains(results, base, value) for value in (final, area))
            share = "-"
            if at_end:
                share, low, high = map(needed, share_needed(results, base))
                share += f" ({low} to {high})"
            if results is base:
                at_end = on_mean = []
            cells = [
                name,
                len(results),
                f"{results[0]['learning_rate']:g}",
                interval([*map(final, results)]),
                interval(at_end),
                interval([*map(area, results)]),
                interval(on_mean),
                share,
                *(_mean(results, *what) for what in (("entropy",), ("no_signal",), ("tokens", ".0f"))),
                *(f"{cost[name]:.2f}" if name in cost else "-" for cost in (time_of, memory_of)),
            ]
            lines.append("| " + " | ".join(map(str, cells)) + " |")
        lines.append("")
    if len(tasks) > 1 and (shares := on_all([*rows.values()])):
        lines += [f"## {', '.join(tasks[:-1])} and {tasks[-1]} together", ""]
        lines += ["Gain on GRPO's mean over the rollouts, as a share of what GRPO learns; mean of the tasks.", ""]
        lines += ["| method or mix | gain |", "|---|---|"]
        for name in sorted(shares, key=lambda name: -statistics.fmean(shares[name])):
            lines.append(f"| {name} | {interval(shares[name])} |")
        lines.append("")
    tried = {task: finished(f"{task}_{BUDGET // 3}") for task in ALL_ON}
    if names := set.intersection(*map(set, tried.values())):
        found = {name: [statistics.fmean(map(area, tried[task][name])) for task in ALL_ON] for name in names}
        lines += ["## Mixes tried with a third of the rollouts, beside their parts", ""]
        lines += [f"Mean accuracy over the rollouts; {len(TUNING_SEEDS)} seeds.", ""]
        lines += [f"| method or mix | learning rate | {' | '.join(ALL_ON)} |", "|---|---" + "|---" * len(ALL_ON) + "|"]
        for name in sorted(names, key=lambda name: -math.prod(found[name])):
            rate = tried[TUNED_ON][name][0]["learning_rate"]
            lines.append(f"| {name} | {rate:g} | {' | '.join(f'{score:.3f}' for score in found[name])} |")
        lines.append("")
    lines += ["Left out: " + "; ".join(f"`{name}` {reason}" for name, reason in LEFT_OUT.items()) + ".", ""]
    return "\n".join(lines)


def _mean(results: list[dict], name: str, form: str = ".3f") -> str:
    values = [result[name] for result in results if result[name] is not None]
    return format(statistics.fmean(values), form) if values else "-"


def run(row: Row) -> None:
    """Train a row and write it, unless it is there."""
    if read(row) is not None:
        return
    try:
        result = train(row)
    except (ValueError, MixingError) as error:  # settings that do not go together
        print(f"{row.task} {row.name}: {error}", file=sys.stderr)
        return
    partial = row.path.with_suffix(".partial")
    partial.write_text(json.dumps(result) + "\n")
    os.replace(partial, row.path)
    print(f"{row.task} {row.name} {row.learning_rate:g} seed {row.seed}: {final(result):.3f}", file=sys.stderr)


def again(names: list[str], tasks: list[str], count: int) -> bool:
    """Run finished rows once more; whether all end within the scatter of the seeds (two standard deviations)."""
    candidates = [
        (result, rows) for task in tasks for name, rows in rows_of(task).items() if name in names for result in rows
    ]
    good = True
    for result, rows in random.Random(0).sample(candidates, min(count, len(candidates))):
        now = train(Row(*(result[field] for field in Row._fields)))
        ends = [*map(final, rows)]
        scatter = 2 * statistics.stdev(ends) if len(ends) > 1 else math.inf
        within = abs(final(now) - statistics.fmean(ends)) <= scatter
        good &= within
        told = f"{result['task']} {result['name']} {result['learning_rate']:g} seed {result['seed']}"
        print(f"{told}: {final(result):.3f}, again {final(now):.3f}; seeds {interval(ends)}{'' if within else ' !'}")
    return good


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--methods", nargs="*", help="names as in trl_ext.mix, 'a+b' is a mix; default: all")
    parser.add_argument("--tasks", nargs="*", default=list(ALL_ON), choices=list(TASKS))
    parser.add_argument("--best", type=int, metavar="N", help="the N best on the tasks that all run on")
    parser.add_argument("--hours", type=float, default=math.inf, help="start no row after so many hours")
    parser.add_argument("--mixes", action="store_true", help="search for a mix instead")
    parser.add_argument("--again", type=int, metavar="N", help="only run N finished rows once more, and compare")
    parser.add_argument("--table", action="store_true", help="only write the table")
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", category=UserWarning)
    names = options.methods or [name for name in list_methods() if name not in LEFT_OUT]
    names = best(options.best) if options.best else names
    if options.again:
        baselines = [*map(baseline_of, names)] if options.methods is None else []
        sys.exit(not again([*names, *baselines], options.tasks, options.again))
    start, seen = time.perf_counter(), set()
    while not options.table:
        # Anew after every row: the grid decides which come next.
        wanted = mixes() if options.mixes else next_rows(names, options.tasks)
        left = [row for row in wanted if read(row) is None and row not in seen]
        if not left or time.perf_counter() - start > 3600 * options.hours:
            break
        times = [
            (r["total_seconds"], r["budget"])
            for p in (RESULTS / "runs").glob("*/*.json")
            for r in [json.loads(p.read_text())]
        ]
        if not seen and times:
            each = statistics.median(seconds / budget for seconds, budget in times)
            print(f"at least {len(left)} rows, {each * sum(r.budget for r in left) / 3600:.1f} hours", file=sys.stderr)
        row = left[0]
        seen.add(row)
        row.path.parent.mkdir(parents=True, exist_ok=True)
        lock = row.path.with_suffix(".lock")
        with contextlib.suppress(Timeout), FileLock(lock, timeout=0):
            run(row)
            lock.unlink(missing_ok=True)
    text = table(list(TASKS))
    (RESULTS / "runs.md").write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
