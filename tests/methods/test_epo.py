import math
from statistics import fmean

import pytest
import torch
from harness import arithmetic, build, difference, parameters, partly_external, scripted, train
from hypothesis import given, settings
from hypothesis import strategies as st

from trl_ext import EPOConfig, EPOTrainer, MethodTrainer, mix
from trl_ext.methods.epo import epo_beta, epo_loss, epo_penalty, trajectory_mean


ENTROPIES = torch.tensor([[0.2, 1.5, 0.4], [0.0, 0.9, 3.0]], dtype=torch.float64)
MASK = torch.ones(2, 3, dtype=torch.long)


def test_worked_example():
    entropies = ENTROPIES.clone().requires_grad_()
    bonus, smoothing = epo_loss(entropies, MASK, [0.5, 0.7], 2, 120, 0.001, 0.1, 0.0, 2.0, 3.0)
    (bonus + smoothing).backward()
    beta = epo_beta(2, 120)
    assert beta == pytest.approx(1.904837, abs=1e-6)
    assert bonus.item() == pytest.approx(-0.001, abs=1e-9)
    assert smoothing.item() / (0.001 * beta) == pytest.approx(0.035, abs=1e-6)
    assert (bonus + smoothing).item() == pytest.approx(-0.00093333, abs=1e-8)
    inside, outside = -0.00016667, -0.00013492
    expected = [[inside, outside, inside], [inside, inside, outside]]
    assert torch.allclose(entropies.grad, torch.tensor(expected, dtype=torch.float64), atol=1e-8)


def test_worked_example_without_history():
    for step, history in ((0, []), (5, [])):
        bonus, smoothing = epo_loss(ENTROPIES, MASK, history, step, 120, 0.001, 0.1)
        assert bonus.item() == pytest.approx(-0.001, abs=1e-9) and smoothing == 0
    # A policy that was always certain: its corridor would punish any entropy at all.
    assert epo_loss(ENTROPIES, MASK, [0.0, 0.0], 2, 120)[1] == 0


def test_worked_weights():
    values = [epo_beta(k, 120) for k in (0, 30, 60, 119)]
    assert values == pytest.approx([2, 1.223130, 1.049787, 1.002606], abs=1e-6)
    assert [epo_beta(k, 1) for k in (0, 1, 7)] == pytest.approx([2, 1.049787, 1.049787], abs=1e-6)
    assert epo_beta(60, 121) == epo_beta(60, 120)  # floor(K / 2)
    assert epo_beta(9, 10, 0.0) == 2


def test_indicator_counts_the_ends_of_the_corridor_as_outside():
    entropies = torch.tensor([0.1, 0.5, 0.7, 1.0, 1.1], dtype=torch.float64, requires_grad=True)
    found = epo_penalty(entropies, 1.0, 0.5, 1.0, "indicator")
    assert found.tolist() == [1, 1, 0, 1, 1] and not found.requires_grad
    hinge = epo_penalty(entropies, 1.0, 0.5, 1.0)
    assert hinge.tolist() == pytest.approx([0.4, 0, 0, 0, 0.1])
    hinge.sum().backward()
    assert entropies.grad.tolist() == [-1, 0, 0, 0, 1]


def turns_of(row):
    """Positions of each maximal run of ones."""
    turns, before = [], 0
    for position, value in enumerate(row):
        if value and not before:
            turns.append([])
        if value:
            turns[-1].append(position)
        before = value
    return turns


def literal_mean(values, mask, average):
    if average == "token":
        tokens = [v for row, m in zip(values, mask, strict=True) for v, keep in zip(row, m, strict=True) if keep]
        return fmean(tokens) if tokens else 0.0
    rows = [[fmean(row[i] for i in turn) for turn in turns_of(m)] for row, m in zip(values, mask, strict=True)]
    rows = [fmean(row) for row in rows if row]
    return fmean(rows) if rows else 0.0


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_loss_and_gradient_are_those_of_the_equations(data):
    shape = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 7))
    draw = st.lists(
        st.lists(st.booleans(), min_size=shape[1], max_size=shape[1]), min_size=shape[0], max_size=shape[0]
    )
    mask = data.draw(draw)
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    entropies = 3 * torch.rand(shape, dtype=torch.float64, generator=generator)
    history = data.draw(st.lists(st.floats(0.1, 3.0), max_size=4))
    low, high = data.draw(st.sampled_from([(0.0, 2.0), (0.8, 1.2), (0.5, 1.5)]))
    average = data.draw(st.sampled_from(["trajectory", "token"]))
    step, total, coef, alpha, gamma, smooth = len(history), data.draw(st.integers(1, 9)), 0.3, 0.7, 2.0, 0.5

    def literal(values):
        reference = fmean(history) if history else None
        beta = 1 + math.exp(-gamma * step / (total // 2)) if total > 1 else (2 if step == 0 else 1 + math.exp(-gamma))
        bonus = literal_mean(values, mask, average)
        if reference is None:
            return -coef * bonus
        penalty = [[max(low * reference - v, 0) + max(v - high * reference, 0) for v in row] for row in values]
        return -coef * (bonus - smooth * beta * alpha * literal_mean(penalty, mask, average))

    value = entropies.clone().requires_grad_()
    spoiled = torch.where(torch.tensor(mask), value, torch.nan)
    options = (coef, alpha, low, high, gamma, smooth, "hinge", average)
    loss = sum(epo_loss(spoiled, torch.tensor(mask), history, step, total, *options))
    loss.backward()
    assert loss.item() == pytest.approx(literal(entropies.tolist()), abs=1e-9)
    for row in range(shape[0]):  # piecewise linear, so a difference is exact away from the kinks
        for column in range(shape[1]):
            up, down = entropies.clone(), entropies.clone()
            up[row, column] += 1e-6
            down[row, column] -= 1e-6
            slope = (literal(up.tolist()) - literal(down.tolist())) / 2e-6
            reference = fmean(history) if history else 0.0
            if all(abs(entropies[row, column].item() - end * reference) > 1e-5 for end in (low, high)):
                assert value.grad[row, column].item() == pytest.approx(slope, abs=1e-6)
    # The code's form: the same bonus, and a penalty without a gradient.
    other = entropies.clone().requires_grad_()
    bonus, constant = epo_loss(other, torch.tensor(mask), history, step, total, *options[:6], "indicator", average)
    assert not constant.requires_grad and bonus.requires_grad


def test_turns():
    values = torch.tensor([[1.0, 3.0, 9.0, 5.0], [2.0, 9.0, 9.0, 9.0], [9.0] * 4])
    mask = torch.tensor([[1, 1, 0, 1], [1, 0, 0, 0], [0, 0, 0, 0]])
    assert trajectory_mean(values, mask).item() == pytest.approx(((2 + 5) / 2 + 2) / 2)
    assert trajectory_mean(values, mask, count=4.0).item() == pytest.approx(((2 + 5) / 2 + 2) / 4)
    assert trajectory_mean(values, mask, "token").item() == pytest.approx(11 / 4)
    empty = values.requires_grad_()
    zero = trajectory_mean(empty, 0 * mask)
    zero.backward()
    assert zero == 0 and (empty.grad == 0).all()


# -------------------------------------------------------------------------------------------------- in the trainer

CORRIDOR = {"epo_kappa_low": 0.8, "epo_kappa_high": 1.2, "epo_alpha": 1.0, "epo_coef": 0.5}


class Watching(EPOTrainer):
    config_class = EPOConfig

    def regularizers(self, tokens):
        terms = super().regularizers(tokens)
        if tokens.training:
            self.__dict__.setdefault("seen", []).append((tokens, list(self.epo_history), terms))
        return terms


def logged(trainer, name):
    return [entry[name] for entry in trainer.state.log_history if name in entry]


def mean_entropy(batches):
    total = sum((tokens.entropies.detach() * tokens.model_mask).sum().item() for tokens in batches)
    return total / sum(tokens.model_mask.sum().item() for tokens in batches)


def test_history_is_the_entropy_of_every_generations_first_pass():
    trainer = train(
        Watching,
        max_steps=12,
        num_iterations=2,
        gradient_accumulation_steps=1,
        steps_per_generation=2,
        per_device_train_batch_size=8,
        **CORRIDOR,
    )
    passes = [[tokens for tokens, *_ in trainer.seen[i : i + 2]] for i in range(0, 12, 4)]
    expected = [mean_entropy(batches) for batches in passes]
    assert [len(history) for _, history, _ in trainer.seen] == [0] * 4 + [1] * 4 + [2] * 4
    assert trainer.epo_history == pytest.approx(expected[:2], rel=1e-5)
    total, count = trainer.epo_sums.tolist()
    assert total / count == pytest.approx(expected[2], rel=1e-5)
    assert trainer.epo_total_steps == 3
    assert logged(trainer, "epo/reference") == pytest.approx([expected[0]] * 4 + [fmean(expected[:2])] * 4, rel=1e-5)
    assert logged(trainer, "epo/beta") == pytest.approx([1 + math.exp(-3)] * 4 + [1 + math.exp(-6)] * 4)
    assert max(logged(trainer, "epo/outside")) > 0
    for tokens, history, terms in trainer.seen:
        bonus, smoothing = epo_loss(
            tokens.entropies, tokens.model_mask, history, len(history), 3, 0.5, 1.0, 0.8, 1.2, 3.0
        )
        assert terms["epo/bonus"].item() == pytest.approx(bonus.item(), rel=1e-5)
        assert terms["epo/smoothing"].item() == pytest.approx(smoothing.item(), rel=1e-5, abs=1e-9)


@pytest.mark.parametrize("average", ["trajectory", "token"])
def test_neither_history_nor_update_depend_on_the_split(average):
    settings = CORRIDOR | {"optim": "sgd", "learning_rate": 0.05, "epo_average": average, "temperature": 2.0}
    settings |= {"rollout_func": partly_external, "max_steps": 4, "num_iterations": 2, "loss_type": "grpo"}
    whole = train(EPOTrainer, per_device_train_batch_size=16, **settings)
    split = train(EPOTrainer, per_device_train_batch_size=4, gradient_accumulation_steps=4, **settings)
    assert whole.epo_history == pytest.approx(split.epo_history, rel=1e-6) and len(whole.epo_history) == 1
    assert difference(whole, split) < 1e-6


def test_indicator_trains_as_the_bonus_alone_bit_for_bit_and_the_hinge_does_not():
    settings = CORRIDOR | {"max_steps": 4, "temperature": 2.0}
    bonus_only = train(EPOTrainer, **settings | {"epo_alpha": 0.0})
    indicator = train(EPOTrainer, epo_penalty="indicator", **settings)
    hinge = train(EPOTrainer, **settings)
    assert logged(indicator, "epo/smoothing")[-1] > 0
    assert all(torch.equal(p, parameters(bonus_only)[name]) for name, p in parameters(indicator).items())
    assert difference(hinge, bonus_only) > 1e-6
    # It changes the reported loss.
    gap = indicator.state.log_history[-2]["loss"] - bonus_only.state.log_history[-2]["loss"]
    assert gap == pytest.approx(logged(indicator, "epo/smoothing")[-1], abs=1e-5)


def test_bonus_raises_and_corridor_holds_the_entropy():
    settings = {"max_steps": 12, "learning_rate": 3e-3, "temperature": 2.0, "per_device_train_batch_size": 16}
    plain = train(MethodTrainer, **settings)
    free = train(EPOTrainer, epo_coef=1.0, epo_alpha=0.0, **settings)
    held = train(EPOTrainer, epo_coef=1.0, epo_alpha=4.0, epo_kappa_high=1.1, **settings)
    last = [fmean(logged(trainer, "entropy")[-4:]) for trainer in (plain, free, held)]
    assert last[1] > last[0] + 0.1
    assert last[2] < last[1] - 0.1


def test_selected_tokens_do_not_change_what_has_entropy():
    mixed = mix("epo", "d3s")

    class Checking(mixed.Trainer):
        def regularizers(self, tokens):
            terms = super().regularizers(tokens)
            assert tokens.mask.sum() < tokens.model_mask.sum()
            rows = tokens.model_mask.any(1).sum()
            everything = trajectory_mean(tokens.entropies, tokens.model_mask)
            share = tokens.share(tokens.carried["epo/count"])
            assert terms["epo/bonus"].item() == pytest.approx(-0.5 * (everything * rows / share).item(), rel=1e-5)
            return terms

    train(Checking, mixed.Config, epo_coef=0.5, d3s_k_init=0.5, d3s_k_final=0.5, max_steps=1)


@pytest.mark.parametrize("stop", [3, 6])
def test_stopped_and_resumed(stop, tmp_path):
    """In the middle of the second generation, and at its end."""
    settings = CORRIDOR | {"max_steps": 10, "steps_per_generation": 2, "num_iterations": 2, "temperature": 2.0}
    settings |= {"gradient_accumulation_steps": 1, "save_strategy": "steps", "save_steps": stop, "out": tmp_path}
    whole = train(EPOTrainer, **settings)
    resumed = train(EPOTrainer, resume=str(tmp_path / f"checkpoint-{stop}"), **settings)
    assert difference(whole, resumed) == 0.0
    assert whole.epo_history == resumed.epo_history and len(whole.epo_history) == 2
    assert torch.equal(whole.epo_sums, resumed.epo_sums)


def test_rollouts_of_which_no_token_is_trained_on_are_not_counted():
    class Watching(mix("epo", "d3s").Trainer):
        def regularizers(self, tokens):
            self.counts = [*getattr(self, "counts", []), (tokens.carried["epo/count"], tokens.mask.any(1).sum())]
            return super().regularizers(tokens)

    trainer = train(Watching, d3s_n_init=4, d3s_k_init=0.1, max_completion_length=8)
    assert all(count == rows for count, rows in trainer.counts) and min(rows for _, rows in trainer.counts) < 8


def test_a_schedule_that_is_given_is_that_of_a_resumed_run(tmp_path):
    settings = {"out": tmp_path, "save_strategy": "steps", "save_steps": 2}
    train(EPOTrainer, max_steps=2, **settings)
    longer = train(EPOTrainer, max_steps=4, resume=str(tmp_path / "checkpoint-2"), epo_total_steps=50, **settings)
    assert longer.epo_total_steps == 50


def test_shares_of_several_processes_add_up():
    trainer = build(EPOTrainer)
    for share in ([1.5, 3.0], [2.0, 4.0]):
        trainer.load_local_state({"epo": share})
    assert trainer.epo_sums.tolist() == [3.5, 7.0]


def test_evaluation_reads_and_never_writes():
    trainer = train(EPOTrainer, eval_dataset=arithmetic().select(range(8)), per_device_eval_batch_size=8, **CORRIDOR)
    before = repr((trainer.method_state(), trainer.local_state()))
    trainer.evaluate()
    assert repr((trainer.method_state(), trainer.local_state())) == before
    assert any("eval_epo/entropy" in entry for entry in trainer.state.log_history)
    fresh = build(EPOTrainer, eval_dataset=arithmetic().select(range(8)), per_device_eval_batch_size=8)
    fresh.evaluate()  # before there is any history
    assert fresh.epo_history == [] and fresh.epo_sums.tolist() == [0, 0]


def test_rollouts_without_tokens_leave_the_means():
    """TRL masks answers that were cut off; a mean over the others must not shrink with their number."""

    def cut_off(prompts, trainer):
        output = scripted(prompts, trainer)
        ids = output["completion_ids"]
        output["completion_ids"] = [row[:-1] if i % 3 == 0 else row for i, row in enumerate(ids)]
        return output

    trainer = train(Watching, mask_truncated_completions=True, rollout_func=cut_off, max_steps=1, **CORRIDOR)
    ((tokens, _, terms),) = trainer.seen
    rows = tokens.model_mask.any(1)
    assert 0 < rows.sum() < len(rows)
    alone = trajectory_mean(tokens.entropies[rows], tokens.model_mask[rows])
    assert terms["epo/bonus"].item() == pytest.approx(-0.5 * alone.item(), rel=1e-5)


def test_a_generation_without_tokens_adds_nothing_to_the_history():
    def endless(prompts, trainer):
        output = scripted(prompts, trainer)
        keep = trainer.state.global_step == 1
        output["env_mask"] = [[int(keep)] * len(ids) for ids in output["completion_ids"]]
        return output

    trainer = train(EPOTrainer, rollout_func=endless, max_steps=3, **CORRIDOR)
    assert len(trainer.epo_history) == 1 and trainer.epo_step == 2
    assert all(p.isfinite().all() for p in parameters(trainer).values())


def test_bad_input():
    for name, value in {
        "epo_coef": -1.0,
        "epo_alpha": -0.1,
        "epo_kappa_low": -0.1,
        "epo_kappa_high": 0.0,
        "epo_gamma": -1.0,
        "epo_total_steps": 0,
        "epo_smooth_coef": -1.0,
        "epo_penalty": "typo",
        "epo_average": "typo",
        "entropy_coef": 0.01,
        "use_adaptive_entropy": True,
    }.items():
        with pytest.raises(ValueError, match=f"`{name}` must be .*got {value!r}"):
            EPOConfig("unused", use_cpu=True, bf16=False, **{name: value})
    with pytest.raises(TypeError, match="`entropy_coef` must be given for EPOOneShotRLVRConfig"):
        mix("epo", "one_shot_rlvr").Config("unused", use_cpu=True, bf16=False)
