import math

import pytest
import torch
from harness import arithmetic, build, difference, parity_reward, scripted, train
from hypothesis import given, settings
from hypothesis import strategies as st

from trl_ext import DCPOConfig, DCPOTrainer, MethodTrainer, mix
from trl_ext.core.loss import clipped_loss
from trl_ext.core.rollouts import group_advantages
from trl_ext.methods.dcpo import dcpo_advantages, dcpo_bounds


def visit(rewards, state=(0.0, 0.0, 0.0), **options):
    """One group; returns its advantages and (visits, mean, std)."""
    values = torch.tensor(rewards, dtype=torch.float64)
    before = [torch.tensor([x], dtype=torch.float64) for x in state]
    advantages, *after = dcpo_advantages(values, torch.zeros(len(values), dtype=torch.long), *before, **options)
    return advantages.tolist(), tuple(x.item() for x in after)


def test_worked_example_of_three_visits():
    advantages, state = visit([1, 0, 0, 0])
    assert advantages == pytest.approx([1.5, -0.5, -0.5, -0.5], abs=1e-6)
    assert state == pytest.approx((1, 0.25, 0.5), abs=1e-6)
    advantages, state = visit([0, 0, 0, 0], state)
    assert advantages == pytest.approx([-0.166667] * 4, abs=1e-6)
    assert state == pytest.approx((2, 0.125, 0.375), abs=1e-6)
    advantages, state = visit([1, 1, 0, 0], state)
    assert advantages == pytest.approx([1.091846, 1.091846, -0.631672, -0.631672], abs=1e-6)
    assert state == pytest.approx((3, 0.25, 0.485913), abs=1e-6)


def test_worked_bounds():
    q = torch.tensor([1, 0.9, 0.5, 0.1, 0.01, 0.002, 0.001], dtype=torch.float64)
    low, high = dcpo_bounds(q.log())
    assert low.tolist() == pytest.approx([0.8, 0.768742, 0.5, 0.5, 0.5, 0.5, 0.5], abs=1e-6)
    assert high.tolist() == pytest.approx([1.170820, 1.187184, 1.306226, 2, 5, 10, 10], abs=1e-6)
    low, high = dcpo_bounds(torch.tensor([-1e9, 0.3]))  # an underflow, and a rounding error above 1
    assert low.tolist() == pytest.approx([0.5, 0.8]) and high.tolist() == pytest.approx([10, 1.170820])


Q = torch.tensor([[0.9, 0.1, 1.0], [0.5, 0.01, 0.3]], dtype=torch.float64)
P = torch.tensor([[0.99, 0.25, 1.0], [0.2, 0.2, 0.3]], dtype=torch.float64)
MASK = torch.tensor([[1, 1, 0], [1, 1, 1]])
ADVANTAGES = torch.tensor([[1.0], [-1.0]], dtype=torch.float64)


def test_worked_loss():
    class Tokens:
        old_logps, logps, mask, advantages, items, rows = Q.log(), P.log(), MASK, ADVANTAGES.expand(2, 3), 5.0, 2.0

        def replace(self, **changes):
            return self.__dict__.update(changes) or self

    trainer = build(DCPOTrainer, num_generations=2)
    trainer.log_token_metric = lambda name, part, whole: logged.append((name, (part / whole).item()))
    logged, tokens = [], Tokens()
    tokens.log_ratio = trainer.log_ratio(tokens)
    tokens.ratio_low, tokens.ratio_high = trainer.clip_range(tokens)
    per_token = trainer.policy_loss(tokens)
    assert per_token[MASK.bool()].tolist() == pytest.approx([-1.1, -2.0, 0.5, 10.0, 1.0], abs=1e-6)
    assert trainer.aggregate_loss(per_token, tokens).item() == pytest.approx(2.283333, abs=1e-6)
    assert logged == [("dcpo/clipped", pytest.approx(0.6))]
    trainer.args.dcpo_otm_scale = "mean"
    assert trainer.aggregate_loss(per_token, tokens).item() == pytest.approx(2.283333 / 2, abs=1e-6)


@settings(max_examples=60, deadline=None)
@given(
    st.floats(-12, 0), st.floats(-4, 4), st.sampled_from([-1.5, 0.7]), st.sampled_from([0.1, 0.16]), st.floats(1.5, 12)
)
def test_gradient_of_the_clip(old, change, advantage, eps, ratio_max):
    """The gradient is -A r exactly where no bound is passed: for A < 0 above low and up to the largest ratio."""
    old = torch.tensor([[old]], dtype=torch.float64)
    low, high = dcpo_bounds(old, eps, 0.2, ratio_max)
    logp = (old + change).requires_grad_()
    ratio = (logp - old).exp().item()
    if min(abs(ratio - low.item()), abs(ratio - high.item()), abs(ratio - ratio_max)) < 1e-9:
        return
    log_ratio = (logp - old).clamp(max=math.log(ratio_max))
    clipped_loss(log_ratio, torch.tensor([[advantage]], dtype=torch.float64), low, high).sum().backward()
    live = ratio < high.item() if advantage > 0 else low.item() < ratio < ratio_max
    assert logp.grad.item() == pytest.approx(-advantage * ratio if live else 0.0, rel=1e-9)
    assert 0.5 <= low.item() < 1 < high.item() <= ratio_max


@settings(max_examples=80, deadline=None)
@given(
    st.lists(st.one_of(st.sampled_from([0.0, 0.1, 1.0, float("nan")]), st.floats(-3, 3)), min_size=1, max_size=6),
    st.sampled_from(["sample", "population"]),
    st.floats(-5, 5),
    st.integers(0, 5),
)
def test_properties_of_a_visit(rewards, estimator, shift, visits):
    state = (float(visits), 0.3, 0.4) if visits else (0.0, 0.0, 0.0)
    advantages, after = visit(rewards, state, estimator=estimator)
    known = [r for r in rewards if r == r]
    assert all(a == a and abs(a) < 1e9 for a in advantages)
    assert all(a == 0 for a, r in zip(advantages, rewards, strict=True) if r != r)
    if len(known) < 2:
        assert advantages == [0] * len(rewards) and after == state
        return
    assert after[0] == visits + 1
    # Unscored rollouts influence nobody.
    alone, again = visit(known, state, estimator=estimator)
    assert again == pytest.approx(after) and alone == pytest.approx(
        [a for a, r in zip(advantages, rewards, strict=True) if r == r]
    )
    # Nor does a constant, if it was there from the start.
    moved, _ = visit([r + shift for r in known], (state[0], state[1] + shift, state[2]), estimator=estimator)
    if max(known) - min(known) > 1e-3:
        assert moved == pytest.approx(alone, abs=1e-6)


@pytest.mark.parametrize("value", [0.1, 0.3, -7.7])
@pytest.mark.parametrize("size", [3, 7, 8])
def test_a_reward_that_never_varies_never_teaches(value, size):
    state = (0.0, 0.0, 0.0)
    for _ in range(12):
        advantages, state = visit([value] * size, state)
        assert advantages == [0] * size and state[2] == 0


def test_the_history_is_that_of_all_rewards():
    """With the population's standard deviation the recursion is that of the pooled rewards."""
    torch.manual_seed(0)
    groups = torch.randn(5, 4, dtype=torch.float64)
    state = (0.0, 0.0, 0.0)
    for group in groups:
        _, state = visit(group.tolist(), state, estimator="population")
    assert state == pytest.approx((5, groups.mean().item(), groups.std(unbiased=False).item()), abs=1e-12)


def test_first_visit_is_grpo():
    rewards = [0.3, 1.0, -0.5, 0.0]
    expected = group_advantages(torch.tensor(rewards, dtype=torch.float64), torch.zeros(4, dtype=torch.long), eps=0.0)
    assert visit(rewards)[0] == pytest.approx(expected.tolist(), abs=1e-6)


def test_a_forgotten_history_counts_as_nothing():
    assert visit([1, 0, 0], (3.0, 0.9, 0.2), history_weight=0.0) == visit([1, 0, 0], (3.0, 0.0, 0.0))


# -------------------------------------------------------------------------------------------------- in the trainer


class Recording(DCPOTrainer):
    config_class = DCPOConfig

    def observe(self, rollouts):
        before = self.dcpo_history.clone()
        super().observe(rollouts)
        self.__dict__.setdefault("seen", []).append((rollouts, before))


def test_groups_of_one_prompt_are_successive_visits():
    class Twice(Recording):
        replaces = ("choose_prompts",)

        def choose_prompts(self, n, generator):
            return torch.tensor([5, 2, 5, 5])

    trainer = train(Twice, rollout_func=scripted, per_device_train_batch_size=16, max_steps=1)
    ((rollouts, _),) = trainer.seen
    state, found = (0.0, 0.0, 0.0), []
    for group in (0, 2, 3):
        advantages, state = visit(rollouts.rewards[rollouts.group_ids == group].tolist(), state)
        found += advantages
    rows = rollouts.prompt_index == 5
    assert rollouts.advantages[rows].tolist() == pytest.approx(found, abs=1e-6)
    assert trainer.dcpo_history[:, 5].tolist() == pytest.approx(list(state))
    assert trainer.dcpo_history[0].nonzero().flatten().tolist() == [2, 5] and trainer.dcpo_history[0, 2] == 1


def test_groups_of_equal_rewards_teach_from_the_second_visit_on():
    calls = []

    def reward(completions, **kwargs):
        calls.append(1)
        return [float(i % 4 == 0) if len(calls) == 1 else 0.0 for i in range(len(completions))]

    data = arithmetic().select(range(2))
    trainer = train(Recording, rewards=reward, data=data, max_steps=2)
    (first, _), (second, _) = trainer.seen
    assert first.advantages.tolist() == pytest.approx([1.5, -0.5, -0.5, -0.5] * 2)
    assert second.advantages.tolist() == pytest.approx([-0.166667] * 8, abs=1e-6)
    logs = [entry["dcpo/nonzero_advantage"] for entry in trainer.state.log_history if "dcpo/visited" in entry]
    assert logs == [1.0, 1.0]


def test_evaluation_reads_and_never_writes():
    trainer = train(DCPOTrainer, eval_dataset=arithmetic().select(range(4)), per_device_eval_batch_size=8)
    before = trainer.dcpo_history.clone()
    trainer.evaluate()
    assert torch.equal(before, trainer.dcpo_history)
    assert any("eval_dcpo/nonzero_advantage" in entry for entry in trainer.state.log_history)


def test_answers_to_a_hint_are_no_visit():
    class Hinting(Recording):
        def edit_examples(self, examples, group_ids):
            for example, group in zip(super().edit_examples(examples, group_ids), group_ids.tolist(), strict=True):
                if group == 0:
                    example["prompt"] += " "
            return examples

    trainer = train(Hinting, max_steps=1)
    ((rollouts, _),) = trainer.seen
    rows = rollouts.prompt_index
    assert trainer.dcpo_history[0, rows[0]] == 0 and trainer.dcpo_history[0, rows[-1]] == 1


def test_parts_can_be_switched_off():
    off = {"dcpo_use_sas": False, "dcpo_use_dac": False, "dcpo_use_otm": False}
    shared = {"num_iterations": 2, "max_steps": 4, "rewards": parity_reward}
    plain = train(MethodTrainer, **shared)
    assert difference(train(DCPOTrainer, **off, **shared), plain) < 1e-6
    for part in off:
        assert difference(train(DCPOTrainer, **(off | {part: True}), **shared), plain) > 1e-6


def test_bad_input():
    for name, value in {
        "num_generations": 1,
        "dcpo_eps_low": 0.0,
        "dcpo_eps_high": -0.1,
        "dcpo_ratio_max": 1.0,
        "dcpo_history_weight": 1.5,
        "dcpo_sas_std": "both",
        "dcpo_otm_scale": "none",
    }.items():
        with pytest.raises(ValueError, match=f"`{name}` must be"):
            DCPOConfig("unused", use_cpu=True, bf16=False, **{name: value})
    with pytest.raises(ValueError, match=r"`dcpo_use_dac` bounds.*importance_sampling_level='sequence'"):
        build(DCPOTrainer, importance_sampling_level="sequence")
    with pytest.raises(ValueError, match=r"`dcpo_use_dac` bounds.*loss_type='cispo'"):
        build(DCPOTrainer, loss_type="cispo")
    with pytest.warns(UserWarning, match="never clips a token"):
        build(DCPOTrainer)
    with pytest.raises(TypeError, match="replace the groups of equal rewards"):
        mix("dcpo", "dynamic_sampling")
