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
]  # harness.py, distributed_worker.py

import pytest
import torch


torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def in_tmp_dir(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
