import pytest
import torch
from harness import build, difference, train

from trl_ext import DisCOConfig, DisCOTrainer, MethodTrainer, mix
from trl_ext.core.rollouts import group_advantages
from trl_ext.methods.disco import disco_objective, disco_penalty, disco_scores


OLD = torch.tensor([[-0.5, -1, -0.2], [-0.7, -0.3, -0.9], [-1.2, -0.4, 0], [-0.6, -0.8, -0.5]], dtype=torch.float64)
NEW = [[-0.45, -0.95, -0.22], [-0.75, -0.33, -0.85], [-1.25, -0.45, 0], [-0.58, -0.9, -0.45]]
MASK = torch.tensor([[1, 1, 1], [1, 1, 1], [1, 1, 0], [1, 1, 1]])
REWARDS = torch.tensor([1, 0, 0, 1])
IDS = torch.zeros(4, dtype=torch.long)


def loss_and_gradient(objective, score, tau, beta):
    logps = torch.tensor(NEW, dtype=torch.float64, requires_grad=True)
    scores = disco_scores(logps, OLD, MASK, score)
    value = disco_objective(scores, REWARDS == 1, REWARDS == 0, IDS, objective, tau)
    penalty, kl = disco_penalty(logps, OLD, MASK, beta)
    loss = penalty - value
    loss.backward()
    return loss.item(), logps.grad, kl.item()


@pytest.mark.parametrize(
    ("objective", "beta", "loss", "rows"),
    [
        ("disco_b", 0.0, -0.155000, [-0.166667, 0.166667, 0.250000, -0.166667]),
        ("disco_b", 1e3, -0.129276, [-0.818733, -0.485399, -0.402066, -0.818733]),
        ("disco", 0.0, -0.154466, [-0.166667, 0.168389, 0.247417, -0.166667]),
        ("disco", 1e3, -0.128742, [-0.818733, -0.483677, -0.404649, -0.818733]),
    ],
)
def test_worked_examples(objective, beta, loss, rows):
    found, gradient, kl = loss_and_gradient(objective, "logL", 10.0, beta)
    assert found == pytest.approx(loss, abs=1e-6) and kl == pytest.approx(0.007273, abs=1e-6)
    assert torch.allclose(gradient, torch.tensor(rows, dtype=torch.float64).unsqueeze(1) * MASK, atol=1e-6)


def test_worked_example_of_ratios():
    loss, gradient, _ = loss_and_gradient("disco", "Lratio", 1.0, 0.0)
    assert loss == pytest.approx(-0.038539, abs=1e-6)
    expected = [
        [-0.175212, -0.175212, -0.163366],
        [0.161689, 0.164955, 0.178694],
        [0.233081, 0.233081, 0],
        [-0.170034, -0.150806, -0.175212],
    ]
    assert torch.allclose(gradient, torch.tensor(expected, dtype=torch.float64), atol=1e-6)


def test_questions_without_both_kinds_count_and_teach_nothing():
    scores = torch.randn(6, dtype=torch.float64, requires_grad=True)
    positive = torch.tensor([1, 0, 1, 1, 0, 0], dtype=torch.bool)
    ids = torch.tensor([0, 0, 1, 1, 2, 2])
    value = disco_objective(scores, positive, ~positive, ids, "disco_b")
    value.backward()
    assert torch.allclose(scores.grad, torch.tensor([1 / 3, -1 / 3, 0, 0, 0, 0], dtype=torch.float64))
    none = disco_objective(scores, positive & False, positive & False, ids)
    none.backward()
    assert none == 0


def test_large_temperature_is_the_mean():
    scores = torch.randn(4, dtype=torch.float64)
    soft = disco_objective(scores, REWARDS == 1, REWARDS == 0, IDS, "disco", 1e7)
    assert soft.item() == pytest.approx(disco_objective(scores, REWARDS == 1, REWARDS == 0, IDS, "disco_b").item())


def test_masked_positions_and_large_ratios():
    old, logps = OLD.clone(), torch.tensor(NEW, dtype=torch.float64)
    old[2, 2] = torch.nan
    logps[2, 2] = torch.inf
    for score in ("logL", "Lratio"):
        assert disco_scores(logps, old, MASK, score).isfinite().all()
    for estimator in ("kl", "low_var_kl"):
        assert disco_penalty(logps, old, MASK, estimator=estimator)[1].isfinite()
    assert disco_scores(logps + 1e4, old, MASK, "Lratio").isfinite().all()


def test_every_question_weighs_the_same_and_in_grpo_it_does_not():
    grpo = []
    for k in (1, 2, 4, 7):
        rewards = torch.tensor([1.0] * k + [0.0] * (8 - k), dtype=torch.float64)
        scores = torch.zeros(8, dtype=torch.float64, requires_grad=True)
        disco_objective(scores, rewards == 1, rewards == 0, torch.zeros(8), "disco_b").backward()
        assert scores.grad.abs().sum().item() == pytest.approx(2.0)
        grpo.append(group_advantages(rewards, torch.zeros(8, dtype=torch.long)).abs().sum().item() / 8)
    assert grpo == pytest.approx([0.619, 0.810, 0.935, 0.619], abs=1e-3)


def test_in_a_run():
    settings = {"num_iterations": 2, "max_steps": 4, "learning_rate": 1e-2}
    trainer = train(DisCOTrainer, **settings)
    logged = trainer.state.log_history[1]
    assert logged["disco/kl"] != 0 and 0 <= logged["disco/valid_questions"] <= 1
    assert difference(trainer, train(MethodTrainer, **settings)) > 1e-4
    graded = train(DisCOTrainer, disco_threshold=0.5, **settings)
    assert difference(trainer, graded) == 0.0  # the rewards are 0 and 1
    other = train(DisCOTrainer, disco_threshold=2.0, **settings)
    assert other.state.log_history[0]["disco/valid_questions"] == 0


def test_rows_that_fill_up_a_micro_batch_are_no_question():
    class Watching(mix("disco", "d3s").Trainer):
        def aggregate_loss(self, per_token_loss, tokens):
            real = tokens.group_ids >= 0
            assert torch.equal(real, tokens.mask.any(1))
            rows = [part[real] for part in (tokens.logps, tokens.old_logps, tokens.mask)]
            rewards, groups = tokens.rewards[real], tokens.group_ids[real]
            objective = disco_objective(disco_scores(*rows), rewards == 1, rewards == 0, groups)
            penalty, _ = disco_penalty(tokens.logps, tokens.old_logps, tokens.mask)
            loss = super().aggregate_loss(per_token_loss, tokens)
            assert loss.item() == pytest.approx((penalty - objective).item(), abs=1e-6)
            self.filled = getattr(self, "filled", 0) + int((~real).sum())
            return loss

    trainer = train(
        Watching, per_device_train_batch_size=8, gradient_accumulation_steps=2, d3s_n_init=2, num_generations=4
    )
    assert trainer.filled > 0


def test_bad_input():
    for name, value in {"disco_objective": "typo", "disco_tau": 0.0, "disco_beta": -1.0, "disco_delta": -1.0}.items():
        with pytest.raises(ValueError, match=f"`{name}` must be"):
            DisCOConfig("unused", use_cpu=True, bf16=False, **{name: value})
    for name, value in {
        "importance_sampling_level": "sequence",
        "off_policy_mask_threshold": 0.1,
        "vllm_importance_sampling_correction": True,  # off by default, unlike TRL's
    }.items():
        with pytest.raises(ValueError, match=f"`{name}` is"):
            build(DisCOTrainer, **{name: value})
    with pytest.raises(ValueError, match="per_device_train_batch_size"):
        build(DisCOTrainer, per_device_train_batch_size=6, steps_per_generation=2)
    assert DisCOConfig("unused", use_cpu=True, bf16=False, disco_score="Lratio").disco_tau == 1.0
