import math

import pytest
import torch
from harness import arithmetic, build, difference, parameters, parity_reward, scripted, train
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer

from trl_ext import MixingError, TTTDiscoverConfig, TTTDiscoverTrainer, mix
from trl_ext.methods.ttt_discover import (
    adaptive_beta,
    entropic_advantages,
    groups_with_signal,
    is_loss,
    kl_shaped_advantages,
    tilted_kl,
    tilted_weights,
)
from trl_ext.tasks import POLICY_PATH


NAN = math.nan


def f64(*values):
    return torch.tensor(values, dtype=torch.float64)


def one_group(values):
    return f64(*values), torch.zeros(len(values), dtype=torch.long)


# -------------------------------------------------------------------------------------------- the worked examples


@pytest.mark.parametrize(
    ("rewards", "beta", "advantages"),
    [
        ([1, 0, 0, 0, 0, 0, 0, 0], 2.465388, [10.768045] + [-0.606034] * 7),
        ([0.1, 0.2, 0.4, 0.8], 4.658133, [-0.905380, -0.846366, -0.576619, 10.780825]),
    ],
)
def test_worked_examples(rewards, beta, advantages):
    assert adaptive_beta(*one_group(rewards)).item() == pytest.approx(beta, abs=1e-6)
    assert entropic_advantages(*one_group(rewards)).tolist() == pytest.approx(advantages, abs=1e-6)


def test_fixed_beta_by_hand():
    rewards = f64(0.0, 1.0, 3.0)
    terms = torch.exp(0.5 * rewards)
    expected = [(terms[i] / ((terms.sum() - terms[i]) / 2) - 1).item() for i in range(3)]
    found = entropic_advantages(rewards, torch.zeros(3, dtype=torch.long), beta=0.5)
    assert found.tolist() == pytest.approx(expected, abs=1e-9)


# ------------------------------------------------------------------------------------------------- edge cases


@pytest.mark.parametrize(("size", "top"), [(4, 2), (4, 3), (8, 5), (6, 5)])
def test_ties_at_the_top_that_the_budget_cannot_meet(size, top):
    rewards, ids = one_group([0.7] * top + [0.2] * (size - top))
    expected = [(size - 1) / (top - 1) - 1] * top + [-1.0] * (size - top)
    assert entropic_advantages(rewards, ids).tolist() == pytest.approx(expected, abs=1e-6)
    if top > size / 2:
        assert adaptive_beta(rewards, ids).item() == 1048576


def test_groups_without_a_signal_have_no_advantage():
    constant = [0.1 + 0.2] * 5  # whose mean in floating point is another number
    assert entropic_advantages(*one_group(constant)).tolist() == [0.0] * 5
    assert adaptive_beta(*one_group(constant)).item() == 0
    for beta in (None, 2.0):
        for rewards in ([1, 0], [1], [NAN, 1, 0, NAN], [NAN] * 3):  # fewer than three are scored
            assert entropic_advantages(*one_group(rewards), beta=beta).tolist() == [0.0] * len(rewards)


def test_unscored_rollouts_leave_the_group():
    found = entropic_advantages(*one_group([0.1, NAN, 0.2, 0.4, NAN, 0.8]))
    assert found.tolist() == pytest.approx([-0.905380, 0, -0.846366, -0.576619, 0, 10.780825], abs=1e-6)


def test_a_budget_that_three_scored_rollouts_cannot_meet():
    """ln 4 nats are more than three weights can diverge: without a rule the best would get 1e12."""
    found = entropic_advantages(*one_group([1, 0, 0.5, NAN, NAN, NAN, NAN, NAN]), kl_budget=math.log(4))
    assert found.tolist() == [0.0] * 8


@settings(max_examples=80, deadline=None)
@given(
    st.lists(st.integers(-50, 50), min_size=3, max_size=12),
    st.sampled_from([0.01, 1.0, 37.0]),
    st.sampled_from([-5.0, 0.0, 3.0]),
    st.sampled_from([0.2, math.log(2)]),
)
def test_the_budget_is_met_and_scale_and_shift_do_not_matter(values, scale, shift, budget):
    rewards, ids = one_group([value / 10 for value in values])
    found = entropic_advantages(rewards, ids, kl_budget=budget)
    assert (found >= -1).all()
    if rewards.unique().numel() == 1:
        assert (found == 0).all()
        return
    best = rewards == rewards.max()
    assert (found[best] > 0).all()
    order = rewards.argsort()
    assert (found[order].diff() >= 0).all()  # a better reward never has a smaller advantage
    beta = adaptive_beta(rewards, ids, budget)
    if budget < math.log(len(values) / int(best.sum())) - 1e-9:
        assert tilted_kl(rewards.unsqueeze(0), beta).item() == pytest.approx(budget, abs=1e-9)
        moved = entropic_advantages(scale * rewards + shift, ids, kl_budget=budget)
        assert torch.allclose(moved, found, rtol=1e-5, atol=1e-6)


def test_groups_of_different_sizes_are_independent():
    first, second = [1.0, 0, 0, 0, 0, 0, 0, 0], [0.1, 0.2, 0.4, 0.8]
    ids = torch.tensor([5, 2, 5, 2, 5, 2, 5, 2, 5, 5, 5, 5])
    rewards = torch.empty(12, dtype=torch.float64)
    rewards[ids == 5], rewards[ids == 2] = f64(*first), f64(*second)
    found = entropic_advantages(rewards, ids)
    assert found[ids == 5].tolist() == pytest.approx([10.768045] + [-0.606034] * 7, abs=1e-6)
    assert found[ids == 2].tolist() == pytest.approx([-0.905380, -0.846366, -0.576619, 10.780825], abs=1e-6)
    assert adaptive_beta(rewards, ids).tolist() == pytest.approx([4.658133, 2.465388], abs=1e-6)


def test_which_groups_stay():
    ids = torch.tensor([0, 0, 0, 1, 1, 1, 2, 2, 2, 2])
    kept = groups_with_signal(f64(1, 1, 1, 0, 0.5, NAN, 1, 0, NAN, 0), ids)
    assert kept.tolist() == [False] * 6 + [True, True, False, True]
    constant = groups_with_signal(f64(NAN, NAN, NAN, 0, 0, NAN, 1, 1, 1, 1), ids)
    assert constant.tolist() == [False] * 3 + [True, True, False] + [False] * 4  # one group, so there is a step
    assert not groups_with_signal(f64(*[NAN] * 10), ids).any()


def test_kl_shaping_by_hand():
    logps, base = f64([-1, -2, -3], [-1, -1, NAN]), f64([-2, -2, -1], [-1.5, NAN, -1])
    mask = torch.tensor([[1, 1, 1], [1, 0, 0]])
    # log-ratios 1, 0, -2 and 0.5; their mean is -0.125
    found = kl_shaped_advantages(f64(2, -1), logps, base, mask, 0.1)
    expected = f64([2 - 0.1125, 2 - 0.0125, 2 + 0.1875], [-1 - 0.0625, -1, -1])
    assert torch.allclose(found, expected, atol=1e-12)
    again = kl_shaped_advantages(f64(2, -1).unsqueeze(1).expand(2, 3), logps, base, mask, 0.1, mean=-0.125)
    assert torch.allclose(again, expected, atol=1e-12)


def test_surrogate_has_no_clip():
    log_ratio = torch.tensor([[0.0, 3.0, -3.0]], dtype=torch.float64, requires_grad=True)
    loss = is_loss(log_ratio, f64([1, 2, -1]))
    assert loss.tolist()[0] == pytest.approx([-1, -2 * math.exp(3), math.exp(-3)])
    loss.sum().backward()
    assert torch.equal(log_ratio.grad, loss.detach())


def test_effective_sizes_are_the_papers():
    """64 normal rewards: about 20 effective samples and beta * sigma of 1.28 at every scale."""
    generator = torch.Generator().manual_seed(0)
    table = torch.randn(40, 64, generator=generator, dtype=torch.float64)
    ids = torch.arange(40).repeat_interleave(64)
    for scale in (0.01, 1.0, 100.0):
        rewards = scale * table
        betas = adaptive_beta(rewards.flatten(), ids)
        sizes = 1 / tilted_weights(rewards, betas).square().sum(1)
        assert sizes.mean().item() == pytest.approx(20, abs=1.5)
        assert (betas * rewards.std(1)).mean().item() == pytest.approx(1.28, abs=0.03)
    fixed = [
        (1 / tilted_weights(s * table, torch.full((40,), 2.0)).square().sum(1)).mean().item() for s in (0.01, 1, 100)
    ]
    assert fixed == pytest.approx([64, 9, 1], abs=2)


# ------------------------------------------------------------------------------------------------- in a real run


def graded(completions, **kwargs):
    """Rewards of many values, of an odd scale."""
    return [0.01 * (sum(map(ord, text)) % 7) - 3 for text in completions]


def test_in_a_run():
    class Checking(TTTDiscoverTrainer):
        def observe(self, rollouts):
            super().observe(rollouts)
            expected = entropic_advantages(rollouts.rewards, rollouts.group_ids)
            assert torch.equal(rollouts.advantages, expected) and expected.max() > 1
            assert torch.equal(rollouts.selected, groups_with_signal(rollouts.rewards, rollouts.group_ids))
            self.kept = [*getattr(self, "kept", []), rollouts.selected.float().mean().item()]

    trainer = train(Checking, rewards=graded, max_steps=4)
    assert [log["kept_rollouts"] for log in trainer.state.log_history[:-1]] == pytest.approx(trainer.kept)
    assert min(trainer.kept) > 0
    log = trainer.state.log_history[0]
    assert log["entropic/beta"] > 10 and 1 <= log["entropic/effective_size"] < 4 and log["entropic/max_advantage"] > 1


def test_constant_groups_leave_the_batch():
    def some(completions, **kwargs):
        return [1.0] * 4 + [float(i) for i in range(4)]

    class Checking(TTTDiscoverTrainer):
        def _compute_loss(self, model, inputs):
            assert set(inputs["group_ids"].tolist()) == {1}
            return super()._compute_loss(model, inputs)

    trainer = train(Checking, rewards=some, max_steps=1)
    assert trainer.state.log_history[0]["kept_rollouts"] == 0.5


def expected_update(record, rate):
    """Gradient descent on the plain sum over all tokens of the batch, from the embedded policy."""
    model = AutoModelForCausalLM.from_pretrained(POLICY_PATH)
    ids = torch.cat([record.prompt_ids, record.completion_ids], 1)
    mask = torch.cat([record.prompt_mask, record.completion_mask], 1)
    keep = record.completion_ids.shape[1]
    logits = model(input_ids=ids, attention_mask=mask, logits_to_keep=keep + 1).logits[:, :-1]
    logps = logits.float().log_softmax(-1).gather(-1, record.completion_ids.unsqueeze(-1)).squeeze(-1)
    valid = record.mask * record.selected.unsqueeze(1)
    (-(logps - logps.detach()).exp() * record.advantages.unsqueeze(1) * valid).sum().backward()
    return {name: -rate * p.grad for name, p in model.named_parameters()}


@pytest.mark.parametrize("loss_type", ["dapo", "grpo"])
@pytest.mark.parametrize("split", [1, 4])
def test_the_update_is_that_of_a_sum_over_the_batch(split, loss_type):
    class Recording(TTTDiscoverTrainer):
        def observe(self, rollouts):
            super().observe(rollouts)
            self.record = rollouts

    trainer = train(
        Recording,
        rewards=graded,
        rollout_func=scripted,
        loss_type=loss_type,
        per_device_train_batch_size=16 // split,
        gradient_accumulation_steps=split,
        max_grad_norm=0.0,
        optim="sgd",
        learning_rate=1e-4,
        max_steps=1,
    )
    start = dict(AutoModelForCausalLM.from_pretrained(POLICY_PATH).named_parameters())
    after = parameters(trainer)
    expected = expected_update(trainer.record, 1e-4)
    largest = max(step.abs().max().item() for step in expected.values())
    assert largest > 1e-4
    for name, step in expected.items():
        assert torch.allclose(after[name] - start[name].detach(), step, atol=1e-3 * largest)


def test_several_optimizer_steps_per_generation_sum_over_their_own_share():
    """With a learning rate that hardly moves the policy two half batches add up to the whole one."""
    common = {"rewards": graded, "rollout_func": scripted, "max_grad_norm": 0.0, "optim": "sgd", "learning_rate": 1e-6}

    def double():
        return AutoModelForCausalLM.from_pretrained(POLICY_PATH, dtype=torch.float64)

    whole = train(TTTDiscoverTrainer, model=double(), per_device_train_batch_size=16, max_steps=1, **common)
    halves = train(
        TTTDiscoverTrainer,
        model=double(),
        per_device_train_batch_size=8,
        steps_per_generation=2,
        gradient_accumulation_steps=1,
        max_steps=2,
        **common,
    )
    start = dict(double().named_parameters())
    moved = max((p - start[name]).abs().max().item() for name, p in parameters(whole).items())
    assert difference(whole, halves) < 0.02 * moved


def test_trls_loss_instead():
    sum_loss = train(TTTDiscoverTrainer, rewards=graded)
    ours = train(TTTDiscoverTrainer, rewards=graded, entropic_surrogate="trl")
    assert difference(sum_loss, ours) > 1e-5

    class Plain(mix("d3s").Trainer):  # TRL's own loss with these advantages
        replaces = ("compute_advantages",)

        def compute_advantages(self, rollouts):
            return entropic_advantages(rollouts.rewards, rollouts.group_ids)

        def select_rollouts(self, rollouts):
            return super().select_rollouts(rollouts) & groups_with_signal(rollouts.rewards, rollouts.group_ids)

    every = {"d3s_n_init": 4, "d3s_n_final": 4, "d3s_k_init": 1.0}
    assert difference(ours, train(Plain, rewards=graded, **every)) < 1e-6


@pytest.mark.parametrize("lora", [False, True])
def test_kl_shaping_in_a_run(lora):
    class Checking(TTTDiscoverTrainer):
        def observe(self, rollouts):
            super().observe(rollouts)
            plain = entropic_advantages(rollouts.rewards, rollouts.group_ids).unsqueeze(1)
            mask = rollouts.mask * rollouts.selected.unsqueeze(1)
            shaping = rollouts.advantages - plain
            assert (shaping * mask).sum().abs() < 1e-4 and (shaping * (1 - mask) == 0).all()
            self.sizes = [*getattr(self, "sizes", []), shaping.abs().max().item()]

    extra = {"peft_config": LoraConfig(target_modules=["q_proj", "v_proj"])} if lora else {}
    rate = 1e-2 if lora else 1e-3
    trainer = train(Checking, rewards=graded, entropic_kl_coef=0.5, max_steps=3, learning_rate=rate, **extra)
    assert trainer.sizes[0] < 1e-4 < 1e-2 < trainer.sizes[1]  # the first generation is the start model's
    assert (trainer.entropic_base is None) == lora
    kl = [log["entropic/kl"] for log in trainer.state.log_history[:-1]]
    assert abs(kl[0]) < 1e-5 < abs(kl[2])  # an estimate from a few tokens may be negative


def test_the_penalty_keeps_the_policy_near_its_start():
    common = {"rewards": graded, "max_steps": 10, "num_generations": 8, "per_device_train_batch_size": 16}
    drift = [
        train(TTTDiscoverTrainer, entropic_kl_coef=coef, **common).state.log_history[9]["entropic/kl"]
        for coef in (1e-6, 3.0)
    ]
    assert drift[1] < 0.5 * drift[0]


def test_rare_best_answers_are_learnt():
    """A reward that one first digit has: it becomes more frequent."""

    def nines(completions, **kwargs):
        return [float(text.count("9")) for text in completions]

    trainer = train(
        TTTDiscoverTrainer, rewards=nines, num_generations=16, per_device_train_batch_size=64, max_steps=15
    )
    rewards = [log["reward"] for log in trainer.state.log_history[:-1]]
    assert sum(rewards[-3:]) > 2 * sum(rewards[:3])


def test_evaluation():
    trainer = build(
        TTTDiscoverTrainer,
        eval_dataset=arithmetic("test").select(range(4)),
        per_device_eval_batch_size=8,
        entropic_kl_coef=0.1,
        rewards=graded,
    )
    result = trainer.evaluate()
    assert math.isfinite(result["eval_loss"]) and abs(result["eval_entropic/kl"]) < 1e-5


# -------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("num_generations", 2),
        ("entropic_kl_budget", 0.0),
        ("entropic_kl_budget", math.log(8)),
        ("entropic_beta", 0.0),
        ("entropic_beta", math.inf),
        ("entropic_beta_max", 0.5),
        ("entropic_iters", 0),
        ("entropic_eps", 0.0),
        ("entropic_kl_coef", -0.1),
        ("entropic_surrogate", "typo"),
    ],
)
def test_settings_out_of_range_are_named(name, value):
    settings = {"num_generations": 8} | {name: value}
    with pytest.raises(ValueError, match=f"`{name}` must be .*got {value!r}"):
        TTTDiscoverConfig("unused", use_cpu=True, bf16=False, **settings)


def test_refused_combinations():
    with pytest.raises(ValueError, match=r"`beta` must be 0 with `entropic_kl_coef` 0\.1"):
        TTTDiscoverConfig("unused", use_cpu=True, bf16=False, beta=0.1, entropic_kl_coef=0.1)
    for loss_type in ("cispo", "sapo", "vespo"):
        with pytest.raises(ValueError, match=f"`loss_type='{loss_type}'`"):
            build(TTTDiscoverTrainer, loss_type=loss_type)
    model = AutoModelForCausalLM.from_pretrained(POLICY_PATH)
    model.config._name_or_path = ""
    args = TTTDiscoverConfig("unused", use_cpu=True, bf16=False, report_to=[], entropic_kl_coef=0.1)
    tokenizer = AutoTokenizer.from_pretrained(POLICY_PATH)
    with pytest.raises(ValueError, match=r"`entropic_kl_coef` is 0\.1, but the policy does not say"):
        TTTDiscoverTrainer(model, graded, args, arithmetic(), processing_class=tokenizer)
    for other, hook in {"ngrpo": "compute_advantages", "kl_cov": "policy_loss"}.items():
        with pytest.raises(MixingError, match=f"both replace `{hook}`"):
            mix("ttt_discover", other)


def test_with_a_blend():
    trainer, config = mix("ttt_discover", blend={"ttt_discover": 0.5, "grpo": 0.5})
    trainer = train(trainer, config, rewards=parity_reward, entropic_kl_coef=0.1)
    assert all(p.isfinite().all() for p in parameters(trainer).values())
