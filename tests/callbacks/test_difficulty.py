import pytest
import torch
from harness import arithmetic, build, difference, train
from matplotlib.image import imread

from trl_ext import DifficultyCallback, MethodTrainer, VADETrainer
from trl_ext.callbacks.difficulty import draw_difficulty
from trl_ext.core.state import PROMPTS


def watched(folder, resume=None, **settings):
    trainer = build(VADETrainer, out=folder, save_strategy="steps", save_steps=2, max_steps=4, **settings)
    trainer.add_callback(DifficultyCallback(trainer))
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def test_the_spread_of_the_rates_is_kept_and_drawn(tmp_path):
    trainer = watched(
        tmp_path / "run", eval_dataset=arithmetic().select(range(2)), eval_strategy="steps", eval_steps=2
    )
    entries = [entry for entry in trainer.state.log_history if "vade/rates" in entry]
    assert [entry["step"] for entry in entries] == [1, 2, 3, 4]
    assert all(sum(entry["vade/rates"]) == 24 and len(entry["vade/rates"]) == 20 for entry in entries)
    rates = trainer.prompt_table()["vade/rate"]
    assert entries[-1]["vade/rates"] == torch.histc(rates.float(), 20, 0, 1).int().tolist()
    assert imread(tmp_path / "run" / "prompt_difficulty.png").std() > 0.05  # not a blank page
    resumed = watched(tmp_path / "run", resume=str(tmp_path / "run" / "checkpoint-2"))
    again = [entry for entry in resumed.state.log_history if "vade/rates" in entry]
    assert [(entry["step"], entry["vade/rates"]) for entry in again] == [(e["step"], e["vade/rates"]) for e in entries]


def test_it_changes_nothing(tmp_path):
    alone = train(VADETrainer, max_steps=4)
    assert difference(watched(tmp_path / "run"), alone) == 0.0
    assert (tmp_path / "run" / "checkpoint-4" / PROMPTS).is_file()


def test_a_method_without_rates(tmp_path):
    trainer = build(MethodTrainer, out=tmp_path / "run")
    trainer.add_callback(DifficultyCallback(trainer))
    trainer.train()
    assert not (tmp_path / "run" / "prompt_difficulty.png").exists()


@pytest.mark.parametrize("counts", [[0] * 20, [5] + [0] * 19])
def test_unusual_histories_are_drawn(tmp_path, counts):
    assert draw_difficulty([{"step": 3, "a/rates": counts}], str(tmp_path / "x.png"))
    assert not draw_difficulty([{"step": 3, "loss": 1.0}], str(tmp_path / "y.png"))
