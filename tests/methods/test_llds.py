import pytest
import torch
from harness import build, difference, train

from trl_ext import LLDSConfig, LLDSTrainer, MethodTrainer, mix
from trl_ext.methods.llds import llds_loss


OLD = torch.tensor([[-0.5, -1.0, -0.2, -0.8], [-0.3] * 4, [-1.0] * 4], dtype=torch.float64)
NEW = [[-0.9, -0.8, -0.2, -1.0], [-0.4, -0.1, -0.3, -0.3], [-2.0] * 4]
MASK = torch.tensor([[1, 1, 0, 1], [1, 1, 1, 1], [1, 1, 1, 1]])
PRESERVED = torch.tensor([True, True, False])  # advantages 1, 0, -1


def loss_and_gradient(gate="action", weights=1.0, mask=MASK):
    logps = torch.tensor(NEW, dtype=torch.float64, requires_grad=True)
    loss = llds_loss(logps, OLD, mask, PRESERVED, gate, weights)
    (0.2 * loss).backward()
    return loss.item(), logps.grad


def test_worked_example():
    loss, gradient = loss_and_gradient()
    assert loss == pytest.approx(0.085714, abs=1e-6) and 0.2 * loss == pytest.approx(0.017143, abs=1e-6)
    expected = torch.zeros(3, 4, dtype=torch.float64)
    expected[0, [0, 3]] = -0.028571
    assert torch.allclose(gradient, expected, atol=1e-6)


def test_worked_example_of_the_token_gate():
    loss, gradient = loss_and_gradient("token")
    assert loss == pytest.approx(0.1, abs=1e-6)
    expected = torch.zeros(3, 4, dtype=torch.float64)
    expected[[0, 0, 1], [0, 3, 0]] = -0.028571  # not where nothing has moved
    assert torch.allclose(gradient, expected, atol=1e-6)


def test_nothing_is_penalised_that_has_not_moved():
    logps = torch.tensor([[-1.5, -1.0, -1.0]], dtype=torch.float64, requires_grad=True)
    llds_loss(logps, torch.full((1, 3), -1.0).double(), torch.ones(1, 3), torch.tensor([True])).backward()
    assert torch.allclose(logps.grad, torch.tensor([[-1 / 3, 0, 0]], dtype=torch.float64))
    rewards = lambda completions, **kw: [1.0] * len(completions)  # noqa: E731
    log = train(LLDSTrainer, rewards=rewards, llds_gate="token", num_iterations=2, max_steps=1).state.log_history[0]
    assert log["llds/preserved"] == 1 and log["grad_norm"] == 0


def test_worked_example_of_the_answer_weight():
    weights = torch.ones(3, 4)
    weights[0, 3] = 0.5
    loss, _ = loss_and_gradient(weights=weights)
    assert loss == pytest.approx(0.071429, abs=1e-6) and 0.2 * loss == pytest.approx(0.014286, abs=1e-6)


def test_response_gate_sums_over_all_actions():
    old = torch.tensor([[0.0, 0.0, 0.0]], dtype=torch.float64)
    new = torch.tensor([[-0.1, 9.9, 0.3]], dtype=torch.float64)  # the actions sum to +0.1 and -0.3
    mask, preserved = torch.tensor([[1, 0, 1]]), torch.tensor([True])
    assert llds_loss(new, old, mask, preserved, "action").item() == pytest.approx(0.05)
    assert llds_loss(new, old, mask, preserved, "response") == 0
    assert llds_loss(-new, old, mask, preserved, "response").item() == pytest.approx(0.15)


def test_tool_outputs_may_hold_anything():
    old, new = OLD.clone(), torch.tensor(NEW, dtype=torch.float64)
    old[0, 2], new[0, 2] = -torch.inf, torch.nan
    assert llds_loss(new, old, MASK, PRESERVED).item() == pytest.approx(0.085714, abs=1e-6)


def test_nothing_to_preserve_is_a_connected_zero():
    logps = torch.tensor(NEW, dtype=torch.float64, requires_grad=True)
    loss = llds_loss(logps, OLD, MASK, torch.zeros(3, dtype=torch.bool))
    loss.backward()
    assert loss == 0 and (logps.grad == 0).all()


def test_a_share_of_a_token_is_divided_by():
    """In a generation of many micro-batches a few preserved tokens are less than one for each."""
    logps = torch.tensor(NEW, dtype=torch.float64)
    found = llds_loss(logps, OLD, MASK, PRESERVED, count=torch.tensor(0.5))
    assert found.item() == pytest.approx(0.6 / 0.5)
    assert llds_loss(logps, OLD, MASK, torch.zeros(3, dtype=torch.bool), count=torch.tensor(0.0)) == 0


SETTINGS = {"num_iterations": 2, "max_steps": 4, "learning_rate": 1e-2}


def test_in_a_run():
    plain = train(MethodTrainer, **SETTINGS)
    assert difference(train(LLDSTrainer, llds_coef=0.0, **SETTINGS), plain) < 1e-7
    trainer = train(LLDSTrainer, **SETTINGS)
    assert difference(trainer, plain) > 1e-5
    assert 0 < trainer.state.log_history[0]["llds/preserved"] <= 1
    assert any(log["llds/loss"] > 0 for log in trainer.state.log_history[1:-1])
    assert trainer.state.log_history[0]["llds/loss"] == 0  # nothing can have fallen at the first update


def test_unscored_responses_are_not_preserved_and_flat_groups_are():
    class Checking(LLDSTrainer):
        def carry(self, rollouts):
            carried = super().carry(rollouts)
            assert carried["llds/preserved"].tolist() == [False, True, True, True, True, True, True, True]
            assert carried["llds/tokens"] == rollouts.mask[1:].sum()
            return carried

    rewards = [None] + [0.7] * 7
    train(Checking, rewards=lambda completions, **kw: rewards, num_iterations=2, max_steps=1)


def test_single_rollouts_are_preserved_by_their_advantage():
    class Checking(mix("llds", "spo").Trainer):
        def carry(self, rollouts):
            carried = super().carry(rollouts)
            assert torch.equal(carried["llds/preserved"], rollouts.advantages >= 0)
            assert not carried["llds/preserved"].all()
            return carried

    train(Checking, num_iterations=2, max_steps=1, spo_offline_n=0)


def test_the_update_does_not_depend_on_the_split():
    settings = {"num_iterations": 2, "max_steps": 4, "optim": "sgd", "learning_rate": 0.1}
    whole = train(LLDSTrainer, **settings)
    split = train(LLDSTrainer, per_device_train_batch_size=4, gradient_accumulation_steps=2, **settings)
    assert difference(whole, split) < 1e-6


def test_answers():
    with pytest.raises(ValueError, match=r"trainer.answer_mask"):
        train(LLDSTrainer, llds_answer_weight="0.5", num_iterations=2)
    trainer = build(LLDSTrainer, llds_answer_weight="schedule", num_iterations=2)
    trainer.answer_mask = torch.ones_like
    trainer.train()  # without tool calls the schedule gives answers no weight, and here all is answer
    assert all(log["llds/loss"] == 0 for log in trainer.state.log_history[:-1])


def test_every_output_of_a_tool_is_a_call():
    class Checking(LLDSTrainer):
        def carry(self, rollouts):
            masks = torch.tensor([[1, 0, 1, 1], [1, 1, 0, 0], [0, 1, 0, 1], [1, 1, 1, 1]]).repeat(2, 1)
            rollouts = rollouts.replace(completion_mask=torch.ones_like(masks), mask=masks)
            assert super().carry(rollouts)["llds/calls"] == (1 + 1 + 2 + 0) / 4  # also of the one that ends with it
            raise StopIteration

    trainer = build(Checking, llds_answer_weight="schedule", num_iterations=2)
    trainer.answer_mask = torch.ones_like
    with pytest.raises(StopIteration):
        trainer.train()


def test_bad_input():
    with pytest.warns(UserWarning, match="LLDSTrainer has no effect"):
        build(LLDSTrainer)
    for name, value in {
        "llds_coef": -1.0,
        "llds_gate": "typo",
        "llds_answer_weight": "typo",
        "llds_target_calls": 0.0,
    }.items():
        with pytest.raises(ValueError, match=f"`{name}` must be"):
            LLDSConfig("unused", use_cpu=True, bf16=False, **{name: value})
    with pytest.raises(ValueError, match="`llds_answer_weight` must be"):
        LLDSConfig("unused", use_cpu=True, bf16=False, llds_answer_weight="1.5")
