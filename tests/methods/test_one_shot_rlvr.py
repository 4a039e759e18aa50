import json

import pytest
import torch
from datasets import load_dataset
from harness import arithmetic, build, train
from hypothesis import given
from hypothesis import strategies as st

from trl_ext import OneShotRLVRConfig, OneShotRLVRTrainer, mix
from trl_ext.cli import main
from trl_ext.core.state import PROMPTS
from trl_ext.methods.one_shot_rlvr import historical_variance, rank_examples, repeat_examples


def test_worked_ranking():
    histories = {7: [0, 0, 1, 1], 3: [0.5] * 4, 12: [0, 0.25, 0.5, 1], 1: [1, 1, 1]}
    assert [historical_variance(h) for h in histories.values()] == pytest.approx([0.25, 0, 0.136719, 0], abs=1e-6)
    assert [historical_variance(h) ** 0.5 for h in histories.values()] == pytest.approx(
        [0.5, 0, 0.369755, 0], abs=1e-6
    )
    assert rank_examples(histories) == [7, 12, 3, 1]
    assert rank_examples(histories, min_epochs=4) == [7, 12, 3]
    assert rank_examples({1: [0.5], 2: []}) == []
    assert repeat_examples([7], 4) == [7] * 4 and repeat_examples([7, 12, 3], 8) == [7, 12, 3, 7, 12, 3, 7, 12]


@given(st.dictionaries(st.integers(0, 50), st.lists(st.sampled_from([0.0, 0.1, 0.2, 0.3, 1.0]), max_size=6)))
def test_ranking_is_stable_and_by_variance(histories):
    ranked = rank_examples(histories)
    assert set(ranked) == {row for row, history in histories.items() if len(history) > 1}
    order = list(histories)
    keys = [(-historical_variance(histories[row]), order.index(row)) for row in ranked]
    assert keys == sorted(keys)


@pytest.mark.parametrize("order", [[0.1, 0.2, 0.3], [0.3, 0.1, 0.2]])
def test_equal_histories_have_equal_variances(order):
    assert historical_variance(order) == historical_variance([0.1, 0.2, 0.3])


def test_worked_loss():
    """TRL's loss with these settings is the paper's: policy + 0.001 KL - 0.001 H, each a mean over tokens."""
    trainer = build(OneShotRLVRTrainer, loss_type="bnpo", per_device_train_batch_size=2, num_generations=2)
    logps = torch.tensor([[-0.4, -1.0], [-0.3, -0.3]], dtype=torch.float64, requires_grad=True)
    entropies = torch.tensor([[0.9, 1.1], [0.4, 0.2]], dtype=torch.float64, requires_grad=True)
    trainer._get_per_token_logps_and_entropies = lambda *args, **kwargs: (logps, entropies, None)
    trainer.current_gradient_accumulation_steps = 1
    trainer.model.train()
    ids = torch.ones(2, 2, dtype=torch.long)
    inputs = {
        "prompt_ids": ids,
        "prompt_mask": ids,
        "completion_ids": ids,
        "completion_mask": torch.tensor([[1, 1], [1, 0]]),
        "advantages": torch.tensor([0.707, -0.707], dtype=torch.float64),
        "old_per_token_logps": torch.tensor([[-0.5, -1.0], [-0.2, -0.3]], dtype=torch.float64),
        "ref_per_token_logps": torch.tensor([[-0.6, -1.2], [-0.2, -0.1]], dtype=torch.float64),
        "num_items_in_batch": torch.tensor(3),
    }
    loss = trainer._compute_loss(trainer.model, inputs)
    loss.backward()
    assert loss.item() == pytest.approx(-0.28366438, abs=1e-6)
    assert entropies.grad.flatten().tolist() == pytest.approx([-1 / 3000, -1 / 3000, -1 / 3000, 0])
    assert trainer._metrics["train"]["kl"] == [pytest.approx(0.014211, abs=1e-6)]
    assert trainer._metrics["train"]["entropy"] == [pytest.approx(0.8, abs=1e-6)]


def some_unscored(completions, **kwargs):
    """Per generation of two groups: 1, 0, 1, None and nothing but None."""
    return [[1.0, 0.0, 1.0, None][i] if i < 4 else None for i in range(len(completions))]


def half(completions, **kwargs):
    return [0.5] * len(completions)


def test_histories_hold_the_mean_of_the_outcome_reward():
    data = arithmetic().select(range(2))
    settings = {"data": data, "rewards": [half, some_unscored], "num_generations": 4, "shuffle_dataset": False}
    trainer = train(OneShotRLVRTrainer, hv_outcome_reward="some_unscored", **settings)
    assert trainer.one_shot_histories == {0: [pytest.approx(2 / 3)] * 3}
    first = train(OneShotRLVRTrainer, **settings)
    assert first.one_shot_histories == {0: [0.5] * 3, 1: [0.5] * 3}


def test_copies_of_a_prompt_are_one_visit_and_groups_of_their_own():
    class Twice(OneShotRLVRTrainer):
        config_class = OneShotRLVRConfig
        replaces = ("choose_prompts",)

        def choose_prompts(self, n, generator):
            return torch.tensor([3, 3])

        def observe(self, rollouts):
            super().observe(rollouts)
            assert rollouts.group_ids.unique().tolist() == [0, 1]

    trainer = train(Twice, num_generations=4, rewards=lambda completions, **kw: [float(i < 2) for i in range(8)])
    assert trainer.one_shot_histories == {3: [0.25] * 3}


def test_the_selected_examples_of_a_run_are_the_data_of_the_next(tmp_path, capsys):
    def by_step(prompts, trainer_state, **kwargs):
        """Alternating for the third prompt, a little for the first, constant for the others."""
        step, texts = trainer_state.global_step, arithmetic()["prompt"]
        swings = {texts[2]: step % 2, texts[0]: 0.5 + 0.1 * (step % 2)}
        return [float(swings.get(prompt, 1.0)) for prompt in prompts]

    data = arithmetic().select(range(4))
    # All four prompts in every generation.
    settings = {"num_generations": 4, "per_device_train_batch_size": 16, "data": data, "rewards": by_step}
    run = tmp_path / "run"
    train(OneShotRLVRTrainer, max_steps=4, out=run, save_strategy="steps", save_steps=4, **settings)
    folder = str(run / "checkpoint-4")
    table = load_dataset("parquet", data_files=str(run / "checkpoint-4" / PROMPTS), split="train")
    assert table["one_shot_rlvr/history"][2] == [0, 1, 0, 1] and table["prompt"] == data["prompt"]

    source, target = tmp_path / "data.jsonl", tmp_path / "selected.jsonl"
    arithmetic().select(range(5)).to_json(source)  # one of which the loader holds out
    with pytest.raises(SystemExit):
        main(["select", folder, "--output", str(target), "--dataset", str(source), "--num_selected", "2"])
    assert "is not the data" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["select", folder, "--output", str(target), "--num_selected", "5"])
    assert "`num_selected` must be between 1 and 4" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["select", str(tmp_path), "--output", str(target)])
    assert "name the folder of a finished run" in capsys.readouterr().err


def test_the_command_after_a_recipe(tmp_path, capsys, monkeypatch):
    from trl_ext.recipe import main as recipe

    monkeypatch.chdir(tmp_path)
    small = ["--max_steps", "4", "--per_device_train_batch_size", "32", "--eval_prompts", "0", "--report_to", "none"]
    small += ["--save_strategy", "no", "--dataset_size", "8", "--num_generations", "4"]
    recipe(["one_shot_rlvr"], argv=[*small, "--output_dir", "warm"])
    options = ["--dataset_size", "8", "--repeat_to", "16", "--num_selected", "2", "--output", "selected.jsonl"]
    main(["select", "warm", *options])
    assert "16 rows are in selected.jsonl" in capsys.readouterr().out
    rows = [json.loads(line) for line in (tmp_path / "selected.jsonl").read_text().splitlines()]
    assert len(rows) == 16 and rows[0] == rows[2] != rows[1] and {"prompt", "answer"} <= rows[0].keys()
    recipe(["one_shot_rlvr"], argv=[*small, "--dataset", "selected.jsonl", "--rewards", "exact_match"])


def test_bad_input():
    with pytest.raises(ValueError, match="`use_adaptive_entropy` must be False"):
        OneShotRLVRConfig("unused", use_cpu=True, bf16=False, use_adaptive_entropy=True)
    with pytest.raises(ValueError, match="`hv_outcome_reward` names the reward function 'accuracy'"):
        build(OneShotRLVRTrainer, hv_outcome_reward="accuracy")
    with pytest.raises(ValueError, match="`min_epochs` must be at least 2"):
        rank_examples({}, 1)
    for prompts, size in (([], 4), ([1, 2], 1)):
        with pytest.raises(ValueError, match="`repeat_to` must be at least"):
            repeat_examples(prompts, size)
    with pytest.raises(TypeError, match="both set the weight of the KL term"):
        mix("one_shot_rlvr", "grpo_d")
