import itertools
import math

import pytest
import torch
from harness import build, difference, scripted, train
from hypothesis import given, settings
from hypothesis import strategies as st

from trl_ext import GTPOConfig, GTPOTrainer, MixingError, mix
from trl_ext.core.loss import aggregate
from trl_ext.methods.gtpo import (
    conflict_counts,
    conflict_runs,
    conflict_weights,
    entropy_filter,
    gtpo_advantages,
    gtpo_loss,
    mean_entropy,
)


LN2 = math.log(2)
IDS = torch.tensor([[5, 6, 11, 12, 8, 9], [5, 6, 13, 8, 9, 0], [5, 7, 14, 15, 16, 9]])
MASK = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 0], [1, 1, 1, 1, 1, 1]])
ADVANTAGES = torch.tensor([2.0, -1.0, -1.0], dtype=torch.float64)
ENTROPY = torch.tensor([0.3, 0.9, 0.5], dtype=torch.float64)
GROUP = torch.zeros(3, dtype=torch.long)


def example_weights():
    prefix, suffix = conflict_runs(IDS, MASK, ADVANTAGES, GROUP)
    return conflict_weights(prefix, suffix, ADVANTAGES, MASK), prefix, suffix


def test_worked_conflicts():
    weights, prefix, suffix = example_weights()
    assert weights.tolist() == [[2, 2, 1, 1, 2, 2], [0, 0, 1, 0, 0, 0], [0, 1, 1, 1, 1, 0]]
    assert (prefix | suffix).int().tolist() == [[1, 1, 0, 0, 1, 1], [1, 1, 0, 1, 1, 0], [1, 0, 0, 0, 0, 1]]
    assert conflict_counts(prefix, suffix).tolist() == [2, 2, 1]


@pytest.mark.parametrize("initial, expected", [(0.5, -0.861111), (0.9, -0.788444)])
def test_worked_loss(initial, expected):
    weights, _, _ = example_weights()
    logps = torch.full(MASK.shape, -1.0, dtype=torch.float64, requires_grad=True)
    kept = entropy_filter(ENTROPY, initial)
    per_token = gtpo_loss(logps - logps.detach(), ADVANTAGES, ENTROPY, kept) * weights
    if initial == 0.5:
        shaped = gtpo_loss(torch.zeros_like(logps), ADVANTAGES, ENTROPY, kept)[:, 0]
        assert torch.allclose(-shaped.detach(), torch.tensor([1.97, 0.0, -1.05], dtype=torch.float64))
    loss = aggregate(per_token, MASK, "grpo", 17.0, 3.0, 6)
    loss.backward()
    assert loss.item() == pytest.approx(expected, abs=1e-6)
    if initial == 0.5:
        high, low = -0.218889, -0.109444
        expected = [[high, high, low, low, high, high], [0] * 6, [0, *[0.058333] * 4, 0]]
        assert torch.allclose(logps.grad, torch.tensor(expected, dtype=torch.float64), atol=1e-6)


def test_worked_loss_of_the_released_code():
    weights, prefix, suffix = example_weights()
    weights = weights * 3 / conflict_counts(prefix, suffix).clamp(min=1).unsqueeze(1)
    per_token = gtpo_loss(torch.zeros(3, 6).double(), ADVANTAGES, ENTROPY, entropy_filter(ENTROPY, None, 0.7))
    assert aggregate(per_token * weights, MASK, "grpo", 17.0, 3.0, 6).item() == pytest.approx(-0.941667, abs=1e-6)


def test_filter():
    entropy = torch.tensor([0.1, LN2, 0.695, 2.0], dtype=torch.float64)
    assert entropy_filter(entropy).tolist() == [True, True, False, False]
    assert entropy_filter(entropy, LN2).tolist() == [True, True, False, False]
    assert entropy_filter(entropy, 0.7).all()
    assert entropy_filter(entropy, None, 0.7).tolist() == [True, True, True, False]


def test_mean_entropy():
    entropies = torch.tensor([[1.0, 2.0, 77.0], [5.0, 5.0, 5.0]], dtype=torch.float64, requires_grad=True)
    found = mean_entropy(entropies, torch.tensor([[1, 1, 0], [0, 0, 0]]))
    assert found.tolist() == [1.5, 0.0] and not found.requires_grad


class TestAdvantages:
    def test_mean_without_standard_deviation(self):
        rewards = torch.tensor([1.0, 0.0, 0.0, math.nan, 5.0, 7.0], dtype=torch.float64)
        found = gtpo_advantages(rewards, torch.tensor([4, 4, 4, 4, 1, 1]))
        expected = torch.tensor([2 / 3, -1 / 3, -1 / 3, 0, -1, 1], dtype=torch.float64)
        assert torch.allclose(found, expected)

    def test_equal_rewards_leave_no_rounding_error(self):
        rewards = torch.full((7,), 0.7)
        assert ((rewards - torch.nanmean(rewards)) != 0).any()  # which would have a sign
        assert (gtpo_advantages(rewards, torch.zeros(7).long()) == 0).all()
        alone = torch.tensor([0.7, math.nan, math.nan])
        assert (gtpo_advantages(alone, GROUP) == 0).all()


class TestConflicts:
    def test_one_sign_alone_has_none(self):
        for advantages in ([1.0, 1.0, 0.0], [-1.0, -1.0, 0.0], [0.0, 0.0, 0.0]):
            prefix, suffix = conflict_runs(IDS, MASK, torch.tensor(advantages), GROUP)
            assert not (prefix | suffix).any()
            assert (conflict_weights(prefix, suffix, torch.tensor(advantages), MASK) == MASK).all()

    def test_identical_completions_of_opposite_sign(self):
        ids, mask, advantages = IDS[[0, 0]], MASK[[0, 0]], torch.tensor([1.0, -1.0])
        prefix, suffix = conflict_runs(ids, mask, advantages, GROUP[:2])
        weights = conflict_weights(prefix, suffix, advantages, mask, 3.0)
        assert weights.tolist() == [[9.0] * 6, [0.0] * 6]
        assert conflict_counts(prefix, suffix).tolist() == [6, 6]

    def test_the_partner_may_change(self):
        ids = torch.tensor([[1, 2, 3, 4], [1, 9, 9, 9], [8, 2, 3, 7]])
        prefix, _ = conflict_runs(ids, torch.ones_like(ids), torch.tensor([1.0, -1.0, -1.0]), GROUP)
        assert prefix.int().tolist() == [[1, 1, 1, 0], [1, 0, 0, 0], [0, 0, 0, 0]]

    def test_tool_tokens_break_a_run(self):
        ids = torch.tensor([[1, 2, 3, 4, 5], [1, 2, 3, 4, 5]])
        mask = torch.tensor([[1, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
        prefix, suffix = conflict_runs(ids, mask, torch.tensor([1.0, -1.0]), GROUP[:2])
        assert prefix.int().tolist() == [[1, 0, 0, 0, 0]] * 2
        assert suffix.int().tolist() == [[0, 0, 1, 1, 1]] * 2

    def test_truncated_completions_have_no_suffix(self):
        truncated = torch.tensor([False, True, False])
        prefix, suffix = conflict_runs(IDS, MASK, ADVANTAGES, GROUP, truncated)
        assert torch.equal(prefix, conflict_runs(IDS, MASK, ADVANTAGES, GROUP)[0])
        assert suffix.int().tolist() == [
            [0, 0, 0, 0, 0, 1],
            [0] * 6,
            [0, 0, 0, 0, 0, 1],
        ]  # 8 was shared with the cut one

    def test_padding_and_empty_completions_match_nothing(self):
        ids = torch.tensor([[1, 0, 0], [1, 0, 0], [0, 0, 0]])
        mask = torch.tensor([[1, 0, 0], [1, 1, 0], [0, 0, 0]])
        prefix, suffix = conflict_runs(ids, mask, torch.tensor([1.0, -1.0, -1.0]), GROUP)
        assert prefix.int().tolist() == [[1, 0, 0], [1, 0, 0], [0, 0, 0]] and not suffix.any()

    def test_groups_do_not_mix_and_may_differ_in_size(self):
        ids = torch.cat([IDS, IDS[:2], IDS[:1]])
        mask = torch.cat([MASK, MASK[:2], MASK[:1]])
        advantages = torch.cat([ADVANTAGES, torch.tensor([-1.0, 1.0, 1.0]).double()])
        groups = torch.tensor([7, 7, 7, 2, 2, 5])
        order = torch.tensor([3, 0, 5, 2, 4, 1])
        found = torch.stack(conflict_runs(ids[order], mask[order], advantages[order], groups[order]))
        apart = [
            torch.stack(conflict_runs(ids[i], mask[i], advantages[i], groups[i]))
            for i in (slice(0, 3), slice(3, 5), slice(5, 6))
        ]
        assert torch.equal(found, torch.cat(apart, dim=1)[:, order])
        assert not apart[2].any()


def naive_runs(ids, mask, signs):
    """The definition, token by token, for one group."""
    result = []
    for backwards in (False, True):
        rows = []
        for row, valid in zip(ids, mask, strict=True):
            last = max((t for t, v in enumerate(valid) if v), default=-1)
            rows.append([(t, row[t] if valid[t] else None) for t in range(last + 1)][:: -1 if backwards else 1])
        runs = [[False] * len(row) for row in ids]
        for i, row in enumerate(rows):
            for k, (t, token) in enumerate(row):
                others = [o[k][1] for j, o in enumerate(rows) if signs[i] * signs[j] < 0 and k < len(o)]
                if token is None or token not in others:
                    break
                runs[i][t] = True
        result.append(runs)
    return result


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 5), st.integers(1, 7), st.integers(0, 10_000))
def test_runs_follow_the_definition(size, length, seed):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(2, (size, length), generator=generator)
    mask = (torch.rand(size, length, generator=generator) < 0.85).long()
    signs = torch.randint(-1, 2, (size,), generator=generator).float()
    found = conflict_runs(ids, mask, signs, torch.zeros(size, dtype=torch.long))
    assert [part.tolist() for part in found] == naive_runs(ids.tolist(), mask.tolist(), signs.tolist())


def test_long_completions_are_compared_block_by_block():
    size, length = 64, 1500  # 2**22 // 64**2 = 1024 positions at once
    ids = torch.zeros(size, length, dtype=torch.long)
    ids[:, 1300:] = torch.arange(size).unsqueeze(1)
    signs = torch.ones(size)
    signs[::2] = -1
    prefix, suffix = conflict_runs(ids, torch.ones_like(ids), signs, torch.zeros(size, dtype=torch.long))
    assert prefix[:, :1300].all() and not prefix[:, 1300:].any() and not suffix.any()


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 4), st.integers(1, 6), st.booleans(), st.integers(0, 10_000))
def test_gradient_is_the_closed_form(rows, length, off_policy, seed):
    generator = torch.Generator().manual_seed(seed)

    def draw():
        return torch.randn(rows, length, generator=generator, dtype=torch.float64)

    logps = draw().requires_grad_()
    old = draw() if off_policy else logps.detach()
    mask = (torch.rand(rows, length, generator=generator) < 0.7).long()
    advantages = torch.randn(rows, generator=generator, dtype=torch.float64)
    entropy = mean_entropy(draw().abs(), mask)
    kept, weights = entropy_filter(entropy), draw().abs()
    per_token = gtpo_loss(logps - old, advantages, entropy, kept, 0.3) * weights
    aggregate(per_token, mask, "grpo", 1.0, float(rows), length).backward()
    for i, t in itertools.product(range(rows), range(length)):
        shaped = (advantages[i] - 0.3 * entropy[i]) if entropy[i] <= LN2 else 0.0
        ratio = math.exp(logps[i, t] - old[i, t])
        expected = -shaped * weights[i, t] * ratio * mask[i, t] / max(mask[i].sum(), 1) / rows
        assert logps.grad[i, t].item() == pytest.approx(float(expected), abs=1e-6, rel=1e-6)


def test_net_gradient_on_a_shared_opening_tag():
    """One right answer of eight: under GRPO the shared opening hardly moves, here it is pushed up."""
    ids = torch.tensor([[1, 2, 10 + i, 3] for i in range(8)])
    advantages = gtpo_advantages(torch.tensor([1.0] + [0.0] * 7, dtype=torch.float64), torch.zeros(8).long())
    prefix, suffix = conflict_runs(ids, torch.ones_like(ids), advantages, torch.zeros(8).long())
    weights = conflict_weights(prefix, suffix, advantages, torch.ones_like(ids))
    push = advantages.unsqueeze(1) * weights
    assert abs((advantages.unsqueeze(1) * torch.ones_like(ids))[:, :2].sum()) < 1e-9
    assert push[1:, :2].eq(0).all() and push[:, :2].sum() > 3  # 2 tokens x 2 x 7/8
    assert push[1:, 2].eq(advantages[1:]).all()


# ------------------------------------------------------------------------------------------------------------ training


def watching(base=GTPOTrainer):
    class Watching(base):
        def carry(self, rollouts):
            carried = super().carry(rollouts)
            self.__dict__.setdefault("seen", []).append((rollouts, carried))
            return carried

        def policy_loss(self, tokens):
            loss = super().policy_loss(tokens)
            self.__dict__.setdefault("losses", []).append((tokens, loss.detach()))
            return loss

    return Watching


def constant_answers(prompts, trainer):
    """Answers of the same beginning and end, whatever the prompt."""
    output = scripted(prompts, trainer)
    first, last = trainer.processing_class("(")["input_ids"], trainer.processing_class(")")["input_ids"]
    output["completion_ids"] = [[*first, *ids[:-1], *last, ids[-1]] for ids in output["completion_ids"]]
    return output


def middle_reward(completions, **kwargs):
    return [float(sum(map(ord, text)) % 2) for text in completions]


def test_in_a_run():
    trainer = train(watching(), rollout_func=constant_answers, rewards=middle_reward, max_completion_length=8)
    for rollouts, carried in trainer.seen:
        weights, advantages, mask = carried["gtpo/weights"], rollouts.advantages, rollouts.mask
        assert (weights[mask == 0] == 0).all()
        for row in (advantages > 0).nonzero().flatten():
            assert weights[row, 0] == 2 and weights[row, mask[row].sum() - 2] == 2
        for row in (advantages < 0).nonzero().flatten():
            assert weights[row, 0] == 0 and weights[row, mask[row].sum() - 2] == 0
    assert any((rollouts.advantages > 0).any() for rollouts, _ in trainer.seen)
    assert 0 < trainer.state.log_history[0]["gtpo/conflicts"] < 1


def test_entropy_shapes_and_filters():
    kept = []
    for threshold in (100.0, 1e-9):
        trainer = train(
            watching(), rewards=middle_reward, gtpo_use_initial_entropy=False, gtpo_entropy_threshold=threshold
        )
        for tokens, loss in trainer.losses:
            entropy = mean_entropy(tokens.entropies, tokens.mask)
            shaped = tokens.advantages[:, 0] - 0.1 * entropy
            expected = -torch.where(entropy <= threshold, shaped, 0.0)
            assert torch.allclose(loss[:, 0], expected, atol=1e-6)
        kept.append(trainer.state.log_history[0]["gtpo/kept"])
        assert "gtpo/initial_entropy" not in trainer.state.log_history[0]
    assert kept == [1.0, 0.0]


def test_initial_entropy_is_that_of_the_first_generation(tmp_path):
    class Checking(watching()):
        @classmethod
        def needs(cls, args):
            return {"entropies"}

        def observe(self, rollouts):
            first = self.gtpo_initial_entropy is None
            super().observe(rollouts)
            if first:
                means = mean_entropy(rollouts.entropies, rollouts.mask)
                assert self.gtpo_initial_entropy == pytest.approx(means.mean().item(), abs=1e-5)
                self.first = self.gtpo_initial_entropy

    trainer = train(Checking, temperature=1.5, learning_rate=1e-2, out=tmp_path, save_strategy="steps", save_steps=2)
    assert trainer.gtpo_initial_entropy == trainer.first > 0
    resumed = train(Checking, temperature=1.5, learning_rate=1e-2, out=tmp_path, resume=str(tmp_path / "checkpoint-2"))
    assert resumed.gtpo_initial_entropy == trainer.first and not hasattr(resumed, "first")
    # An uncertain start switches the filter off.
    settings = {"gtpo_entropy_threshold": trainer.first / 2}
    assert train(GTPOTrainer, temperature=1.5, **settings).state.log_history[0]["gtpo/kept"] == 1.0
    strict = train(GTPOTrainer, temperature=1.5, gtpo_use_initial_entropy=False, **settings)
    assert strict.state.log_history[0]["gtpo/kept"] < 1.0


def test_only_the_first_generation_costs_a_pass():
    passes = []

    class Counting(GTPOTrainer):
        def completion_entropies(self, *args):
            passes.append(self._generation)
            return super().completion_entropies(*args)

    train(Counting)
    assert passes == [0]
    train(Counting, gtpo_use_initial_entropy=False)
    assert passes == [0]


def constant_reward(completions, **kwargs):
    return [None if i % 4 == 3 else 1.0 for i in range(len(completions))]


def test_groups_of_equal_rewards_and_unscored_rollouts():
    trainer = train(watching(), rewards=constant_reward, gtpo_use_initial_entropy=False, gtpo_entropy_threshold=9.0)
    for tokens, loss in trainer.losses:
        assert (loss[tokens.rewards.isnan()] == 0).all()
        assert (loss[~tokens.rewards.isnan()] > 0).all()  # less entropy, as the formula has it
    silent = train(watching(), rewards=constant_reward, gtpo_skip_equal_rewards=True)
    assert all((loss == 0).all() for _, loss in silent.losses)
    assert difference(silent, build(GTPOTrainer)) == 0.0


def test_released_code_divides_and_sums():
    def weights(**settings):
        trainer = train(
            watching(), rollout_func=constant_answers, rewards=middle_reward, max_completion_length=8, max_steps=1,
            **settings,
        )  # fmt: skip
        return trainer.seen[0]

    rollouts, plain = weights()
    _, divided = weights(gtpo_divide_by_conflicts=True)
    prefix, suffix = conflict_runs(
        rollouts.completion_ids, rollouts.mask, rollouts.advantages, rollouts.group_ids, rollouts.truncated
    )
    counts = torch.maximum(prefix.sum(1), suffix.sum(1)).clamp(min=1).unsqueeze(1)
    assert counts.max() > 1
    assert torch.allclose(divided["gtpo/weights"], plain["gtpo/weights"] * 4 / counts)


def test_tool_outputs_never_conflict():
    def with_tool(prompts, trainer):
        """The second and third token of every completion are the same, and written by a tool."""
        output = constant_answers(prompts, trainer)
        output["completion_ids"] = [[ids[0], ids[0], ids[0], *ids[1:]] for ids in output["completion_ids"]]
        output["env_mask"] = [[1, 0, 0] + [1] * (len(ids) - 3) for ids in output["completion_ids"]]
        return output

    trainer = train(watching(), rollout_func=with_tool, rewards=middle_reward, max_completion_length=8)
    compared = 0
    for rollouts, carried in trainer.seen:
        weights, active = carried["gtpo/weights"], rollouts.advantages != 0
        assert (weights[:, 1:3] == 0).all() and (rollouts.mask[:, 1:3] == 0).all()
        assert (weights[active][:, 0] != 1).all()
        compared += int(active.sum())
    assert compared


def test_scale_rewards_plays_no_part():
    first = train(GTPOTrainer, scale_rewards="none", rewards=middle_reward)
    assert difference(first, train(GTPOTrainer, scale_rewards="group", rewards=middle_reward)) == 0.0


@pytest.mark.parametrize(
    "field, value",
    [
        ("gtpo_conflict_weight", 0.9),
        ("gtpo_entropy_coef", -0.1),
        ("gtpo_entropy_threshold", 0.0),
        ("num_generations", 1),
    ],
)
def test_settings_out_of_range_are_named(field, value):
    with pytest.raises(ValueError, match=f"`{field}` must be"):
        GTPOConfig("unused", use_cpu=True, bf16=False, **{field: value})


def test_what_it_cannot_honour():
    with pytest.raises(ValueError, match="`importance_sampling_level` is 'sequence'"):
        build(GTPOTrainer, importance_sampling_level="sequence")
    with pytest.warns(UserWarning, match=r"`num_iterations` \(now 2\)"):
        build(GTPOTrainer, num_iterations=2)
    with pytest.warns(UserWarning, match="`beta` is 0.1"):
        build(GTPOTrainer, beta=0.1)
    for other, reason in {
        "clip_cov": "no clip",
        "kl_cov": "policy_loss",
        "dcpo": "",
        "spo": "compute_advantages",
    }.items():
        with pytest.raises(MixingError, match=reason):
            mix("gtpo", other)
