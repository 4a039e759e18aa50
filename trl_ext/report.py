"""A report on a training run: one page with its curves, alarms, evaluations, settings and cost."""

import base64
import contextlib
import html
import io
import json
import math
import os
import platform
import re
import shlex
import sys
import time
import warnings
from dataclasses import dataclass, field
from datetime import datetime, timezone
from importlib.metadata import version
from itertools import groupby
from pathlib import Path

import numpy as np
from transformers import TrainerCallback

from .core.card import changed_settings, command_line, versions, without_secrets


RUN_FILE, STATE_FILE, REPORT_FILE = "run.json", "trainer_state.json", "report.html"
REFRESH = 60  # seconds after which a log brings the files of a running training up to date
POINTS = 400  # most points of a curve

# Curves by section and picture: metrics by the regular expression of their names. The first match counts.
SECTIONS = {
    "Reward and loss": [
        ("Reward", r"reward"),
        ("Spread of rewards in a group", r"reward_std"),
        ("Mean of each reward", r"rewards/(.+)/mean"),
        ("Standard deviation of each reward", r"rewards/(.+)/std"),
        ("Rewards of preferences", r"rewards/(chosen|rejected|margins)"),
        ("Loss", r"loss"),
        ("Token accuracy", r"mean_token_accuracy"),
    ],
    "Policy": [
        ("Entropy (nats per token)", r"entropy"),
        ("KL to the reference", r"kl"),
        ("Share of clipped tokens", r"clip_ratio/((?:low|high|region)_mean)|clip_ratio"),
        ("Extreme clip shares", r"clip_ratio/(low_min|high_max)"),
        ("Groups without a signal", r"frac_reward_zero_std"),
        ("Trainer against sampler", r"sampling/(.+)"),
    ],
    "Completions": [
        ("Length (tokens)", r"completions/(mean|min|max)_length"),
        ("Length if terminated (tokens)", r"completions/(mean|min|max)_terminated_length"),
        ("Share cut at the longest length", r"completions/clipped_ratio"),
    ],
    "Optimisation": [
        ("Learning rate", r"learning_rate"),
        ("Gradient norm", r"grad_norm"),
        ("Seconds per step", r"step_time"),
    ],
}
EVALUATIONS = [
    ("pass@k", r"eval_stats/(pass@\d+)"),
    ("All of k samples correct", r"eval_stats/(pass_hat@\d+)"),
    ("Majority of k samples", r"eval_stats/(maj@\d+)"),
    ("Answers", r"eval_stats/(exact_match|levenshtein)"),
    ("Reward", r"eval_reward"),
    ("Loss", r"eval_loss"),
    ("Token accuracy", r"eval_mean_token_accuracy"),
]
# What is a count, a place or a sum at the end, not a curve.
NO_CURVES = re.compile(r"step|epoch|num_.*|total_flos|train_.*|eval_(.*_)?(runtime|per_second)|eval_num_.*")
PICTURES = {
    "entropy_law.png": "Entropy and the reward that it buys",
    "token_entropy.png": "Entropy by token",
    "prompt_difficulty.png": "Estimated success rates of the prompts",
}


# ------------------------------------------------------------------------------------------------- what a run has left


@dataclass
class Run:
    """
    What is known of a run.

    Attributes:
        folder (`str`):
            Its `output_dir`.
        state (`dict`):
            Contents of `trainer_state.json`; empty before the first log.
        info (`dict`):
            Contents of `run.json`, written by [`RunReportCallback`].
        results (`dict`):
            Contents of `results.json`, written by recipes.
        evaluations (`list[dict]`):
            Lines of `evaluations.jsonl`.
        sparsity (`dict`):
            Contents of `update_sparsity.json`.
    """

    folder: str
    state: dict = field(default_factory=dict)
    info: dict = field(default_factory=dict)
    results: dict = field(default_factory=dict)
    evaluations: list[dict] = field(default_factory=list)
    sparsity: dict = field(default_factory=dict)

    @property
    def history(self) -> list[dict]:
        """The trainer's `log_history`."""
        return self.state.get("log_history", [])


def read_run(folder: str) -> Run:
    """
    Read what a run has left, finished or not. Nothing is unpickled.

    Args:
        folder (`str`):
            The `output_dir` of any TRL trainer, or one of its checkpoints.

    Returns:
        [`Run`]: the newest state: of the folder itself, or of the checkpoint with the most steps.

    Raises:
        FileNotFoundError: if there is no such folder, or no run in it.
    """
    if not os.path.isdir(folder):
        raise FileNotFoundError(f"there is no folder {folder!r}: name the `output_dir` of a training run.")
    root = Path(folder)
    states = [_read_json(path) for path in (root / STATE_FILE, *root.glob(f"checkpoint-*/{STATE_FILE}"))]
    run = Run(
        folder=str(folder),
        state=max(states, key=lambda state: state.get("global_step", -1)),  # the folder's own if they are equal
        info=_read_json(root / RUN_FILE),
        results=_read_json(root / "results.json"),
        evaluations=_read_lines(root / "evaluations.jsonl"),
        sparsity=_read_json(root / "update_sparsity.json"),
    )
    if not (run.state or run.info):
        raise FileNotFoundError(
            f"{folder} has neither a {STATE_FILE} nor a {RUN_FILE}, also not in a checkpoint: name the "
            "`output_dir` of a run that saved checkpoints, called `trainer.save_state()` or had a RunReportCallback."
        )
    return run


def _read_json(path: Path) -> dict:
    """Contents of a file, empty if there is none or it is being written."""
    with contextlib.suppress(OSError, ValueError):
        content = json.loads(path.read_text(encoding="utf-8"))
        return content if isinstance(content, dict) else {}
    return {}


def _read_lines(path: Path) -> list[dict]:
    rows = []
    with contextlib.suppress(OSError, UnicodeDecodeError):
        for line in path.read_text(encoding="utf-8").splitlines():
            with contextlib.suppress(ValueError):
                rows.append(json.loads(line))
    return [row for row in rows if isinstance(row, dict)]


def is_number(value) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def series(history: list[dict], name: str) -> tuple[list[int], list[float]]:
    """
    Steps and values of a metric; None and infinite values are NaN.

    Args:
        history (`list[dict]`):
            `trainer.state.log_history`.
        name (`str`):
            Name of the metric.
    """
    rows = [(entry["step"], entry[name]) for entry in history if "step" in entry and name in entry]
    rows = [(step, value) for step, value in rows if value is None or is_number(value)]
    return [step for step, _ in rows], [
        math.nan if value is None or not math.isfinite(value) else float(value) for _, value in rows
    ]


def numbers(history: list[dict], name: str) -> list[float]:
    """Finite values of a metric."""
    return [value for value in series(history, name)[1] if not math.isnan(value)]


def alarms(history: list[dict]) -> list[tuple[int, str, str]]:
    """Step, name and reason of every alarm that a callback logged as `<callback>/alarm` and `<callback>/reason`."""
    found = []
    for entry in history:
        for name, reason in entry.items():
            if name.endswith("/reason") and isinstance(reason, str):
                alarm = entry.get(f"{name.removesuffix('reason')}alarm", "alarm")
                found.append((entry.get("step", 0), str(alarm), reason))
    return found


# ---------------------------------------------------------------------------------------------------------- the report


@dataclass
class Curve:
    """A line of a picture, with an interval or none."""

    label: str
    steps: list
    values: list
    low: list | None = None
    high: list | None = None


@dataclass
class Chart:
    """A picture of curves over optimizer steps; `marks` are vertical lines (step, label), resumes without a
    label; `last` is the step up to which it goes."""

    title: str
    curves: list[Curve]
    marks: list[tuple[int, str]] = field(default_factory=list)
    last: int | None = None


@dataclass
class Picture:
    """A picture that a callback drew."""

    title: str
    path: str


@dataclass
class Table:
    """A table; without a header, the first column names what is in the second."""

    rows: list[list[str]]
    header: list[str] = field(default_factory=list)


@dataclass
class Note:
    """A sentence."""

    text: str


@dataclass
class Section:
    """A heading with what is below it; `folded` is not shown until asked for."""

    title: str
    parts: list = field(default_factory=list)
    folded: bool = False


@dataclass
class Report:
    """A report before it is written as HTML or Markdown."""

    title: str
    status: str
    subtitle: str
    tiles: list[tuple[str, str, str]]
    sections: list[Section]


def build_report(run: Run) -> Report:
    """
    Put together what is to be said of a run.

    Args:
        run ([`Run`]):
            From [`read_run`].

    Returns:
        [`Report`]: for [`to_html`] or [`to_markdown`].
    """
    info, results, history = run.info, run.results, run.history
    trainer = info.get("trainer") or results.get("trainer") or "Training run"
    data = results.get("dataset") or info.get("facts", {}).get("data set")
    model = results.get("model") or info.get("model")
    rewards = ", ".join(map(str, results.get("rewards") or info.get("rewards") or []))
    words = [
        f"model {model}" if model else "",
        f"rewards {rewards}" if rewards else "",
        f"started {_day(info['sessions'][0].get('start'))}" if info.get("sessions") else "",
    ]
    sections = [
        _alarm_section(run),
        *_evaluation_sections(run),
        *_curve_sections(run),
        _sparsity_section(run),
        _picture_section(run),
        _number_section(history),
        _method_section(info),
        _setting_section(info),
        _provenance_section(run),
    ]
    return Report(
        title=f"{trainer} on {data}" if data else trainer,
        status=_status(run),
        subtitle=" · ".join(word for word in words if word),
        tiles=_tiles(run),
        sections=[section for section in sections if section.parts],
    )


def _status(run: Run) -> str:
    sessions = run.info.get("sessions") or []
    step, last = run.state.get("global_step", 0), run.state.get("max_steps") or 0
    if sessions:
        ended = bool(sessions[-1].get("end"))
    else:
        ended = 0 < last <= step or any("train_runtime" in entry for entry in run.history[-5:])
    if not ended:
        return "not finished"
    return "stopped early" if last > step else "finished"


def _tiles(run: Run) -> list[tuple[str, str, str]]:
    """Label, value and remark of the figures at the top."""
    history, results, tiles = run.history, run.results, []
    step, last = run.state.get("global_step", 0), run.state.get("max_steps") or 0
    tiles.append(("Optimizer steps", show(step), f"of {show(last)}" if last > step else ""))
    if values := numbers(history, "reward"):
        part = max(1, len(values) // 10)
        first, now = np.mean(values[:part]), np.mean(values[-part:])
        tiles.append(("Training reward", show(now), f"{show(first)} at first"))
    if results.get("after") and results.get("before"):
        scale, unit = (100, "%") if results.get("metric") == "accuracy" else (1, "")
        before, after, gain = (results[name] or {} for name in ("before", "after", "gain"))
        if all(is_number(part.get("mean")) for part in (before, after)):
            margin = gain.get("margin")
            remark = f"{show(scale * before['mean'])}{unit} before"
            if is_number(gain.get("mean")):
                remark += f", gain {scale * gain['mean']:+.3g}" + (f" ± {scale * margin:.2g}" if margin else "")
            tiles.append((f"Held-out {results['metric']}", f"{show(scale * after['mean'])}{unit}", remark))
    rollouts = numbers(history, "num_rollouts")[-1:] or [results[n] for n in ("rollouts",) if results.get(n)]
    tokens = numbers(history, "num_tokens")[-1:]
    if rollouts:
        tiles.append(("Rollouts", show(rollouts[0]), f"{short(tokens[0])} tokens" if tokens else ""))
    elif tokens:
        tiles.append(("Tokens", short(tokens[0]), ""))
    if seconds := _seconds(run):
        steps = numbers(history, "step_time")
        tiles.append(("Time", duration(seconds), f"{np.median(steps):.3g} s per step" if steps else ""))
    peaks = [s["peak_memory"] for s in run.info.get("sessions", ()) if is_number(s.get("peak_memory"))]
    if peaks:
        kind = run.info["sessions"][-1].get("peak_memory_of", "")
        tiles.append(("Peak memory", f"{max(peaks) / 2**30:.2f} GiB", kind))
    if (found := _alarm_rows(run)) or run.info:
        tiles.append(("Alarms and warnings", show(len(found)), ""))
    return tiles


def _seconds(run: Run) -> float:
    """Time of all sessions, of the recipe's clock, or of the trainer's."""
    sessions = sum(s.get("seconds") or 0 for s in run.info.get("sessions", ()))
    return sessions or 60 * (run.results.get("minutes") or 0) or sum(numbers(run.history, "train_runtime"))


def _alarm_rows(run: Run) -> list[list[str]]:
    rows = [[show(step), alarm, reason] for step, alarm, reason in alarms(run.history)]
    for warning in run.info.get("warnings", ()):
        if all(warning["message"] != reason for *_, reason in rows):  # callbacks warn of their alarms too
            times = f" ({warning['count']} times)" if warning.get("count", 1) > 1 else ""
            rows.append([show(warning.get("step")), warning.get("category", "warning"), warning["message"] + times])
    return rows


def _alarm_section(run: Run) -> Section:
    rows = _alarm_rows(run)
    return Section("Alarms and warnings", [Table(rows, ["step", "kind", "what"])] if rows else [])


def _evaluation_sections(run: Run) -> list[Section]:
    """The evaluations, and what else they measured."""
    main, rest, results = Section("Evaluation"), Section("Other metrics of evaluations", folded=True), run.results
    if results.get("after") and results.get("before"):
        rows = []
        for name in ("before", "after", "gain"):
            part = results.get(name) or {}
            margin = part.get("margin")
            rows.append([name, show(part.get("mean")), f"± {show(margin)}" if is_number(margin) else "-"])
        metric = results.get("metric") or "reward"
        main.parts.append(Table(rows, [f"held-out {metric}", "mean", "95% interval over prompts"]))
    # An EvalStatsCallback writes into the history of the trainer, and to a file of its own.
    table = {}
    for line in run.evaluations:
        if is_number(line.get("step")) and isinstance(line.get("summary"), dict):
            table[line["step"]] = {f"eval_stats/{name}": value for name, value in line["summary"].items()}
    for entry in run.history:
        found = {name: value for name, value in entry.items() if name.startswith("eval_")}
        if found and "step" in entry:
            table[entry["step"]] = table.get(entry["step"], {}) | found
    rows = [{"step": step, **table[step]} for step in sorted(table)]
    names = dict.fromkeys(name for row in rows for name in row if not NO_CURVES.fullmatch(name))
    bounds = {f"{name}{end}" for name in names for end in ("_low", "_high")}
    left = [name for name in names if name not in bounds and numbers(rows, name)]
    words, charts = [], []
    for title, pattern in EVALUATIONS:
        found = {name: match for name in left if (match := re.fullmatch(pattern, name))}
        left = [name for name in left if name not in found]
        if found:
            curves = [_bounded(rows, name, match[match.lastindex or 0]) for name, match in found.items()]
            charts.append(Chart(title, curves, _resumes(run), _last(run)))
            words += [_first_best_last(curve) for curve in curves]
    if words:
        main.parts.append(Table(words, ["evaluation", "first", "best", "last"]))
    main.parts += charts
    rest.parts = [Chart(name, [_bounded(rows, name, name)], _resumes(run), _last(run)) for name in left]
    return [main, rest]


def _bounded(rows: list[dict], name: str, label: str) -> Curve:
    """The curve of a metric, with its interval where there is one."""
    steps, values = series(rows, name)
    curve = Curve(label, steps, values)
    if any(f"{name}_low" in row for row in rows):
        at = {row["step"]: row for row in rows}
        ends = [[at[step].get(f"{name}{end}") for step in steps] for end in ("_low", "_high")]
        curve.low, curve.high = ([x if is_number(x) else math.nan for x in end] for end in ends)
    return curve


def _first_best_last(curve: Curve) -> list[str]:
    """A row of the table of evaluations."""
    valid = [i for i, value in enumerate(curve.values) if not math.isnan(value)]
    best = (min if "loss" in curve.label else max)(valid, key=lambda i: curve.values[i])

    def cell(i):
        words = show(curve.values[i])
        if curve.low is not None and not math.isnan(curve.low[i]):
            words += f" ({show(curve.low[i])} to {show(curve.high[i])})"
        return f"{words} at step {show(curve.steps[i])}"

    return [curve.label, cell(valid[0]), cell(best), cell(valid[-1])]


def _resumes(run: Run) -> list[tuple[int, str]]:
    return [(session.get("start_step", 0), "") for session in run.info.get("sessions", ())[1:]]


def _last(run: Run) -> int:
    return max((entry["step"] for entry in run.history if "step" in entry), default=0)


def _curve_sections(run: Run) -> list[Section]:
    """Curves of training by section: those of all TRL trainers, then those of each method, then the rest."""
    history, resumes, last = run.history, _resumes(run), _last(run)
    known = [name for entry in history for name, value in entry.items() if is_number(value) or value is None]
    known = [name for name in dict.fromkeys(known) if not NO_CURVES.fullmatch(name)]
    left = [name for name in known if not name.startswith(("eval_", "eval/")) and numbers(history, name)]
    sections = []
    for title, charts in SECTIONS.items():
        section = Section(title)
        for name, pattern in charts:
            found = {metric: match for metric in left if (match := re.fullmatch(pattern, metric))}
            left = [metric for metric in left if metric not in found]
            curves = [
                Curve(next((g for g in match.groups() if g), metric), *series(history, metric))
                for metric, match in found.items()
            ]
            marks = [(step, alarm) for step, alarm, _ in alarms(history)] if name.startswith("Entropy") else []
            if curves:
                section.parts.append(Chart(name, curves, [*resumes, *marks], last))
        if section.parts and resumes and not any(other.parts for other in sections):
            section.parts.insert(0, Note("Dotted lines show where the run was resumed."))
        sections.append(section)
    left.sort(key=lambda name: ("/" not in name, name.split("/")[0]))
    for owner, names in groupby(left, key=lambda name: name.split("/")[0] if "/" in name else "Other metrics"):
        charts = [Chart(n.removeprefix(f"{owner}/"), [Curve(n, *series(history, n))], resumes, last) for n in names]
        sections.append(Section(owner if owner == "Other metrics" else f"Metrics of {owner}", charts))
    return sections


def _sparsity_section(run: Run) -> Section:
    if not run.sparsity:
        return Section("Update sparsity")
    rows = [
        [dtype, "any change" if name == "density" else f"unchanged to {name}", f"{100 * value:.2f}%"]
        for dtype, part in run.sparsity.get("figures", {}).items()
        for name, value in part.items()
    ]
    trained = run.sparsity.get("trained_dtype", "?")
    return Section("Update sparsity", [Table(rows, ["compared in", f"entries (trained in {trained})", "share"])])


def _picture_section(run: Run) -> Section:
    found = [(os.path.join(run.folder, name), title) for name, title in PICTURES.items()]
    return Section("Pictures of callbacks", [Picture(title, path) for path, title in found if os.path.isfile(path)])


def _number_section(history: list[dict]) -> Section:
    names = dict.fromkeys(n for entry in history for n, x in entry.items() if is_number(x) and n != "step")
    rows = []
    for name in names:
        if values := numbers(history, name):
            rows.append(
                [name, *(show(x) for x in (values[0], values[-1], min(values), max(values))), show(len(values))]
            )
    table = Table(rows, ["metric", "first", "last", "smallest", "largest", "logs"])
    return Section("All metrics in numbers", [table] if rows else [], folded=True)


def _method_section(info: dict) -> Section:
    rows = [
        [m["name"], m.get("title", ""), f"arXiv {m['id']}" if m.get("id") else ""] for m in info.get("methods", ())
    ]
    return Section("Methods", [Table(rows, ["method", "paper", "source"])] if rows else [])


def _setting_section(info: dict) -> Section:
    settings = info.get("settings") or {}
    rows = [[name, value if isinstance(value, str) else json.dumps(value)] for name, value in settings.items()]
    return Section("Settings that differ from the defaults", [Table(rows, ["setting", "value"])] if rows else [])


def _provenance_section(run: Run) -> Section:
    info, results, parts = run.info, run.results, []
    rows = [[name.replace("_", " "), str(value)] for name, value in info.get("facts", {}).items()]
    versions = info.get("versions") or results.get("versions") or {}
    if versions:
        rows.append(["versions", ", ".join(f"{name} {number}" for name, number in versions.items())])
    commands = list(dict.fromkeys(s["command"] for s in info.get("sessions", ()) if s.get("command")))
    rows += [["command", command] for command in commands or filter(None, [results.get("command")])]
    if rows:
        parts.append(Table(rows))
    sessions = info.get("sessions", ())
    if sessions:
        parts.append(
            Table(
                [
                    [
                        _day(s.get("start")),
                        _day(s.get("end")) if s.get("end") else "not finished",
                        f"{show(s.get('start_step'))} to {show(s.get('end_step'))}",
                        duration(s.get("seconds") or 0),
                        show(s.get("processes")),
                        s.get("machine", ""),
                    ]
                    for s in sessions
                ],
                ["start", "end", "steps", "time", "processes", "machine"],
            )
        )
    return Section("How it was run", parts)


# ----------------------------------------------------------------------------------------------------------- in words


def show(value) -> str:
    """A number for people."""
    if not is_number(value) or math.isnan(value):
        return "-"
    if 1e4 <= abs(value) < 1e15 or value in range(10_000):
        return f"{value:,.0f}"
    return f"{value:.4g}"


def short(value: float) -> str:
    """A large number with its unit."""
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.3g}{unit}"
    return show(value)


def duration(seconds: float) -> str:
    """A time in hours, minutes and seconds."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes:02} min"
    return f"{minutes} min {rest:02} s" if minutes else f"{seconds:.3g} s"


def _day(moment: str | None) -> str:
    with contextlib.suppress(TypeError, ValueError):
        return datetime.fromisoformat(moment).strftime("%Y-%m-%d %H:%M UTC")
    return "-"


# ----------------------------------------------------------------------------------------------------------- pictures

INK, GRID = "#0b0c0d", "#8c8d8e"  # become the page's own colours
COLOURS = ("#3f7fe8", "#d9730d", "#2a9d6f", "#9b51c7", "#c93a5b", "#6b7280")
ALARM = "#d03030"
STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "trl-ext",  # the same run gives the same file
    "font.family": ["DejaVu Sans"],
    "font.size": 8.5,
    "text.parse_math": False,  # a name is a name
    "text.color": INK,
    "axes.edgecolor": GRID,
    "axes.labelcolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.formatter.useoffset": False,
    "axes.formatter.limits": (-3, 5),
    "legend.frameon": False,
    "path.simplify": True,
}


def draw(chart: Chart, form: str = "svg") -> bytes:
    """
    Draw curves over optimizer steps.

    Args:
        chart ([`Chart`]):
            What to draw; long curves are thinned to their extremes, with a running mean over them.
        form (`str`, *optional*, defaults to `"svg"`):
            `"svg"` or `"png"`.

    Returns:
        `bytes`: the picture.
    """
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(4.6, 2.3), layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.subplots()
        for i, curve in enumerate(chart.curves):
            _draw_curve(axes, curve, COLOURS[i % len(COLOURS)])
        seen = {""}
        for step, label in chart.marks:
            style = {"color": ALARM, "linestyle": "--"} if label else {"color": INK, "linestyle": ":", "alpha": 0.5}
            axes.axvline(step, linewidth=1, label=None if label in seen else label, **style)
            seen.add(label)
        low, high = axes.dataLim.intervaly
        if low >= 0 and low <= high / 2:  # shares and counts start at 0
            axes.set_ylim(0, 1 if high == 0 else 1.05 * high)
        if len(chart.curves) > 1 or len(seen) > 1:
            figure.legend(loc="outside upper left", fontsize=7.5, ncols=4, handlelength=1.2, columnspacing=1.2)
        axes.grid(color=GRID, alpha=0.25, linewidth=0.6)
        axes.tick_params(length=0)
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        axes.margins(x=0.02)
        if chart.last:
            axes.set_xlim(-0.02 * chart.last, 1.02 * chart.last)
        axes.set_xlabel("optimizer steps")
        target = io.BytesIO()
        if form == "svg":
            none = dict.fromkeys(("Date", "Creator", "Format", "Type"))
            figure.savefig(target, format="svg", transparent=True, metadata=none)
        else:
            figure.savefig(target, format="png", dpi=150)
        return target.getvalue()


def _draw_curve(axes, curve: Curve, colour: str) -> None:
    x, y = np.asarray(curve.steps, dtype=float), np.asarray(curve.values, dtype=float)
    if curve.low is not None:
        low, high = np.asarray(curve.low, dtype=float), np.asarray(curve.high, dtype=float)
        axes.fill_between(x, low, high, color=colour, alpha=0.12, linewidth=0)
        axes.errorbar(x, y, np.abs([y - low, high - y]), fmt="none", ecolor=colour, alpha=0.5, capsize=2, linewidth=1)
    if len(x) < 40:
        axes.plot(x, y, color=colour, linewidth=1.3, label=curve.label, marker="o", markersize=2.5)
        return
    axes.plot(*thin(x, y), color=colour, linewidth=0.7, alpha=0.35)
    axes.plot(*thin(x, running_mean(y)), color=colour, linewidth=1.5, label=curve.label)


def running_mean(values: np.ndarray) -> np.ndarray:
    """Mean of every value with those right before it, a twentieth of all; NaN is left out."""
    width = max(2, len(values) // 20)
    valid = np.isfinite(values)
    total, count = np.cumsum(np.where(valid, values, 0)), np.cumsum(valid)
    total[width:], count[width:] = total[width:] - total[:-width], count[width:] - count[:-width]
    return np.where(count > 0, total / np.maximum(count, 1), np.nan)


def thin(x: np.ndarray, y: np.ndarray, most: int = POINTS) -> tuple[np.ndarray, np.ndarray]:
    """At most so many points of a curve: the smallest and the largest of every stretch."""
    if len(x) <= most:
        return x, y
    rows = set()
    for part in np.array_split(np.arange(len(x)), most // 2):
        values = y[part]
        if np.isfinite(values).any():
            rows |= {part[np.nanargmin(values)], part[np.nanargmax(values)]}
        else:
            rows.add(part[0])
    chosen = sorted(rows)
    return x[chosen], y[chosen]


# ----------------------------------------------------------------------------------------------------------- as a page

CSS = """
:root { color-scheme: light dark; --ink: #1c2733; --dim: #5b6875; --line: #dfe4e9; --page: #f5f7f9; --card: #fff;
  --good: #1d7f53; --warn: #b3541e; }
@media (prefers-color-scheme: dark) { :root { --ink: #e3e8ed; --dim: #98a4b0; --line: #323b45; --page: #14181d;
  --card: #1c2229; --good: #55c493; --warn: #eb9a5e; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink); font: 15px/1.5 system-ui, "Segoe UI", Roboto,
  "Helvetica Neue", "DejaVu Sans", sans-serif; }
main { max-width: 1180px; margin: 0 auto; padding: 28px 20px 48px; }
h1 { font-size: 1.65rem; line-height: 1.25; margin: 0 12px 0 0; overflow-wrap: anywhere; }
h2 { font-size: 1.1rem; margin: 34px 0 12px; overflow-wrap: anywhere; }
.title { display: flex; flex-wrap: wrap; align-items: center; gap: 6px 0; }
header p { color: var(--dim); margin: 6px 0 0; overflow-wrap: anywhere; }
.status { border: 1px solid; border-radius: 99px; padding: 1px 11px; font-size: .8rem; font-weight: 600;
  color: var(--warn); }
.status.finished { color: var(--good); }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(158px, 1fr)); gap: 12px; margin-top: 22px; }
.tiles > div, figure, .scroll { background: var(--card); border: 1px solid var(--line); border-radius: 8px; }
.tiles > div { padding: 11px 14px; }
.tiles b { display: block; font-size: 1.4rem; font-weight: 600; line-height: 1.3; }
.tiles span { color: var(--dim); font-size: .8rem; display: block; }
.charts { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 350px), 1fr)); gap: 12px;
  margin-bottom: 12px; }
figure { margin: 0; padding: 10px 12px 6px; min-width: 0; }
figure.wide { margin-bottom: 12px; }
figcaption { font-size: .85rem; font-weight: 600; margin-bottom: 4px; overflow-wrap: anywhere; }
svg { display: block; width: 100%; height: auto; }
svg text { font-family: inherit !important; }
img { display: block; max-width: 100%; height: auto; background: #fff; border-radius: 4px; }
section > p, details > p { color: var(--dim); margin: -6px 0 12px; font-size: .86rem; }
.scroll { overflow-x: auto; margin-bottom: 12px; }
table { border-collapse: collapse; width: 100%; font-size: .86rem; }
th, td { text-align: left; padding: 6px 14px; border-top: 1px solid var(--line); vertical-align: top; }
thead th { border-top: 0; color: var(--dim); font-weight: 600; white-space: nowrap; }
tbody tr:first-child :is(th, td) { border-top: 0; }
thead + tbody tr:first-child :is(th, td) { border-top: 1px solid var(--line); }
tbody th { font-weight: 500; white-space: nowrap; }
td { overflow-wrap: break-word; font-variant-numeric: tabular-nums; }
summary { cursor: pointer; font-size: 1.1rem; font-weight: 700; margin: 34px 0 12px; }
footer { color: var(--dim); font-size: .8rem; margin-top: 40px; }
@media print { details:not([open]) > * { display: block; } figure, .tiles > div { break-inside: avoid; } }
"""


def to_html(report: Report) -> str:
    """
    A report as one page that needs no other file, no script and no network.

    Args:
        report ([`Report`]):
            From [`build_report`].
    """
    text = html.escape
    tiles = "".join(
        f"<div><span>{text(label)}</span><b>{text(value)}</b><span>{text(remark)}</span></div>"
        for label, value, remark in report.tiles
    )
    body = []
    for section in report.sections:
        head = text(section.title)
        body.append(f"<details><summary>{head}</summary>" if section.folded else f"<section><h2>{head}</h2>")
        for kind, parts in groupby(section.parts, type):
            inner = "\n".join(_html_of(part) for part in parts)
            body.append(f'<div class="charts">{inner}</div>' if kind is Chart else inner)
        body.append("</details>" if section.folded else "</section>")
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{text(report.title)}</title>
<style>{CSS}</style>
</head>
<body>
<main>
<header>
<div class="title"><h1>{text(report.title)}</h1>
<span class="status {report.status.split()[0]}">{text(report.status)}</span></div>
<p>{text(report.subtitle)}</p>
<div class="tiles">{tiles}</div>
</header>
{chr(10).join(body)}
<footer>{text(_footer())}</footer>
</main>
</body>
</html>
"""


def _footer() -> str:
    return f"Written by trl-ext {version('trl-ext')} on {datetime.now(timezone.utc):%Y-%m-%d %H:%M} UTC."


def _html_of(part) -> str:
    text = html.escape
    if isinstance(part, Note):
        return f"<p>{text(part.text)}</p>"
    if isinstance(part, Table):
        head = "".join(f"<th>{text(cell)}</th>" for cell in part.header)
        head = f"<thead><tr>{head}</tr></thead>" if part.header else ""
        rows = "".join(
            f"<tr><th>{text(first)}</th>{''.join(f'<td>{text(cell)}</td>' for cell in rest)}</tr>"
            for first, *rest in part.rows
        )
        return f'<div class="scroll"><table>{head}<tbody>{rows}</tbody></table></div>'
    title = text(part.title)
    if isinstance(part, Picture):
        data = base64.b64encode(Path(part.path).read_bytes()).decode()
        image = f'<img alt="{title}" src="data:image/png;base64,{data}">'
        return f'<figure class="wide"><figcaption>{title}</figcaption>{image}</figure>'
    picture = draw(part).decode()
    picture = picture[picture.index("<svg") :]
    picture = re.sub(r' id="[A-Za-z.]+_\d+"', "", picture)  # repeated in every picture, and used by none
    picture = re.sub(r' (width|height)="[\d.]+pt"', "", picture, count=2).replace(INK, "currentColor")
    picture = re.sub(
        r' d="[^"]*"', lambda path: re.sub(r"(\.\d\d)\d+", r"\1", path[0]), picture
    )  # hundredths of a point
    picture = picture.replace("<svg", f'<svg role="img" aria-label="{title}"', 1)
    return f"<figure><figcaption>{title}</figcaption>{picture}</figure>"


def to_markdown(report: Report, pictures: str) -> str:
    """
    A report as Markdown, with its pictures in a folder beside it.

    Args:
        report ([`Report`]):
            From [`build_report`].
        pictures (`str`):
            Folder of the pictures, which is made and filled; the text refers to it by its last part.
    """
    os.makedirs(pictures, exist_ok=True)
    lines = [f"# {_plain(report.title)}", "", f"**{report.status}** {_plain(report.subtitle)}", ""]
    tiles = [[label, f"{value} ({remark})" if remark else value] for label, value, remark in report.tiles]
    lines += _markdown_table(Table(tiles, ["", ""]))
    count = 0
    for section in report.sections:
        lines += ["", f"## {_plain(section.title)}", ""]
        for part in section.parts:
            if isinstance(part, (Table, Note)):
                lines += [*(_markdown_table(part) if isinstance(part, Table) else [_plain(part.text)]), ""]
                continue
            name = f"{count:03}_{re.sub(r'[^a-z0-9]+', '_', part.title.lower()).strip('_')[:60]}.png"
            count += 1
            data = draw(part, "png") if isinstance(part, Chart) else Path(part.path).read_bytes()
            Path(pictures, name).write_bytes(data)
            title = _plain(part.title)
            lines += [f"**{title}**", "", f"![{title}]({os.path.basename(pictures)}/{name})", ""]
    return "\n".join([*lines, "", _footer(), ""])


def _plain(text: str) -> str:
    """Text that Markdown leaves as it is."""
    return re.sub(r"([\\`*_\[\]<>|#])", r"\\\1", " ".join(str(text).split()))


def _markdown_table(table: Table) -> list[str]:
    header = table.header or ["", *[""] * (len(table.rows[0]) - 1)]
    rows = ["| " + " | ".join(_plain(cell) for cell in row) + " |" for row in (header, *table.rows)]
    return [rows[0], "|" + "---|" * len(header), *rows[1:]]


def write_report(folder: str, output: str | None = None, form: str | None = None) -> str:
    """
    Write the report on a run.

    Args:
        folder (`str`):
            The run's `output_dir`.
        output (`str`, *optional*):
            File to write, `report.html` or `report.md` in the run's folder by default. The pictures of a Markdown
            report are put in a folder of its name with `_files`.
        form (`str`, *optional*):
            `"html"` or `"markdown"`; by default Markdown if `output` ends in `.md`.

    Returns:
        `str`: the file.

    Raises:
        FileNotFoundError: as [`read_run`].
        ValueError: for another form.
    """
    form = form or ("markdown" if str(output or "").lower().endswith((".md", ".markdown")) else "html")
    if form not in ("html", "markdown"):
        raise ValueError(f"`format` must be 'html' or 'markdown', got {form!r}.")
    report = build_report(read_run(folder))
    path = Path(output or Path(folder, REPORT_FILE if form == "html" else "report.md"))
    path.parent.mkdir(parents=True, exist_ok=True)
    content = to_html(report) if form == "html" else to_markdown(report, str(path.with_name(f"{path.stem}_files")))
    _replace(path, content)
    return str(path)


def _replace(path: Path, content: str) -> None:
    """Write a file that is never seen half-written."""
    partial = path.with_name(f"{path.name}.partial")
    partial.write_text(content, encoding="utf-8", errors="replace")
    os.replace(partial, path)


# -------------------------------------------------------------------------------------------------------- the callback


class RunReportCallback(TrainerCallback):
    """
    Keeps what is to be known of a run, of any TRL trainer, and writes a report on it. Training does not change.

    In `output_dir`, the main process writes `run.json` (trainer, methods, settings that differ from the defaults,
    versions, and for every session the command, machine, steps, time and peak memory, and the warnings) and
    `trainer_state.json` (as `trainer.save_state()` does) at the start, at checkpoints, about every minute and at the
    end, and then `report.html`. `trl-ext report <output_dir>` writes it at any other time. A resumed run adds a
    session.

    Add it last, so that what other callbacks write at the end is there. Whatever goes wrong in writing is a warning:
    it must not cost the model.

    Args:
        trainer (`Trainer`):
            The trainer.
        command (`str`, *optional*):
            How the run was started; by default the process's command line without secrets.
        facts (`dict`, *optional*):
            What else to say of the run, such as its data set, by name.
        at_end (`bool`, *optional*, defaults to `True`):
            Whether to write the report at the end; False if that is done later, by [`write_report`].

    Example:
    ```python
    trainer = GRPOTrainer(...)
    trainer.add_callback(RunReportCallback(trainer))
    ```
    """

    def __init__(self, trainer, command: str | None = None, facts: dict | None = None, at_end: bool = True):
        self.trainer, self.facts, self.at_end = trainer, dict(facts or {}), at_end
        command = command or getattr(trainer, "command", None) or command_line()
        self.command = without_secrets(shlex.split(command))
        self._info, self._show = None, None

    def on_train_begin(self, args, state, control, **kwargs):
        if not state.is_world_process_zero:
            return
        self._info = describe(self.trainer, self.facts)
        before = _read_json(Path(args.output_dir, RUN_FILE)) if state.global_step else {}
        self._info |= {"sessions": before.get("sessions", []), "warnings": before.get("warnings", [])}
        self._info["sessions"].append(
            {
                "start": _now(),
                "end": None,
                "start_step": state.global_step,
                "command": self.command,
                "machine": machine(),
                "processes": args.world_size,
            }
        )
        self._began = time.monotonic()
        self._listen(state)
        self._write(args, state)

    def on_log(self, args, state, control, **kwargs):
        if self._info is not None and time.monotonic() - self._written > REFRESH:
            self._write(args, state)

    def on_save(self, args, state, control, **kwargs):
        if self._info is not None:
            self._write(args, state)

    def on_train_end(self, args, state, control, **kwargs):
        if self._info is None:
            return
        if self._show is not None and warnings.showwarning is self._listener:
            warnings.showwarning = self._show
        self._info["sessions"][-1]["end"] = _now()
        self._write(args, state)
        self._info = None
        if not self.at_end:
            return
        try:
            write_report(args.output_dir)
        except Exception as error:
            warnings.warn(
                f"RunReportCallback: no report was written ({type(error).__name__}: {error}). Training is complete; "
                f"try `trl-ext report {shlex.quote(args.output_dir)}`.",
                stacklevel=2,
            )

    def _write(self, args, state) -> None:
        self._written = time.monotonic()
        session = self._info["sessions"][-1]
        session |= {"end_step": state.global_step, "seconds": self._written - self._began, **peak_memory()}
        try:
            os.makedirs(args.output_dir, exist_ok=True)
            _replace(Path(args.output_dir, RUN_FILE), json.dumps(self._info, indent=1, default=str) + "\n")
            path = os.path.join(args.output_dir, STATE_FILE)
            state.save_to_json(f"{path}.partial")
            os.replace(f"{path}.partial", path)
        except OSError as error:
            warnings.warn(f"RunReportCallback: {args.output_dir} cannot be written ({error}).", stacklevel=2)

    def _listen(self, state) -> None:
        """Note warnings on their way to where they are shown."""
        self._show = shown = warnings.showwarning
        known = self._info["warnings"]

        def listener(message, category, *rest, **named):
            words = str(message)
            if issubclass(category, (DeprecationWarning, FutureWarning, PendingDeprecationWarning)):
                return shown(message, category, *rest, **named)  # about code, not about the run
            same = next((w for w in known if w["message"] == words), None)
            if same:
                same["count"] += 1
            elif len(known) < 100:
                known.append({"step": state.global_step, "category": category.__name__, "message": words, "count": 1})
            return shown(message, category, *rest, **named)

        self._listener = warnings.showwarning = listener


def describe(trainer, facts: dict | None = None) -> dict:
    """
    What is known of a run before its first step.

    Args:
        trainer (`Trainer`):
            The trainer.
        facts (`dict`, *optional*):
            What else to say.

    Returns:
        `dict`: `trainer`, `methods`, `model`, `rewards`, `settings`, `versions` and `facts`, which can be written as
        JSON.
    """
    model = trainer.accelerator.unwrap_model(trainer.model)
    parameters = list(model.parameters())
    known = {"parameters": short(sum(p.numel() for p in parameters))}
    if trained := {str(p.dtype).removeprefix("torch.") for p in parameters if p.requires_grad}:
        count = sum(p.numel() for p in parameters if p.requires_grad)
        known["trained parameters"] = f"{short(count)} in {', '.join(sorted(trained))}"
    with contextlib.suppress(TypeError):  # a stream has no length
        known["training rows"] = f"{len(trainer.train_dataset):,}"
    papers = [cls for cls in type(trainer).__mro__ if cls.__dict__.get("_paper")]
    name = str(getattr(model.config, "_name_or_path", "") or "")
    return {
        "trainer": type(trainer).__name__,
        "methods": [
            {"name": cls.__dict__.get("_name") or cls.__name__, "title": cls._paper["title"], "id": cls._paper["id"]}
            for cls in papers
        ],
        "model": os.path.basename(name) if os.path.isabs(name) else name,
        "rewards": list(getattr(trainer, "reward_func_names", ())),
        "settings": changed_settings(trainer.args),
        "versions": versions(),
        "facts": known | (facts or {}),
    }


def machine() -> str:
    """What kind of machine this is, without its name."""
    import psutil
    import torch

    words = [f"{platform.system()} {platform.machine()}", f"{os.cpu_count()} CPU cores"]
    words.append(f"{psutil.virtual_memory().total / 2**30:.0f} GiB")
    if torch.cuda.is_available():
        words.append(f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}")
    return ", ".join(words)


def peak_memory() -> dict:
    """Most memory in use so far, in bytes: of the main process's GPU, or of the process."""
    import torch

    if torch.cuda.is_available():
        return {"peak_memory": torch.cuda.max_memory_allocated(), "peak_memory_of": "GPU of the main process"}
    with contextlib.suppress(ImportError):  # not on Windows
        import resource

        unit = 1 if sys.platform == "darwin" else 1024
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
        return {"peak_memory": peak, "peak_memory_of": "main process"}
    return {}


def _now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")
