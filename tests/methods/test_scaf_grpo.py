import pytest
import torch
from datasets import Dataset
from harness import arithmetic, build, difference, scripted, train
from trl import GRPOConfig, GRPOTrainer

from trl_ext import ScafGRPOConfig, ScafGRPOTrainer
from trl_ext.core.rollouts import group_advantages
from trl_ext.methods.scaf_grpo import cliff_groups, exempt_steps, hint_levels


def test_worked_advantages_of_a_rescued_group():
    rewards = torch.tensor([0, 0, 0, 1, 0, 0, 0, 0], dtype=torch.float64)
    found = group_advantages(rewards, torch.zeros(8, dtype=torch.long), eps=1e-6)
    expected = torch.full((8,), -0.353552, dtype=torch.float64)
    expected[3] = 2.474867
    assert torch.allclose(found, expected, atol=1e-6)
    found = group_advantages(rewards[:4], torch.zeros(4, dtype=torch.long), eps=1e-6)
    assert torch.allclose(found, torch.tensor([-0.499999] * 3 + [1.499997], dtype=torch.float64), atol=1e-6)


def test_levels_accumulate_inside_a_column():
    hints = {"knowledge": ["a", "b"], "planning": [], "solution": ["x", "y", "z"]}
    assert hint_levels(hints, 2) == [
        ("knowledge", ["a"]),
        ("knowledge", ["a", "b"]),
        ("solution", ["x"]),
        ("solution", ["x", "y"]),
    ]
    assert hint_levels({"knowledge": None, "planning": "one", "solution": [""]}) == [("planning", ["one"])]


def test_cliffs():
    nan = float("nan")
    rewards = torch.tensor([0.0, 0.0, 0.0, nan, 1.0, 0.0, nan, nan])
    ids = torch.tensor([5, 5, 2, 2, 3, 3, 4, 4])
    assert cliff_groups(rewards, ids).tolist() == [2, 5]
    assert cliff_groups(rewards, ids, threshold=1.0).tolist() == [2, 3, 5]


def test_exemption():
    assert exempt_steps(20, 0.15) == 3 and exempt_steps(10, 0.15) == 2 and exempt_steps(100, 0.07) == 7
    assert exempt_steps(100, 0.15, 50) == 50


HINTS = {"knowledge": ["k1", "k2"], "planning": ["p1"], "solution": ["s1", "s2"]}


def hinted_data(n=24, conversational=False):
    data = arithmetic(conversational=conversational).select(range(n))
    for column, hints in HINTS.items():
        data = data.add_column(column, [hints] * n)
    return data


class Recording(ScafGRPOTrainer):
    """Fails every ordinary rollout and succeeds at one level of help, which the prompt tells."""

    helps = "p1"
    asked: tuple = ()

    def _generate(self, prompts):
        texts = [p if isinstance(p, str) else p[-1]["content"] for p in prompts]
        if self._cached is None:
            self.asked = (*self.asked, texts)
        self.succeeds = [self.helps in text for text in texts]
        return super()._generate(prompts)

    def observe(self, rollouts):
        super().observe(rollouts)
        self.seen = [*getattr(self, "seen", []), rollouts]


def run(search="sequential", **settings):
    holder = {}

    def reward(completions, **kwargs):
        return [float(value) for value in holder["trainer"].succeeds]

    settings = {"data": hinted_data(), "scaf_exempt_steps": 0, "max_steps": 1, **settings}
    trainer = build(Recording, rewards=reward, rollout_func=scripted, scaf_hint_search=search, **settings)
    holder["trainer"] = trainer
    trainer.train()
    return trainer


def test_sequential_search_stops_at_the_first_success():
    trainer = run()
    asked = [text.split("\n", 1)[1] for texts in trainer.asked[1:] for text in texts]
    expected = ["Knowledge Hints: k1"] * 2 + ["Knowledge Hints: k1 k2"] * 2 + ["Planning Hints: p1"] * 2
    assert asked == expected
    rollouts = trainer.seen[0]
    assert rollouts.rewards.view(2, 4).sum(1).tolist() == [1, 1] and rollouts.changed_prompt.sum() == 2
    assert torch.equal(rollouts.rewards.bool(), rollouts.changed_prompt)
    logged = trainer.state.log_history[0]
    assert (logged["scaf/cliff_groups"], logged["scaf/rescued_groups"], logged["scaf/extra_rollouts"]) == (2, 2, 6)
    decoded = trainer.processing_class.batch_decode(rollouts.prompt_ids, skip_special_tokens=True)
    for text, changed in zip(decoded, rollouts.changed_prompt, strict=True):
        assert text.startswith("Question: ") == bool(changed) and ("p1" in text) == bool(changed)


def test_parallel_search_keeps_the_earliest_success():
    trainer = run("parallel", max_steps=1)
    trainer.helps = "k1"
    assert [len(texts) for texts in trainer.asked] == [8, 10]
    decoded = trainer.processing_class.batch_decode(trainer.seen[0].prompt_ids, skip_special_tokens=True)
    assert sum("Planning Hints: p1" in text for text in decoded) == 2


def test_which_row_is_replaced_is_drawn_anew():
    trainer = run(max_steps=6)
    positions = {tuple(r.changed_prompt.nonzero().squeeze(1).tolist()) for r in trainer.seen}
    assert len(positions) > 2


def test_conversational_prompts_keep_their_form():
    trainer = run(data=hinted_data(conversational=True))
    assert all(text.startswith("Question: ") for texts in trainer.asked[1:] for text in texts)


def test_exempt_steps_are_plain_grpo():
    settings = {"data": hinted_data(), "max_steps": 3}
    trainer = train(ScafGRPOTrainer, scaf_exempt_steps=3, rewards=lambda completions, **kw: [0.0] * 8, **settings)
    plain = train(GRPOTrainer, GRPOConfig, rewards=lambda completions, **kw: [0.0] * 8, **settings)
    assert difference(trainer, plain) == 0.0
    assert [log["scaf/guided"] for log in trainer.state.log_history[:-1]] == [0, 0, 0]
    assert trainer.state.log_history[0]["scaf/cliff_groups"] == 2


def test_rows_without_hints_are_left_alone():
    data = hinted_data()
    data = data.map(lambda row: dict.fromkeys(HINTS))
    trainer = run(data=data)
    assert len(trainer.asked) == 1 and trainer.seen[0].rewards.sum() == 0


def test_levels_that_do_not_fit_are_left_out():
    trainer = build(ScafGRPOTrainer, data=hinted_data())
    assert len(trainer._scaf_prompts(0)) == 5
    limit = trainer.model.config.max_position_embeddings
    long = hinted_data().map(lambda row: {"knowledge": ["x" * limit]})
    assert len(build(ScafGRPOTrainer, data=long)._scaf_prompts(0)) == 3


def test_plateau():
    trainer = build(ScafGRPOTrainer, data=hinted_data(), scaf_exempt_mode="plateau", scaf_plateau_window=2)
    trainer.state.max_steps = 100
    trainer.state.global_step = 50
    assert [trainer._scaf_guided(n) for n in (10, 5, 4)] == [False] * 3
    average = [10.0, 9.5, 8.95]
    assert trainer.scaf_average == pytest.approx(average)
    assert not trainer._scaf_guided(8)  # 8.855 against 9.5
    assert trainer._scaf_guided(9)  # 8.8695 against 8.95: a fall of less than 2 percent
    assert trainer._scaf_guided(0)  # for good
    state = trainer.method_state()
    again = build(ScafGRPOTrainer, data=hinted_data(), scaf_exempt_mode="plateau", scaf_plateau_window=2)
    again.load_method_state(state)
    assert again.scaf_started and again.scaf_average == trainer.scaf_average


def test_expected_gain_is_the_cards():
    p, levels = 0.01, [0.1, 0.2, 0.3, 0.4]
    plain = 1 - (1 - p) ** 8 - p**8
    missed = 1.0
    for level in levels:
        missed *= 1 - level
    assert plain == pytest.approx(0.0773, abs=1e-4)
    assert plain + (1 - p) ** 8 * (1 - missed) == pytest.approx(0.721, abs=1e-3)


def test_bad_input():
    with pytest.raises(ValueError, match=r"`scaf_hint_columns` is .* none of which .*\['prompt', 'answer'\]"):
        build(ScafGRPOTrainer)
    some = Dataset.from_dict({"prompt": ["1+1="] * 8, "solution": [["s"]] * 8})
    assert build(ScafGRPOTrainer, data=some).scaf_columns == ["solution"]
    for name, value in {
        "scaf_exempt_fraction": 1.0,
        "scaf_exempt_steps": -1,
        "scaf_exempt_mode": "typo",
        "scaf_hint_search": "typo",
        "scaf_hint_columns": [],
        "scaf_hint_levels": 0,
        "scaf_plateau_window": 0,
    }.items():
        with pytest.raises(ValueError, match=f"`{name}` must be"):
            ScafGRPOConfig("unused", use_cpu=True, bf16=False, **{name: value})
