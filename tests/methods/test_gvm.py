import pytest
import torch
from harness import arithmetic, build, parity_reward, train
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig

from trl_ext import GVMConfig, GVMTrainer, MixingError, mix
from trl_ext.core.rollouts import Sample
from trl_ext.methods.gvm import gvm_budgets, gvm_prompt_weights, gvm_ratios


pytestmark = pytest.mark.filterwarnings("ignore:`gvm_max_accept`")


def tensor(*values):
    return torch.tensor(values, dtype=torch.float64)


RATES, NORMS = tensor(0.125, 0.25, 0.5, 0.75, 1, 0), tensor(4, 3, 2, 1.5, 1, 0)


def test_worked_allocations():
    ratios = gvm_ratios(RATES, NORMS, 48)
    assert ratios.tolist() == pytest.approx([0.488048, 0.264870, 0.125605, 0.077002, 0.044475, 0], abs=1e-6)
    assert gvm_budgets(ratios, 48).tolist() == [23, 13, 6, 4, 2, 0]
    ratios = gvm_ratios(RATES, torch.ones(6), 48)
    assert ratios.tolist() == pytest.approx([0.330733, 0.239324, 0.170236, 0.139151, 0.120555, 0], abs=1e-6)
    assert gvm_budgets(ratios, 48).tolist() == [16, 11, 8, 7, 6, 0]
    assert gvm_budgets(gvm_ratios(RATES, NORMS, 48, alpha=0.01), 48).tolist() == [21, 14, 7, 4, 2, 0]
    assert gvm_budgets(gvm_ratios(RATES, NORMS, 48, alpha=0.0), 48).tolist() == [24, 12, 6, 4, 2, 0]


def test_worked_filter():
    ratios = gvm_ratios(RATES, NORMS, 48, max_accept=0.9)
    assert ratios.tolist() == pytest.approx([0.510764, 0.277198, 0.131451, 0.080586, 0, 0], abs=1e-6)
    assert gvm_budgets(ratios, 48).tolist() == [25, 13, 6, 4, 0, 0]
    # p q N of the six: 2.9, 3.2, 3.0, 2.8, 2.1, 0; both filters look at the same shares.
    assert (gvm_ratios(RATES, NORMS, 48, min_expected=2.9) > 0).tolist() == [True, True, True, False, False, False]
    assert torch.equal(gvm_ratios(RATES, NORMS, 48, min_expected=99), gvm_ratios(RATES, NORMS, 48))  # nothing left


def test_worked_rounding():
    sixth = torch.ones(6, dtype=torch.float64) / 6
    assert gvm_budgets(tensor(0.5, 0.5), 3).tolist() == [1, 2]
    assert gvm_budgets(tensor(0.35, 0.35, 0.3), 5).tolist() == [2, 2, 1]
    assert gvm_budgets(sixth, 9).tolist() == [1, 1, 1, 2, 2, 2]
    assert gvm_budgets(sixth, 9, 2).tolist() == [0, 3, 0, 2, 2, 2]
    assert gvm_budgets(tensor(1.0, 0.0), 1, 2).tolist() == [1, 0]  # one prompt is left


prompts = st.lists(st.tuples(st.floats(0, 1), st.floats(0, 9)), min_size=1, max_size=9)


@settings(max_examples=150, deadline=None)
@given(prompts, st.integers(1, 64), st.integers(1, 3), st.sampled_from([0.0, 0.7, 1.0]), st.floats(0, 3))
def test_budgets_have_the_total(values, total, least, max_accept, min_expected):
    rates, norms = torch.tensor(values, dtype=torch.float64).T
    ratios = gvm_ratios(rates, norms, total, 1e-3, 2.0, max_accept, min_expected)
    assert ratios.sum().item() == pytest.approx(1) and ratios.isfinite().all() and (ratios >= 0).all()
    budgets = gvm_budgets(ratios, total, least)
    assert budgets.sum() == total and (budgets >= 0).all()
    few = (budgets > 0) & (budgets < least)
    assert not few.any() or (budgets > 0).sum() == 1
    if ((rates > 0) & (norms > 0)).any():
        assert (budgets[(rates == 0) | (norms == 0)] == 0).all()
    else:
        assert torch.allclose(ratios, torch.full_like(rates, 1 / len(rates)))


def test_the_variance_falls_to_one_half():
    """1,000 prompts, p ~ Beta(0.8, 0.8), G = 1 + 4 (1 - p): sum G^2 / (p n) is halved, 0.012924 to 0.0065."""
    torch.manual_seed(0)
    rates = torch.distributions.Beta(0.8, 0.8).sample((1000,)).double().clamp(min=0.03)
    norms = 1 + 4 * (1 - rates)

    def variance(budgets):
        return (norms**2 / (rates * budgets)).sum().item()

    uniform = variance(torch.full((1000,), 8.0))
    optimal = variance(8000 * gvm_ratios(rates, norms, 8000, alpha=0.0))
    assert optimal == pytest.approx((norms / rates.sqrt()).sum().item() ** 2 / 8000)  # the least there can be
    assert optimal / uniform == pytest.approx(0.5, abs=0.05)
    dealt = gvm_budgets(gvm_ratios(rates, norms, 8000), 8000)
    assert dealt.min() > 0 and variance(dealt) / uniform == pytest.approx(0.51, abs=0.05)


def test_prompt_weights_make_prompts_count_alike():
    groups = torch.tensor([0, 0, 0, 1, 2, 2, 2, 2])
    weights = gvm_prompt_weights(torch.ones(8, dtype=torch.bool), groups)
    values = torch.arange(8, dtype=torch.float64)
    means = torch.stack([values[groups == i].mean() for i in range(3)])
    assert (weights * values).mean().item() == pytest.approx(means.mean().item())
    accepted = torch.tensor([1, 0, 1, 0, 0, 0, 1, 0], dtype=torch.bool)
    weights = gvm_prompt_weights(accepted, groups)
    assert (weights * values * accepted).mean().item() == pytest.approx(((0 + 2) / 2 + 6) / 2)
    assert not gvm_prompt_weights(torch.zeros(8, dtype=torch.bool), groups).any()


# -------------------------------------------------------------------------------------------------- in the trainer


@pytest.mark.parametrize("name", ["embed_tokens", "layers.0.mlp"])
def test_the_gradient_norm_is_that_of_the_sequences_log_probability(name):
    trainer = build(GVMTrainer, gvm_grad_params=name)
    sample = Sample([5, 6, 7], [8, 9, 10, 2], "", False, [1, 0, 1, 1], [1.0])
    model = trainer.model
    ids = torch.tensor([[5, 6, 7, 8, 9, 10, 2]])
    logps = model(ids).logits[0, 2:-1].log_softmax(-1)[[0, 2, 3], [8, 10, 2]]  # without the tool's token
    parameter = next(p for key, p in model.named_parameters() if name in key)
    (expected,) = torch.autograd.grad(logps.sum(), parameter)
    assert trainer._gvm_norm(sample) == pytest.approx(expected.norm().item(), rel=1e-4)
    assert all(p.grad is None for p in model.parameters())


def test_estimates_count_accepted_samples():
    trainer = build(GVMTrainer, gvm_grad_params=None)

    def sample(reward, truncated=False):
        return Sample([1], [2], "", truncated, None, [reward])

    nan = float("nan")
    assert trainer._gvm_measure(0, [sample(1.0), sample(0.0), sample(nan), sample(1.0, True)]) == (1 / 3, 1.0)
    assert trainer._gvm_measure(0, [sample(nan), sample(0.5)]) == (0.0, 0.0)


def hard_and_easy(prompts, **kwargs):
    """Of four prompts one is solved always, one every second time, one every fourth time and one never."""
    first = arithmetic()["prompt"][:4]
    every = dict(zip(first, (1, 2, 4, 10**9), strict=True))
    return [float((i + 1) % every[prompt] == 0) for i, prompt in enumerate(prompts)]


def test_hard_prompts_get_more_and_unsolved_ones_nothing():
    seen = []

    class Watching(GVMTrainer):
        config_class = GVMConfig

        def observe(self, rollouts):
            super().observe(rollouts)
            seen.append(torch.bincount(rollouts.prompt_index, minlength=4).tolist())

    settings = {"data": arithmetic().select(range(4)), "rewards": hard_and_easy, "per_device_train_batch_size": 32}
    settings |= {"num_generations": 8, "max_steps": 3, "gvm_grad_params": None, "gvm_update_steps": 2}
    trainer = train(Watching, gvm_max_accept=0.9, **settings)
    assert trainer.gvm_rates.tolist() == [1.0, 0.5, 0.25, 0.0]
    assert all(sum(counts) == 32 and counts[0] == counts[3] == 0 and counts[2] > counts[1] > 0 for counts in seen)
    assert trainer.rollouts_spent == 3 * 32 + 2 * 4 * 8  # estimated at generations 0 and 2
    assert trainer.gvm_estimated.tolist() == [2] * 4
    assert trainer.prompt_table()["gvm/rate"].tolist() == trainer.gvm_rates.tolist()


def test_raft_trains_on_accepted_rollouts_of_equal_prompts():
    seen = []

    class Watching(GVMTrainer):
        config_class = GVMConfig

        def observe(self, rollouts):
            super().observe(rollouts)
            assert torch.equal(rollouts.advantages, rollouts.rewards.clamp(min=0))
            seen.append(rollouts)

        def token_weights(self, tokens):
            weights = super().token_weights(tokens)
            rows = seen[-1]
            expected = gvm_prompt_weights(rows.rewards > 0, rows.group_ids)[tokens.row_ids]
            assert torch.allclose(weights, expected.float().unsqueeze(1).expand_as(weights))
            return weights

    rewards = lambda completions, **kw: [3 * r - 1 for r in parity_reward(completions)]  # noqa: E731
    data = arithmetic().select(range(4))
    train(Watching, gvm_loss="raft", rewards=rewards, data=data, per_device_train_batch_size=16)
    assert len(seen) == 3 and any((rollouts.rewards < 0).any() for rollouts in seen)


def test_bad_input():
    for name, value in {
        "gvm_alpha": -1.0,
        "gvm_beta": 0.0,
        "gvm_presamples": 0,
        "gvm_max_accept": 1.1,
        "gvm_min_expected": -1.0,
        "gvm_grad_params": "",
        "gvm_update_steps": 0,
        "gvm_min_rollouts": 0,
        "gvm_loss": "ppo",
    }.items():
        with pytest.raises(ValueError, match=f"`{name}` must be"):
            GVMConfig("unused", use_cpu=True, bf16=False, **{name: value})
    with pytest.raises(ValueError, match="`gvm_grad_params` is 'embed_tokens', but no trainable parameter"):
        build(GVMTrainer, peft_config=LoraConfig(target_modules=["q_proj"]))
    assert build(GVMTrainer, peft_config=LoraConfig(target_modules=["q_proj"]), gvm_grad_params="lora_B")
    trainer, config = mix("gvm", "bnpo")
    with pytest.raises(ValueError, match="'raft' brings its own advantages, and so does BNPOTrainer"):
        build(trainer, config, gvm_loss="raft")
    trainer, config = mix("gvm", "d3s")
    assert build(trainer, config)
    with pytest.raises(ValueError, match="D3S selects rollouts by the variance"):
        build(trainer, config, gvm_loss="raft")
    with pytest.warns(UserWarning, match="`gvm_max_accept` leaves rollouts to prompts that are always solved"):
        build(GVMTrainer)
    with pytest.raises(MixingError, match="both replace `prompt_budgets`"):
        mix("gvm", "knapsack_rl")
