import pytest
import torch
from harness import partly_external, scripted, train
from hypothesis import given, settings
from hypothesis import strategies as st

from trl_ext import EMPGConfig, EMPGTrainer, MethodTrainer
from trl_ext.core.rollouts import step_means, step_numbers
from trl_ext.methods.empg import empg_advantages


MASK = torch.tensor([[1, 1, 0, 1, 1], [1, 1, 0, 1, 1]])
ENTROPIES = torch.tensor([[0.2, 0.4, 9.0, 1.0, 1.4], [0.1, 0.1, 9.0, 2.0, 2.0]], dtype=torch.float64)


def test_worked_example():
    assert step_numbers(MASK).tolist() == [[0, 0, -1, 1, 1]] * 2
    steps = step_means(ENTROPIES, step_numbers(MASK))
    assert torch.allclose(steps, torch.tensor([[0.3, 1.2], [0.1, 2.0]], dtype=torch.float64))
    base = torch.tensor([1.0, -1.0], dtype=torch.float64)
    found = empg_advantages(ENTROPIES, MASK, base)
    expected = [[1.256551, 1.256551, 0, 0.748265, 0.748265], [-1.440183, -1.440183, 0, -0.564632, -0.564632]]
    assert torch.allclose(found, torch.tensor(expected, dtype=torch.float64), atol=1e-6)
    uncentred = empg_advantages(ENTROPIES, MASK, base, center=False)
    expected = [[1.300928, 1.300928, 0, 0.792642, 0.792642], [-1.395806, -1.395806, 0, -0.520255, -0.520255]]
    assert torch.allclose(uncentred, torch.tensor(expected, dtype=torch.float64), atol=1e-6)
    per_token = empg_advantages(ENTROPIES, MASK, base.unsqueeze(1).expand(2, 5))
    assert torch.allclose(per_token, found)


def test_switched_off_it_only_centres():
    base = torch.tensor([1.0, -0.5], dtype=torch.float64)
    plain = empg_advantages(ENTROPIES, MASK, base, k=0, zeta=0, center=False)
    assert torch.allclose(plain, base.unsqueeze(1) * MASK, atol=1e-6)


def test_equal_entropies():
    found = empg_advantages(torch.ones(2, 5, dtype=torch.float64), MASK, torch.zeros(2, dtype=torch.float64), zeta=0.1)
    assert torch.allclose(found, torch.tensor([0.05, 0.05, 0, -0.05, -0.05]).double().expand(2, 5), atol=1e-6)


def test_unscored_rollouts_take_no_part():
    entropies = torch.cat([ENTROPIES, torch.full((1, 5), 50.0, dtype=torch.float64)])
    mask, base = torch.cat([MASK, MASK[:1]]), torch.tensor([1.0, -1.0, 0.0], dtype=torch.float64)
    found = empg_advantages(entropies, mask, base, scored=torch.tensor([True, True, False]))
    assert torch.allclose(found[:2], empg_advantages(ENTROPIES, MASK, base[:2])) and (found[2] == 0).all()


def test_nothing_to_modulate():
    empty = empg_advantages(ENTROPIES, torch.zeros_like(MASK), torch.ones(2, dtype=torch.float64))
    assert (empty == 0).all()
    one = empg_advantages(ENTROPIES[:1, :2], MASK[:1, :2], torch.ones(1, dtype=torch.float64))
    assert torch.allclose(one, torch.zeros(1, 2, dtype=torch.float64), atol=1e-6)


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 5), st.integers(1, 6), st.integers(0, 1000))
def test_masked_tokens_have_no_influence_and_steps_are_centred(n, length, seed):
    generator = torch.Generator().manual_seed(seed)
    mask = (torch.rand(n, length, generator=generator) < 0.7).long()
    entropies = torch.rand(n, length, generator=generator, dtype=torch.float64)
    base = torch.randn(n, generator=generator, dtype=torch.float64)
    found = empg_advantages(entropies, mask, base)
    spoiled = torch.where(mask.bool(), entropies, 1e6)
    assert torch.allclose(empg_advantages(spoiled, mask, base), found)
    assert found.isfinite().all() and (found[mask == 0] == 0).all()
    means = step_means(found, step_numbers(mask))
    assert mask.sum() == 0 or abs(means.nanmean()) < 1e-6


def test_mean_gain_is_one_and_confident_steps_gain():
    torch.manual_seed(0)
    entropies = torch.distributions.Gamma(2.0, 2.0).sample((4096, 1)).double()
    ones = torch.ones(4096, dtype=torch.float64)
    gain = empg_advantages(entropies, torch.ones(4096, 1), ones, zeta=0, center=False).squeeze(1)
    order = entropies.squeeze(1).argsort()
    assert gain.mean().item() == pytest.approx(1.0, abs=1e-6)
    assert gain[order[:410]].mean().item() == pytest.approx(1.13, abs=0.05)
    assert gain[order[-410:]].mean().item() == pytest.approx(0.78, abs=0.05)


def test_in_a_run_with_tool_outputs():
    class Checking(EMPGTrainer):
        def observe(self, rollouts):
            super().observe(rollouts)
            base = MethodTrainer.compute_advantages(self, rollouts)
            expected = empg_advantages(rollouts.entropies, rollouts.mask, base, rollouts.scored)
            assert torch.allclose(rollouts.advantages, expected)
            assert (rollouts.advantages[rollouts.mask == 0] == 0).all()
            self.steps = int(step_numbers(rollouts.mask).max()) + 1

    trainer = train(Checking, rollout_func=partly_external)
    assert trainer.steps == 2 and trainer.state.log_history[0]["empg/steps"] > 1
    single = train(Checking, rollout_func=scripted)
    assert single.steps == 1 and single.state.log_history[0]["empg/steps"] == 1


@pytest.mark.parametrize("field", ["empg_k", "empg_k_future", "empg_zeta", "empg_eps"])
def test_settings_out_of_range_are_named(field):
    with pytest.raises(ValueError, match=f"`{field}` must be"):
        EMPGConfig("unused", use_cpu=True, bf16=False, **{field: -1.0})
