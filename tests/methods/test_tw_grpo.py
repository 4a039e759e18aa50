import math

import pytest
import torch
from harness import build, difference, partly_external, scripted, train
from hypothesis import given, settings
from hypothesis import strategies as st

from trl_ext import MethodTrainer, MixingError, TWGRPOConfig, TWGRPOTrainer, mix
from trl_ext.core.loss import aggregate
from trl_ext.methods.tw_grpo import (
    answer_format,
    deal_groups,
    position_divergence,
    position_weights,
    soft_accuracy,
    soft_choice,
    symbolically_equal,
)
from trl_ext.tasks.data import load_rewards


PROBABILITIES = torch.tensor(
    [
        [[0.7, 0.2, 0.1], [0.5, 0.25, 0.25], [1 / 3, 1 / 3, 1 / 3]],
        [[0.1, 0.2, 0.7], [0.5, 0.25, 0.25], [0.8, 0.1, 0.1]],
    ],
    dtype=torch.float64,
)
MASK = torch.tensor([[1, 1, 1], [1, 1, 0]])


def weights_of(logps, mask, alpha=1.7, **options):
    return position_weights(position_divergence(logps, mask, **options), alpha) * mask


def test_worked_example():
    weights = weights_of(PROBABILITIES.log(), MASK)
    expected = torch.tensor([[1.7, 1.0, 1.0], [1.7, 1.0, 0.0]], dtype=torch.float64)
    assert torch.allclose(weights, expected, atol=1e-6)
    losses = torch.tensor([[0.2, -0.4, 0.1], [0.3, 0.6, 9.0]], dtype=torch.float64)
    assert aggregate(losses * weights, MASK, "bnpo", 1.0, 2.0, 3).item() == pytest.approx(0.23, abs=1e-6)
    assert aggregate(losses, MASK, "bnpo", 1.0, 2.0, 3).item() == pytest.approx(0.16, abs=1e-6)


def naive_weights(logps, mask, alpha, clamp):
    """The authors' formula, one number at a time."""
    rollouts, length, vocabulary = logps.shape
    divergence = []
    for t in range(length):
        rows = [logps[g, t].tolist() if mask[g, t] else [-math.log(vocabulary)] * vocabulary for g in range(rollouts)]
        total = 0.0
        for v in range(vocabulary):
            mean = sum(row[v] for row in rows) / rollouts
            for row in rows:
                d = min(max(mean - row[v], -clamp), clamp)
                total += math.exp(d) - d - 1
        divergence.append(total / rollouts)
    low, high = min(divergence), max(divergence)
    return [1 + (alpha - 1) * (d - low) / (high - low + 1e-8) for d in divergence]


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 4), st.integers(1, 5), st.integers(2, 6), st.integers(0, 10_000))
def test_weights_follow_the_formula(rollouts, length, vocabulary, seed):
    generator = torch.Generator().manual_seed(seed)
    logits = 6 * torch.randn(rollouts, length, vocabulary, generator=generator, dtype=torch.float64)
    logps = logits.log_softmax(-1)
    mask = (torch.rand(rollouts, length, generator=generator) < 0.8).long()
    found = weights_of(logps, torch.ones_like(mask), 2.5, clamp=4.0)
    expected = torch.tensor(naive_weights(logps, torch.ones_like(mask), 2.5, 4.0), dtype=torch.float64)
    assert torch.allclose(found, expected.expand_as(found), atol=1e-6)
    found = weights_of(logps, mask, 2.5, clamp=4.0)
    expected = torch.tensor(naive_weights(logps, mask, 2.5, 4.0), dtype=torch.float64)
    assert torch.allclose(found, expected * mask, atol=1e-6)
    spoiled = logps.masked_fill(mask.unsqueeze(2) == 0, torch.nan)
    for ended in ("uniform", "ignore"):
        assert torch.equal(
            position_divergence(spoiled, mask, ended=ended), position_divergence(logps, mask, ended=ended)
        )


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 10_000))
def test_gradient_is_the_weighted_surrogates(seed):
    """Against central differences of the loss with the weights held fixed: they carry no gradient."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(3, 4, 5, generator=generator, dtype=torch.float64)
    ids = torch.randint(5, (3, 4, 1), generator=generator)
    mask = (torch.rand(3, 4, generator=generator) < 0.8).long()
    advantages = torch.randn(3, 1, generator=generator, dtype=torch.float64)
    old = logits.log_softmax(-1).gather(2, ids).squeeze(2)

    def loss(logits, weights=None):
        logps = logits.log_softmax(-1)
        weights = weights_of(logps, mask) if weights is None else weights
        per_token = -(logps.gather(2, ids).squeeze(2) - old).exp() * advantages * weights
        return aggregate(per_token, mask, "bnpo", 1.0, 3.0, 4)

    leaf = logits.clone().requires_grad_()
    loss(leaf).backward()
    fixed = weights_of(logits.log_softmax(-1), mask)
    for index in [(0, 0, 0), (1, 2, 3), (2, 3, 4)]:
        step = torch.zeros_like(logits)
        step[index] = 1e-5
        numeric = (loss(logits + step, fixed) - loss(logits - step, fixed)) / 2e-5
        assert leaf.grad[index].item() == pytest.approx(numeric.item(), abs=1e-6)


class TestEdges:
    def test_exact_agreement_weighs_all_positions_the_same(self):
        same = PROBABILITIES[:1].log().expand(4, 3, 3)
        assert torch.equal(weights_of(same, torch.ones(4, 3)), torch.ones(4, 3, dtype=torch.float64))

    def test_tiny_differences_already_spread_the_weights(self):
        generator = torch.Generator().manual_seed(0)
        logps = torch.randn(1, 3, 1000, generator=generator, dtype=torch.float64).log_softmax(-1).repeat(2, 1, 1)
        logps[1] += (
            1e-5
            * torch.randn(3, 1000, generator=generator, dtype=torch.float64)
            * torch.tensor([[1.0], [0.0], [10.0]], dtype=torch.float64)
        )
        weights = weights_of(logps, torch.ones(2, 3))
        assert weights[0, 1] == 1 and weights[0, 2] > 1.4

    def test_one_rollout_or_one_position(self):
        assert (weights_of(PROBABILITIES[:1].log(), MASK[:1]) == 1).all()
        assert (weights_of(PROBABILITIES[:, :1].log(), MASK[:, :1]) == 1).all()

    def test_a_tail_after_all_ends_has_the_smallest_divergence(self):
        logps = torch.cat([PROBABILITIES[:, [0, 0]].log(), torch.zeros(2, 1, 3).double()], dim=1)
        logps[1, 1] = torch.tensor([0.5, 0.2, 0.3], dtype=torch.float64).log()
        mask = torch.tensor([[1, 1, 0], [1, 1, 0]])
        with_tail, without = weights_of(logps, mask), weights_of(logps[:, :2], mask[:, :2])
        assert position_divergence(logps, mask)[2] == 0
        assert without[0, 1] == 1 and 1 < with_tail[0, 1] < with_tail[0, 0]

    def test_ended_rollouts(self):
        divergence = position_divergence(PROBABILITIES.log()[[1, 0]], MASK[[1, 0]])  # the sharp one has ended
        assert divergence[2] == 0
        sharp = position_divergence(PROBABILITIES.log(), MASK[[1, 0]])  # the flat one has
        assert sharp[2] > 0
        ignored = position_divergence(PROBABILITIES.log(), MASK[[1, 0]], ended="ignore")
        assert ignored[2] == 0 and torch.allclose(ignored[:2], sharp[:2])
        nobody = position_divergence(PROBABILITIES.log(), torch.zeros(2, 3), ended="ignore")
        assert (nobody == 0).all()

    def test_clamp(self):
        logps = torch.tensor([[[-0.0, -80.0]], [[-80.0, -0.0]]], dtype=torch.float64)
        d = 11.0
        expected = math.exp(d) - d - 1 + math.exp(-d) + d - 1
        assert position_divergence(logps, torch.ones(2, 1)).item() == pytest.approx(expected)

    def test_alpha_bounds_the_weights(self):
        divergence = torch.tensor([[3.0, 1.0, 2.0], [0.0, 0.0, 0.0]], dtype=torch.float64)
        weights = position_weights(divergence, 3.0)
        assert torch.allclose(
            weights, torch.tensor([[3.0, 1.0, 2.0], [1.0, 1.0, 1.0]], dtype=torch.float64), atol=1e-6
        )


def test_groups_are_dealt_evenly():
    assert deal_groups(torch.tensor([0, 0, 1, 1, 2, 2, 3, 3]), 2) == ([[0, 1], [2, 3]], False)
    assert deal_groups(torch.tensor([0, 0, 0, 1, 1, 1, 2, 2, 2, 2, 2, 2]), 2) == ([[0, 1], [2, 2]], False)
    assert deal_groups(torch.tensor([0, 0, 0, 1, 1, 1, 2, 2]), 2) == ([[0, 2], [1, 1]], True)
    assert deal_groups(torch.tensor([5, 5, 5, 5]), 4) == ([[5], [5], [5], [5]], True)


class TestRewards:
    @pytest.mark.parametrize(
        "text, solution, credit",
        [
            ("A,B", "A,B", 1.0),
            ("B, A", "A,B", 1.0),
            ("A", "A,B", 0.5),
            ("A,C", "A,B", 0.0),
            ("A,B,C", "A,B", 0.0),
            ("A,A", "A,B", 0.5),
            ("", "A", 0.0),
            ("a", "A", 0.0),
            ("<think>B</think><answer> A,\n B </answer>", "<answer>A,B,C,D</answer>", 0.5),
            ("<answer>A</answer><answer>B</answer>", "A,B", 0.5),
            ("<answer></answer>", "A", 0.0),
            ("A", "<answer>A</answer>", 1.0),
            ("the answer is A", "A", 0.0),
        ],
    )
    def test_soft_choice(self, text, solution, credit):
        assert soft_choice(text, solution) == credit

    def test_another_form_of_the_same_answer(self):
        assert symbolically_equal("$\\frac{1}{2}$", "$0.5$")
        assert soft_choice("$\\frac{1}{2}$", "$0.5$") == 1.0
        assert soft_choice("$\\frac{1}{2}$", "$0.5$", equal=lambda text, solution: False) == 0.0

    def test_as_a_reward_function(self):
        (reward,) = load_rewards(["trl_ext.methods.tw_grpo.soft_accuracy"])
        assert reward is soft_accuracy
        chat = [[{"role": "assistant", "content": "A"}], [{"role": "assistant", "content": None}]]
        assert reward(chat, solution=["A,B", "A"], other=[1, 2]) == [0.5, 0.0]
        assert reward(["A", "A"], solution=["A", None]) == [1.0, None]

    @pytest.mark.parametrize(
        "text, bit",
        [
            ("<think>x</think><answer>A</answer>", 1.0),
            ("Well. <think>x\ny</think> \n <answer>A</answer>\n", 1.0),
            ("<think>x</think> so <answer>A</answer>", 0.0),
            ("<think>x</think><answer>A</answer>.", 0.0),
            ("<answer>A</answer>", 0.0),
            ("<think>x</think>", 0.0),
            ("<think><think>x</think><answer>A</answer>", 0.0),
            ("<think>x</think><answer>A</answer><answer>B</answer>", 0.0),
            ("", 0.0),
        ],
    )
    def test_format(self, text, bit):
        assert answer_format([text, [{"role": "assistant", "content": text}]]) == [bit, bit]

    def test_partial_credit_gives_more_groups_a_signal(self):
        generator = torch.Generator().manual_seed(0)
        chosen = torch.rand(500, 8, 4, generator=generator) < torch.tensor([0.6, 0.6, 0.15, 0.15])
        signals = [0, 0]
        for group in chosen.tolist():
            texts = [",".join(option for option, on in zip("ABCD", row, strict=True) if on) for row in group]
            credit = [soft_choice(text, "A,B", equal=lambda text, solution: False) for text in texts]
            signals[0] += len({value == 1 for value in credit}) > 1
            signals[1] += len(set(credit)) > 1
        assert signals[0] / 500 == pytest.approx(0.91, abs=0.04) and signals[1] / 500 > 0.99


# ------------------------------------------------------------------------------------------------------------ training


def checking(base=TWGRPOTrainer):
    """Compares the weights with those from all log-probabilities at once."""

    class Checking(base):
        def carry(self, rollouts):
            carried = super().carry(rollouts)
            logits = self.model(
                input_ids=torch.cat([rollouts.prompt_ids, rollouts.completion_ids], dim=1),
                attention_mask=torch.cat([rollouts.prompt_mask, rollouts.completion_mask], dim=1),
            ).logits.detach()
            width = rollouts.completion_ids.shape[1]
            logps = logits[:, -width - 1 : -1].float().log_softmax(-1)
            for group in rollouts.group_ids.unique():
                rows = rollouts.group_ids == group
                options = {"clamp": self.args.tw_clamp, "ended": self.args.tw_ended}
                expected = weights_of(logps[rows], rollouts.mask[rows], self.args.tw_alpha, **options)
                assert torch.allclose(carried["tw_grpo"][rows], expected, atol=1e-3)
                assert expected.max() > 1.1
            self.checked = True
            return carried

    return Checking


@pytest.mark.parametrize(
    "options",
    [
        {"rollout_func": scripted},
        {"rollout_func": partly_external, "tw_ended": "ignore", "tw_alpha": 3.0},
        # A group in several passes, and several chunks of positions.
        {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4, "max_completion_length": 12},
    ],
)
def test_in_a_run(options, monkeypatch):
    monkeypatch.setattr("trl_ext.methods.tw_grpo.TOKENS_AT_ONCE", 8)
    trainer = train(checking(), **options)
    assert trainer.checked
    assert 1.0 < trainer.state.log_history[0]["tw_grpo/weight"] < trainer.args.tw_alpha
    assert trainer.state.log_history[0]["tw_grpo/divergence"] > 0


def test_the_vocabulary_is_never_held_for_all_tokens(monkeypatch):
    monkeypatch.setattr("trl_ext.methods.tw_grpo.TOKENS_AT_ONCE", 4)
    sizes = []

    class Counting(TWGRPOTrainer):
        def head_logits(self, states):
            sizes.append(states.shape[:-1].numel())
            return super().head_logits(states)

    train(Counting, max_completion_length=16, max_steps=1)
    assert len(sizes) > 2 and max(sizes) <= 4


def test_weights_stay_for_all_updates_of_a_generation():
    passes = []

    class Counting(TWGRPOTrainer):
        def completion_hidden_states(self, *args):
            passes.append(self.state.global_step)
            return super().completion_hidden_states(*args)

    train(Counting, num_iterations=2, max_steps=4, per_device_train_batch_size=4, gradient_accumulation_steps=2)
    assert passes == [0, 0, 2, 2]  # two groups in each generation


def solution_data():
    from datasets import Dataset

    return Dataset.from_list([{"prompt": "1+1=", "solution": "A,B"}] * 8)


def lettered(prompts, trainer):
    tokenizer = trainer.processing_class
    answers = ["A", "B,A", "C", "A"] * (len(prompts) // 4)
    return {
        "prompt_ids": tokenizer(list(prompts))["input_ids"],
        "completion_ids": [[*ids, tokenizer.eos_token_id] for ids in tokenizer(answers)["input_ids"]],
        "logprobs": None,
    }


@pytest.mark.parametrize("soft, expected", [(True, [0.5, 1.0, 0.0, 0.5]), (False, [0.0, 1.0, 0.0, 0.0])])
def test_soft_reward_can_be_switched_off(soft, expected):
    seen = []

    class Watching(TWGRPOTrainer):
        def observe(self, rollouts):
            super().observe(rollouts)
            seen.append(rollouts)

    train(
        Watching, data=solution_data(), rewards=[soft_accuracy, answer_format], rollout_func=lettered, soft_reward=soft
    )
    assert seen[0].rewards.tolist() == expected * 2
    assert seen[0].reward_matrix[:, 0].tolist() == [0.5, 1.0, 0.0, 0.5] * 2


def test_alpha_one_is_grpo_with_either_loss():
    for loss_type in ("bnpo", "grpo"):
        plain = train(MethodTrainer, loss_type=loss_type)
        assert difference(train(TWGRPOTrainer, tw_alpha=1.0, loss_type=loss_type), plain) == 0.0
        assert difference(train(TWGRPOTrainer, loss_type=loss_type), plain) > 1e-6


@pytest.mark.parametrize("field, value", [("tw_alpha", 0.99), ("tw_clamp", 0.0), ("tw_ended", "never")])
def test_settings_out_of_range_are_named(field, value):
    with pytest.raises(ValueError, match=f"`{field}` must be"):
        TWGRPOConfig("unused", use_cpu=True, bf16=False, **{field: value})


def test_what_it_cannot_honour():
    with pytest.raises(ValueError, match="`soft_reward` is False, but"):
        build(TWGRPOTrainer, soft_reward=False)
    for other, reason in {"disco": "does not look at `token_weights`", "spo": "one rollout per prompt"}.items():
        with pytest.raises(MixingError, match=reason):
            mix("tw_grpo", other)
