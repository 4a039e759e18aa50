import pytest
import torch
from harness import build, difference, sparse_reward, train
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from trl_ext import GPPOConfig, GPPOTrainer, MethodTrainer, mix
from trl_ext.core.loss import clipped_loss
from trl_ext.methods.gppo import gppo_clipped, gppo_loss, positive_likelihood_loss


RATIO = torch.tensor([[1.5, 0.5, 1.1], [0.5, 1.5, 4.0]], dtype=torch.float64)
ADVANTAGES = torch.tensor([[2.0], [-1.0]], dtype=torch.float64)


@pytest.mark.parametrize(
    ("options", "loss", "gradient"),
    [
        ({"dual_clip": 10}, 0.09, [[-0.426667, -0.166667, -0.366667], [0.133333, 0.25, 0.666667]]),
        ({"dual_clip": 3}, -0.076667, [[-0.426667, -0.166667, -0.366667], [0.133333, 0.25, 0.0]]),
        (
            {"beta_low": 0.5, "beta_high": 0.75},
            0.09,
            [[-0.32, -0.166667, -0.366667], [0.066667, 0.25, 0.666667]],
        ),
        ({"beta_low": 0.0, "beta_high": 0.0}, 0.09, [[0.0, -0.166667, -0.366667], [0.0, 0.25, 0.666667]]),
    ],
)
def test_worked_examples(options, loss, gradient):
    log_ratio = RATIO.log().requires_grad_()
    value = gppo_loss(log_ratio, ADVANTAGES, 0.8, 1.28, **options).mean()
    value.backward()
    # The paper's sum is of tokens over the whole batch, hence the plain mean.
    assert value.item() == pytest.approx(loss, abs=1e-6)
    assert torch.allclose(log_ratio.grad, torch.tensor(gradient, dtype=torch.float64), atol=1e-6)


def papers_form(lp, old, advantages, low, high, beta_low, beta_high, dual_clip):
    """The paper's r / sg(r), max and min, by autograd; the betas on the clipped branch alone."""
    ratio = (lp - old).exp()

    def scaled(x, beta):
        return beta * (x - x.detach()) + x.detach()

    unit = ratio / ratio.detach()
    lower, upper = scaled(low * unit, beta_low), scaled(high * unit, beta_high)
    clipped = torch.where(ratio < low, lower, torch.where(ratio > high, upper, ratio))
    loss = torch.maximum(-advantages * ratio, -advantages * clipped)
    if dual_clip is not None:
        loss = torch.where(advantages < 0, torch.minimum(loss, -advantages * dual_clip), loss)
    return loss


def closed_form(ratio, advantage, low, high, beta_low, beta_high, dual_clip):
    """-A * F, equation by equation."""
    if advantage < 0 and ratio < low:
        return -advantage * beta_low * low
    if advantage > 0 and ratio > high:
        return -advantage * beta_high * high
    if advantage < 0 and dual_clip is not None and ratio > dual_clip:
        return 0.0
    return -advantage * ratio


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_gradient_is_that_of_the_equations(data):
    low, high = data.draw(st.floats(0.3, 0.95)), data.draw(st.floats(1.05, 3.0))
    dual_clip = data.draw(st.sampled_from([None, 1.02, 2.0, 10.0]))
    betas = data.draw(st.sampled_from([0.0, 0.5, 1.0, 2.0])), data.draw(st.sampled_from([0.0, 0.75, 1.0]))
    ratios = st.one_of(st.floats(1e-4, 100.0), st.sampled_from([low - 1e-9, low + 1e-9, high - 1e-9, high + 1e-9]))
    cells = data.draw(
        st.lists(st.tuples(ratios, st.sampled_from([-1.9, -0.3, 0.0, 0.7, 2.0])), min_size=6, max_size=6)
    )
    kinks = [low, high] if dual_clip is None else [low, high, dual_clip]
    assume(all(abs(r - kink) > 1e-10 for r, _ in cells for kink in kinks))
    mask = torch.tensor(data.draw(st.lists(st.booleans(), min_size=6, max_size=6))).view(2, 3)
    ratio = torch.tensor([r for r, _ in cells], dtype=torch.float64).view(2, 3)
    advantages = torch.tensor([a for _, a in cells], dtype=torch.float64).view(2, 3)
    old = torch.randn(2, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    lp = (old + ratio.log()).requires_grad_()
    loss = gppo_loss(lp - old, advantages, low, high, *betas, dual_clip)
    (loss * mask).sum().backward()
    expected = [closed_form(r, a, low, high, *betas, dual_clip) for r, a in cells]
    expected = [value * kept for value, kept in zip(expected, mask.flatten().tolist(), strict=True)]
    assert lp.grad.flatten().tolist() == pytest.approx(expected, abs=1e-6, rel=1e-9)
    again = lp.detach().clone().requires_grad_()
    oracle = papers_form(again, old, advantages, low, high, *betas, dual_clip)
    (oracle * mask).sum().backward()
    assert torch.allclose(loss, oracle, atol=1e-9) and torch.allclose(lp.grad, again.grad, atol=1e-6)
    if dual_clip is None:  # the value is PPO's
        assert torch.allclose(loss, clipped_loss(lp - old, advantages, low, high), atol=1e-9)
    below, above = gppo_clipped(lp - old, advantages, low, high)
    assert (below & above).sum() == 0
    if betas == (0.0, 0.0):
        assert (lp.grad[below | above] == 0).all()


def test_exactly_at_a_bound():
    """Both branches agree there, so the paper's max, which splits its gradient, comes to the same."""
    bounds = torch.tensor([[0.5, 2.0, 0.5, 2.0]], dtype=torch.float64)  # exact in exp(log(.))
    advantages = torch.tensor([[-1.0, 1.0, 1.0, -1.0]], dtype=torch.float64)
    log_ratio = torch.zeros(1, 4, dtype=torch.float64, requires_grad=True)
    old = -bounds.log()
    low, high = (log_ratio - old).exp().detach()[0, 0], (log_ratio - old).exp().detach()[0, 1]
    gppo_loss(log_ratio - old, advantages, low, high).sum().backward()
    assert log_ratio.grad.tolist() == [pytest.approx([0.5, -2.0, -0.5, 2.0])]
    assert not torch.stack(gppo_clipped(log_ratio - old, advantages, low, high)).any()


def test_bounds_may_be_tensors_and_ratios_per_sequence():
    log_ratio = torch.tensor([[0.5], [-0.5]], dtype=torch.float64, requires_grad=True)
    advantages = torch.tensor([[1.0, 1.0], [-1.0, -1.0]], dtype=torch.float64)
    low, high = torch.full((2, 1), 0.9), torch.full((2, 1), 1.1)
    loss = gppo_loss(log_ratio, advantages, low.double(), high.double())
    loss.sum().backward()
    assert loss.shape == (2, 2)
    assert log_ratio.grad.flatten().tolist() == pytest.approx([-2 * 1.1, 2 * 0.9])


@pytest.mark.parametrize("size", [30.0, 800.0])
def test_extreme_ratios_keep_the_gradient_of_the_bound(size):
    log_ratio = torch.tensor([[size, -size]], requires_grad=True)
    loss = gppo_loss(log_ratio, torch.tensor([[1.0, -1.0]]))
    loss.sum().backward()
    assert loss.tolist() == [pytest.approx([-1.28, 0.8])]
    assert log_ratio.grad.tolist() == [pytest.approx([-1.28, 0.8])]
    wrong = gppo_loss(torch.tensor([[size, -size]]), torch.tensor([[-1.0, 1.0]]))
    assert wrong.isfinite().all()


def test_likelihood_term():
    logps = torch.tensor([[-1.0, -2.0, torch.nan], [-5.0, -5.0, -5.0], [-4.0, -9.0, -9.0]], requires_grad=True)
    mask = torch.tensor([[1, 1, 0], [1, 1, 1], [1, 0, 0]])
    loss = positive_likelihood_loss(logps, mask, torch.tensor([True, False, True]))
    loss.backward()
    assert loss.item() == pytest.approx(7 / 3)
    assert logps.grad.tolist() == [pytest.approx([-1 / 3, -1 / 3, 0]), [0, 0, 0], pytest.approx([-1 / 3, 0, 0])]
    logps.grad = None
    loss = positive_likelihood_loss(logps, mask, torch.zeros(3, dtype=torch.bool))
    loss.backward()
    assert loss == 0 and (logps.grad == 0).all()


# -------------------------------------------------------------------------------------------------- in the trainer

# At a high temperature the policy is unsure of its answers, so ratios move in both directions.
STALE = {
    "num_iterations": 4,
    "max_steps": 4,
    "learning_rate": 1e-2,
    "per_device_train_batch_size": 16,
    "temperature": 4.0,
}


class Watching(GPPOTrainer):
    config_class = GPPOConfig

    def regularizers(self, tokens):
        ratio = (tokens.logps - tokens.old_logps).detach().exp()
        mask = tokens.mask.bool()
        shares = []
        for cut in (
            (tokens.advantages < 0) & (ratio < 0.8) & mask,
            (tokens.advantages > 0) & (ratio > 1.28) & mask,
        ):
            shares.append((cut.sum() / mask.sum()).item())
        self.__dict__.setdefault("shares", []).append(shares)
        terms = super().regularizers(tokens)
        self.__dict__.setdefault("terms", []).append((tokens, terms))
        return terms


def test_clipped_tokens_are_counted_and_keep_learning():
    trainer = train(Watching, gppo_pos_coef=0.0, **STALE)
    logs = [entry for entry in trainer.state.log_history if "gppo/clipped_low" in entry]
    found = [[entry["gppo/clipped_low"], entry["gppo/clipped_high"]] for entry in logs]
    assert found == [pytest.approx(shares, abs=1e-6) for shares in trainer.shares]
    assert found[0] == [0, 0] and max(low for low, _ in found) > 0.05 and max(high for _, high in found) > 0.05
    assert all("gppo/positive_loss" not in entry for entry in logs)
    plain = train(MethodTrainer, epsilon=0.2, epsilon_high=0.28, **STALE)
    assert difference(trainer, plain) > 1e-4
    off = train(GPPOTrainer, gppo_beta_low=0.0, gppo_beta_high=0.0, gppo_pos_coef=0.0, **STALE)
    assert difference(off, plain) < 1e-6


def test_correct_is_full_marks_of_the_named_reward():
    values = [1.0, 0.5, None, 1.0, 0.0, 2.0, 0.99, 1.0]

    def partial(completions, **kwargs):
        return values

    trainer = train(
        Watching,
        rewards=[sparse_reward, partial],
        gppo_correct_reward="partial",
        gppo_pos_coef=0.5,
        num_iterations=2,
        max_steps=1,
        shuffle_dataset=False,
    )
    ((tokens, terms),) = trainer.terms
    correct = tokens.carried["gppo/correct"]
    expected = [value is not None and value >= 1 for value in values]
    assert correct[tokens.row_ids.argsort()].tolist() == expected
    kept = (correct.unsqueeze(1) & tokens.mask.bool()).double()
    mean = -(kept * tokens.logps.double()).sum() / kept.sum()
    assert terms["gppo/positive_loss"].item() == pytest.approx(0.5 * mean.item(), rel=1e-5)


def test_a_group_in_which_all_is_right_teaches_by_its_likelihood_alone():
    def right(completions, **kwargs):
        return [1.0] * len(completions)

    settings = STALE | {"rewards": right, "learning_rate": 1e-4}
    trainer = train(Watching, **settings)
    still = train(GPPOTrainer, gppo_pos_coef=0.0, **settings)
    assert difference(still, build(GPPOTrainer, **STALE)) == 0.0 < difference(trainer, still)
    losses = [entry["gppo/positive_loss"] for entry in trainer.state.log_history if "gppo/positive_loss" in entry]
    assert losses == sorted(losses, reverse=True) and losses[-1] < losses[0] - 1e-3


def test_the_clip_alone_does_not_depend_on_the_split():
    settings = STALE | {"optim": "sgd", "learning_rate": 0.1, "gppo_pos_coef": 0.0, "max_grad_norm": 0.0}
    whole = train(Watching, **settings)
    split = train(GPPOTrainer, **settings | {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 4})
    assert max(max(shares) for shares in whole.shares) > 0  # it does clip
    assert difference(whole, split) < 1e-6


def test_dcpos_bounds():
    """DCPO says where the clip is, GPPO what happens beyond it."""
    mixed = mix("dcpo", "gppo")

    class Checking(mixed.Trainer):
        def policy_loss(self, tokens):
            assert tokens.ratio_low.shape == tokens.logps.shape
            found = super().policy_loss(tokens)
            oracle = gppo_loss(tokens.log_ratio, tokens.advantages, tokens.ratio_low, tokens.ratio_high)
            assert torch.equal(found, oracle)
            return found

    train(Checking, mixed.Config, num_iterations=2, max_steps=2)


def test_bad_input():
    for name, value in {
        "epsilon": 1.0,
        "epsilon_high": 0.0,
        "gppo_beta_low": -1.0,
        "gppo_beta_high": -1.0,
        "gppo_dual_clip": 1.0,
        "gppo_pos_coef": -0.1,
    }.items():
        with pytest.raises(ValueError, match=f"`{name}` must be .*got {value}"):
            GPPOConfig("unused", use_cpu=True, bf16=False, **{name: value})
    with pytest.raises(ValueError, match=r"`gppo_correct_reward` names .*'typo'.*'parity_reward'"):
        build(GPPOTrainer, gppo_correct_reward="typo", num_iterations=2)
    with pytest.warns(UserWarning, match="GPPOTrainer clips no token, so only its likelihood term acts"):
        build(GPPOTrainer)
    for name, value in {"delta": 2.0, "loss_type": "cispo"}.items():
        with pytest.raises(ValueError, match=f"`{name}"):
            build(GPPOTrainer, num_iterations=2, gppo_dual_clip=10.0, **{name: value})
    for loss_type in ("sapo", "vespo"):
        with pytest.raises(ValueError, match=f"`loss_type='{loss_type}'`"):
            build(GPPOTrainer, num_iterations=2, loss_type=loss_type)
    for other in ("bapo", "clip_cov"):
        with pytest.raises(TypeError, match="contradict each other"):
            mix("gppo", other)
