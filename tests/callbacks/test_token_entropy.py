import json

import pytest
import torch
from harness import build, difference, train
from matplotlib.image import imread
from trl import GRPOConfig, GRPOTrainer

from trl_ext import ClipCovTrainer, MethodTrainer, TokenEntropyCallback
from trl_ext.callbacks.entropy_law import entropy_drift
from trl_ext.callbacks.token_entropy import draw_token_entropy, top_entropies


NAMES = {f"token_entropy/{name}" for name in ("top_share", "high", "threshold", "covariance", "drift")}
SPLIT = {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 2, "num_iterations": 2}


def watched(folder, trainer_class=MethodTrainer, resume=None, **settings):
    trainer = build(trainer_class, out=folder, **settings)
    trainer.add_callback(TokenEntropyCallback(trainer))
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def test_the_highest_entropies():
    entropies = torch.tensor([0.1, 0.9, 0.5, 0.7, 0.3])
    assert top_entropies(entropies, 0.2).tolist() == pytest.approx([0.9])
    assert top_entropies(entropies, 0.3).tolist() == pytest.approx([0.9, 0.7])
    assert len(top_entropies(torch.ones(100), 0.07)) == 7  # 100 * 0.07 is 7.000000000000001
    assert len(top_entropies(torch.ones(0))) == 0


@pytest.mark.parametrize("trainer_class", [MethodTrainer, ClipCovTrainer])
def test_it_changes_nothing(tmp_path, trainer_class):
    alone = train(trainer_class, max_steps=4, **SPLIT)
    with_it = watched(tmp_path / "run", trainer_class, max_steps=4, **SPLIT)
    assert difference(with_it, alone) == 0.0
    for before, after in zip(alone.state.log_history[:-1], with_it.state.log_history[:-1], strict=True):
        timed = {"step_time"}
        assert set(after) - set(before) <= NAMES
        assert {k: v for k, v in before.items() if k not in timed} == {k: after[k] for k in before if k not in timed}


def test_the_numbers_are_those_of_the_tokens(tmp_path):
    trainer = build(MethodTrainer, out=tmp_path / "run", max_steps=2, **SPLIT)
    callback = TokenEntropyCallback(trainer)
    trainer.add_callback(callback)
    seen = []
    trainer.watch_tokens(seen.append)
    trainer.train()
    first = seen[0].entropies[seen[0].mask.bool()].sort(descending=True).values
    k = -(-len(first) // 5)
    assert callback.threshold == pytest.approx(first[k - 1].item(), abs=1e-6)
    logs = [entry for entry in trainer.state.log_history if "token_entropy/high" in entry]
    for entry, parts in zip(logs, (seen[:2], seen[2:4]), strict=True):
        shares, high, covariances = [], [], []
        for tokens in parts:
            valid = tokens.mask.bool()
            entropies = tokens.entropies[valid].double()
            top = entropies.sort(descending=True).values[: -(-len(entropies) // 5)]
            shares.append((top.sum() / entropies.sum()).item())
            high.append((entropies >= callback.threshold).double().mean().item())
            logps, advantages = tokens.logps[valid].detach().double(), tokens.advantages[valid].double()
            covariances.append(((logps - logps.mean()) * (advantages - advantages.mean())).mean().item())
        assert entry["token_entropy/top_share"] == pytest.approx(sum(shares) / 2, abs=1e-5)
        assert entry["token_entropy/high"] == pytest.approx(sum(high) / 2, abs=1e-5)
        assert entry["token_entropy/covariance"] == pytest.approx(sum(covariances) / 2, abs=1e-5)
    # Two micro-batches are a generation, the next two its second visit.
    rows = {
        name: torch.cat([(getattr(t, name) * t.mask).sum(1) / t.mask.sum(1) for t in seen[:2]]).detach()
        for name in ("logps", "advantages")
    }
    groups = torch.cat([tokens.group_ids for tokens in seen[:2]])
    assert len(groups.unique()) < len(groups) / 2
    assert logs[0]["token_entropy/drift"] == pytest.approx(entropy_drift(**rows, group_ids=groups).item(), abs=1e-6)
    assert "token_entropy/drift" not in logs[1]

    table = json.loads((tmp_path / "run" / "token_entropy.json").read_text())
    counts = torch.bincount(torch.cat([tokens.token_ids[tokens.mask.bool()] for tokens in seen]))
    assert table["steps"] == [0, 2]
    assert {entry["id"]: entry["count"] for entry in table["tokens"]} == {
        i: n for i, n in enumerate(counts.tolist()) if n
    }
    assert sum(entry["share"] for entry in table["tokens"]) == pytest.approx(1.0)
    heaviest = table["tokens"][0]
    of_it = torch.cat([t.entropies[t.mask.bool() & (t.token_ids == heaviest["id"])] for t in seen])
    assert heaviest["mean"] == pytest.approx(of_it.mean().item(), rel=1e-5)
    assert imread(tmp_path / "run" / "token_entropy.png").std() > 0.05


def test_a_resumed_run_keeps_its_threshold(tmp_path):
    settings = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4}
    whole = watched(tmp_path / "run", **settings)
    resumed = watched(tmp_path / "run", resume=str(tmp_path / "run" / "checkpoint-2"), **settings)
    for entry, again in zip(whole.state.log_history[:-1], resumed.state.log_history[:-1], strict=True):
        assert {name: entry[name] for name in NAMES} == {name: again[name] for name in NAMES}
    assert json.loads((tmp_path / "run" / "token_entropy.json").read_text())["steps"] == [2, 4]


def test_odd_tokens_are_drawn(tmp_path):
    tokens = [
        {"token": t, "id": i, "count": 1, "mean": 0.1, "share": 0.2} for i, t in enumerate(["$x_", "\n", "", "漢"])
    ]
    draw_token_entropy({"steps": [0, 1], "tokens": tokens}, [], str(tmp_path / "x.png"))
    assert imread(tmp_path / "x.png").std() > 0.05


def test_what_is_refused(tmp_path):
    with pytest.raises(ValueError, match="`trainer` is a GRPOTrainer"):
        TokenEntropyCallback(build(GRPOTrainer, GRPOConfig, out=tmp_path / "run"))
    trainer = build(MethodTrainer, out=tmp_path / "run")
    with pytest.raises(ValueError, match="`top_share`"):
        TokenEntropyCallback(trainer, top_share=0)
