import copy

import pytest
import torch
from harness import arithmetic, build, difference, scripted, train
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig

from trl_ext import CAPOConfig, CAPOTrainer, MethodTrainer
from trl_ext.methods.capo import RowMoments, accepted, predicted_shifts, row_gradient_sums, sgd_moves, softmax_errors


pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


def f64(*values):
    return torch.tensor(values, dtype=torch.float64)


@pytest.mark.parametrize(
    ("top_k", "objective", "policy"),
    [(0, [0.053028, 1.137723], [0.000645, 0.191629]), (2, [0.039737, 0.669637], [0.000368, 0.070664])],
)
def test_worked_example(top_k, objective, policy):
    hidden, advantages = f64([1, 0.5], [2, -1]), f64(1.5, 1.5)
    logits = f64([2, 1, 0, -1], [0.5, 0.4, 0.3, 0.2])
    probs, errors, ids = softmax_errors(logits, torch.tensor([0, 3]), top_k)
    if top_k:
        assert torch.allclose(probs, f64([0.731059, 0.268941], [0.524979, 0.475021]), atol=1e-6)
        assert ids.tolist() == [[0, 1], [0, 1]]
        assert torch.equal(errors[1], -probs[1])  # the sampled token is not among the two
    found = predicted_shifts(probs, errors, sgd_moves(errors, hidden, advantages), advantages, 0.1)
    assert found[0].tolist() == pytest.approx(objective, abs=1e-6)
    assert found[1].tolist() == pytest.approx(policy, abs=1e-6)
    if not top_k:
        assert accepted(*found, tau_hessian=0.5, tau_fisher=0.1).tolist() == [True, False]


# ------------------------------------------------------------- the definitions, one token and one matrix at a time


class Oracle:
    """The equations with explicit (k, H) matrices, and a dict of moments."""

    def __init__(self, beta1=0.9, beta2=0.999, eps=1e-8):
        self.beta1, self.beta2, self.eps = beta1, beta2, eps
        self.rows, self.steps = {}, 0

    def gradient(self, logits, hidden, token, advantage, top_k):
        ids = logits.argsort(descending=True)[: top_k or len(logits)]
        pi = logits[ids].exp() / logits[ids].exp().sum()
        error = (ids == token).double() - pi
        return ids.tolist(), pi, error, advantage * torch.outer(error, hidden)

    def shifts(self, logits, hidden, token, advantage, lr, top_k):
        ids, pi, error, gradient = self.gradient(logits, hidden, token, advantage, top_k)
        step = gradient
        if self.rows:
            zero = (torch.zeros_like(hidden), torch.zeros_like(hidden))
            mean, square = (torch.stack([self.rows.get(i, zero)[part] for i in ids]) for part in (0, 1))
            mean = self.beta1 * mean + (1 - self.beta1) * gradient
            square = self.beta2 * square + (1 - self.beta2) * gradient * gradient
            mean, square = mean / (1 - self.beta1 ** (self.steps + 1)), square / (1 - self.beta2 ** (self.steps + 1))
            step = mean / (square.sqrt() + self.eps)
        u = step @ hidden
        fisher = torch.diag(pi) - torch.outer(pi, pi)
        bend = (error @ u) ** 2 - u @ fisher @ u
        return lr * (gradient * step).sum() + lr**2 / 2 * advantage * bend, lr**2 / 2 * (error @ u) ** 2

    def update(self, gradients):
        """`gradients`: the ids and the gradient of every accepted token."""
        sums, counts = {}, {}
        for ids, gradient in gradients:
            for i, row in zip(ids, gradient, strict=True):
                sums[i] = sums.get(i, 0) + row
                counts[i] = counts.get(i, 0) + 1
        for i, total in sums.items():
            g = total / counts[i]
            mean, square = self.rows.get(i, (torch.zeros_like(g), torch.zeros_like(g)))
            moved = self.beta1 * mean + (1 - self.beta1) * g, self.beta2 * square + (1 - self.beta2) * g * g
            self.rows[i] = moved
        self.steps += 1


def draw_tokens(seed, n=7, size=9, width=4):
    generator = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(n, size, generator=generator, dtype=torch.float64)
    hidden = torch.randn(n, width, generator=generator, dtype=torch.float64)
    tokens = torch.randint(size, (n,), generator=generator)
    return logits, hidden, tokens, torch.randn(n, generator=generator, dtype=torch.float64)


def compare(oracle, found, logits, hidden, tokens, advantages, lr, top_k):
    for i in range(len(tokens)):
        expected = oracle.shifts(logits[i], hidden[i], tokens[i], advantages[i], lr, top_k)
        assert found[0][i].item() == pytest.approx(expected[0].item(), abs=1e-10)
        assert found[1][i].item() == pytest.approx(expected[1].item(), abs=1e-10)


@pytest.mark.parametrize("top_k", [0, 1, 3, 9])
def test_sgd_agrees_with_explicit_matrices(top_k):
    logits, hidden, tokens, advantages = draw_tokens(0)
    probs, errors, _ = softmax_errors(logits, tokens, top_k)
    found = predicted_shifts(probs, errors, sgd_moves(errors, hidden, advantages), advantages, 0.3)
    compare(Oracle(), found, logits, hidden, tokens, advantages, 0.3, top_k)


def test_adam_agrees_with_explicit_matrices():
    """Over calls in which all, some and none of the tokens are accepted, with rows that are new in the middle."""
    moments, oracle = RowMoments(0.8, 0.95, 1e-6), Oracle(0.8, 0.95, 1e-6)
    for call, accept in enumerate(([], [0, 1], [], [0, 2, 3, 4, 5, 6])):
        logits, hidden, tokens, advantages = draw_tokens(call)
        probs, errors, ids = softmax_errors(logits, tokens, 3)
        found = predicted_shifts(probs, errors, moments.moves(errors, hidden, advantages, ids), advantages, 0.3)
        compare(oracle, found, logits, hidden, tokens, advantages, 0.3, 3)
        if call == 1:  # nothing was accepted before: gradient ascent, although a step was counted
            sgd = predicted_shifts(probs, errors, sgd_moves(errors, hidden, advantages), advantages, 0.3)
            assert torch.equal(found[0], sgd[0]) and moments.steps == 1
        oracle.update([oracle.gradient(logits[i], hidden[i], tokens[i], advantages[i], 3)[::3] for i in accept])
        rows, counts = ids[accept].unique(return_counts=True)
        sums = row_gradient_sums(errors[accept], hidden[accept], advantages[accept], ids[accept], rows)
        moments.update(rows, sums / counts.unsqueeze(1))
        assert moments.ids.tolist() == sorted(oracle.rows) and moments.steps == oracle.steps == call + 1
        for i, row in enumerate(moments.ids.tolist()):
            assert torch.allclose(moments.mean[i], oracle.rows[row][0], atol=1e-12)
            assert torch.allclose(moments.square[i], oracle.rows[row][1], atol=1e-12)
    assert 3 < len(moments.ids) <= 9


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10_000), st.floats(1e-4, 1.0), st.sampled_from([0, 2]))
def test_closed_form_of_gradient_ascent(seed, lr, top_k):
    """The scalars of the paper: |v|^2, |h|^2 and the variance q of v under pi."""
    logits, hidden, tokens, a = draw_tokens(seed)
    probs, v, _ = softmax_errors(logits, tokens, top_k)
    v2, h2 = (v**2).sum(1), (hidden**2).sum(1)
    q = (probs * v**2).sum(1) - (probs * v).sum(1) ** 2
    if not top_k:
        p = probs[torch.arange(len(tokens)), tokens]
        s2, s3 = (probs**2).sum(1), (probs**3).sum(1)
        assert torch.allclose(v2, 1 - 2 * p + s2) and torch.allclose(q, p - 2 * p**2 + s3 - (p - s2) ** 2)
    objective, policy = predicted_shifts(probs, v, sgd_moves(v, hidden, a), a, lr)
    assert torch.allclose(objective, lr * a**2 * v2 * h2 + lr**2 / 2 * a**3 * h2**2 * (v2**2 - q))
    assert torch.allclose(policy, lr**2 / 2 * a**2 * h2**2 * v2**2)


def test_the_objectives_shift_is_right_to_second_order():
    """A tenth of the learning rate leaves a thousandth of the error, and the prediction is not just linear."""
    logits, hidden, tokens, advantages = draw_tokens(3)
    probs, errors, _ = softmax_errors(logits, tokens)
    moves = sgd_moves(errors, hidden, advantages)
    rows = torch.arange(len(tokens))

    def error(lr):
        ratio = (logits + lr * moves).softmax(1)[rows, tokens] / probs[rows, tokens]
        return (advantages * (ratio - 1) - predicted_shifts(probs, errors, moves, advantages, lr)[0]).abs()

    large = error(1e-3) > 1e-10  # beyond rounding
    assert large.sum() >= 3
    assert ((error(1e-3) / error(1e-4))[large] / 1000 - 1).abs().max() < 0.1


def test_the_policys_shift_is_the_divergence_on_average_over_tokens():
    logits, hidden, _, advantages = (part[:1] for part in draw_tokens(4))
    probs = logits.softmax(1)
    lr = 1e-3
    expected = torch.zeros(())
    moves = sgd_moves(softmax_errors(logits, torch.tensor([2]))[1], hidden, advantages)  # a step that is given
    for token in range(9):
        errors = softmax_errors(logits, torch.tensor([token]))[1]
        expected = expected + probs[0, token] * predicted_shifts(probs, errors, moves, advantages, lr)[1][0]
    after = (logits + lr * moves).log_softmax(1)
    divergence = (probs * (probs.log() - after)).sum()
    assert expected.item() == pytest.approx(divergence.item(), rel=1e-2)


def test_bounds_are_strict_and_zero_is_none():
    objective, policy = f64(0.0, 0.5, -0.5, 0.1, -0.1, 0.1), f64(0.0, 0.0, 0.0, 0.0, 0.0, 1.0)
    assert accepted(objective, policy, 0.5, 1.0).tolist() == [True, False, False, True, True, False]
    assert accepted(objective, policy, 0.5, 1.0, symmetric=False).tolist() == [True, False, False, True, False, False]
    assert accepted(objective, policy, 0.0, 1.0).tolist() == [True] * 5 + [False]
    assert accepted(objective, policy, 0.5, 0.0).tolist() == [True, False, False, True, True, True]
    assert accepted(objective, policy, 0.0, 0.0, symmetric=False).all()


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10_000), st.booleans(), st.booleans())
def test_the_kept_share_falls_with_the_learning_rate(seed, adam, symmetric):
    logits, hidden, tokens, advantages = draw_tokens(seed, n=40)
    advantages[::5] = 0
    probs, errors, ids = softmax_errors(logits, tokens, 4)
    moments = RowMoments()
    if adam:
        rows = ids.unique()
        moments.update(rows, row_gradient_sums(errors, hidden, advantages, ids, rows))
    moves = moments.moves(errors, hidden, advantages, ids)
    before = torch.ones(40, dtype=torch.bool)
    for lr in (0.0, 0.003, 0.01, 0.03, 0.1):
        shifts = predicted_shifts(probs, errors, moves, advantages, lr)
        assert accepted(*shifts, 0.01, 1e-4, symmetric).all() or lr > 0
        kept = accepted(*shifts, 0.0, 1e-4)
        assert (kept <= before).all()
        before = kept
        if not adam:  # a token without an advantage moves nothing
            assert (shifts[0][::5] == 0).all() and accepted(*shifts, 0.01, 1e-4, symmetric)[::5].all()
    assert not before.all()


# --------------------------------------------------------------------------------------------------------- training

LIVELY = {"max_completion_length": 6, "temperature": 1.5, "learning_rate": 1e-4, "num_iterations": 2, "max_steps": 4}


class Checked(CAPOTrainer):
    """Compares every micro-batch with the oracle."""

    def token_weights(self, tokens):
        args = self.args
        self.record = getattr(self, "record", [])
        self.oracle = getattr(self, "oracle", None) or Oracle(args.adam_beta1, args.adam_beta2, args.adam_epsilon)
        mask = tokens.mask.bool()
        kept, gradients = torch.zeros(mask.shape), []
        lr = self.optimizer.param_groups[0]["lr"]
        with torch.no_grad():
            for at in mask.nonzero().tolist():
                hidden = tokens.hidden_states[tuple(at)]
                logits = self.model.lm_head(hidden)
                token, advantage = tokens.token_ids[tuple(at)], tokens.advantages[tuple(at)]
                inputs = logits.double(), hidden.double(), token, advantage.double()
                shifts = self.oracle.shifts(*inputs, lr, self.capo_k)
                if accepted(*shifts, args.capo_tau_hessian, args.capo_tau_fisher, args.capo_symmetric):
                    kept[tuple(at)] = 1
                    gradients.append(self.oracle.gradient(*inputs, self.capo_k)[::3])
        if args.capo_optimizer == "adam":
            self.oracle.update(gradients)
        weights = super().token_weights(tokens)
        assert torch.equal(weights > 0, kept.bool())
        assert torch.allclose(weights, kept * mask.sum() / kept.sum())
        loss = -(tokens.advantages * kept).sum() / kept.sum()  # ratios are 1
        self.record.append((kept.sum().item() / mask.sum().item(), loss.item()))
        return weights


@pytest.mark.parametrize(
    "options",
    [
        {"capo_optimizer": "sgd", "capo_top_k": 0, "capo_tau_fisher": 1e-5, "capo_tau_hessian": 0.02},
        {"capo_optimizer": "sgd", "capo_top_k": 5, "capo_symmetric": False},
        {"capo_tau_fisher": 1e-4, "capo_tau_hessian": 0.02},
    ],
    ids=["sgd", "sgd, top 5", "adam"],
)
def test_the_run_follows_the_equations(options, monkeypatch):
    monkeypatch.setattr("trl_ext.methods.capo.CHUNK", 3 * 50 * 128)  # a few tokens at once
    trainer = train(Checked, **{**LIVELY, "num_iterations": 1, "loss_type": "bnpo", **options})
    shares = [share for share, _ in trainer.record]
    assert len(shares) == 4 and all(share > 0 for share in shares) and min(shares) < 0.95
    logs = [log for log in trainer.state.log_history if "loss" in log]
    for log, (share, loss) in zip(logs, trainer.record, strict=True):
        assert log["capo/kept"] == pytest.approx(share, abs=1e-6) and log["loss"] == pytest.approx(loss, abs=1e-6)
    assert max(abs(log["loss"]) for log in logs) > 1e-3
    moments = trainer.capo_rows
    if trainer.args.capo_optimizer == "sgd":
        assert len(moments.ids) == moments.steps == 0
    else:
        assert moments.steps == 4 and moments.ids.tolist() == sorted(trainer.oracle.rows)
        for i, row in enumerate(moments.ids.tolist()):
            assert torch.allclose(moments.mean[i].double(), trainer.oracle.rows[row][0], rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("loss_type", ["grpo", "bnpo", "dr_grpo"])
def test_a_large_learning_rate_drops_tokens_and_a_small_one_none(loss_type):
    options = {"loss_type": loss_type, "capo_optimizer": "sgd", "optim": "sgd", **LIVELY}
    for learning_rate, dropped in ((1e-9, False), (1e-3, True)):
        options |= {"learning_rate": learning_rate}
        ours, plain = train(CAPOTrainer, **options), train(MethodTrainer, **without(options))
        kept = [log["capo/kept"] for log in ours.state.log_history if "loss" in log]
        assert (min(kept) < 0.9) == dropped and (max(kept) == 1.0 or dropped)
        assert (difference(ours, plain) > 0) == dropped


def without(options):
    return {name: value for name, value in options.items() if not name.startswith("capo_")}


def test_the_first_warm_up_step_keeps_everything():
    trainer = train(CAPOTrainer, **{**LIVELY, "lr_scheduler_type": "linear", "warmup_steps": 2, "learning_rate": 1e-2})
    kept = [log["capo/kept"] for log in trainer.state.log_history if "loss" in log]
    assert kept[0] == 1.0 and min(kept) < 0.9


def test_gradient_ascents_mask_does_not_depend_on_the_split():
    options = {"capo_optimizer": "sgd", "capo_tau_fisher": 1e-5, "optim": "sgd", "rollout_func": scripted, **LIVELY}
    options["learning_rate"] = 1e-3
    whole = train(CAPOTrainer, **options)
    split = train(CAPOTrainer, per_device_train_batch_size=2, gradient_accumulation_steps=4, **options)
    assert difference(whole, split) < 1e-6
    assert 0 < whole.state.log_history[0]["capo/kept"] < 1


def same(first, second):
    first, second = (trainer.method_state()["capo"] for trainer in (first, second))
    assert first["steps"] == second["steps"] and len(first["ids"])
    return all(torch.equal(first[name], second[name]) for name in ("ids", "mean", "square"))


@pytest.mark.parametrize("stop", [2, 3], ids=["between generations", "inside of one"])
def test_a_resumed_run_is_the_same_run(stop, tmp_path):
    options = {**LIVELY, "out": tmp_path, "save_strategy": "steps", "save_steps": stop}
    whole = train(CAPOTrainer, **options)
    resumed = train(CAPOTrainer, resume=str(tmp_path / f"checkpoint-{stop}"), **options)
    assert difference(whole, resumed) == 0.0 and same(whole, resumed) and whole.capo_rows.steps == 4


def test_the_moments_move_once_per_micro_batch_and_only_in_training():
    class Keeping(CAPOTrainer):
        last = None

        def token_weights(self, tokens):
            self.last = tokens if tokens.training else self.last
            return super().token_weights(tokens)

    data = {"eval_dataset": arithmetic("test").select(range(4)), "per_device_eval_batch_size": 4}
    trainer = build(Keeping, gradient_accumulation_steps=2, **data, **LIVELY)
    trainer.evaluate()
    assert trainer.capo_rows.steps == 0 and "eval_capo/kept" in trainer.state.log_history[-1]
    trainer.train()
    assert trainer.capo_rows.steps == 8
    before = copy.deepcopy(trainer.method_state())
    trainer.evaluate()
    trainer.token_weights(trainer.last.replace(training=True))
    assert repr(trainer.method_state()) == repr(before)


def test_number_of_likely_tokens():
    assert build(CAPOTrainer).capo_k == 50
    assert build(CAPOTrainer, top_k=7).capo_k == 7
    assert build(CAPOTrainer, top_k=7, capo_top_k=9).capo_k == 9
    with pytest.raises(ValueError, match="`capo_top_k` is 1000, but the vocabulary has 262 tokens"):
        build(CAPOTrainer, capo_top_k=1000)


def test_a_normaliser_that_is_only_corrected_in_part_is_announced():
    with pytest.warns(UserWarning, match="`loss_type='dapo'` divides by the tokens of the whole generation"):
        build(CAPOTrainer, loss_type="dapo")


def test_a_head_that_is_not_trained_is_announced():
    with pytest.warns(UserWarning, match="which `peft_config` leaves untrained"):
        build(CAPOTrainer, peft_config=LoraConfig(target_modules=["q_proj"]))


@pytest.mark.filterwarnings("error:.*CAPOTrainer:UserWarning")
def test_what_needs_no_warning():
    for loss_type in ("grpo", "bnpo", "dr_grpo"):
        build(CAPOTrainer, loss_type=loss_type)
    build(CAPOTrainer, peft_config=LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"]))


@pytest.mark.parametrize(
    ("field", "value"),
    [("capo_tau_fisher", -1.0), ("capo_tau_hessian", -1.0), ("capo_optimizer", "typo"), ("capo_top_k", 0)],
)
def test_settings_out_of_range_are_named(field, value):
    with pytest.raises(ValueError, match=f"`{field}` must be .*got {value!r}"):
        CAPOConfig("unused", use_cpu=True, bf16=False, **{field: value})
