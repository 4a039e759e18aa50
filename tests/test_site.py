"""The documentation site: what is generated of every method, and that nothing leads nowhere."""

import dataclasses
import importlib.util
import inspect
import json
import re
import shutil
from contextlib import nullcontext
from pathlib import Path

import pytest
from trl import GRPOConfig

from trl_ext.core.mixing import find_method, joints_of, list_methods


DOCS = Path(__file__).parents[1] / "docs"
PARTS = (
    "What it does",
    "When to use it",
    "Use",
    "Settings",
    "Metrics",
    "Paper, code, and what we follow",
    "Published settings",
    "Mixing",
    "Evidence",
    "Citation",
)
METRIC = re.compile(r"`(\w+/[\w@]+)`")
OF_TRL = ("completions/", "clip_ratio/", "rewards/")


def load():
    spec = importlib.util.spec_from_file_location("docs_build", DOCS / "build.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


docs = load()


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """Folder of the generated pages, and their order."""
    folder = tmp_path_factory.mktemp("pages")
    return folder, docs.generate(folder)


# ------------------------------------------------------------------------------------------------ methods.yaml


def test_notes_are_complete():
    said = docs.notes()
    assert sorted(said["methods"]) == list_methods()
    for slug, notes in said["methods"].items():
        assert notes.keys() == {"symptoms", "use", "avoid", "read"}, slug
        assert notes["symptoms"] and set(notes["symptoms"]) <= said["symptoms"].keys(), slug
        assert all(notes[part].endswith(".") for part in ("use", "avoid", "read")), slug
    used = {symptom for notes in said["methods"].values() for symptom in notes["symptoms"]}
    assert used == said["symptoms"].keys(), "a symptom without a method"
    assert all(symptom.keys() == {"title", "sign", "first"} for symptom in said["symptoms"].values())


@pytest.mark.parametrize("slug", list_methods())
def test_reading_notes_name_logged_metrics(slug):
    for metric in METRIC.findall(docs.notes()["methods"][slug]["read"]):
        assert metric in find_method(slug).__doc__ or metric.startswith(OF_TRL), metric


# ------------------------------------------------------------------------------------------------ pages


@pytest.mark.parametrize("slug", list_methods())
def test_page_of_method(site, slug):
    trainer, page = find_method(slug), (site[0] / "methods" / f"{slug}.md").read_text(encoding="utf-8")
    headings = re.findall(r"^## (.*)$", page, re.M)
    assert [heading for heading in headings if heading != "Equations"] == list(PARTS)
    config, source = trainer.config_class, inspect.getsource(inspect.getmodule(trainer))
    trl = {field.name: docs.default_of(field) for field in dataclasses.fields(GRPOConfig)}
    settings = page[page.index("\n## Settings") : page.index("\n## Metrics")]
    for field in dataclasses.fields(config):
        if field.name in config._declared and docs.default_of(field) != trl.get(field.name):
            (row,) = [line for line in settings.splitlines() if f"`{field.name}`" in line.split(" | ")[0]]
            assert docs.default_of(field) in row
            assert len(row.split(" | ")[2]) > 3, field.name
    metrics = page[page.index("\n## Metrics") : page.index("\n## Paper, code")]
    logged = {*METRIC.findall(trainer.__doc__), *re.findall(r'log_(?:token_)?metric\(\s*"(\w+/\w+)"', source)}
    assert logged and all(f"`{metric}`" in metrics for metric in logged)
    for part in docs.public_parts(next(m for m in docs.methods() if m.slug == slug)):
        assert f"### `{part.__name__}`" in page
    assert trainer._paper["id"] in page and trainer._paper["citation"].strip() in page
    assert (DOCS.parent / "recipes/configs" / f"{slug}.yaml").read_text(encoding="utf-8").strip() in page
    assert "[`" not in re.sub(r"\[`[^`]+`\]\([^)]+\)|```.*?```|\?\?\? abstract.*?    ```\n", "", page, flags=re.S)


def test_tables_have_every_method(site):
    index = (site[0] / "methods/index.md").read_text(encoding="utf-8")
    guide = (site[0] / "guide.md").read_text(encoding="utf-8")
    symptoms = docs.notes()["symptoms"]
    for slug in list_methods():
        (row,) = [line for line in index.splitlines() if line.startswith("| [") and f"/methods/{slug}.md)" in line]
        _, _, hooks, titles = row.split(" | ")[:4]
        assert re.findall(r"`(\w+)`", hooks) == joints_of(find_method(slug))
        wanted = docs.notes()["methods"][slug]["symptoms"]
        assert titles == "<br>".join(f"[{symptoms[s]['title']}](/guide.md#{s})" for s in wanted)
        for symptom in wanted:
            part = guide[guide.index(f"{{ #{symptom} }}") :].split("\n## ")[0]
            assert f"/methods/{slug}.md)" in part
    # What a mix refuses is on both pages, with the reason.
    for here, there in (("ngrpo", "dynamic_sampling"), ("dynamic_sampling", "ngrpo")):
        page = (site[0] / "methods" / f"{here}.md").read_text(encoding="utf-8")
        assert f"/methods/{there}.md): NGRPOTrainer and DynamicSamplingTrainer contradict" in page


def test_links_between_pages_resolve(site):
    folder, nav = site
    pages = {str(path.relative_to(folder)): path.read_text(encoding="utf-8") for path in folder.rglob("*.md")}
    checked = 0
    for name, text in pages.items():
        for target in re.findall(r"\]\((?!https?:)([^)\s]+)\)", re.sub(r"```.*?```", "", text, flags=re.S)):
            path, _, anchor = target.partition("#")
            page = path.lstrip("/") if path.startswith("/") or not path else str(Path(name).parent / path)
            assert (folder / (page or name)).is_file(), f"{name}: {target}"
            if anchor:
                marks = (f"{{ #{anchor} }}", f'<a id="{anchor}">', f"\n## {anchor.capitalize()}\n")
                assert any(mark in pages[page or name] for mark in marks), f"{name}: {target}"
            checked += 1
    assert checked > 300
    assert set(re.findall(r"'([\w/]+\.md)'", str(nav))) == pages.keys()


def test_site_builds_and_loads_nothing_from_elsewhere(site, tmp_path):
    pytest.importorskip("material", reason='needs mkdocs-material: pip install -e ".[docs]"')
    docs.render(*site, tmp_path / "site")
    pages = list((tmp_path / "site").rglob("*.html"))
    assert len(pages) > len(list_methods())
    for page in pages:
        text = page.read_text(encoding="utf-8")
        assert not re.search(r'<(?:script|img|iframe)[^>]*\ssrc="(?:https?:)?//', text), page.name
        for link in re.findall(r'<link[^>]*href="https?:[^>]*>', text):
            assert 'rel="canonical"' in link, link
        assert "[`" not in re.sub(r"<(code|pre)\b.*?</\1>", "", text, flags=re.S), page.name
    broken = tmp_path / "broken"
    broken.mkdir()
    for text in ("[x](a.md)", "[x](/b.md)", "[x](#nowhere)"):
        (broken / "a.md").write_text(text)
        with nullcontext() if text == "[x](a.md)" else pytest.raises(SystemExit):
            docs.render(broken, ["a.md"], tmp_path / "unused")


# ------------------------------------------------------------------------------------------------ docstrings


def test_docstring_becomes_markdown():
    def example(a, b, c):
        """
        What it does, with [`SPOTrainer`] and [`~os.path.join`].

        Args:
            a (`int`), b (`int`, *optional*, defaults to
                `1`):
                Two numbers,
                on two lines.
            c (`str`):
                - a list
                - in it

        Returns:
            `int`: a sum
            or so.

        Raises:
            ValueError: for a
                negative number.
            OSError: never.

        Example:
        ```python
        Args: not a section
        ```
        """

    assert docs.markdown(example.__doc__).splitlines() == [
        "What it does, with [`SPOTrainer`](/methods/spo.md) and `join`.",
        "",
        "**Args**",
        "",
        "- **`a`** (`int`), **`b`** (`int`, *optional*, defaults to `1`): Two numbers,",
        "    on two lines.",
        "- **`c`** (`str`): - a list",
        "    - in it",
        "",
        "**Returns**",
        "",
        "`int`: a sum",
        "or so.",
        "",
        "**Raises**",
        "",
        "- ValueError: for a negative number.",
        "- OSError: never.",
        "",
        "**Example**:",
        "",
        "```python",
        "Args: not a section",
        "```",
    ]


def test_code_has_no_docstring():
    def double(x):
        """Twice."""
        return 2 * x

    assert docs.code_of(docs.cost).startswith("def cost(slug: str)") and '"""' not in docs.code_of(docs.cost)
    assert "rows = {}" in docs.code_of(docs.cost)


def test_cells_and_links():
    assert docs.cell("a | b `c | d`\n e") == "a \\| b `c | d` e"
    text = "![p](docs/a.svg) [q](other.md) [r](https://x) [s](#t)"
    assert docs.relinked(text, {"docs/a.svg": "/a.svg"}) == "![p](/a.svg) q [r](https://x) [s](#t)"


def test_sentences_on_sources():
    assert docs.from_sources("As in Dr. GRPO, the code has 3. This is plain. `x` is ours; It ends.") == [
        "As in Dr. GRPO, the code has 3.",
        "`x` is ours;",
    ]


# ------------------------------------------------------------------------------------------------ evidence


@pytest.mark.parametrize(
    ("count", "seeds", "said"),
    [
        (5, 5, "shown in 5 of 5 seeds"),
        (2, 5, "only in 2 of 5 seeds"),
        (0, 5, "**not shown** (0 of 5 seeds)"),
        (1, 1, "shown"),
        (0, 1, "**not shown**"),
    ],
)
def test_verdicts(count, seeds, said):
    assert docs.verdict(count, seeds) == said


def test_curves_are_drawn_where_there_are_any(tmp_path):
    found = {f"share, visit {visit}": [visit / 10, 0.1] for visit in (1, 2, 10)}
    found |= {label: [1.0, 0.1] for label in ("other, first 50 steps", "single, visit 1")}
    assert docs.series(found) == {"visit": {"share": {1.0: 0.1, 2.0: 0.2, 10.0: 1.0}}}
    assert docs.draw(found, tmp_path / "x.svg") and "<svg" in (tmp_path / "x.svg").read_text()
    assert not docs.draw({"a": [1.0, 0.1]}, tmp_path / "y.svg") and not (tmp_path / "y.svg").exists()


def test_evidence_is_that_of_the_files(site):
    page = (site[0] / "methods/dcpo.md").read_text(encoding="utf-8")
    results = json.loads((DOCS.parent / "benchmarks/results/dcpo.json").read_text(encoding="utf-8"))
    for label, (value, spread) in results["numbers"].items():
        assert f"    | {label} | " in page and f"{value:,.6g} ± {spread:g} |" in page  # folded, as there are many
    assert f"In the paper: {results['paper']}" in page and '??? note "All numbers"' in page
    assert "![What was measured](dcpo.svg)" in page and (site[0] / "methods/dcpo.svg").is_file()
    table = (site[0] / "evidence.md").read_text(encoding="utf-8")
    for claim, count in results["claims"].items():
        said = f"{claim}: {docs.verdict(count, results['seeds'])}"
        assert f"- {said}\n" in page and said in table
    for slug in list_methods():
        (row,) = [line for line in table.splitlines() if f"](/methods/{slug}.md#evidence)" in line]
        assert row.endswith("| no check |") != bool(docs.results_of(slug))
    times = json.loads((DOCS.parent / "benchmarks/results/time.json").read_text())["rows"]
    assert f"{times['bnpo']['median']:.2f} times TRL's" in (site[0] / "methods/bnpo.md").read_text(encoding="utf-8")


def test_every_record_of_a_mechanism_is_on_a_page():
    """A record is made by a script of its name, belongs to a method, and says on how many seeds its claims hold."""
    found = {stem: record for slug in list_methods() for stem, record in docs.results_of(slug).items()}
    folder = DOCS.parent / "benchmarks"
    scripts = {path.stem for path in (folder / "mechanisms").glob("*.py")}
    made = {
        path.stem for path in (folder / "results").glob("*.json") if path.stem in scripts or "samplers" in path.stem
    }
    assert made == found.keys()
    for stem, record in found.items():
        assert record["paper"].endswith(".") and record["claims"], stem
        assert all(0 <= count <= record["seeds"] for count in record["claims"].values()), stem


def test_runs_are_on_the_pages(site):
    run = docs.comparison()
    table, index = ((site[0] / name).read_text(encoding="utf-8") for name in ("evidence.md", "methods/index.md"))
    for task, found in docs.rows_of_runs().items():
        for slug in found.keys() & set(list_methods()):
            page = (site[0] / f"methods/{slug}.md").read_text(encoding="utf-8")
            end = run.interval([run.final(row) for row in found[slug]])
            assert f"- `{task}`: {end} of the held-out prompts at the end" in page and f"| {slug} | " in table
            assert f"]({slug}_runs.svg)" in page and (site[0] / f"methods/{slug}_runs.svg").is_file()
            values = run.gains(found[slug], found[run.baseline_of(slug)], run.area)
            (row,) = [line for line in index.splitlines() if line.startswith("| [") and f"/methods/{slug}.md)" in line]
            assert f"`{task}` {sum(values) / len(values):+.3f} ± {run.half_width(values):.3f}" in row
    assert "](gains.svg)" in table and "knapsack_rl" in (site[0] / "gains.svg").read_text(encoding="utf-8")
    for slug, reason in run.LEFT_OUT.items():
        assert reason in (site[0] / f"methods/{slug}.md").read_text(encoding="utf-8")


def test_scaling_is_that_of_the_files(site):
    page = (site[0] / "scaling.md").read_text(encoding="utf-8")
    for slug in list_methods():
        assert page.count(f"](/methods/{slug}.md) |") == 1
    assert re.search(r"\[GTPO\]\(/methods/gtpo.md\) \| 1 \| 0 \|", page)
    rows = json.loads((DOCS.parent / "benchmarks/results/barrier.json").read_text())["rows"]
    ratio, groups, stream = rows["code service, correlation 0.5, started 1.5"].values()
    (line,) = [line for line in page.splitlines() if line.startswith("| code service, correlation 0.5 |")]
    assert line.split(" | ")[2] == f"{ratio:.2f} ({groups:.2f}, {stream:.2f})"


def test_what_holds_is_shown_where_it_is_known(tmp_path, monkeypatch):
    shutil.copytree(DOCS, tmp_path / "docs", ignore=shutil.ignore_patterns("properties.*", "site"))
    cells = {"LoRA": {"spo": "passed", "vas": "no adapters"}, "images": {"vas": "passed"}}
    (tmp_path / "docs/properties.json").write_text(json.dumps(cells))
    (tmp_path / "docs/properties.md").write_text("# What holds\n")
    monkeypatch.setattr(docs, "HERE", tmp_path / "docs")
    nav = docs.generate(tmp_path / "pages")
    assert "properties.md" in str(nav) and (tmp_path / "pages/properties.md").is_file()
    assert "- LoRA: no adapters\n- images: yes\n" in (tmp_path / "pages/methods/vas.md").read_text(encoding="utf-8")
    assert "[What holds for which method](/properties.md)" in (tmp_path / "pages/running.md").read_text()
