"""The table of properties is complete, and says what the tests found."""

import importlib.util
import json
from pathlib import Path

import pytest

from trl_ext.core.mixing import list_methods


DOCS = Path(__file__).parents[1] / "docs"


@pytest.fixture(scope="module")
def drawing():
    spec = importlib.util.spec_from_file_location("draw_properties", DOCS / "draw_properties.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_cell_is_filled(drawing):
    cells = json.loads((DOCS / "properties.json").read_text())
    assert cells.keys() == drawing.PROPERTIES.keys()
    for title, column in cells.items():
        assert sorted(column) == list_methods(), title
        assert all(cell and cell != "failed" for cell in column.values()), title


def test_the_page_is_up_to_date(drawing):
    cells = json.loads((DOCS / "properties.json").read_text())
    assert (DOCS / "properties.md").read_text(encoding="utf-8") == drawing.page(cells)


def test_reasons_become_notes(drawing):
    text = drawing.page(
        {"LoRA": {"a": "passed", "b": "no", "c": "no"}, "images": {"a": "why", "b": "passed", "c": "no"}}
    )
    assert "| `a` | yes | [1] |" in text and "| `b` | [2] | yes |" in text and "| `c` | [2] | [2] |" in text
    assert "1. why\n2. no\n" in text
