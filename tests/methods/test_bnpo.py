import pytest
import torch
from harness import build, train
from hypothesis import given, settings
from hypothesis import strategies as st

from trl_ext import BNPOConfig, BNPOTrainer, mix
from trl_ext.core.rollouts import group_advantages
from trl_ext.methods.bnpo import beta_density, beta_parameters, bnpo_advantages, success_rates


def groups(*rewards):
    flat = torch.tensor([r for group in rewards for r in group], dtype=torch.float64)
    return flat, torch.tensor([i for i, group in enumerate(rewards) for _ in group])


ACCURACY = ([1, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0])
FORMAT = ([1, 1, 1, 0], [1, 1, 1, 1], [1, 0, 0, 0])


def test_worked_example():
    rates = torch.tensor([0.5, 0.25, 0.75], dtype=torch.float64)
    alpha, beta = beta_parameters(rates)
    assert (alpha.item(), beta.item()) == pytest.approx((1.5, 1.5))
    assert beta_density(rates, alpha, beta).tolist() == pytest.approx([1.273240, 1.102658, 1.102658], abs=1e-6)
    found = bnpo_advantages(*groups([1, 1, 0, 0], [1, 0, 0, 0], [1, 1, 1, 0]))
    expected = [0.392699, 0.392699, -0.392699, -0.392699, 0.680175, -0.226725, -0.226725, -0.226725]
    expected += [0.226725, 0.226725, 0.226725, -0.680175]
    assert found.tolist() == pytest.approx(expected, abs=1e-6)


def test_one_prompt_alone():
    assert bnpo_advantages(*groups([1, 0, 0, 0])).tolist() == pytest.approx([0.75, -0.25, -0.25, -0.25], abs=1e-6)


FORMAT_ADVANTAGES = [0.236230, 0.236230, 0.236230, -0.708690, 0, 0, 0, 0, 0.755484, -0.251828, -0.251828, -0.251828]
BOTH = [0.458202, 0.004752, 0.004752, -0.467708, 0.196350, 0.196350, -0.196350, -0.196350]
BOTH += [0.491105, -0.012551, -0.012551, -0.466001]


def test_worked_decomposition():
    assert bnpo_advantages(*groups(*FORMAT)).tolist() == pytest.approx(FORMAT_ADVANTAGES, abs=1e-6)
    mean = (bnpo_advantages(*groups(*ACCURACY)) + bnpo_advantages(*groups(*FORMAT))) / 2
    assert mean.tolist() == pytest.approx(BOTH, abs=1e-6)


def test_decomposition_in_the_trainer():
    accuracy, form = (torch.tensor(rewards).flatten().tolist() for rewards in (ACCURACY, FORMAT))

    class Checking(BNPOTrainer):
        def observe(self, rollouts):
            super().observe(rollouts)
            assert rollouts.advantages.tolist() == pytest.approx(BOTH, abs=1e-5)
            self.checked = True

    rewards = [lambda completions, **kw: accuracy, lambda completions, **kw: form]
    settings = {"rewards": rewards, "per_device_train_batch_size": 12, "max_steps": 1}
    assert train(Checking, beta_norm_decompose=True, **settings).checked


def test_the_fit_is_to_all_groups_also_to_those_that_are_replaced():
    class Checking(mix("bnpo", "dynamic_sampling").Trainer):
        def compute_advantages(self, rollouts):
            advantages, everything = super().compute_advantages(rollouts), rollouts.everything
            rates, _ = success_rates(everything.raw_rewards.double(), everything.group_ids)
            parameters = beta_parameters(rates)
            expected = bnpo_advantages(rollouts.rewards.double(), rollouts.group_ids, parameters=parameters)
            assert torch.allclose(advantages, expected.float())
            own = bnpo_advantages(rollouts.rewards.double(), rollouts.group_ids)
            self.differ = getattr(self, "differ", False) or not torch.allclose(own, expected)
            self.alphas = [*getattr(self, "alphas", []), parameters[0].item()]
            return advantages

    def often_failed(prompts, completions, **kwargs):
        return [float(p[0] in "13579" and i % 3 == 0) for i, p in enumerate(prompts)]

    trainer = train(Checking, per_device_train_batch_size=16, rewards=often_failed)
    logged = [log["bnpo/alpha"] for log in trainer.state.log_history if "bnpo/alpha" in log]
    assert trainer.differ and logged == pytest.approx(trainer.alphas)


def test_fixed_parameters_recover_known_methods():
    rewards, ids = groups([1, 1, 0, 0], [1, 0, 0, 0])
    rates = torch.tensor([0.5, 0.25], dtype=torch.float64)
    density = beta_density(rates, torch.tensor(1.5).double(), torch.tensor(1.5).double())
    ours = (rewards - rates[ids]) / density[ids]
    population = group_advantages(rewards, ids, eps=0.0) * (3 / 4) ** -0.5  # from the sample to the population std
    assert torch.allclose(ours / population, torch.full((8,), torch.pi / 8).double(), atol=1e-6)
    assert beta_density(torch.tensor([0.0, 0.3, 1.0]), torch.tensor(1.0), torch.tensor(1.0)).tolist() == [1, 1, 1]


@settings(max_examples=80, deadline=None)
@given(
    st.lists(
        st.lists(st.one_of(st.sampled_from([0.0, 1.0, float("nan")]), st.floats(0, 1)), min_size=1, max_size=6),
        min_size=1,
        max_size=5,
    )
)
def test_degenerate_batches(rewards):
    values, ids = groups(*rewards)
    found = bnpo_advantages(values, ids)
    assert found.isfinite().all() and (found[values.isnan()] == 0).all()
    for i, group in enumerate(rewards):
        known = {r for r in group if r == r}
        if len(known) == 1 and max(map(len, rewards)) > 1:
            assert (found[ids == i].abs() < 1e-6).all()


def test_equal_rates_and_single_rollouts():
    found = bnpo_advantages(*groups([1, 0], [1, 0], [0, 1]))
    assert found.tolist() == pytest.approx([0.5, -0.5, 0.5, -0.5, -0.5, 0.5])  # nothing to fit
    assert bnpo_advantages(*groups([1], [0], [1])).tolist() == [1, 0, 1]  # REINFORCE


def test_the_fit_minimises_the_gradients_variance():
    """V for p ~ Beta(3, 1): 0.150000 unnormalised, 0.154213 as GRPO, 0.099626 fitted."""

    def b(x, y):
        x, y = torch.tensor(x).double(), torch.tensor(y).double()
        return (torch.lgamma(x) + torch.lgamma(y) - torch.lgamma(x + y)).exp().item()

    def variance(alpha, beta, a, c):
        return b(alpha, beta) ** 2 * b(a + 3 - 2 * alpha, c + 3 - 2 * beta) / b(a, c)

    assert variance(1, 1, 3, 1) == pytest.approx(0.150000, abs=1e-6)
    assert variance(1.5, 1.5, 3, 1) == pytest.approx(0.154213, abs=1e-6)
    assert variance(2, 4 / 3, 3, 1) == pytest.approx(0.099626, abs=1e-6)
    torch.manual_seed(0)
    rates = torch.distributions.Beta(3.0, 1.0).sample((20_000,)).double()
    assert [x.item() for x in beta_parameters(rates)] == pytest.approx([2, 4 / 3], abs=0.05)


def test_bad_input():
    with pytest.raises(ValueError, match=r"2.0 lies outside of \[`beta_norm_reward_min`"):
        train(BNPOTrainer, rewards=lambda completions, **kw: [2.0] * len(completions))
    with pytest.raises(ValueError, match="have 2 values for 1 reward"):
        build(BNPOTrainer, beta_norm_reward_min=[0.0, 0.0], beta_norm_reward_max=[1.0, 1.0])
    for name, value in {
        "beta_norm_reward_max": [0.0],
        "beta_norm_max_weight": 0.0,
        "beta_norm_var_floor": -1.0,
    }.items():
        with pytest.raises(ValueError, match=f"`{name}` must be"):
            BNPOConfig("unused", use_cpu=True, bf16=False, **{name: value})
    assert BNPOConfig("unused", use_cpu=True, bf16=False, beta_norm_reward_max=2.0).beta_norm_reward_max == [2.0]
