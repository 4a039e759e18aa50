"""A run that is stopped and resumed continues as if it had not been stopped."""

import json
import os
import shutil
import signal
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import killed_worker
import pytest
import torch
from datasets import load_dataset
from harness import arithmetic, difference, launch, train

from trl_ext import MethodTrainer, SPOTrainer, mix
from trl_ext.core.state import MARKER, PROMPTS, missing_part, newest_complete


RUNS = {
    "neutral": (MethodTrainer, {}),
    "neutral, several epochs": (MethodTrainer, {"rows": 9, "max_steps": 12, "stop": 7}),
    "neutral, inside a generation": (MethodTrainer, {"num_iterations": 2, "steps_per_generation": 2, "beta": 0.1}),
    "spo": (SPOTrainer, {"spo_offline_n": 1}),
    "spo, inside a generation": (SPOTrainer, {"num_iterations": 2, "spo_offline_n": 1}),
    "clip_cov + spo": (
        mix("clip_cov", "spo").Trainer,
        {"num_iterations": 2, "spo_offline_n": 0, "clip_cov_ratio": 0.2, "clip_cov_low": 0.01},
    ),
}


@pytest.mark.parametrize("name", RUNS)
def test_resumed_run_equals_the_run_that_was_not_stopped(name, tmp_path):
    cls, settings = RUNS[name]
    settings = {"max_steps": 7, "save_strategy": "steps", **settings}
    stop, rows = settings.pop("stop", 3), settings.pop("rows", 24)
    settings |= {"save_steps": stop, "data": arithmetic().select(range(rows)), "out": tmp_path / "run"}
    whole = train(cls, **settings)
    shutil.rmtree(tmp_path / "run" / f"checkpoint-{2 * stop}", ignore_errors=True)
    resumed = train(cls, resume=str(tmp_path / "run" / f"checkpoint-{stop}"), **settings)
    assert difference(whole, resumed) == 0.0
    drop = ("step_time", "train_runtime", "train_samples_per_second", "train_steps_per_second", "train_loss")
    histories = [
        [{k: v for k, v in log.items() if k not in drop} for log in trainer.state.log_history]
        for trainer in (whole, resumed)
    ]
    assert histories[0] == histories[1]
    states = [t.method_state() | t.local_state() for t in (whole, resumed)]
    assert repr(states[0]) == repr(states[1])


@pytest.fixture
def checkpoint(tmp_path):
    train(SPOTrainer, out=tmp_path / "run", save_strategy="steps", save_steps=2, max_steps=2, spo_offline_n=0)
    return tmp_path / "run" / "checkpoint-2"


def resume(checkpoint, cls=SPOTrainer, **settings):
    return train(cls, resume=str(checkpoint), out=checkpoint.parent, max_steps=4, **settings)


@pytest.mark.parametrize("name", ["trl_ext_state.pt", "trl_ext_complete.json", "trl_ext_local_0.pt"])
def test_a_missing_state_file_is_named(checkpoint, name):
    os.remove(checkpoint / name)
    with pytest.raises(FileNotFoundError, match=name):
        resume(checkpoint, spo_offline_n=0)


def test_another_data_set_is_refused(checkpoint):
    with pytest.raises(ValueError, match=r"`train_dataset` differs"):
        resume(checkpoint, spo_offline_n=0, data=arithmetic(seed=1).select(range(24)))
    with pytest.raises(ValueError, match=r"`train_dataset` differs"):
        resume(checkpoint, spo_offline_n=0, data=arithmetic().select(range(23)))


def test_another_trainer_is_refused(checkpoint):
    with pytest.raises(ValueError, match="written by SPOTrainer and cannot be resumed by MethodTrainer"):
        resume(checkpoint, MethodTrainer)


def test_state_files_hold_no_code(checkpoint):
    for name in ("trl_ext_state.pt", "trl_ext_local_0.pt"):
        assert torch.load(checkpoint / name, weights_only=True)


def test_only_the_model_saves_no_state(tmp_path):
    train(MethodTrainer, out=tmp_path, save_strategy="steps", save_steps=1, max_steps=1, save_only_model=True)
    assert not (tmp_path / "checkpoint-1" / "trl_ext_state.pt").exists()


@pytest.mark.parametrize("conversational", [False, True])
def test_what_is_known_of_the_prompts_lies_beside_the_checkpoint(conversational, tmp_path):
    data = arithmetic(conversational=conversational).select(range(24))
    settings = {"out": tmp_path, "save_strategy": "steps", "save_steps": 2, "max_steps": 2, "data": data}
    trainer = train(mix("spo", "knapsack_rl").Trainer, spo_offline_n=0, num_generations=4, **settings)
    table = load_dataset("parquet", data_files=str(tmp_path / "checkpoint-2" / PROMPTS), split="train")
    assert table["row"][:] == list(range(24)) and table["prompt"][:] == arithmetic()["prompt"][:24]
    assert table["spo/visits"][:] == trainer.spo_visits.tolist() and sum(table["spo/weight"]) == pytest.approx(1)
    assert table["knapsack/rollouts"][:] == trainer.knapsack_counts.tolist()
    assert all(
        (rate != rate) == (count == 0)
        for rate, count in zip(table["knapsack/rate"], table["knapsack/rollouts"], strict=True)
    )
    train(MethodTrainer, **settings | {"out": tmp_path / "plain"})
    assert not (tmp_path / "plain" / "checkpoint-2" / PROMPTS).exists()


MOMENTS = {
    "model": 3,
    "state": 4,
    "marker": 4,
    "half of the last file": 3,
    "rotation": 3,
}  # and the newest complete one


@pytest.mark.parametrize(
    "moment", [pytest.param(m, marks=[] if m == "half of the last file" else pytest.mark.slow) for m in MOMENTS]
)
def test_a_run_that_was_killed_while_saving_goes_on(moment, tmp_path):
    step = MOMENTS[moment]
    worker = Path(killed_worker.__file__)
    result = subprocess.run(
        [sys.executable, str(worker), str(tmp_path / "run"), moment, str(step)], capture_output=True, check=False
    )
    assert result.returncode == -signal.SIGKILL, result.stderr.decode()[-3000:]
    newest = step if moment == "rotation" else step - 1
    assert newest_complete(str(tmp_path / "run")) == str(tmp_path / "run" / f"checkpoint-{newest}")
    settings = dict(killed_worker.SETTINGS)
    with pytest.warns(UserWarning, match=f"passed over.*checkpoint-{step} ") if newest < step else nullcontext():
        resumed = train(SPOTrainer, out=tmp_path / "run", resume=True, **settings)
    whole = train(SPOTrainer, out=tmp_path / "whole", **settings | {"save_strategy": "no"})
    assert resumed.state.global_step == 6 and difference(resumed, whole) == 0.0
    assert repr(resumed.method_state()) == repr(whole.method_state())


@pytest.mark.slow
def test_two_processes_resume_from_the_same_checkpoint(tmp_path):
    launch(Path(__file__).with_name("resume_worker.py"), 2, tmp_path)
    for process in range(2):
        result = json.loads((tmp_path / f"result_{process}.json").read_text())
        assert (result["processes"], result["gap"]) == (2, 0.0)
        assert len(result["said"]) == 1 and "checkpoint-3; passed over" in result["said"][0]


def test_rotation_spares_the_last_complete_checkpoint(tmp_path, monkeypatch):
    """When an older checkpoint is deleted, the new one is complete; one that is written anew is not, until it is."""
    complete = []
    rmtree = shutil.rmtree

    def watched(path, *args, **kwargs):
        folders = (tmp_path / "run").glob("checkpoint-*")
        complete.append([int(f.name[11:]) for f in folders if missing_part(str(f)) is None and str(f) != str(path)])
        return rmtree(path, *args, **kwargs)

    monkeypatch.setattr(shutil, "rmtree", watched)
    settings = {"out": tmp_path / "run", "save_strategy": "steps", "save_steps": 1, "save_total_limit": 1}
    train(MethodTrainer, max_steps=3, **settings)
    assert complete == [[2], [3]]
    monkeypatch.undo()

    class Stopped(MethodTrainer):
        def _save_optimizer_and_scheduler(self, output_dir):
            raise KeyboardInterrupt

    assert missing_part(str(tmp_path / "run" / "checkpoint-3")) is None
    with pytest.raises(KeyboardInterrupt):
        train(Stopped, max_steps=3, **settings | {"save_steps": 3})
    assert missing_part(str(tmp_path / "run" / "checkpoint-3")) == MARKER


def test_no_complete_checkpoint_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no complete checkpoint in .*: it has none"):
        train(MethodTrainer, out=tmp_path / "none", resume=True)
    (tmp_path / "run" / "checkpoint-7").mkdir(parents=True)
    with pytest.raises(
        FileNotFoundError, match=r"unfinished ones: checkpoint-7 \(no complete trl_ext_complete.json\)"
    ):
        train(MethodTrainer, out=tmp_path / "run", resume=True)


def test_a_checkpoint_can_wait_for_the_end_of_the_generation(tmp_path):
    settings = {"num_iterations": 2, "steps_per_generation": 2, "max_steps": 9, "beta": 0.1}
    settings |= {"save_strategy": "steps", "out": tmp_path / "run"}
    waited = train(MethodTrainer, save_steps=3, save_between_generations=True, **settings)
    saved = sorted(int(folder.name[11:]) for folder in (tmp_path / "run").glob("checkpoint-*"))
    assert saved == [4, 8, 9]  # due at 3, 6 and 9, the end of the training; generations end at 4 and 8
    for step in saved:
        local = torch.load(tmp_path / "run" / f"checkpoint-{step}" / "trl_ext_local_0.pt", weights_only=True)
        assert ("buffer" in local) == (step == 9)
    resumed = train(MethodTrainer, resume=str(tmp_path / "run" / "checkpoint-4"), save_steps=100, **settings)
    assert difference(waited, resumed) == 0.0
