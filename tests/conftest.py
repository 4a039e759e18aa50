import json
import os
import sys
import tempfile
from pathlib import Path


os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing here needs the Hub, and some libraries try it at import
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ["TRACKIO_DIR"] = tempfile.mkdtemp()  # read once, at its import
sys.path[:0] = [
    str(Path(__file__).parent),
    str(Path(__file__).parent / "core"),
    str(Path(__file__).parent / "methods"),
    str(Path(__file__).parents[1] / "benchmarks"),
]  # harness.py, distributed_worker.py, shared_prefix.py

import pytest
import torch


torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def in_tmp_dir(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    """Path of a model of the embedded policy's vocabulary with other weights."""
    from harness import make_teacher

    return make_teacher(tmp_path_factory.mktemp("teacher") / "model")


def pytest_addoption(parser):
    parser.addoption("--properties", help="file to which to add what holds for which method, as JSON")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    """A test marked `shows(property)` fills a cell of the table of properties: the method's, its parameter `name`."""
    report = yield
    if marker := item.get_closest_marker("shows"):
        name = item.callspec.params["name"]
        method = marker.args[1](name) if marker.args[1:] else name
        report.user_properties.append(("shows", (marker.args[0], method)))
    return report


CELLS: dict[str, dict[str, str]] = {}


def pytest_runtest_logreport(report):
    properties = dict(report.user_properties)
    if "shows" not in properties or (report.when != "call" and report.passed):
        return
    (title, method), cell = properties["shows"], "passed"
    if report.failed:
        cell = "failed"
    elif report.skipped or "refused" in properties:
        cell = properties.get("refused", report.longrepr[2] if report.skipped else "")
    column = CELLS.setdefault(title, {})
    # Several tests may share a cell; a failure outweighs all, and a refusal what passes beside it.
    if method is not None and column.get(method, "passed") != "failed" and (cell != "passed" or method not in column):
        column[method] = cell


def pytest_sessionfinish(session):
    path = session.config.getoption("--properties")
    if not path or hasattr(session.config, "workerinput"):  # xdist's controller hears of all tests
        return
    path = Path(path)
    known = json.loads(path.read_text()) if path.exists() else {}
    for title, column in CELLS.items():
        known[title] = {**known.get(title, {}), **column}
    path.write_text(json.dumps(known, indent=1, sort_keys=True) + "\n")
