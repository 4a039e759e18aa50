import math

import pytest
import torch
from harness import arithmetic, build, train
from hypothesis import given, settings
from hypothesis import strategies as st

from trl_ext import MixingError, VASConfig, VASTrainer, mix
from trl_ext.core.prompts import make_generator
from trl_ext.methods.vas import (
    edit_distance,
    interleave,
    outcome_variance,
    pool_rows,
    self_bleu,
    success_rates,
    trajectory_diversity,
    vas_batch_sizes,
)


FOUR = [[1, 2, 3, 4, 5], [1, 2, 3, 9, 5], [7, 8, 3, 4, 5], [1, 2, 3, 4, 5]]


def test_worked_diversities():
    assert self_bleu(FOUR) == pytest.approx(0.743758, abs=1e-6)
    found = {name: trajectory_diversity(FOUR, name) for name in ("inverse_self_bleu", "edit", "distinct_3")}
    assert found == pytest.approx({"inverse_self_bleu": 0.256242, "edit": 0.126667, "distinct_3": 0.583333}, abs=1e-6)
    three = [[1, 2, 3, 4, 5, 6], [1, 2, 3], [4, 5, 6]]
    assert self_bleu(three) == pytest.approx(0.912269, abs=1e-6)
    assert trajectory_diversity(three, "edit") == pytest.approx(0.5, abs=1e-6)
    assert trajectory_diversity([[1, 2, 3, 4], [5, 6, 7, 8], [9, 10, 11, 12]]) == 1
    assert self_bleu([[1, 2], [3, 4, 5]]) == 0
    assert self_bleu([[1, 2, 0, 0, 0, 0], [3, 4, 5, 0, 0, 0]]) == pytest.approx(0.368403, abs=1e-6)  # with padding
    assert trajectory_diversity([[1], [1]]) == pytest.approx(0.784557, abs=1e-6)
    assert trajectory_diversity([[1, 2, 3]]) == 0 and trajectory_diversity([[], []]) == 1
    assert trajectory_diversity([[], []], "edit") == 0 and trajectory_diversity([[1], [2]], "distinct_3") == 0


def test_worked_scores():
    rewards = torch.tensor([[1, 1, 1, 0]], dtype=torch.float64)
    ovs = outcome_variance(rewards)
    assert ovs.item() == 0.1875
    assert (0.8 * ovs + 0.2 * trajectory_diversity(FOUR)).item() == pytest.approx(0.201248, abs=1e-6)
    graded = torch.tensor([[0.5, 1, 0, torch.nan]], dtype=torch.float64)
    assert outcome_variance(graded, "positive_variance").item() == pytest.approx(0.083333, abs=1e-6)
    assert success_rates(graded).item() == pytest.approx(1 / 3) and success_rates(graded, 0.4).item() == 2 / 3
    nothing = torch.full((1, 3), torch.nan)
    assert outcome_variance(nothing).item() == 0 == outcome_variance(nothing, "positive_variance").item()


def test_worked_batch():
    assert vas_batch_sizes(7, 0.5) == (3, 4) and vas_batch_sizes(10, 0.7) == (7, 3) and vas_batch_sizes(3, 0.3)[0] == 0
    assert interleave(torch.tensor([1, 2, 3]), torch.tensor([7, 8, 9, 10])).tolist() == [1, 7, 2, 8, 3, 9, 10]
    scores = torch.tensor([0.2, 0.1, 0, 0.1])
    counts = torch.zeros(4)
    trainer = build(VASTrainer, data=arithmetic().select(range(4)), vas_lambda=1.0, vas_scoring="online")
    trainer.vas_known[0] = scores
    for i in range(2000):
        counts += torch.bincount(trainer.choose_prompts(2, make_generator(0, i)), minlength=4)
    assert counts[2] == 0 and torch.allclose(counts / 4000, torch.tensor([0.5, 0.25, 0, 0.25]), atol=0.03)


tokens = st.lists(st.integers(0, 4), max_size=7)


def naive_bleu(hypothesis, references):
    """The definition, one n-gram at a time."""
    product = 1.0
    for n in (1, 2, 3):
        grams = [tuple(hypothesis[i : i + n]) for i in range(len(hypothesis) - n + 1)]
        matches = 0
        for gram in set(grams):
            most = max(sum(tuple(r[i : i + n]) == gram for i in range(len(r) - n + 1)) for r in references)
            matches += min(grams.count(gram), most)
        if matches == 0 and n > 1:
            matches = 0.1
        product *= matches / max(1, len(grams))
    if product == 0:
        return 0.0
    closest = sorted((abs(len(r) - len(hypothesis)), len(r)) for r in references)[0][1]
    penalty = 1 if len(hypothesis) > closest else math.exp(1 - closest / len(hypothesis))
    return penalty * product ** (1 / 3)


@settings(max_examples=150, deadline=None)
@given(st.lists(tokens, min_size=2, max_size=5))
def test_self_bleu_is_its_definition(responses):
    values = [naive_bleu(r, responses[:i] + responses[i + 1 :]) for i, r in enumerate(responses)]
    assert self_bleu(responses) == pytest.approx(sum(values) / len(values), abs=1e-9)
    for measure in ("inverse_self_bleu", "edit", "distinct_3"):
        assert -1e-9 <= trajectory_diversity(responses, measure) <= 1 + 1e-9
        shuffled = trajectory_diversity(responses[::-1], measure)
        assert shuffled == pytest.approx(trajectory_diversity(responses, measure), abs=1e-9)


def naive_distance(a, b):
    if not a or not b:
        return len(a) + len(b)
    return min(
        naive_distance(a[1:], b) + 1, naive_distance(a, b[1:]) + 1, naive_distance(a[1:], b[1:]) + (a[0] != b[0])
    )


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 3), max_size=5), st.lists(st.integers(0, 3), max_size=5))
def test_edit_distance_is_its_definition(a, b):
    assert edit_distance(a, b) == naive_distance(a, b) == edit_distance(b, a)


@given(st.integers(1, 9), st.lists(st.integers(0, 12), max_size=6))
def test_the_pool_gives_every_prompt_before_any_again(size, counts):
    rows, start = [], 0
    for count in counts:
        rows += pool_rows(size, start, count, 7).tolist()
        start += count
    for epoch in range(0, len(rows) - size + 1, size):
        assert sorted(rows[epoch : epoch + size]) == list(range(size))
    assert rows == pool_rows(size, 0, len(rows), 7).tolist()


# -------------------------------------------------------------------------------------------------- in the trainer


def by_prompt(prompts, **kwargs):
    """One prompt is solved half of the time, the others never."""
    special = arithmetic()["prompt"][3]
    return [float(prompt == special and i % 2) for i, prompt in enumerate(prompts)]


def test_refreshes_find_the_prompts_worth_drawing():
    settings = {"vas_num_rollouts": 4, "vas_update_steps": 2, "vas_tds_weight": 0.0, "max_steps": 5}
    seen = []

    class Watching(VASTrainer):
        config_class = VASConfig

        def observe(self, rollouts):
            super().observe(rollouts)
            seen.append(rollouts.prompt_index[::4].tolist())

    data = arithmetic().select(range(8))
    trainer = train(Watching, data=data, rewards=by_prompt, per_device_train_batch_size=16, **settings)
    known = trainer.prompt_table()
    assert known["vas/rate"].tolist() == [0, 0, 0, 0.5, 0, 0, 0, 0] and known["vas/ovs"][3] == 0.25
    assert known["vas/score"].tolist() == [0, 0, 0, 0.8 * 0.25, 0, 0, 0, 0]
    assert all(rows[0] == rows[2] == 3 for rows in seen)  # drawn by score, twice in a batch
    assert sorted(seen[0][1::2] + seen[1][1::2] + seen[2][1::2] + seen[3][1::2]) == list(range(8))  # uniform, in turn
    assert trainer.rollouts_spent == 5 * 16 + 3 * 8 * 4  # refreshes before generations 0, 2 and 4
    assert trainer.vas_refreshed == 4


def test_momentum_smooths_the_scores():
    trainer = build(VASTrainer, vas_momentum=0.75, vas_tds_weight=0.0, vas_scoring="online")
    trainer._vas_learn(torch.tensor([2]), [[0.25, 0.5, 0.5]])
    trainer._vas_learn(torch.tensor([2, 4]), [[0.0, 0.5, 0.0], [0.25, 0.0, 0.5]])
    assert trainer.vas_known[0, [2, 4]].tolist() == pytest.approx([0.75 * 0.2, 0.2])
    assert trainer.vas_known[1:, 2].tolist() == [0, 0.5, 0]
    assert trainer._vas_scores()[0].item() == pytest.approx((0.15 + 0.2) / 2)  # not seen: the mean of those that were
    trainer.args.vas_minmax = True
    assert trainer._vas_scores()[2] == 0 and trainer._vas_scores()[4].item() == pytest.approx(1)


def test_online_scores_are_those_of_the_training_groups():
    def rewards(completions, **kwargs):
        return [None if i == 0 else float(i % 2) for i in range(len(completions))]

    trainer = train(VASTrainer, vas_scoring="online", rewards=rewards, max_steps=1, vas_diversity="edit")
    seen = ~trainer.vas_known[0].isnan()
    assert seen.sum() == 2 and trainer.rollouts_spent == 8
    assert sorted(trainer.vas_known[3, seen].tolist()) == pytest.approx([0.5, 2 / 3])
    tds = trainer.vas_known[2, seen]
    assert (tds > 0).all() and torch.allclose(trainer.vas_known[0, seen], 0.8 * trainer.vas_known[1, seen] + 0.2 * tds)


@pytest.mark.parametrize("masked", [False, True])
def test_an_answer_that_was_cut_off_is_wrong_and_counts_as_a_trajectory(masked):
    settings = {"rewards": lambda completions, **kw: [1.0] * len(completions), "max_completion_length": 3}
    settings |= {"temperature": 20.0, "max_steps": 1, "vas_diversity": "edit", "vas_scoring": "online"}
    trainer = train(VASTrainer, mask_truncated_completions=masked, **settings)
    seen = ~trainer.vas_known[0].isnan()
    assert (trainer.vas_known[3, seen] < 0.5).all() and (trainer.vas_known[2, seen] > 0.3).all()


def test_nothing_to_tell_prompts_apart_means_uniform_draws():
    settings = {"vas_num_rollouts": 2, "vas_tds_weight": 0.0, "max_steps": 3}
    trainer = train(VASTrainer, rewards=lambda completions, **kw: [1.0] * len(completions), **settings)
    assert not trainer._vas_scores().any() and trainer.state.global_step == 3


def test_bad_input():
    for name, value in {
        "vas_lambda": 1.5,
        "vas_ovs_weight": -1.0,
        "vas_tds_weight": -1.0,
        "vas_update_steps": 0,
        "vas_num_rollouts": 1,
        "vas_momentum": 1.0,
        "vas_max_tokens": 0,
        "vas_diversity": "bleu",
        "vas_scoring": "never",
        "vas_outcome": "mean",
    }.items():
        with pytest.raises(ValueError, match=f"`{name}` must be"):
            VASConfig("unused", use_cpu=True, bf16=False, **{name: value})
    with pytest.raises(ValueError, match="`vas_accuracy_reward` names the reward function 'accuracy'"):
        build(VASTrainer, vas_accuracy_reward="accuracy")
    with pytest.warns(UserWarning, match=r"`vas_lambda` \(0.3\) of 2 prompts per generation is less than one"):
        build(VASTrainer, vas_lambda=0.3)
    for other in ("spo", "vade"):
        with pytest.raises(MixingError):
            mix("vas", other)
