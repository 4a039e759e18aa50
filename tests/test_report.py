import base64
import json
import math
import pickle
import re
import shlex
import shutil
import subprocess
import warnings
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace
from xml.etree import ElementTree

import numpy as np
import pytest
from harness import arithmetic, build, difference
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.figure import Figure
from transformers import TrainerCallback, TrainerState
from trl import GRPOConfig, GRPOTrainer, SFTConfig, SFTTrainer

from trl_ext import RunReportCallback, SPOConfig, SPOTrainer, write_report
from trl_ext.cli import main
from trl_ext.core.card import changed_settings, without_secrets
from trl_ext.report import (
    Chart,
    Curve,
    build_report,
    draw,
    duration,
    read_run,
    running_mean,
    series,
    show,
    thin,
    to_html,
)
from trl_ext.tasks import POLICY_PATH


NASTY = "<script>alert('x')</script> & \"a\" | b $\\frac{ `c` _d_"
BROWSER = shutil.which("chromium") or shutil.which("google-chrome")


@pytest.fixture
def folder(tmp_path):
    """What a resumed run with evaluations, an alarm and holes in its metrics has left."""
    history = []
    for step in range(1, 61):
        entry = {"step": step, "loss": 0.1, "reward": step / 60, "entropy": 1 / step, "step_time": 2.0, "epoch": 1.0}
        entry |= {"clip_ratio/low_mean": 0.0, "clip_ratio/high_mean": 0.01, "frac_reward_zero_std": None}
        entry |= {"completions/mean_length": 7.0, "completions/clipped_ratio": 0.25, "num_tokens": 1000.0 * step}
        entry |= {"spo/rho": 0.9, "spo/rates": [1, 2], "num_rollouts": 64.0 * step, f"tools/{NASTY}": 1.0}
        entry["grad_norm"] = math.nan if step % 2 else math.inf if step % 3 else 1.0
        history.append(entry)
    history[30] |= {"entropy_law/alarm": "collapse", "entropy_law/reason": f"Entropy collapse {NASTY}"}
    history.insert(20, {"step": 20, "eval_reward": 0.3, "eval_runtime": 1.0, "eval_clip_ratio/low_mean": 0.0})
    history.insert(41, {"step": 40, "eval_stats/pass@1": 0.4, "eval_stats/record": "{}"})
    state = {"global_step": 60, "max_steps": 60, "log_history": history}
    evaluation = {"pass@1": 0.5, "pass@1_low": 0.3, "pass@1_high": 0.7, "pass@4": 0.8, "unscored": 0.0}
    session = {"start": "2026-01-02T03:04:05+00:00", "end": "2026-01-02T04:04:05+00:00", "start_step": 0}
    session |= {"end_step": 40, "seconds": 3600.0, "command": f"python {NASTY}", "machine": "Linux", "processes": 2}
    session |= {"peak_memory": 2**31, "peak_memory_of": "main process"}
    info = {
        "trainer": "SPOTrainer",
        "methods": [{"name": "SPO", "title": f"Paper {NASTY}", "id": "2509.13232"}],
        "settings": {"learning_rate": 0.002, "run_notes": NASTY, "weights": [1, 2]},
        "versions": {"trl": "1.16.0"},
        "facts": {"data set": NASTY},
        "sessions": [session, session | {"start_step": 40, "end_step": 60, "seconds": 90.0}],
        "warnings": [
            {"step": 31, "category": "UserWarning", "message": f"Entropy collapse {NASTY}", "count": 1},
            {"step": 3, "category": "UserWarning", "message": f"Beware {NASTY}", "count": 2},
        ],
    }
    results = {"metric": "accuracy", "before": {"mean": 0.25, "margin": 0.1}, "after": {"mean": 0.5, "margin": None}}
    results["gain"] = {"mean": 0.25, "margin": 0.05}
    sparsity = {"trained_dtype": "fp32", "figures": {"bf16": {"density": 0.25, "1e-05": 0.75}}}
    (tmp_path / "run").mkdir()
    for name, content in (
        ("trainer_state.json", state),
        ("run.json", info),
        ("results.json", results),
        ("update_sparsity.json", sparsity),
    ):
        (tmp_path / "run" / name).write_text(json.dumps(content))
    (tmp_path / "run" / "evaluations.jsonl").write_text(
        json.dumps({"step": 20, "summary": evaluation}) + "\nhalf a li"
    )
    Figure(figsize=(1, 1)).savefig(tmp_path / "run" / "entropy_law.png")
    return tmp_path / "run"


class Page(HTMLParser):
    """Tags, attributes and text of a page."""

    def __init__(self, page):
        super().__init__()
        self.tags, self.attributes, self.words = [], [], []
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += [(tag, *pair) for pair in attributes]

    def handle_data(self, data):
        self.words.append(data)


def section(report, title):
    return next(section for section in report.sections if section.title == title)


def charts(report):
    return {part.title: part for section in report.sections for part in section.parts if isinstance(part, Chart)}


# ------------------------------------------------------------------------------------------------------------ contents


def test_everything_is_in_the_report(folder):
    report = build_report(read_run(folder))
    assert (report.title, report.status) == (f"SPOTrainer on {NASTY}", "finished")
    tiles = {label: (value, remark) for label, value, remark in report.tiles}
    assert tiles["Held-out accuracy"] == ("50%", "25% before, gain +25 ± 5")
    assert tiles["Rollouts"] == ("3,840", "60k tokens")
    assert tiles["Time"] == ("1 h 01 min", "2 s per step")
    assert tiles["Peak memory"] == ("2.00 GiB", "main process")
    assert tiles["Alarms and warnings"][0] == "2"  # the callback's own warning of its alarm is no second one
    assert [row[:2] for row in section(report, "Alarms and warnings").parts[0].rows] == [
        ["31", "collapse"],
        ["3", "UserWarning"],
    ]
    drawn = charts(report)
    for title in ("Reward", "Loss", "Share of clipped tokens", "Length (tokens)", "Share cut at the longest length"):
        assert title in drawn
    assert drawn["Entropy (nats per token)"].marks == [(40, ""), (31, "collapse")]
    assert drawn["Reward"].marks == [(40, "")]
    assert [curve.label for curve in drawn["Share of clipped tokens"].curves] == ["low_mean", "high_mean"]
    assert "Groups without a signal" not in drawn  # nothing but None
    assert [chart.title for chart in section(report, "Metrics of spo").parts] == ["rho"]
    assert [chart.title for chart in section(report, "Metrics of tools").parts] == [NASTY]
    assert section(report, "Update sparsity").parts[0].rows[0] == ["bf16", "any change", "25.00%"]
    settings = dict(section(report, "Settings that differ from the defaults").parts[0].rows)
    assert settings == {"learning_rate": "0.002", "run_notes": NASTY, "weights": "[1, 2]"}
    facts, sessions = section(report, "How it was run").parts
    assert ["versions", "trl 1.16.0"] in facts.rows
    assert [row[2] for row in sessions.rows] == ["0 to 40", "40 to 60"]


def test_evaluations_come_from_both_places(folder):
    report = build_report(read_run(folder))
    passes, reward = charts(report)["pass@k"], charts(report)["Reward"]
    assert [(curve.label, curve.steps) for curve in passes.curves] == [("pass@1", [20, 40]), ("pass@4", [20])]
    assert passes.curves[0].values == [0.5, 0.4]
    assert passes.curves[0].low[0] == 0.3
    assert math.isnan(passes.curves[0].high[1])
    assert len(reward.curves[0].steps) == 60  # that of training, later in the report
    table = section(report, "Evaluation").parts[1]
    assert table.rows[0] == ["pass@1", "0.5 (0.3 to 0.7) at step 20", "0.5 (0.3 to 0.7) at step 20", "0.4 at step 40"]
    rest = [chart.title for chart in section(report, "Other metrics of evaluations").parts]
    assert rest == ["eval_stats/unscored", "eval_clip_ratio/low_mean"]


def test_numbers_that_are_none(folder):
    steps, values = series(read_run(folder).history, "grad_norm")
    assert len(steps) == 60
    assert [i for i, value in enumerate(values, 1) if not math.isnan(value)] == [6 * i for i in range(1, 11)]
    assert series([{"step": 1, "x": "word"}, {"x": 1.0}, {"step": 2, "x": True}], "x") == ([], [])


@pytest.mark.parametrize(("step", "ended", "status"), [(60, None, "not finished"), (50, "2026", "stopped early")])
def test_status(folder, step, ended, status):
    info, state = (json.loads((folder / name).read_text()) for name in ("run.json", "trainer_state.json"))
    info["sessions"][-1]["end"] = ended
    (folder / "run.json").write_text(json.dumps(info))
    (folder / "trainer_state.json").write_text(json.dumps(state | {"global_step": step}))
    assert build_report(read_run(folder)).status == status


def test_a_run_that_left_checkpoints_only(tmp_path):
    for step in (9, 10):
        history = [{"step": step, "reward": step / 10, "loss": 1.0}]
        (tmp_path / f"checkpoint-{step}").mkdir()
        state = {"global_step": step, "max_steps": 20, "log_history": history}
        (tmp_path / f"checkpoint-{step}" / "trainer_state.json").write_text(json.dumps(state))
    (tmp_path / "checkpoint-11").mkdir()
    (tmp_path / "checkpoint-11" / "trainer_state.json").write_text('{"global_st')  # being written
    (tmp_path / "training_args.bin").write_bytes(pickle.dumps(Bomb()))
    report = build_report(read_run(str(tmp_path)))
    assert report.status == "not finished"
    assert report.tiles[:2] == [("Optimizer steps", "10", "of 20"), ("Training reward", "1", "1 at first")]
    assert "Reward" in to_html(report)


class Bomb:
    def __reduce__(self):
        return (pytest.fail, ("a pickle was loaded",))


def test_what_is_no_run(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no folder .*nowhere.*output_dir"):
        read_run(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match=r"neither a trainer_state\.json nor a run\.json.*RunReportCallback"):
        read_run(tmp_path)
    (tmp_path / "trainer_state.json").write_text('{"global_step": 0, "log_history": []}')
    assert "Training run" in Path(write_report(tmp_path)).read_text()
    with pytest.raises(ValueError, match=r"`format` must be 'html' or 'markdown', got 'pdf'"):
        write_report(tmp_path, form="pdf")


# --------------------------------------------------------------------------------------------------------------- pages


def test_the_page_needs_nothing_else_and_says_what_it_was_told(folder):
    page = Path(write_report(folder)).read_text()
    parsed = Page(page)
    assert not {"script", "link", "iframe", "object"} & set(parsed.tags)
    sources = [value for _, name, value in parsed.attributes if name in ("src", "srcset", "data")]
    assert len(sources) == 1
    assert base64.b64decode(sources[0].removeprefix("data:image/png;base64,")).startswith(b"\x89PNG")
    for tag, name, value in parsed.attributes:
        assert not name.startswith("on")
        assert name not in ("href", "xlink:href", "action") or value.startswith("#"), (tag, value)
    assert "url(http" not in page and "@import" not in page
    text = "".join(parsed.words)
    for words in (f"SPOTrainer on {NASTY}", f"Entropy collapse {NASTY}", f"Paper {NASTY}", f"Beware {NASTY}"):
        assert words in text
    assert ("html", "lang", "en") in parsed.attributes


def test_the_pictures_are_drawings_in_the_page_s_colours(folder):
    page = Path(write_report(folder)).read_text()
    pictures = re.findall(r"<svg.*?</svg>", page, re.DOTALL)
    assert len(pictures) == len(charts(build_report(read_run(folder)))) + 1  # two are called "Reward"
    for picture in pictures:
        root = ElementTree.fromstring(picture)
        assert root.get("aria-label")
        assert root.get("viewBox") and not root.get("width")
        assert "currentColor" in picture
        words = "".join(root.itertext())
        assert "optimizer steps" in words
    assert write_report(folder, folder / "again.html") and pictures == re.findall(
        r"<svg.*?</svg>", (folder / "again.html").read_text(), re.DOTALL
    )


def test_markdown(folder, tmp_path):
    path = write_report(folder, tmp_path / "new" / "a.md")
    text = Path(path).read_text()
    pictures = re.findall(r"\]\((a_files/[^)]+)\)", text)
    assert len(pictures) == len(set(pictures)) > 10
    assert all((tmp_path / "new" / name).read_bytes().startswith(b"\x89PNG") for name in pictures)
    tables = [row for row in text.split("\n\n") if row.startswith("|")]
    for table in tables:
        assert len({len(re.findall(r"(?<!\\)\|", line)) for line in table.splitlines()}) == 1, table
    assert len(tables) == sum(page.count("<table") for page in [to_html(build_report(read_run(folder)))]) + 1  # tiles
    assert not re.search(r"(?<!\\)<", text)  # nothing that a reader takes for a tag
    for name in ("## Evaluation", "## Policy", "## Metrics of spo", "## All metrics in numbers"):
        assert name in text


@pytest.mark.skipif(BROWSER is None, reason="no chromium or google-chrome found")
def test_in_a_browser(folder, tmp_path):
    page = Path(write_report(folder)).read_text()
    probe = """<script>addEventListener("load", () => {
      const drawn = [...document.querySelectorAll("svg")].filter(x => x.getBoundingClientRect().height > 50);
      const shown = [...document.images].filter(x => x.complete && x.naturalWidth > 0);
      document.title = JSON.stringify({title: document.title, drawn: drawn.length, shown: shown.length,
        wide: document.documentElement.scrollWidth - innerWidth, body: document.body.innerText.length});
    })</script>"""
    (tmp_path / "probe.html").write_text(
        page.replace("<details", "<details open").replace("</body>", f"{probe}</body>")
    )
    command = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}"]
    command += ["--window-size=500,900", "--dump-dom", (tmp_path / "probe.html").as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    title = Page(re.search(r"<title>.*?</title>", done.stdout, re.DOTALL)[0]).words[0]
    seen = json.loads(title)
    assert seen["title"] == f"SPOTrainer on {NASTY}"
    assert seen["shown"] == page.count("<img") == 1
    assert seen["drawn"] == page.count("<svg") > 10
    assert seen["wide"] <= 0  # nothing is wider than a small screen
    assert seen["body"] > 1000


# -------------------------------------------------------------------------------------------------------------- pieces

VALUES = st.lists(st.floats(-1e6, 1e6) | st.just(math.nan), min_size=1, max_size=120)


@given(VALUES, st.integers(2, 50))
def test_thin_curves_keep_their_extremes(values, most):
    x, y = np.arange(len(values)), np.array(values)
    few, kept = thin(x, y, most)
    assert len(few) <= max(most, 2)
    assert (np.diff(few) > 0).all()
    np.testing.assert_array_equal(kept, y[few])
    if np.isfinite(y).any():
        assert (np.nanmin(kept), np.nanmax(kept)) == (np.nanmin(y), np.nanmax(y))


@given(VALUES)
def test_running_means_are_those_of_a_loop(values):
    width = max(2, len(values) // 20)
    for i, mean in enumerate(running_mean(np.array(values))):
        part = [value for value in values[max(0, i - width + 1) : i + 1] if not math.isnan(value)]
        assert mean == pytest.approx(sum(part) / len(part), abs=1e-6) if part else math.isnan(mean)


def test_odd_curves_can_be_drawn():
    nan = math.nan
    for steps, values, low in (
        ([], [], None),
        ([1], [nan], [nan]),
        ([1], [0.5], [0.25]),
        (list(range(99)), [nan] * 99, None),
        (list(range(9999)), [float(i % 7) for i in range(9999)], None),
    ):
        picture = draw(Chart("t", [Curve("$\\frac{$", steps, values, low, low)] * 8, [(3, "b"), (3, "b"), (4, "")]))
        assert len(picture) < 400_000
        ElementTree.fromstring(picture)


def test_words():
    assert [show(x) for x in (3840.0, 0.123456, 1234567.8, 1e-7, math.nan, None, "x", True, 1e30, -0.5, 0)] == [
        "3,840", "0.1235", "1,234,568", "1e-07", "-", "-", "-", "-", "1e+30", "-0.5", "0",
    ]  # fmt: skip
    assert show(math.inf) == "inf"
    assert [duration(x) for x in (0.5, 59.4, 61, 3600, 90061)] == [
        "0.5 s", "59.4 s", "1 min 01 s", "1 h 00 min", "25 h 01 min",
    ]  # fmt: skip


def test_secrets_are_left_out():
    command = "python a.py --hub_token abc --max_tokens 5 --api-key=xyz --wandb_api_key k --password 'p q' --seed 1"
    assert without_secrets(shlex.split(command)) == (
        "python a.py --hub_token ... --max_tokens 5 --api-key=... --wandb_api_key ... --password ... --seed 1"
    )


def test_settings_are_compared_with_those_of_the_trainer_s_config():
    quiet = {"use_cpu": True, "bf16": False, "report_to": []}
    assert "packing" not in changed_settings(SFTConfig("out", **quiet))
    assert changed_settings(SFTConfig("out", packing=True, hub_token="x", **quiet))["packing"] is True
    assert "x" not in changed_settings(SFTConfig("out", hub_token="x", **quiet)).values()
    own = changed_settings(SPOConfig("out", learning_rate=0.5, **quiet))
    assert own["learning_rate"] == 0.5
    assert "spo_rho_min" in own  # a method's own settings are all there
    assert not {"epsilon", "save_between_generations", "save_steps"} & own.keys()


# ------------------------------------------------------------------------------------------------------------ callback


class Warner(TrainerCallback):
    """Warns twice, of itself and of code."""

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step in (1, 2):
            warnings.warn("beware", stacklevel=1)
            warnings.warn("old code", FutureWarning, stacklevel=1)


class Look(TrainerCallback):
    """Writes the report in the middle of the run."""

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 3:
            self.status = build_report(read_run(args.output_dir)).status
            self.steps = read_run(args.output_dir).state["global_step"]


def run(folder, *callbacks, trainer_class=GRPOTrainer, config_class=GRPOConfig, resume=None, **settings):
    trainer = build(trainer_class, config_class, out=folder, **settings)
    for callback in callbacks:
        trainer.add_callback(callback(trainer) if isinstance(callback, type(lambda: 0)) else callback)
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        shown = warnings.showwarning
        trainer.train(resume_from_checkpoint=resume)
        assert warnings.showwarning is shown
    return trainer


def test_a_run_with_a_report_is_the_same_run(tmp_path):
    settings = {"max_steps": 4, "logging_steps": 2, "save_strategy": "steps", "save_steps": 2}
    plain = run(tmp_path / "plain", **settings)
    look = Look()
    own = run(
        tmp_path / "own", Warner(), lambda t: RunReportCallback(t, "python x.py --hub_token abc"), look, **settings
    )
    assert difference(plain, own) == 0
    assert (look.status, look.steps) == ("not finished", 2)
    folder = tmp_path / "own"
    state = json.loads((folder / "trainer_state.json").read_text())
    assert state["global_step"] == 4
    assert TrainerState.load_from_json(str(folder / "trainer_state.json")).log_history == own.state.log_history
    info = json.loads((folder / "run.json").read_text())
    assert [warning for warning in info["warnings"] if warning["message"] in ("beware", "old code")] == [
        {"step": 1, "category": "UserWarning", "message": "beware", "count": 2}
    ]
    assert info["trainer"] == "GRPOTrainer"
    assert info["methods"][0]["id"] == "2402.03300"
    assert info["settings"]["max_steps"] == 4
    (session,) = info["sessions"]
    assert session["command"] == "python x.py --hub_token ..."
    assert (session["start_step"], session["end_step"], session["processes"]) == (0, 4, 1)
    assert session["end"] and session["seconds"] > 0 and session["peak_memory"] > 2**20
    page = (folder / "report.html").read_text()
    assert "finished" in page and "beware (2 times)" in page and page.count("<svg") > 10

    run(folder, RunReportCallback(own), resume=str(folder / "checkpoint-2"), **settings)
    again = read_run(folder)
    assert [(s["start_step"], s["end_step"]) for s in again.info["sessions"]] == [(0, 4), (2, 4)]
    assert [entry["step"] for entry in again.history if "reward" in entry] == [2, 4]
    assert any(warning["message"] == "beware" for warning in again.info["warnings"])
    run(folder, RunReportCallback(own), **settings)  # a new run is no resumed one
    assert len(read_run(folder).info["sessions"]) == 1


def test_methods_and_other_trainers(tmp_path):
    run(tmp_path / "spo", lambda t: RunReportCallback(t, facts={"data set": "sums"}), trainer_class=SPOTrainer,
        config_class=SPOConfig, spo_offline_n=0, max_steps=2)  # fmt: skip
    spo = build_report(read_run(tmp_path / "spo"))
    assert spo.title == "SPOTrainer on sums"
    assert [row[0] for row in section(spo, "Methods").parts[0].rows] == ["SPO", "GRPO"]
    assert {chart.title for chart in section(spo, "Metrics of spo").parts} > {"rho", "value"}

    data = arithmetic().select(range(8)).map(lambda row: {"text": f"{row['prompt']}{row['answer']}"})
    args = SFTConfig(
        str(tmp_path / "sft"), max_steps=1, use_cpu=True, bf16=False, report_to=[], logging_steps=1, disable_tqdm=True,
        gradient_checkpointing=False, save_strategy="no",
    )  # fmt: skip
    trainer = SFTTrainer(POLICY_PATH, args, train_dataset=data.select_columns("text"))
    trainer.add_callback(RunReportCallback(trainer))
    trainer.train()
    sft = build_report(read_run(tmp_path / "sft"))
    assert (sft.title, sft.status) == ("SFTTrainer", "finished")
    assert {"Loss", "Token accuracy"} <= charts(sft).keys()


def test_a_report_that_cannot_be_written_costs_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr("trl_ext.report.draw", lambda *_: 1 / 0)
    trainer = build(GRPOTrainer, GRPOConfig, out=tmp_path, max_steps=1)
    trainer.add_callback(RunReportCallback(trainer))
    with pytest.warns(UserWarning, match=r"no report was written \(ZeroDivisionError.*trl-ext report"):
        trainer.train()
    assert trainer.state.global_step == 1
    monkeypatch.undo()
    write_report(tmp_path)


def test_one_process_writes(tmp_path):
    callback = RunReportCallback(build(GRPOTrainer, GRPOConfig, out=tmp_path))
    args, state = SimpleNamespace(output_dir=str(tmp_path)), TrainerState(is_world_process_zero=False)
    for event in ("on_train_begin", "on_log", "on_save", "on_train_end"):
        getattr(callback, event)(args, state, None)
    assert not list(tmp_path.iterdir())


def test_command(folder, tmp_path, capsys):
    main(["report", str(folder)])
    assert str(folder / "report.html") in capsys.readouterr().out
    main(["report", str(folder), "--output", str(tmp_path / "x"), "--format", "markdown"])
    assert (tmp_path / "x").read_text().startswith("# SPOTrainer")
    with pytest.raises(SystemExit) as stopped:
        main(["report", str(tmp_path / "nowhere")])
    assert stopped.value.code == 2
    assert "there is no folder" in capsys.readouterr().err
