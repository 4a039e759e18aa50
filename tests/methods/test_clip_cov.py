import pytest
import torch
from harness import build, difference, train

from trl_ext import ClipCovConfig, ClipCovTrainer, MethodTrainer
from trl_ext.core.loss import clipped_loss
from trl_ext.core.prompts import make_generator
from trl_ext.methods.clip_cov import (
    clip_cov_draw,
    clip_cov_eligible,
    covariance_sums,
    ppo_clipped,
    token_covariance,
)


OLD = torch.tensor([[-0.1, -2.3, -0.5, -0.2], [-1.2, -0.05, -3.0, -0.4]], dtype=torch.float64)
NEW = torch.tensor([[-0.05, -2.0, -0.5, -0.3], [-1.0, -0.05, -3.5, -0.4]], dtype=torch.float64)
ADVANTAGES = torch.tensor([[1.0], [-1.0]], dtype=torch.float64).expand(2, 4)
MASK = torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0]])
COVARIANCE = torch.tensor(
    [[0.863265, -0.808163, 0.477551, 0.648980], [-0.065306, -1.151020, 2.791837, 0.0]], dtype=torch.float64
)


def test_worked_example():
    logps = NEW.clone().requires_grad_()
    cov = token_covariance(logps, ADVANTAGES, MASK)
    assert torch.allclose(cov, COVARIANCE, atol=1e-6)
    clipped = ppo_clipped(logps - OLD, ADVANTAGES, 0.8, 1.2) & MASK.bool()
    assert clipped.nonzero().tolist() == [[0, 1], [1, 2]]
    eligible = clip_cov_eligible(cov, clipped, MASK, 0.5, 5.0)
    assert eligible.nonzero().tolist() == [[0, 0], [0, 3]]
    keys = torch.arange(8).view(2, 4)
    chosen = clip_cov_draw(keys[eligible], 7, 0.6, make_generator(0, "test"))
    selected = torch.isin(keys, chosen)
    assert torch.equal(selected, eligible) and selected.sum() / 7 == pytest.approx(0.285714, abs=1e-6)
    loss = (clipped_loss(logps - OLD, ADVANTAGES, 0.8, 1.2) * ~selected * MASK).sum() / 7
    loss.backward()
    assert loss.item() == pytest.approx(0.117343, abs=1e-6)
    expected = [[0, 0, -0.142857, 0], [0.174486, 0.142857, 0, 0]]
    assert torch.allclose(logps.grad, torch.tensor(expected, dtype=torch.float64), atol=1e-6)


def test_masked_tokens_have_no_influence():
    spoiled = NEW.clone()
    spoiled[1, 3] = torch.nan
    advantages = ADVANTAGES.clone()
    advantages[1, 3] = 1e9
    assert torch.allclose(token_covariance(spoiled, advantages, MASK), COVARIANCE, atol=1e-6)
    assert covariance_sums(spoiled, advantages, MASK)[0] == 7


def test_sums_of_parts_give_the_covariance_of_the_whole():
    sums = sum(covariance_sums(NEW[i : i + 1], ADVANTAGES[i : i + 1], MASK[i : i + 1]) for i in range(2))
    parts = [token_covariance(NEW[i : i + 1], ADVANTAGES[i : i + 1], MASK[i : i + 1], sums) for i in range(2)]
    assert torch.allclose(torch.cat(parts), COVARIANCE, atol=1e-6)


def test_number_of_drawn_tokens():
    generator = make_generator(0, "test")
    candidates = torch.arange(100)
    assert len(clip_cov_draw(candidates, 5000, 2e-4, generator)) == 1
    assert len(clip_cov_draw(candidates, 9999, 2e-4, generator)) == 1  # floor
    assert len(clip_cov_draw(candidates, 10, 2e-4, generator)) == 1  # never none
    assert len(clip_cov_draw(candidates, 1000, 0.03, generator).unique()) == 30
    assert len(clip_cov_draw(candidates[:0], 1000, 0.03, generator)) == 0


def test_every_eligible_token_is_as_likely():
    counts = torch.zeros(5)
    for i in range(2000):
        counts[clip_cov_draw(torch.arange(5), 10, 0.2, make_generator(0, "test", i))] += 1
    assert torch.allclose(counts / 2000, torch.full((5,), 0.4), atol=0.05)


def test_sequence_level_ratios():
    log_ratio = torch.tensor([[0.5], [-0.5]], dtype=torch.float64)
    assert ppo_clipped(log_ratio, ADVANTAGES, 0.8, 1.2).all()


SETTINGS = {"num_iterations": 2, "max_steps": 4}


def test_selected_tokens_get_no_gradient():
    """With every token eligible and all of them drawn nothing is learnt; with none it is plain GRPO."""
    none = train(ClipCovTrainer, clip_cov_low=1e8, clip_cov_high=1e9, **SETTINGS)
    plain = train(MethodTrainer, epsilon=1.0, epsilon_high=1.0, **SETTINGS)
    assert difference(none, plain) == 0.0
    some = train(ClipCovTrainer, clip_cov_low=1e-3, clip_cov_high=1e9, clip_cov_ratio=1.0, **SETTINGS)
    assert difference(some, plain) > 1e-5
    assert some.state.log_history[0]["clip_cov/selected"] > 0.05


def test_the_draw_is_seeded():
    settings = {"clip_cov_low": 1e-3, "clip_cov_ratio": 0.2, **SETTINGS}
    first, again = train(ClipCovTrainer, **settings), train(ClipCovTrainer, **settings)
    assert difference(first, again) == 0.0
    assert difference(first, train(ClipCovTrainer, clip_cov_seed=7, **settings)) > 0


def test_the_clip_range_is_open_by_default():
    trainer = build(ClipCovTrainer)
    assert (trainer.epsilon_low, trainer.epsilon_high) == (1.0, 1.0)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("clip_cov_ratio", 0.0),
        ("clip_cov_ratio", 1.5),
        ("clip_cov_low", 0.0),
        ("clip_cov_high", 0.5),
        ("clip_cov_scope", "typo"),
    ],
)
def test_settings_out_of_range_are_named(field, value):
    with pytest.raises(ValueError, match=f"`{field}` must be .*got {value!r}"):
        ClipCovConfig("unused", use_cpu=True, bf16=False, **{field: value})
