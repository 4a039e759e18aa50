import itertools

import pytest
from harness import arithmetic, build, difference, train
from hypothesis import given
from hypothesis import strategies as st

from trl_ext import GRPODConfig, GRPODTrainer, MethodTrainer, mix
from trl_ext.methods.grpo_d import kl_beta


@pytest.mark.parametrize(
    ("total", "low", "high", "ratio", "values"),
    [
        (100, 0.0, 0.02, 0.3, {0: 0.01, 15: 0.005, 30: 0, 31: 0.000286, 65: 0.01, 100: 0.02, 120: 0.02}),
        (100, 0.04, 0.1, 0.3, {0: 0.07, 15: 0.055, 30: 0.04, 31: 0.040857, 65: 0.07, 100: 0.1}),
        (20, 0.02, 0.06, 1.0, {0: 0.04, 10: 0.03, 20: 0.02, 21: 0.06}),
        (10, 0.0, 0.5, 0.0, {0: 0.0, 5: 0.25, 10: 0.5, 11: 0.5}),
    ],
)
def test_worked_schedules(total, low, high, ratio, values):
    found = {step: kl_beta(step, total, low, high, ratio) for step in values}
    assert found == pytest.approx(values, abs=1e-6)


@given(st.integers(1, 500), st.floats(0, 1), st.floats(0, 1), st.floats(0, 1), st.sampled_from(["dip", "monotone"]))
def test_the_weight_stays_in_its_range_and_turns_once(total, low, width, ratio, schedule):
    values = [kl_beta(step, total, low, low + width, ratio, schedule) for step in range(total + 3)]
    assert all(low - 1e-9 <= value <= low + width + 1e-9 for value in values)
    assert values[-1] == low + width
    rising = [b - a for a, b in itertools.pairwise(values)]
    exploring = ratio * total if schedule == "dip" else 0
    assert all(
        (change <= 1e-12) == (step + 1 <= exploring) or abs(change) < 1e-9
        for step, change in enumerate(rising)
        if not step < exploring < step + 1
    )


def test_the_weight_of_every_step_and_the_penalty_it_weighs():
    seen = []

    class Watching(GRPODTrainer):
        config_class = GRPODConfig

        def regularizers(self, tokens):
            gap = tokens.ref_logps - tokens.logps.detach()
            divergence = (gap.exp() - gap - 1) * tokens.mask
            seen.append((tokens.step, self.kl_weight(tokens), (divergence.sum() / tokens.mask.sum()).item()))
            return super().regularizers(tokens)

    trainer = train(Watching, max_steps=5, kl_explore_ratio=0.4, num_iterations=5)
    betas = [0.01, 0.005, 0.0, 0.02 / 3, 0.04 / 3]
    assert [step for step, *_ in seen] == list(range(5))
    assert [weight for _, weight, _ in seen] == pytest.approx(betas)
    logged = [entry["grpo_d/beta"] for entry in trainer.state.log_history if "grpo_d/beta" in entry]
    assert logged == pytest.approx(betas)
    divergences = [entry["kl"] for entry in trainer.state.log_history if "kl" in entry]
    assert divergences == pytest.approx([kl for _, weight, kl in seen if weight], rel=1e-4, abs=1e-7)
    assert seen[-1][2] > 0


def test_it_is_trls_penalty_with_that_weight():
    settings = {"num_iterations": 3, "max_steps": 3, "loss_type": "grpo"}
    constant = train(GRPODTrainer, kl_beta_min=0.3, kl_beta_max=0.3, **settings)
    assert difference(constant, train(MethodTrainer, beta=0.3, use_bias_correction_kl=False, **settings)) == 0.0
    assert difference(constant, train(GRPODTrainer, kl_beta_max=0.3, **settings)) > 1e-6


def test_a_generation_made_at_weight_zero_still_has_a_reference():
    """Weight 0 at its lowest point, and more than 0 at the next update on the same rollouts."""
    trainer = train(GRPODTrainer, max_steps=4, kl_explore_ratio=0.25, kl_beta_max=0.5, num_iterations=2)
    betas = [entry["grpo_d/beta"] for entry in trainer.state.log_history if "grpo_d/beta" in entry]
    assert betas[1] == 0.0 and betas[2] > 0


def test_a_resumed_run_keeps_its_schedule(tmp_path):
    settings = {"out": tmp_path, "save_strategy": "steps", "save_steps": 2, "kl_beta_max": 0.5}
    train(GRPODTrainer, max_steps=4, **settings)
    longer = train(GRPODTrainer, max_steps=8, resume=str(tmp_path / "checkpoint-2"), **settings)
    betas = [entry["grpo_d/beta"] for entry in longer.state.log_history if "grpo_d/beta" in entry]
    assert betas == pytest.approx([kl_beta(step, 4, 0.0, 0.5) for step in range(8)])


def test_a_schedule_that_is_given_is_that_of_a_resumed_run(tmp_path):
    settings = {"out": tmp_path, "save_strategy": "steps", "save_steps": 2, "kl_beta_max": 0.5}
    train(GRPODTrainer, max_steps=2, **settings)
    resumed = str(tmp_path / "checkpoint-2")
    longer = train(GRPODTrainer, max_steps=4, resume=resumed, kl_total_steps=8, **settings)
    assert longer.state.log_history[3]["grpo_d/beta"] == pytest.approx(kl_beta(3, 8, 0.0, 0.5))


def test_evaluation_uses_the_current_weight():
    trainer = build(GRPODTrainer, eval_dataset=arithmetic().select(range(4)), kl_beta_max=0.5)
    trainer.evaluate()
    before = list(trainer.state.log_history)  # which training begins anew
    trainer.train()
    trainer.evaluate()
    found = [entry["eval_grpo_d/beta"] for entry in before + trainer.state.log_history if "eval_grpo_d/beta" in entry]
    assert found == pytest.approx([0.25, 0.5])


def test_bad_input():
    for name, value in {
        "kl_beta_min": -0.1,
        "kl_beta_max": 0.0,
        "kl_explore_ratio": 1.5,
        "kl_total_steps": 0,
        "kl_schedule": "up",
        "beta": 0.1,
    }.items():
        with pytest.raises(ValueError, match=f"`{name}` must be"):
            GRPODConfig("unused", use_cpu=True, bf16=False, **{name: value})
    with pytest.raises(ValueError, match="`kl_beta_max` must be at least kl_beta_min"):
        GRPODConfig("unused", use_cpu=True, bf16=False, kl_beta_min=0.5)
    for name, reason in {"d3s": "D3S masks tokens", "gtpo": "works without a KL term", "kdrl": "its teacher"}.items():
        with pytest.raises(TypeError, match=reason):
            mix("grpo_d", name)
