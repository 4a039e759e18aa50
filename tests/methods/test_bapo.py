import itertools
import math

import pytest
import torch
from harness import arithmetic, build, difference, train
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from trl_ext import BAPOConfig, BAPOTrainer, MethodTrainer, mix
from trl_ext.core.loss import clipped_loss
from trl_ext.methods.bapo import bapo_candidates, bapo_search, bapo_sums, dual_clipped


RATIO = torch.tensor([[1.9, 1.0, 0.75], [0.5, 0.7, 1.1]], dtype=torch.float64)
ADVANTAGES = torch.tensor([[1.0] * 3, [-1.9] * 3], dtype=torch.float64)
MASK = torch.ones(2, 3, dtype=torch.long)


def found_bounds(ratio, advantages, mask, target, low, high, order):
    """The bounds, and pos and neg at every candidate."""
    lows, highs = bapo_candidates(*low, order), bapo_candidates(*high, order)
    positive, negative = (part.tolist() for part in bapo_sums(ratio, advantages, mask, lows, highs))
    j, i = bapo_search(positive, negative, target, order)
    return lows[j], highs[i], positive, negative


def loss_and_gradient(low, high, dual_clip):
    log_ratio = RATIO.log().requires_grad_()
    loss = dual_clipped(clipped_loss(log_ratio, ADVANTAGES, low, high), ADVANTAGES, dual_clip).mean()
    loss.backward()
    return loss.item(), log_ratio.grad


def test_worked_example_of_the_paper():
    low, high, positive, negative = found_bounds(
        RATIO, ADVANTAGES, MASK, 0.4, (0.6, 0.9, 0.02), (1.2, 3.0, 0.05), "upper_first"
    )
    shares = [p / (p + negative[0]) for p in positive[:3]]
    assert shares == pytest.approx([0.392810, 0.396825, 0.400788], abs=1e-6)
    assert (low, high) == pytest.approx((0.6, 1.3), abs=1e-12)
    loss, gradient = loss_and_gradient(low, high, None)
    assert loss == pytest.approx(0.251667, abs=1e-6)
    expected = [[0, -0.166667, -0.125], [0, 0.221667, 0.348333]]
    assert torch.allclose(gradient, torch.tensor(expected, dtype=torch.float64), atol=1e-6)


def test_worked_example_of_the_code():
    low, high, positive, negative = found_bounds(
        RATIO, ADVANTAGES, MASK, 0.5, (0.6, 0.8, 0.05), (1.2, 2.0, 0.05), "lower_first"
    )
    assert (low, high) == pytest.approx((0.8, 2.0), abs=1e-12)
    assert positive[-1] / negative[-1] == pytest.approx(0.711501, abs=1e-6)
    loss, gradient = loss_and_gradient(low, high, 3.0)
    assert loss == pytest.approx(0.246667, abs=1e-6)
    expected = [[-0.316667, -0.166667, -0.125], [0, 0, 0.348333]]
    assert torch.allclose(gradient, torch.tensor(expected, dtype=torch.float64), atol=1e-6)


def test_candidates_are_counted():
    assert len(bapo_candidates(1.2, 3.0, 0.05)) == 37 and len(bapo_candidates(0.6, 0.9, 0.02)) == 16
    assert bapo_candidates(1.2, 3.0, 0.05)[-1] == bapo_candidates(0.6, 0.9, 0.1)[-1] + 2.1 == 3.0
    assert bapo_candidates(0.6, 0.75, 0.1) == [0.6, 0.7]  # whole steps in the paper
    assert bapo_candidates(0.6, 0.75, 0.1, "lower_first") == [0.6, 0.7, 0.75]
    assert bapo_candidates(0.6, 0.8, 0.05, "lower_first") == pytest.approx([0.6, 0.65, 0.7, 0.75, 0.8])
    assert bapo_candidates(1.2, 1.2, 0.05, "lower_first") == bapo_candidates(1.2, 9.0, 0.0) == [1.2]


def literal_sums(ratio, advantages, mask, low, high):
    """Equation 8, token by token."""
    positive = negative = 0.0
    for r, a, m in zip(ratio.flatten().tolist(), advantages.flatten().tolist(), mask.flatten().tolist(), strict=True):
        if m:
            value = min(r, high) * a if a >= 0 else max(r, low) * a
            positive, negative = positive + max(value, 0), negative + max(-value, 0)
    return positive, negative


def literal_search(ratio, advantages, mask, target, low, high, order):
    """The loops of Algorithm 1 and of the code, with sums anew for every candidate and whole numbers of steps."""
    (a_low, b_low, step_low), (a_high, b_high, step_high) = low, high

    def rho(i, j):
        bounds = min(a_low + j * step_low, b_low), min(a_high + i * step_high, b_high)
        positive, negative = literal_sums(ratio, advantages, mask, *bounds)
        return positive / (positive + negative) if positive + negative else 1.0

    seen, i, j = [rho(0, 0)], 0, 0
    if order == "upper_first":
        while seen[-1] < target and a_low + (j + 1) * step_low <= b_low + 1e-9:
            if a_high + (i + 1) * step_high <= b_high + 1e-9:
                i += 1
            else:
                j += 1
            seen.append(rho(i, j))
    else:
        while seen[-1] < target and a_low + j * step_low < b_low - 1e-9:
            j += 1
            seen.append(rho(i, j))
        while seen[-1] < target and a_high + i * step_high < b_high - 1e-9:
            i += 1
            seen.append(rho(i, j))
    return min(a_low + j * step_low, b_low), min(a_high + i * step_high, b_high), seen


ROWS = st.lists(
    st.tuples(
        st.one_of(st.floats(0.01, 5.0), st.sampled_from([0.6, 0.62, 0.9, 1.0, 1.2, 1.25, 3.0])),
        st.sampled_from([-1.9, -0.5, 0.0, 0.3, 1.0]),
        st.booleans(),
    ),
    min_size=1,
    max_size=12,
)


@settings(max_examples=200, deadline=None)
@given(
    ROWS,
    st.sampled_from([0.1, 1 / 3, 0.4, 0.5, 0.8]),
    st.sampled_from([(0.6, 0.9, 0.02), (0.6, 0.8, 0.05), (0.7, 0.95, 0.1), (0.8, 0.8, 0.1)]),
    st.sampled_from([(1.2, 3.0, 0.05), (1.2, 2.0, 0.3), (1.0, 1.0, 0.1)]),
    st.sampled_from(["upper_first", "lower_first"]),
)
def test_search_is_the_literal_one(rows, target, low, high, order):
    ratio, advantages = (torch.tensor([row[k] for row in rows], dtype=torch.float64) for k in (0, 1))
    mask = torch.tensor([row[2] for row in rows])
    *expected, seen = literal_search(ratio, advantages, mask, target, low, high, order)
    assume(all(abs(share - target) > 1e-5 for share in seen))  # where rounding decides
    first, second, positive, negative = found_bounds(ratio, advantages, mask, target, low, high, order)
    assert (first, second) == pytest.approx(tuple(expected), abs=1e-9)
    for bounds, (p, n) in zip(
        itertools.zip_longest(bapo_candidates(*low, order), bapo_candidates(*high, order)),
        itertools.zip_longest(positive, negative),
        strict=True,
    ):
        oracle = literal_sums(ratio, advantages, mask, bounds[0] or low[0], bounds[1] or high[0])
        assert p is None or p == pytest.approx(oracle[0], abs=1e-9)
        assert n is None or n == pytest.approx(oracle[1], abs=1e-9)
    # Raising the lower bound can only lower the share, so in the paper's order it goes to its end or nowhere.
    if order == "upper_first":
        assert first in (low[0], pytest.approx(bapo_candidates(*low)[-1]))


@settings(max_examples=200, deadline=None)
@given(ROWS, st.floats(0.3, 1.0), st.floats(1.0, 3.0), st.sampled_from([None, 1.1, 2.0, 10.0]))
def test_gradient_is_that_of_the_equation(rows, low, high, dual_clip):
    kinks = [low, high] + ([dual_clip] if dual_clip else [])
    assume(all(abs(r - kink) > 1e-9 for r, *_ in rows for kink in kinks))
    log_ratio = torch.tensor([math.log(r) for r, *_ in rows], dtype=torch.float64, requires_grad=True)
    advantages = torch.tensor([a for _, a, _ in rows], dtype=torch.float64)
    mask = torch.tensor([m for *_, m in rows])
    loss = dual_clipped(clipped_loss(log_ratio, advantages, low, high), advantages, dual_clip)
    (loss * mask).sum().backward()
    again = log_ratio.detach().clone().requires_grad_()
    ratio = again.exp()
    oracle = torch.maximum(-advantages * ratio, -advantages * ratio.clamp(low, high))
    if dual_clip:
        oracle = torch.where(advantages < 0, torch.minimum(oracle, -advantages * dual_clip), oracle)
    (oracle * mask).sum().backward()
    assert torch.allclose(loss, oracle, atol=1e-9) and torch.allclose(log_ratio.grad, again.grad, atol=1e-6)
    for (r, a, m), gradient in zip(rows, log_ratio.grad.tolist(), strict=True):
        live = r <= high if a > 0 else low <= r and (dual_clip is None or r <= dual_clip)
        assert gradient == pytest.approx(-a * r if live and m else 0.0, abs=1e-6)


def test_at_a_bound_a_token_keeps_its_gradient():
    ratio = torch.tensor([2.0, 0.5, 4.0], dtype=torch.float64, requires_grad=True)
    advantages = torch.tensor([1.0, -1.0, -1.0], dtype=torch.float64)
    loss = dual_clipped(clipped_loss(ratio.log(), advantages, 0.5, 2.0), advantages, 4.0)
    loss.sum().backward()
    assert ratio.grad.tolist() == pytest.approx([-1.0, 1.0, 1.0])


def test_degenerate_batches():
    ranges = (0.6, 0.9, 0.02), (1.2, 3.0, 0.05)
    for order in ("upper_first", "lower_first"):
        start, end = (0.6, 1.2), (0.9, 3.0)
        for advantages, mask, expected in (
            (torch.ones(2, 3), MASK, start),  # no negative token
            (torch.zeros(2, 3), MASK, start),
            (-torch.ones(2, 3), 0 * MASK, start),  # all masked
            (-torch.ones(2, 3), MASK, end),  # no positive token
        ):
            low, high, positive, negative = found_bounds(RATIO, advantages.double(), mask, 0.4, *ranges, order)
            assert (low, high) == pytest.approx(expected)
            assert math.isfinite(sum(positive) + sum(negative))
    # Without steps of the lower bound Algorithm 1 does not search at all; the code does.
    fixed = (0.6, 0.6, 0.02), (1.2, 3.0, 0.05)
    assert found_bounds(RATIO, -ADVANTAGES.abs(), MASK, 0.4, *fixed, "upper_first")[:2] == (0.6, 1.2)
    assert found_bounds(RATIO, -ADVANTAGES.abs(), MASK, 0.4, *fixed, "lower_first")[:2] == (0.6, 3.0)


def test_rounding_does_not_start_a_search():
    """Standardised 0/1 rewards of equal lengths are in balance at ratio 1, but for an ulp."""
    advantages = torch.tensor([[1.5, -0.5, -0.5, -0.5]]) / (torch.tensor([0.5]) + 1e-4)
    advantages[0, 1:] *= 1 + 2e-7
    ratio = torch.ones(1, 4)
    for order in ("upper_first", "lower_first"):
        found = found_bounds(ratio, advantages, torch.ones(1, 4), 0.5, (0.6, 0.9, 0.02), (1.2, 3.0, 0.05), order)
        assert found[:2] == (0.6, 1.2)


def test_masked_places_may_hold_anything_and_sums_of_parts_add_up():
    mask = torch.tensor([[1, 0, 1], [0, 1, 1]])
    lows, highs = bapo_candidates(0.6, 0.9, 0.02), bapo_candidates(1.2, 3.0, 0.05)
    whole = bapo_sums(RATIO, ADVANTAGES, mask, lows, highs)
    spoiled = bapo_sums(
        RATIO.masked_fill(mask == 0, torch.nan), ADVANTAGES.masked_fill(mask == 0, torch.inf), mask, lows, highs
    )
    parts = [bapo_sums(RATIO[i : i + 1], ADVANTAGES[i : i + 1], mask[i : i + 1], lows, highs) for i in (0, 1)]
    for k in (0, 1):
        assert torch.equal(whole[k], spoiled[k])
        assert torch.allclose(whole[k], parts[0][k] + parts[1][k], atol=1e-12)


# -------------------------------------------------------------------------------------------------- in the trainer

# At a high temperature the policy is unsure of its answers, so ratios move in both directions.
STALE = {
    "num_iterations": 4,
    "max_steps": 4,
    "learning_rate": 1e-2,
    "per_device_train_batch_size": 16,
    "temperature": 4.0,
}


def watching(trainer):
    class Watching(trainer):
        def policy_loss(self, tokens):
            loss = super().policy_loss(tokens)
            if tokens.training:
                self.__dict__.setdefault("seen", []).append(tokens)
            return loss

    return Watching


def logged(trainer, name):
    return [entry[name] for entry in trainer.state.log_history if name in entry]


def test_bounds_are_those_of_the_batch_and_let_positive_tokens_in():
    target = 0.5
    trainer = train(watching(BAPOTrainer), bapo_target=target, **STALE | {"max_steps": 8})
    lows, highs, shares = (logged(trainer, f"bapo/{name}") for name in ("c_low", "c_high", "rho"))
    outcomes, more = [], []
    for tokens, low, high, share in zip(trainer.seen, lows, highs, shares, strict=True):
        ratio = (tokens.logps - tokens.old_logps).detach().exp().double()
        settings = (0.6, 0.9, 0.02), (1.2, 3.0, 0.05), "upper_first"
        *expected, seen = literal_search(ratio, tokens.advantages.double(), tokens.mask, target, *settings)
        assert (low, high) == (tokens.ratio_low, tokens.ratio_high) == pytest.approx(tuple(expected))
        assert share == pytest.approx(seen[-1], abs=1e-6)
        if seen[0] >= target:
            outcomes.append("in balance")
            assert (low, high) == (0.6, 1.2)
        elif share >= target:
            outcomes.append("balanced")
            # Tokens that a bound of 1.2 would leave without a gradient.
            positive = (tokens.advantages > 0) & tokens.mask.bool()
            more.append((positive & (ratio > 1.2) & (ratio <= high)).sum().item())
        else:
            outcomes.append("out of reach")
            assert (low, high) == pytest.approx((0.9, 3.0))
    assert {"in balance", "balanced"} <= set(outcomes)
    assert min(more) > 0


def test_fixed_bounds_are_plain_grpo():
    fixed = {"bapo_low_start": 0.8, "bapo_low_max": 0.8, "bapo_high_start": 1.28, "bapo_high_max": 1.28}
    plain = train(MethodTrainer, epsilon=0.2, epsilon_high=0.28, **STALE)
    assert difference(train(BAPOTrainer, **fixed, **STALE), plain) < 1e-6
    assert difference(train(BAPOTrainer, **fixed, bapo_dual_clip=1.5, **STALE), plain) > 1e-5
    assert difference(train(BAPOTrainer, bapo_target=0.6, **STALE), plain) > 1e-5


def test_dual_clip_takes_no_part_in_the_search():
    free = train(watching(BAPOTrainer), bapo_target=0.6, **STALE)
    cut = train(watching(BAPOTrainer), bapo_target=0.6, bapo_dual_clip=1.05, **STALE)
    # Until the first update that it changes, the searches are of the same batch.
    assert logged(free, "bapo/rho")[:2] == logged(cut, "bapo/rho")[:2]
    assert difference(free, cut) > 1e-5


def test_nothing_to_search_on_policy_and_in_evaluation():
    with pytest.warns(UserWarning, match="BAPOTrainer has no effect, because every ratio is 1"):
        trainer = train(BAPOTrainer, bapo_target=0.99)
    assert difference(trainer, train(MethodTrainer)) < 1e-6 and not logged(trainer, "bapo/c_low")
    trainer = train(
        BAPOTrainer, eval_dataset=arithmetic().select(range(4)), per_device_eval_batch_size=8, num_iterations=2
    )
    assert logged(trainer, "bapo/c_low")
    trainer.evaluate()
    assert not any(name.startswith("eval_bapo") for entry in trainer.state.log_history for name in entry)


def test_bad_input():
    for name, value in {
        "bapo_target": 1.0,
        "bapo_low_start": 0.0,
        "bapo_low_max": 1.1,
        "bapo_high_start": 0.9,
        "bapo_high_max": 1.1,
        "bapo_high_step": 0.0,
        "bapo_low_step": -0.1,
        "bapo_order": "both",
        "bapo_dual_clip": 1.0,
        "epsilon": 0.3,
        "epsilon_high": 0.28,
    }.items():
        with pytest.raises(ValueError, match=f"`{name}` must be .*got {value!r}"):
            BAPOConfig("unused", use_cpu=True, bf16=False, **{name: value})
    with pytest.raises(ValueError, match=r"`bapo_low_max` must be in \[bapo_low_start, 1\], got 0.5"):
        BAPOConfig("unused", use_cpu=True, bf16=False, bapo_low_max=0.5)
    for name, value in {"delta": 2.0, "loss_type": "cispo"}.items():
        with pytest.raises(ValueError, match=f"`{name}"):
            build(BAPOTrainer, num_iterations=2, **{name: value})
    for other in ("gppo", "ttt_discover"):
        with pytest.raises(TypeError, match="contradict each other"):
            mix("bapo", other)
    with pytest.raises(TypeError, match="both replace `clip_range`"):
        mix("bapo", "dcpo")
    for other in ("disco", "kl_cov"):
        with pytest.raises(TypeError, match="does not look at `clip_range`"):
            mix("bapo", other)


def test_clip_ranges_of_a_mix():
    """What another method sets for itself is not the user's choice."""
    config = mix("bapo", "ngrpo").Config
    assert config("unused", use_cpu=True, bf16=False).epsilon == 0.16
    with pytest.raises(ValueError, match=r"`epsilon` must be left at 0\.16"):
        config("unused", use_cpu=True, bf16=False, epsilon=0.2)
