"""
Builds the documentation into `docs/site/`, without network: pages from the docstrings, the recipes' settings, the
results of the benchmarks, README.md, CONTRIBUTING.md and `docs/methods.yaml`; then `mkdocs build --strict`.

```bash
pip install -e ".[docs]" && python docs/build.py
```
"""

import argparse
import ast
import dataclasses
import functools
import importlib.util
import inspect
import itertools
import json
import logging
import re
import shutil
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

import yaml
from trl import GRPOConfig

import trl_ext
from trl_ext.core import mixing
from trl_ext.core.hooks import Hooks


HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
ITEMS = ("Args", "Parameters", "Attributes", "Class attributes", "Raises")  # sections of a docstring that are lists
SECTIONS = (*ITEMS, "Returns", "Yields", "Example", "Examples")
# Words of a sentence that says where a number comes from, or where paper and code differ.
SOURCES = re.compile(r"\b(code|scripts?|forks?|ours|published|verified|are not known|known to us|the paper)\b")


# ------------------------------------------------------------------------------------------------ docstrings


class Item(NamedTuple):
    """One entry of a section, such as `a (`float`), b (`float`):` and what follows."""

    header: str
    text: str

    @property
    def names(self) -> list[str]:
        return re.findall(r"(?:^|\), )(\w+) \(", self.header) or [self.header]


def sections(doc: str) -> list[tuple[str, str]]:
    """Title (or nothing) and dedented text of each part of a docstring."""
    parts: list[tuple[str, list[str]]] = [("", [])]
    fenced = False
    for line in inspect.cleandoc(doc or "").splitlines():
        title, colon, rest = line.partition(":")
        if not fenced and colon and title in SECTIONS:
            parts.append((title, [f"    {rest.strip()}"] if rest.strip() else []))
            continue
        if not fenced and line[:1].strip() and parts[-1][0] and "Example" not in parts[-1][0]:
            parts.append(("", []))
        fenced ^= line.lstrip().startswith("```")
        parts[-1][1].append(line)
    return [(title, inspect.cleandoc("\n" + "\n".join(lines))) for title, lines in parts if any(map(str.strip, lines))]


def items(text: str) -> list[Item]:
    """Entries of a section that is a list."""
    found: list[tuple[str, list[str]]] = []
    for line in text.splitlines():
        if found and found[-1][0].count("(") > found[-1][0].count(")"):
            found[-1] = (f"{found[-1][0]} {line.strip()}", [])
        elif line[:1].strip():
            found.append((line, []))
        elif found:
            found[-1][1].append(line)
    return [Item(header.removesuffix(":"), inspect.cleandoc("\n" + "\n".join(body))) for header, body in found]


def references(text: str) -> str:
    """Turns [`X`] into a link to the page of X, or into code."""

    def link(match):
        name = match[1].lstrip("~").rpartition(".")[2]
        page = PAGE_OF.get(name)
        return f"[`{name}`]({page})" if page else f"`{name}`"

    return re.sub(r"\[`([^`]+)`\](?!\()", link, text)


def markdown(doc: str) -> str:
    """A docstring in TRL's format as Markdown."""
    lines = []
    for title, text in sections(doc):
        if title in ITEMS:
            lines += [f"**{title}**", ""]
            for item in items(text):
                header = re.sub(r"(^|\), )(\w+) \(", r"\1**`\2`** (", item.header)
                body = item.text.replace("\n", "\n    ")
                colon = ":" if body and title != "Raises" else ""
                lines.append(f"- {header}{colon} {body}".rstrip())
        elif title:
            lines += [f"**{title}**" + (":" if "Example" in title else ""), "", text]
        else:
            lines.append(text)
        lines.append("")
    return references("\n".join(lines)).strip()


def cell(text: str) -> str:
    """Text for a cell of a table: one line, no bars outside of code."""
    parts = re.split(r"(`[^`]*`)", " ".join(references(text).split()))
    return "".join(part if part.startswith("`") else part.replace("|", "\\|") for part in parts)


def sentences(text: str) -> list[str]:
    return [part for part in re.split(r"(?<=[.;])(?<!Dr\.)\s+(?=[A-Z`\[])", " ".join(text.split())) if part]


def from_sources(doc: str) -> list[str]:
    """The sentences on where something comes from."""
    return [sentence for sentence in sentences(doc) if SOURCES.search(sentence)]


# ------------------------------------------------------------------------------------------------ methods


class Method(NamedTuple):
    """What is known of a method, from all sources."""

    slug: str
    trainer: type
    config: type
    module: object
    summary: str  # of the README's table, with its link to the paper
    needs: str
    notes: dict  # of methods.yaml
    settings: str  # the file of published settings

    @property
    def hooks(self) -> list[str]:
        return mixing.joints_of(self.trainer)

    @property
    def page(self) -> str:
        return f"/methods/{self.slug}.md"


def notes() -> dict:
    """What methods.yaml says: the symptoms, and of each method."""
    return yaml.safe_load((HERE / "methods.yaml").read_text(encoding="utf-8"))


def methods() -> list[Method]:
    """All methods."""
    table = re.findall(
        r"^\| `(\w+)` \| `\w+` \| (.*) \| `[^|]*` \| ?(.*?) ?\|$",
        (ROOT / "README.md").read_text(encoding="utf-8"),
        re.M,
    )
    rows, said = {slug: row for slug, *row in table}, notes()["methods"]
    found = []
    for slug in mixing.list_methods():
        trainer = mixing.find_method(slug)
        settings = (ROOT / "recipes/configs" / f"{slug}.yaml").read_text(encoding="utf-8")
        module = sys.modules[trainer.__module__]
        found.append(Method(slug, trainer, trainer.config_class, module, *rows[slug], said[slug], settings))
    return found


def refused(found: list[Method]) -> dict[str, dict[str, str]]:
    """Of each method, those that it cannot be mixed with, and why."""
    pairs: dict[str, dict[str, str]] = {method.slug: {} for method in found}
    for a, b in itertools.combinations(found, 2):
        try:
            # What mix does, without the config class, which takes its time.
            bases = tuple(mixing._ordered([a.trainer, b.trainer]))
            type("Pair", bases, {"config_class": a.config})
        except mixing.MixingError as error:
            pairs[a.slug][b.slug] = pairs[b.slug][a.slug] = str(error)
    return pairs


def public_parts(method: Method) -> list:
    """The module's own functions and classes beside trainer and config, in the order of the file."""
    return [
        value
        for name, value in vars(method.module).items()
        if not name.startswith("_")
        and (inspect.isfunction(value) or inspect.isclass(value))
        and value.__module__ == method.module.__name__
        and value not in (method.trainer, method.config)
    ]


def code_of(function) -> str:
    """Its source without the docstring."""
    lines = inspect.getsource(function).splitlines()
    node = ast.parse("\n".join(lines)).body[0]
    if ast.get_docstring(node) is not None:
        first = node.body[0]
        del lines[first.lineno - 1 : first.end_lineno]
    return "\n".join(lines)


def described(part) -> list[str]:
    """A function or class: its name, arguments, docstring and, folded, its code."""
    lines = [f"### `{part.__name__}`", "", markdown(part.__doc__), ""]
    if inspect.isfunction(part):
        lines += ['??? abstract "Code"', "    ```python", *(f"    {line}" for line in code_of(part).splitlines())]
        lines += ["    ```", ""]
    return lines


def default_of(field: dataclasses.Field) -> str:
    if field.default is not dataclasses.MISSING:
        return f"`{field.default!r}`"
    return f"`{field.default_factory()!r}`" if field.default_factory is not dataclasses.MISSING else "required"


def settings_table(config: type) -> list[str]:
    """Fields that the config declares, as its docstring describes them; then TRL's fields with another default."""
    fields = {f.name: f for f in dataclasses.fields(config) if f.name in config._declared}
    trl = {f.name: f for f in dataclasses.fields(GRPOConfig)}
    entries = [item for title, text in sections(config.__doc__) if title == "Parameters" for item in items(text)]
    said = {name for item in entries for name in item.names}
    entries += [
        Item(f"{name} (`{field.type}`)", field.metadata.get("help", ""))
        for name, field in fields.items()
        if name not in said and name not in trl
    ]
    lines = []
    if entries:
        lines = ["| setting | default | meaning |", "|---|---|---|"]
    for item in entries:
        names = [name for name in item.names if name in fields]
        defaults = [default_of(fields[name]) for name in names]
        lines.append(f"| {'<br>'.join(f'`{n}`' for n in names)} | {'<br>'.join(defaults)} | {cell(item.text)} |")
    changed = [
        name
        for name in fields
        if name in trl and name not in said and default_of(trl[name]) != default_of(fields[name])
    ]
    if changed:
        lines += ["", "TRL's settings with another default:", "", "| setting | default | TRL's |", "|---|---|---|"]
        lines += [f"| `{name}` | {default_of(fields[name])} | {default_of(trl[name])} |" for name in changed]
    return lines or ["None of its own."]


def provenance(method: Method) -> list[str]:
    """What the docstrings and the file of settings say on sources, and on where paper and code differ."""
    intro = sections(method.config.__doc__)[0][1]
    found = [("Settings", sentence) for sentence in sentences(intro)[1:]]
    found += [("Method", sentence) for sentence in from_sources(sections(method.trainer.__doc__)[0][1])]
    for title, text in sections(method.config.__doc__):
        if title == "Parameters":
            found += [(", ".join(f"`{n}`" for n in i.names), s) for i in items(text) for s in from_sources(i.text)]
    for part in public_parts(method):
        for title, text in sections(part.__doc__):
            texts = [item.text for item in items(text)] if title in ITEMS else [text]
            found += [(f"`{part.__name__}`", s) for text in texts for s in from_sources(text)]
    return [f"- {where}: {references(sentence)}" for where, sentence in dict.fromkeys(found)]


def method_page(method: Method, pairs: dict[str, str], titles: dict[str, str], names: dict[str, str]) -> str:
    """The page of a method; `pairs` are the mixes that are refused."""
    trainer, paper = method.trainer, method.trainer._paper
    doc = sections(trainer.__doc__)[0][1].split("\n\n")
    logs = [part for part in doc if part.startswith("Logs ")]
    lines = [f"# {trainer._name}", "", f"*{method.summary[0].upper()}{method.summary[1:]}*", ""]
    lines += ["| name | classes | hooks | needs |", "|---|---|---|---|"]
    lines += [f"| `{method.slug}` | `{trainer.__name__}`, `{method.config.__name__}` | "]
    lines[-1] += f"{', '.join(f'[`{h}`](/hooks.md#{h})' for h in method.hooks) or '-'} | {method.needs or '-'} |"
    lines += ["", "## What it does", "", references("\n\n".join(part for part in doc if part not in logs)), ""]
    for title, text in sections(trainer.__doc__)[1:]:
        lines += [markdown(f"{title}:\n" + text.replace("\n", "\n    ") if title else text), ""]

    lines += ["## When to use it", ""]
    lines += ["For: " + ", ".join(f"[{titles[s]}](/guide.md#{s})" for s in method.notes["symptoms"]) + ".", ""]
    for kind, title, text in (("success", "Use it when", "use"), ("warning", "Leave it when", "avoid")):
        lines += [f'!!! {kind} "{title}"', f"    {method.notes[text]}", ""]

    lines += ["## Use", "", "```python", f"from trl_ext import {method.config.__name__}, {trainer.__name__}"]
    lines += [
        "```",
        "",
        "```bash",
        f"accelerate launch recipes/train.py --methods {method.slug}          # embedded task",
    ]
    lines += [f"accelerate launch recipes/train.py --methods {method.slug} --paper  # published settings", "```", ""]

    if parts := public_parts(method):
        lines += ["## Equations", "", f"Plain functions of `{method.module.__name__}`, exact in float64.", ""]
        for part in parts:
            lines += described(part)
    lines += ["## Settings", "", *settings_table(method.config), ""]
    lines += ["## Metrics", "", references("\n\n".join(logs)), "", f"**How to read them.** {method.notes['read']}", ""]
    lines += [
        "## Paper, code, and what we follow",
        "",
        *(provenance(method) or ["The docstrings name no difference."]),
        "",
    ]
    lines += ["## Published settings", "", f"`recipes/configs/{method.slug}.yaml`, what `--paper` trains with:", ""]
    lines += ["```yaml", method.settings.strip(), "```", ""]

    lines += ["## Mixing", ""]
    if pairs:
        lines += [f"Mixes with all but {len(pairs)} of the other {len(names) - 1} methods:", ""]
        lines += [f"- [{names[other]}](/methods/{other}.md): {reason}" for other, reason in pairs.items()]
    else:
        lines += ["Mixes with every other method."]
    if alone := trainer.__dict__.get("ignores"):
        lines += ["", f"It does not look at {', '.join(f'`{hook}`' for hook in alone)}."]
    if trainer.needs_off_policy:
        lines += ["", f"With one update per generation it {trainer.needs_off_policy.rstrip(',')}."]
    lines += ["", *evidence(method)]
    lines += ["## Citation", "", f"[{paper['title']}](https://huggingface.co/papers/{paper['id']})", ""]
    lines += ["```bibtex", paper["citation"].strip(), "```", ""]
    return "\n".join(lines)


# ------------------------------------------------------------------------------------------------ evidence


def show(mean: float, spread: float, bar: bool) -> str:
    meter = f'<meter value="{mean}"></meter>' if bar else ""
    return f"{meter}{mean:,.6g} ± {spread:g}"


def series(numbers: dict[str, list[float]]) -> dict[str, dict[str, dict[float, float]]]:
    """Curves: what the number in a label counts -> label without it -> number -> mean."""
    curves: dict[str, dict[str, dict[float, float]]] = {}
    for label, (mean, _) in numbers.items():
        for match in re.finditer(r"(\w[\w ]*?)([ =])(\d+(?:\.\d+)?)(?=$|,)", label):
            name = (label[: match.start()] + label[match.end() :]).strip(", ")
            curves.setdefault(match[1], {}).setdefault(name, {})[float(match[3])] = mean
    curves = {x: {name: line for name, line in lines.items() if len(line) > 1} for x, lines in curves.items()}
    return {x: lines for x, lines in curves.items() if max(map(len, lines.values()), default=0) >= 3}


def draw(numbers: dict[str, list[float]], path: Path) -> bool:
    """Draw what depends on a number; whether there was anything."""
    if not (curves := series(numbers)):
        return False
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.6 * len(curves), 3.4), layout="constrained")
    for axes, (x, lines) in zip(figure.subplots(1, len(curves), squeeze=False)[0], curves.items(), strict=True):
        values = [value for line in lines.values() for value in line.values()]
        for label, line in lines.items():
            axes.plot(*zip(*sorted(line.items()), strict=True), marker="o", markersize=4, label=label)
        for which, those in (("x", [x for line in lines.values() for x in line]), ("y", values)):
            if min(those) > 0 and max(those) / min(those) > 20:
                axes.set(**{f"{which}scale": "log"})
        axes.set(xlabel=x)
        axes.grid(alpha=0.3)
        axes.legend(fontsize=7)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    return True


def results_of(slug: str) -> dict[str, dict]:
    """The records of a method's mechanism, which `benchmarks/mechanisms` makes, by the name of the file."""
    paths = [ROOT / "benchmarks/results" / f"{name}.json" for name in (slug, f"samplers_{slug}")]
    return {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in paths if path.exists()}


def verdict(count: int, seeds: int) -> str:
    """What to say of a claim that holds on so many seeds."""
    if seeds == 1:  # nothing is drawn
        return "shown" if count else "**not shown**"
    if count == seeds:
        return f"shown in {count} of {seeds} seeds"
    return f"only in {count} of {seeds} seeds" if count else f"**not shown** (0 of {seeds} seeds)"


def claims(record: dict) -> list[str]:
    return [f"{references(text)}: {verdict(count, record['seeds'])}" for text, count in record["claims"].items()]


def evidence(method: Method) -> list[str]:
    """What was measured: the mechanism, the cost, and what the tests find to hold."""
    lines = ["## Evidence", ""]
    for stem, record in results_of(method.slug).items():
        name = "samplers" if stem.startswith("samplers_") else stem
        script = ROOT / "benchmarks/mechanisms" / f"{name}.py"
        lines += [references(ast.get_docstring(ast.parse(script.read_text(encoding="utf-8"))) or ""), ""]
        lines += [f"In the paper: {references(record['paper'])}", "", *(f"- {claim}" for claim in claims(record)), ""]
        if series(record["numbers"]):
            lines += [f"![What was measured]({stem}.svg)", ""]
        bar = all(0 <= mean <= 1 for mean, _ in record["numbers"].values())
        table = [f"| `benchmarks/results/{stem}.json` | mean and standard deviation |", "|---|---|"]
        table += [f"| {cell(label)} | {show(*number, bar)} |" for label, number in record["numbers"].items()]
        if len(table) > 14:
            table = ['??? note "All numbers"', "", *(f"    {row}" for row in table)]
        lines += [*table, ""]
    if len(lines) == 2:
        lines += [
            "Its equations are tested against worked numbers, and a real run shows that the mechanism acts "
            f"(`tests/methods/test_{method.slug}.py`); there is no recorded measurement of an effect.",
            "",
        ]
    lines += runs(method.slug)
    lines += cost(method.slug)
    properties = HERE / "properties.json"
    if properties.exists():
        cells = json.loads(properties.read_text(encoding="utf-8"))
        lines += ["[What holds](/properties.md), by the tests:", ""]
        for title, column in cells.items():
            if (said := column.get(method.slug)) is not None:
                lines.append(f"- {title}: {'yes' if said == 'passed' else said}")
        lines += [""]
    return lines


@functools.cache
def comparison():
    """The module of `benchmarks/run.py`, which knows its rows."""
    spec = importlib.util.spec_from_file_location("benchmark_run", ROOT / "benchmarks/run.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@functools.cache
def rows_of_runs() -> dict[str, dict[str, list[dict]]]:
    """Rows by task and name, at the learning rates that were chosen."""
    run = comparison()
    return {task: found for task in run.TASKS if (found := run.rows_of(task))}


def runs(slug: str) -> list[str]:
    """What the comparison with plain GRPO says of a method."""
    run, lines = comparison(), []
    for task, found in rows_of_runs().items():
        base = found.get(run.baseline_of(slug))
        if not (slug in found and base):
            continue
        share, low, high = map(run.needed, run.share_needed(found[slug], base))
        ends = [run.interval([*map(run.final, rows)]) for rows in (found[slug], base)]
        lines.append(
            f"- `{task}`: {ends[0]} of the held-out prompts at the end, GRPO {ends[1]} ({len(found[slug])} seeds). "
            f"GRPO's end after this share of its rollouts: {share} ({low} to {high})."
        )
    if slug in run.LEFT_OUT:
        return [f"It is not in the [comparison with plain GRPO](/evidence.md#runs): {run.LEFT_OUT[slug]}.", ""]
    if not lines:
        return []
    start = f"Against plain GRPO at equal rollouts ([all methods](/evidence.md#runs)), {run.BUDGET:,} of them:"
    return [start, "", *lines, "", f"![Held-out accuracy over rollouts]({slug}_runs.svg)", ""]


def draw_runs(slug: str, path: Path) -> bool:
    """Draw a method's curves beside GRPO's, with the standard error over seeds; whether there were any."""
    from matplotlib.figure import Figure

    run = comparison()
    tasks = {task: found for task, found in rows_of_runs().items() if {slug, run.baseline_of(slug)} <= found.keys()}
    if not tasks:
        return False
    figure = Figure(figsize=(4.6 * len(tasks), 3.4), layout="constrained")
    for axes, (task, found) in zip(figure.subplots(1, len(tasks), squeeze=False)[0], tasks.items(), strict=True):
        for name in (run.baseline_of(slug), slug):
            curves = run.curves(found[name])
            x, y = curves.mean(0).T
            error = curves[:, :, 1].std(0, ddof=1) / len(curves) ** 0.5 if len(curves) > 1 else 0 * y
            axes.plot(x, y, label=name)
            axes.fill_between(x, y - error, y + error, alpha=0.2)
        axes.set(title=task, xlabel="rollouts", ylabel="held-out accuracy")
        axes.grid(alpha=0.3)
        axes.legend(fontsize=7)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    return True


@functools.cache
def gains_on_grpo() -> dict[str, dict[str, list[float]]]:
    """What every method and mix gains on GRPO's mean over rollouts: task -> name -> a number per seed."""
    run = comparison()
    gains: dict[str, dict[str, list[float]]] = {}
    for task, found in rows_of_runs().items():
        gains[task] = {}
        for name in found.keys() - set(map(run.baseline_of, found)):
            values = run.gains(found[name], found.get(run.baseline_of(name), []), run.area)
            if len(values) > 1:  # else there is no interval
                gains[task][name] = values
    return gains


def gain(slug: str) -> str:
    """What a method gains, for a cell of a table."""
    run, found = comparison(), {task: some[slug] for task, some in gains_on_grpo().items() if slug in some}
    said = [f"`{task}` {sum(x) / len(x):+.3f} ± {run.half_width(x):.3f}" for task, x in found.items()]
    return "<br>".join(said) or "-"


def draw_gains(path: Path) -> None:
    """Draw the gains with 95% intervals, a column per task."""
    from matplotlib.figure import Figure

    run, gains = comparison(), gains_on_grpo()
    first = next(iter(gains.values()))
    names = sorted(first, key=lambda name: sum(first[name]) / len(first[name]))
    names = [*sorted({name for some in gains.values() for name in some} - set(names)), *names]
    figure = Figure(figsize=(3.2 + 2.4 * len(gains), 1 + 0.22 * len(names)), layout="constrained")
    panels = figure.subplots(1, len(gains), squeeze=False, sharey=True)[0]
    for axes, (task, some) in zip(panels, gains.items(), strict=True):
        axes.axvline(0, color="gray", linewidth=0.8)
        for row, name in enumerate(names):
            if values := some.get(name):
                mean, width = sum(values) / len(values), run.half_width(values)
                clear = abs(mean) > width
                axes.errorbar(mean, row, xerr=width, fmt="o", markersize=4, color="C0" if clear else "silver")
        axes.set(title=task, xlabel="gain in accuracy", yticks=range(len(names)), yticklabels=names)
        axes.grid(alpha=0.3)
    figure.savefig(path)


def evidence_page(found: list[Method]) -> str:
    """What methods gain on plain GRPO; what every method's argument rests on, and whether it showed."""
    lines = ["---", "hide: [toc]", "---", "", "# Evidence", ""]
    if rows_of_runs():
        run = comparison()
        lines += ["## Against plain GRPO at equal rollouts { #runs }", "", *part_of_module(run), ""]
        lines += ["![What methods gain on GRPO](gains.svg)", ""]
        lines += ["Blue: the 95% interval leaves out 0, as one in twenty does by chance.", ""]
        lines += [*run.table(list(run.TASKS)).replace("\n## ", "\n### ").splitlines()[4:], ""]
    records = {method.slug: results_of(method.slug).values() for method in found}
    shares = [n / record["seeds"] for some in records.values() for record in some for n in record["claims"].values()]
    lines += [
        "## Mechanisms",
        "",
        "A method's argument rests on some statistic: more prompts with a signal, a gradient that varies less. "
        "`benchmarks/mechanisms` measures it with the method's own functions, at a small scale; that the statistic "
        "shows does not mean that benchmarks improve. A method's page has the numbers and the paper's figures.",
        "",
        f"{sum(map(bool, records.values()))} of {len(found)} methods have such a check. Of {len(shares)} claims "
        f"{shares.count(1)} are shown in all seeds, {sum(0 < share < 1 for share in shares)} in some and "
        f"{shares.count(0)} in none.",
        "",
        "| method | claims |",
        "|---|---|",
    ]
    for method in found:
        said = [cell(claim) for record in records[method.slug] for claim in claims(record)]
        lines.append(f"| [{method.trainer._name}]({method.page}#evidence) | {'<br>'.join(said) or 'no check'} |")
    return "\n".join(lines) + "\n"


def part_of_module(module) -> list[str]:
    """The last paragraph of a module's docstring."""
    return [references(inspect.cleandoc(module.__doc__).split("\n\n")[-1])]


def scaling_page(found: list[Method]) -> str:
    """What grows with the size of a run."""
    results = ROOT / "benchmarks/results"
    read = {
        name: json.loads((results / f"{name}.json").read_text(encoding="utf-8"))
        for name in ("scaling_passes", "scaling_state", "barrier")
    }

    def told(script: str) -> list[str]:
        text = ast.get_docstring(ast.parse((ROOT / f"benchmarks/{script}.py").read_text(encoding="utf-8")))
        return [references(text.partition("\n```")[0]), ""]

    def values(row: dict | None, key: str) -> str:
        some = [f"{x:.0f}" if abs(x) >= 100 else f"{x:.2g}" for x in row[key]] if row else ["-"]
        return some[0] if len(set(some)) == 1 else " / ".join(some)

    passes, state = read["scaling_passes"], read["scaling_state"]
    sizes = "; ".join(f"{b} rollouts of {t} tokens, vocabulary {v:,}" for b, t, v in passes["sizes"])
    lines = ["---", "hide: [toc]", "---", "", "# Scaling", "", "## Passes, traffic and state", "", *told("scaling")]
    lines += [
        f"Sizes: {sizes}. Where one number stands, it is the same at all three.",
        "",
        "| method | passes per generation | per update | bytes per rollout | kilobytes of state | milliseconds |",
        "|---" * 6 + "|",
    ]
    keys = ("per generation", "per update", "bytes per rollout")
    links = {method.slug: f"[{method.trainer._name}]({method.page})" for method in found}
    for name, row in passes["rows"].items():
        kept = state["rows"].get(name)
        cells = [links.get(name, name), *(values(row, key) for key in keys)]
        cells += [values(kept, key) for key in ("kilobytes", "milliseconds")]
        lines.append("| " + " | ".join(cells) + " |")
    lines += ["", "## Waiting for the slowest", "", *told("barrier")]
    shares = list(dict.fromkeys(name.rpartition(" ")[2] for name in read["barrier"]["rows"]))[1:]
    lines += [
        "How many times as long a step takes in groups, and in brackets the kept length of groups and of a stream, by "
        "the rollouts started over those needed.",
        "",
        "| durations | " + " | ".join(f"{share} started" for share in shares) + " | full batch / carrying over |",
        "|---" * (2 + len(shares)) + "|",
    ]
    for name, row in read["barrier"]["rows"].items():
        if (kind := name.removesuffix(", started 1")) != name:
            rows = [read["barrier"]["rows"][f"{kind}, started {share}"].values() for share in shares]
            cells = ["{:.2f} ({:.2f}, {:.2f})".format(*some) for some in rows]
            lines.append(f"| {kind} | {' | '.join(cells)} | {row['full batch / carrying over']:.1f} |")
    return "\n".join(lines) + "\n"


def cost(slug: str) -> list[str]:
    """What a step costs against plain TRL, as far as it was measured."""
    rows = {}
    for kind in ("time", "memory", "choose"):
        path = ROOT / "benchmarks/results" / f"{kind}.json"
        rows[kind] = json.loads(path.read_text(encoding="utf-8"))["rows"].get(slug) if path.exists() else None
    said = []
    if rows["time"]:
        said.append(f"A step takes {rows['time']['median']:.2f} times TRL's on the embedded task")
    if rows["memory"]:
        said.append(f"the peak of live tensors is {rows['memory']['ratio']:.2f} times TRL's")
    if rows["choose"]:
        said.append(f"choosing 128 of 100,000 prompts takes {rows['choose']['milliseconds']:g} ms")
    return ["; ".join(said)[:1].upper() + "; ".join(said)[1:] + " (`benchmarks/cost.py`).", ""] if said else []


# ------------------------------------------------------------------------------------------------ other pages


def methods_page(found: list[Method], titles: dict[str, str]) -> str:
    lines = ["---", "hide: [toc]", "---", "", "# Methods", ""]
    lines += [
        "Choose a problem or a hook. A method's page has its equations, settings, metrics, sources and evidence. "
        "The gain is on plain GRPO's mean accuracy over the rollouts ([comparison](/evidence.md#runs), on a tiny "
        "policy), the time that of a step over TRL's there.",
        "",
    ]
    lines += [
        "<div>" + "".join(f'<a id="{slug}"></a>' for slug in titles) + '</div><div id="filters"></div>',
        "",
        "| method | what it does | hooks | for | needs | gain | time |",
        "|---|---|---|---|---|---|---|",
    ]
    times = {name: f"{ratio:.2f}" for name, ratio in comparison().costs("time").items()}
    for method in found:
        hooks = "<br>".join(f"`{hook}`" for hook in method.hooks) or "-"
        symptoms = "<br>".join(f"[{titles[s]}](/guide.md#{s})" for s in method.notes["symptoms"])
        row = f"[{method.trainer._name}]({method.page}) | {method.summary} | {hooks} | {symptoms} | {method.needs}"
        lines.append(f"| {row} | {gain(method.slug)} | {times.get(method.slug, '-')} |")
    return "\n".join(lines) + "\n"


def guide_page(symptoms: dict, found: list[Method], pairs: dict[str, dict[str, str]]) -> str:
    lines = ["---", "hide: [navigation]", "---", "", "# Which method for my problem", ""]
    lines += [
        "What you see in the logs, what to look at before any method, and the methods that are for it. A method is a",
        "hypothesis: compare it with plain GRPO at equal rollouts, with several seeds (`trl-ext compare`).",
        "",
    ]
    lines += ["| problem | methods |", "|---|---|"]
    by_symptom = {s: [m for m in found if s in m.notes["symptoms"]] for s in symptoms}
    for slug, symptom in symptoms.items():
        links = ", ".join(f"[{m.trainer._name}]({m.page})" for m in by_symptom[slug])
        lines.append(f"| [{symptom['title']}](#{slug}) | {links} |")
    for slug, symptom in symptoms.items():
        lines += ["", f"## {symptom['title']} {{ #{slug} }}", "", f"**What you see.** {symptom['sign']}", ""]
        lines += [f"**First.** {symptom['first']}", "", "| method | use it when | leave it when |", "|---|---|---|"]
        chosen = by_symptom[slug]
        lines += [
            f"| [{m.trainer._name}]({m.page}) | {cell(m.notes['use'])} | {cell(m.notes['avoid'])} |" for m in chosen
        ]
        clashes = [
            f"{a.trainer._name} with {b.trainer._name}"
            for a, b in itertools.combinations(chosen, 2)
            if b.slug in pairs[a.slug]
        ]
        if clashes:
            lines += ["", f"Do not mix: {'; '.join(clashes)}."]
        lines += ["", f"[These in the table of methods](/methods/index.md#{slug})"]
    return "\n".join(lines) + "\n"


def relinked(text: str, pages: dict[str, str]) -> str:
    """Links between files of the repository become links between pages; what is no page becomes text."""

    def link(match):
        target = pages.get(match[3])
        return f"{match[1]}[{match[2]}]({target})" if target else match[2]

    return re.sub(r"(!?)\[([^\]]*)\]\((?!https?:|#|/)([^)]+)\)", link, text)


def part_of(text: str, start: str, end: str) -> str:
    """The part of a Markdown text from one heading up to another."""
    return text[text.index(start) : text.index(end) if end else None]


def hooks_page(contributing: str) -> str:
    reference = part_of(contributing, "## Hook reference", "### What the pilots").replace("##", "#", 1)
    lines = [reference.strip(), ""]
    for name, hook in vars(Hooks).items():
        hook = getattr(hook, "__func__", hook)
        if inspect.isfunction(hook) and not name.startswith("_") and name in (*mixing.HOOKS, "needs"):
            names = [p for p in inspect.signature(hook).parameters if p not in ("self", "cls")]
            lines += [f"## `{name}({', '.join(names)})` {{ #{name} }}", "", markdown(hook.__doc__), ""]
    return "\n".join(lines)


def classes_page(title: str, modules: list[str]) -> str:
    """Docstrings of public classes and functions."""
    lines = [f"# {title}", ""]
    for module in modules:
        for name in trl_ext._PUBLIC[module]:
            lines += [f"## `{name}` {{ #{name.lower()} }}", "", markdown(getattr(trl_ext, name).__doc__), ""]
    return "\n".join(lines)


CALLBACKS = [module for module in trl_ext._PUBLIC if module.startswith("callbacks.") or module == "report"]
# Where a class or function is described.
PAGE_OF = {name: f"/callbacks.md#{name.lower()}" for module in CALLBACKS for name in trl_ext._PUBLIC[module]}
PAGE_OF |= {name: f"/core.md#{name.lower()}" for name in trl_ext._PUBLIC["core"]}
PAGE_OF |= {
    name: f"/methods/{module.removeprefix('methods.')}.md"
    for module, names in trl_ext._PUBLIC.items()
    if module.startswith("methods.")
    for name in names
}


def generate(folder: Path) -> list:
    """
    Write all pages.

    Args:
        folder (`Path`):
            Where to.

    Returns:
        `list`: the order of the pages, for mkdocs.
    """
    readme, contributing, recipes = (
        (ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "CONTRIBUTING.md", "recipes/README.md")
    )
    found, symptoms = methods(), notes()["symptoms"]
    titles = {slug: symptom["title"] for slug, symptom in symptoms.items()}
    names, pairs = {method.slug: method.trainer._name for method in found}, refused(found)
    links = {"docs/step.svg": "/step.svg", "recipes/README.md": "/recipes.md", "CONTRIBUTING.md": "/contributing.md"}
    links["benchmarks/results/runs.md"] = "/evidence.md#runs"
    if (HERE / "properties.md").exists():
        links["docs/properties.md"] = "/properties.md"
    start = part_of(readme, "# trl_ext", "\n## Methods")
    start += "\n[All methods](/methods/index.md), and [which of them is for my problem](/guide.md).\n"
    pages = {
        "index.md": "---\nhide: [navigation]\n---\n\n" + relinked(start, links),
        "guide.md": guide_page(symptoms, found, pairs),
        "methods/index.md": methods_page(found, titles),
        **{m.page[1:]: method_page(m, pairs[m.slug], titles, names) for m in found},
        "evidence.md": evidence_page(found),
        "scaling.md": scaling_page(found),
        "running.md": "# Running\n\n" + relinked(part_of(readme, "## What to expect", "## Adding a paper"), links),
        "recipes.md": relinked(recipes, {}),
        "callbacks.md": classes_page("Callbacks and reports", CALLBACKS),
        "hooks.md": hooks_page(contributing),
        "core.md": classes_page("Core", ["core"]),
        "contributing.md": relinked(contributing, {}),
    }
    if "docs/properties.md" in links:
        pages["properties.md"] = (HERE / "properties.md").read_text(encoding="utf-8")
    for name, text in pages.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    for method in found:
        for stem, record in results_of(method.slug).items():
            draw(record["numbers"], folder / "methods" / f"{stem}.svg")
        draw_runs(method.slug, folder / "methods" / f"{method.slug}_runs.svg")
    if rows_of_runs():
        draw_gains(folder / "gains.svg")
    shutil.copy(HERE / "step.svg", folder / "step.svg")
    shutil.copytree(HERE / "theme", folder / "theme", dirs_exist_ok=True)
    running = [{"Running": "running.md"}, {"Recipes": "recipes.md"}, {"Callbacks": "callbacks.md"}]
    if "properties.md" in pages:
        running.append({"What holds": "properties.md"})
    return [
        {"Home": "index.md"},
        {"Which method": "guide.md"},
        {"Methods": [{"All methods": "methods/index.md"}, *({names[m.slug]: m.page[1:]} for m in found)]},
        {"Evidence": ["evidence.md", {"Scaling": "scaling.md"}]},
        {"Running": running},
        {"Extending": [{"Hooks": "hooks.md"}, {"Core": "core.md"}, {"Contributing": "contributing.md"}]},
    ]


def render(pages: Path, nav: list, site: Path) -> None:
    """
    Make the site.

    Args:
        pages (`Path`):
            Folder of the pages.
        nav (`list`):
            Their order.
        site (`Path`):
            Folder of the site; what is in it is replaced.

    Raises:
        SystemExit: if a link leads nowhere; the warnings before it say which.
    """
    from mkdocs.commands.build import build
    from mkdocs.config import load_config

    logging.basicConfig(format="%(levelname)s: %(message)s")  # else mkdocs ends without a word
    build(load_config(str(HERE / "mkdocs.yml"), docs_dir=str(pages), site_dir=str(site), nav=nav))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--output", type=Path, default=HERE / "site", help="folder of the site (default: docs/site)")
    output = parser.parse_args().output.resolve()
    with tempfile.TemporaryDirectory() as folder:
        render(Path(folder), generate(Path(folder)), output)
    print(f"Open {output / 'index.html'}; for the search, serve it: python -m http.server -d {output}")
