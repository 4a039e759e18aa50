import json
import math
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from harness import arithmetic, build, difference, launch
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.image import imread
from transformers import TrainerCallback
from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer

from trl_ext import EntropyLawCallback, EntropyLawConfig, MethodTrainer
from trl_ext.callbacks.entropy_law import (
    draw_entropy_law,
    entropy_alarm,
    entropy_drift,
    entropy_law_fit,
    entropy_law_points,
    entropy_level,
    steps_left,
    student_quantile,
)


RUNS = json.loads((Path(__file__).parent / "data" / "entropy_runs.json").read_text())


def run(folder, callback=None, trainer_class=GRPOTrainer, config_class=GRPOConfig, resume=None, **settings):
    trainer = build(trainer_class, config_class, out=folder, **{"max_steps": 6, **settings})
    if callback is not None:
        trainer.add_callback(callback)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def law(**settings):
    return EntropyLawCallback(EntropyLawConfig(**{"eval_every": 1, "alarm_window": 2, **settings}))


def kept(trainer, name):
    entries = trainer.state.log_history
    return [(entry["step"], entry[f"entropy_law/{name}"]) for entry in entries if f"entropy_law/{name}" in entry]


# ------------------------------------------------------------------------------------------------------------- the fit


@pytest.mark.parametrize(
    ("entropy", "reward", "a", "b", "ceiling", "rmse"),
    [
        ([1.0, 0.6, 0.3, 0.1], [0.10, 0.22, 0.29, 0.325], 0.139494, 0.477706, 0.338212, 0.002070),
        ([0.8, 0.4], [0.2, 0.3], 0.136292, 0.503324, 0.367032, 0.0),
        ([0.1, 0.5, 0.7], [0.15, 0.2, 0.4], -0.260983, -0.164758, 0.096225, 0.046634),
    ],
)
def test_worked_fits(entropy, reward, a, b, ceiling, rmse):
    fit = entropy_law_fit(entropy, reward)
    assert (fit.a, fit.b, fit.ceiling, fit.rmse) == pytest.approx((a, b, ceiling, rmse), abs=1e-6)
    assert fit.law_holds is (a > 0)
    assert fit.reward(np.zeros((2, 1))) == pytest.approx(np.full((2, 1), ceiling), abs=1e-6)


def test_worked_curve():
    fit = entropy_law_fit([1.0, 0.6, 0.3, 0.1], [0.10, 0.22, 0.29, 0.325])
    assert fit.reward(0.05) == pytest.approx(0.331060, abs=1e-6)
    step = 1e-6
    assert fit.rate(0.4) == pytest.approx((fit.reward(0.4 + step) - fit.reward(0.4 - step)) / (2 * step), abs=1e-8)


def test_intervals_are_those_of_the_normal_equations():
    entropy, reward = np.array([1.0, 0.6, 0.3, 0.1, 0.7]), np.array([0.10, 0.22, 0.29, 0.325, 0.25])
    fit = entropy_law_fit(entropy, reward)
    design = np.stack([-np.exp(entropy), np.ones(5)], axis=1)
    solution, squares, *_ = np.linalg.lstsq(design, reward, rcond=None)
    covariance = squares[0] / 3 * np.linalg.inv(design.T @ design)
    assert (fit.a, fit.b) == pytest.approx(tuple(solution), abs=1e-12)
    assert fit.covariance == pytest.approx(covariance, abs=1e-12)
    at = np.array([-math.exp(0.45), 1.0])
    low, high = fit.band(0.45)
    assert (high - low) / 2 == pytest.approx(3.182446 * math.sqrt(at @ covariance @ at), rel=1e-6)
    low, high = fit.band(0.45, observed=True)
    assert (high - low) / 2 == pytest.approx(3.182446 * math.sqrt(at @ covariance @ at + squares[0] / 3), rel=1e-6)
    low, high = fit.intervals["a"]
    assert (high - low) / 2 == pytest.approx(3.182446 * math.sqrt(covariance[0, 0]), rel=1e-6)
    assert fit.ceiling_interval == pytest.approx(fit.band(0.0))


def test_student_quantiles_of_a_table():
    table = {(0.95, 1): 12.706205, (0.95, 2): 4.302653, (0.95, 3): 3.182446, (0.95, 10): 2.228139, (0.99, 5): 4.032143}
    table |= {(0.9, 29): 1.699127, (0.95, 200): 1.971896, (0.95, 1000): 1.962339, (0.99, 300): 2.592316}
    for (confidence, freedom), quantile in table.items():
        assert student_quantile(confidence, freedom) == pytest.approx(quantile, abs=2e-6)
    assert student_quantile(0.95, 0) == math.inf


def test_points_that_do_not_make_a_line():
    assert entropy_law_fit([0.5, 0.5, 0.5], [0.1, 0.2, 0.3]) is None
    assert entropy_law_fit([0.5], [0.1]) is None
    assert entropy_law_fit([], []) is None
    whole = entropy_law_fit([1.0, math.nan, 0.6, 0.3, 0.1], [0.10, 0.5, 0.22, math.nan, 0.325])
    assert whole.a == entropy_law_fit([1.0, 0.6, 0.1], [0.10, 0.22, 0.325]).a
    assert whole.points == 3
    low, high = entropy_law_fit([0.8, 0.4], [0.2, 0.3]).band(np.array([0.0, 1.0]))
    assert (low == -math.inf).all()
    assert (high == math.inf).all()


@pytest.mark.slow
@pytest.mark.parametrize("confidence", [0.8, 0.95])
@pytest.mark.parametrize("points", [5, 40])
def test_intervals_cover_what_was_planted(confidence, points):
    generator, runs = np.random.default_rng(points), 2000
    hits = dict.fromkeys(("a", "b", "ceiling", "band", "observed"), 0)
    for _ in range(runs):
        entropy = np.exp(-np.linspace(0, 3, points)) * generator.uniform(0.5, 2)
        a, b = generator.uniform(0.05, 0.35), generator.uniform(0.3, 0.8)
        reward = b - a * np.exp(entropy) + generator.normal(0, 0.02, points)
        fit = entropy_law_fit(entropy, reward, confidence)
        at = generator.uniform(0, 1)
        curve = b - a * math.exp(at)
        for name, truth, (low, high) in (
            ("a", a, fit.intervals["a"]),
            ("b", b, fit.intervals["b"]),
            ("ceiling", b - a, fit.ceiling_interval),
            ("band", curve, fit.band(at)),
            ("observed", curve + generator.normal(0, 0.02), fit.band(at, observed=True)),
        ):
            hits[name] += low <= truth <= high
    error = math.sqrt(confidence * (1 - confidence) / runs)
    for name, count in hits.items():
        assert abs(count / runs - confidence) < 4 * error, name


@given(
    st.lists(st.tuples(st.floats(0, 3), st.floats(-2, 2)), min_size=3, max_size=12),
    st.floats(-3, 3),
    st.floats(0.1, 5),
)
def test_shifting_and_scaling_the_reward(pairs, shift, scale):
    entropy, reward = np.array(pairs).T
    if np.ptp(np.exp(entropy)) < 1e-3:
        return
    fit = entropy_law_fit(entropy, reward)
    moved = entropy_law_fit(entropy, scale * reward + shift)
    size = 1 + abs(fit.a) + abs(fit.b)
    assert moved.a == pytest.approx(scale * fit.a, abs=1e-6 * size)
    assert moved.ceiling == pytest.approx(scale * fit.ceiling + shift, abs=1e-6 * size)
    assert moved.rmse == pytest.approx(scale * fit.rmse, abs=1e-6 * size)


@pytest.mark.slow
def test_the_law_predicts_the_end_of_a_tabular_run():
    """GRPO on the logits of 200 prompts with ten answers each: the first third of the run foretells the last step."""
    generator, prompts, size = np.random.default_rng(0), np.arange(200)[:, None], 8
    logits, entropy, reward = generator.normal(0, 0.5, (200, 10)), [], []
    for _ in range(300):
        p = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
        entropy.append(-(p * np.log(p)).sum(1).mean())
        reward.append(p[:, 0].mean())
        answers = (p.cumsum(1)[:, None] < generator.random((200, size, 1))).sum(2).clip(0, 9)
        right = (answers == 0).astype(float)
        advantages = (right - right.mean(1, keepdims=True)) / np.maximum(right.std(1, keepdims=True), 1e-9)
        gradient = np.zeros_like(logits)
        np.add.at(gradient, (prompts.repeat(size, 1), answers), advantages / size)
        logits += 0.3 * gradient
    fit = entropy_law_fit(entropy[:100], reward[:100])
    assert fit.law_holds
    assert reward[99] - reward[0] > 0.5
    assert fit.reward(entropy[-1]) == pytest.approx(reward[-1], abs=0.05)


# ---------------------------------------------------------------------------------------------------------- steps left


def test_steps_left_of_an_exact_decay():
    steps = np.arange(0, 50, 5)
    left, low, high = steps_left(steps, 0.8 * np.exp(-0.02 * steps), spent=0.04)
    assert left == pytest.approx(math.log(20) / 0.02 - 45, abs=1e-6)
    assert low == pytest.approx(left, abs=1e-4)
    assert high == pytest.approx(left, abs=1e-4)
    assert steps_left(steps, np.full(10, 0.03), spent=0.04) == (0.0, 0.0, 0.0)
    assert steps_left(steps, np.full(10, 0.4), spent=0.04)[0] == math.inf
    assert steps_left(steps, np.exp(0.01 * steps), spent=0.04)[0] == math.inf
    assert steps_left([1], [0.5], spent=0.04) == (math.inf, 0.0, math.inf)
    entropy = np.array([0.8, math.nan, 0.0, 0.4])
    assert steps_left([0, 1, 2, 4], entropy, spent=0.1)[0] == pytest.approx(8.0)


@pytest.mark.slow
def test_the_interval_of_the_steps_left_covers():
    generator, runs = np.random.default_rng(0), 1000
    steps, hits = np.arange(30), 0
    for _ in range(runs):
        rate = generator.uniform(0.02, 0.05)
        noise = generator.normal(0, 0.1, 30)
        _, low, high = steps_left(steps, np.exp(-rate * steps + noise), spent=math.exp(-400 * rate))
        hits += low <= 400 - 29 <= high  # far off, what the rate says is all that matters
    assert abs(hits / runs - 0.95) < 0.04


# -------------------------------------------------------------------------------------------------------------- alarms


def first_alarm(run, kinds=("collapse", "explosion")):
    """Steps after which the first alarm is given, and which."""
    for n in range(1, len(run["entropy"]) + 1):
        alarm = entropy_alarm(run["entropy"][:n])
        if alarm in kinds:
            return n, alarm
    return None, None


def recorded(kind, split="test"):
    return [run for run in RUNS if (run["kind"], run["split"]) == (kind, split)]


def test_alarms_on_recorded_collapses_come_early():
    runs = recorded("collapse")
    assert len(runs) >= 10
    lead = []
    for run in runs:
        step, alarm = first_alarm(run)
        assert alarm == "collapse", (run["recipe"], run["seed"])
        gone = next(n for n in range(11, 999) if entropy_level(run["entropy"][:n]) < 0.25)
        lead.append(gone - step)
    assert min(lead) >= 1
    assert np.median(lead) >= 5


def test_alarms_on_recorded_explosions_come_early():
    runs = recorded("explosion")
    assert len(runs) >= 5
    for run in runs:
        step, alarm = first_alarm(run, ["explosion"])  # a control that overreacts may turn a collapse into one
        assert alarm == "explosion", (run["recipe"], run["seed"])
        assert np.mean(run["entropy"][step - 10 : step]) < 0.4 * math.log(226)  # random tokens


def test_no_alarm_on_recorded_healthy_runs():
    runs = recorded("healthy")
    assert len(runs) >= 10
    for run in runs:
        assert first_alarm(run) == (None, None), (run["recipe"], run["seed"])


def test_the_thresholds_lie_between_the_other_recorded_runs():
    def levels(kind):
        for run in recorded(kind, "set"):
            yield [entropy_level(run["entropy"][:n]) for n in range(11, len(run["entropy"]) + 1)]

    low, high = EntropyLawConfig.collapse_share, EntropyLawConfig.explosion_share
    assert max(min(run) for run in levels("collapse")) < 0.6 * low
    assert min(min(run) for run in levels("healthy")) > 1.3 * low
    assert min(max(run) for run in levels("explosion")) > 1.3 * high
    assert max(max(run) for kind in ("healthy", "collapse") for run in levels(kind)) < high / 1.3


def test_alarms_of_made_up_histories():
    assert entropy_alarm([]) is None
    assert entropy_alarm([1.0] * 5 + [0.0] * 5) is None  # nothing to compare with yet
    assert entropy_alarm([1.0] * 10 + [0.499] * 10) == "collapse"
    assert entropy_alarm([1.0] * 10 + [0.501] * 10) is None
    assert entropy_alarm([1.0] * 10 + [0.501] * 10, floor=0.6) == "collapse"
    assert entropy_alarm([1.0] * 10 + [2.001] * 10) == "explosion"
    assert entropy_alarm([1.0] * 10 + [math.nan] * 90 + [0.499] * 10) == "collapse"
    assert entropy_alarm([1.0] * 10 + [math.nan] * 90) is None
    assert entropy_alarm([0.0] * 11) == "collapse"  # a policy without choice from the start


# ------------------------------------------------------------------------------------------------------- entropy drift


def test_entropy_drift_by_hand():
    logps = torch.tensor([-1.0, -2.0, -0.5, -0.7, -3.0], dtype=torch.float64, requires_grad=True)
    advantages = torch.tensor([1.0, -1.0, 0.5, -0.5, math.nan], dtype=torch.float64)
    drift = entropy_drift(logps, advantages, torch.tensor([4, 4, 9, 9, 9]))
    pairs = [((-1.0, 1.0), (-2.0, -1.0)), ((-0.5, 0.5), (-0.7, -0.5))]
    # of two values the population covariance is a quarter of the product of the differences
    by_hand = [(x - y) * (math.exp(x) * a - math.exp(y) * b) / 4 for (x, a), (y, b) in pairs]
    assert drift.item() == pytest.approx(sum(by_hand) / 2, abs=1e-12)
    assert not drift.requires_grad


def test_entropy_drift_predicts_the_change_of_a_softmax():
    torch.manual_seed(0)
    logits, advantages = torch.randn(6, dtype=torch.float64), torch.randn(6, dtype=torch.float64)
    logps = logits.log_softmax(0)
    # Enumeration: expectations under the policy in place of means over responses drawn from it.
    copies = (logps.exp() * 1e6).round().long()
    group = torch.zeros(int(copies.sum()), dtype=torch.long)
    drift = entropy_drift(logps.repeat_interleave(copies), advantages.repeat_interleave(copies), group)
    step = 1e-4  # natural gradient form of Lemma 1: the logit of y moves by p * A
    moved = (logits + step * logps.exp() * advantages).log_softmax(0)
    entropy = [-(p.exp() * p).sum() for p in (logps, moved)]
    assert (entropy[1] - entropy[0]).item() == pytest.approx(-step * drift.item(), rel=1e-2)


# ---------------------------------------------------------------------------------------------------------- the points


def test_points_of_training_logs_are_means():
    history = [{"step": i, "entropy": e, "reward": r} for i, e, r in ((1, 0.4, 0.1), (2, 0.2, 0.3), (3, 0.9, 0.9))]
    assert entropy_law_points(history, "reward", 2) == [(2, pytest.approx(0.3), pytest.approx(0.2))]
    history.insert(1, {"step": 2, "entropy": 0.4, "reward": None})
    history.insert(1, {"step": 2, "entropy": math.nan, "reward": 1.0})
    assert entropy_law_points(history, "reward", 2) == [(2, pytest.approx(0.3), pytest.approx(0.2))]


def test_points_of_evaluations_take_the_last_entropy():
    history = [
        {"step": 0, "eval_acc": 0.1},  # before any training
        {"step": 1, "entropy": 0.4},
        {"step": 2, "entropy": 0.3},
        {"step": 2, "eval_acc": 0.5, "eval_entropy": 0.2},
        {"step": 3, "entropy": None},
        {"step": 3, "eval_acc": math.nan},
        {"step": 4, "eval_acc": 0.6},
    ]
    assert entropy_law_points(history, "eval_acc") == [(2, 0.3, 0.5), (4, 0.3, 0.6)]


# -------------------------------------------------------------------------------------------------------- the callback


@pytest.mark.parametrize(
    ("trainer_class", "config_class"),
    [(GRPOTrainer, GRPOConfig), (RLOOTrainer, RLOOConfig), (MethodTrainer, MethodTrainer.config_class)],
)
def test_any_trainer_and_nothing_changes(tmp_path, trainer_class, config_class):
    alone = run(tmp_path / "a", None, trainer_class, config_class)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Entropy")
        watched = run(tmp_path / "b", law(), trainer_class, config_class)
    assert difference(alone, watched) == 0.0
    history = watched.state.log_history
    steps, entropy, reward = zip(*entropy_law_points(history, "reward", 1), strict=True)
    fit = entropy_law_fit(entropy, reward)
    assert steps == tuple(range(1, 7))
    assert [step for step, _ in kept(watched, "a")] == [3, 4, 5, 6]
    assert kept(watched, "a")[-1] == (6, fit.a)
    assert kept(watched, "rmse")[-1] == (6, fit.rmse)
    assert kept(watched, "residual")[-1][1] == pytest.approx(reward[-1] - fit.reward(entropy[-1]))
    for step, a in kept(watched, "a"):
        assert (step in dict(kept(watched, "ceiling"))) is (a > 0)
    assert imread(tmp_path / "b" / "entropy_law.png").std() > 0.02  # not a blank page


def test_evaluations_and_logging_steps(tmp_path):
    trainer = build(
        GRPOTrainer,
        GRPOConfig,
        out=tmp_path,
        max_steps=8,
        logging_steps=2,
        eval_strategy="steps",
        eval_steps=2,
        eval_dataset=arithmetic().select(range(4)),
        per_device_eval_batch_size=4,
    )
    trainer.add_callback(law(reward_key="eval_reward", fit_window=6))
    trainer.evaluate()  # without a train step
    trainer.train()
    history = trainer.state.log_history
    points = entropy_law_points(history, "eval_reward")
    assert [step for step, _, _ in points] == [2, 4, 6, 8]
    by_step = {entry["step"]: entry["entropy"] for entry in history if "entropy" in entry}
    assert [entropy for _, entropy, _ in points] == [by_step[step] for step in (2, 4, 6, 8)]
    used = entropy_law_fit(*zip(*[point[1:] for point in points[:3]], strict=True))
    assert [step for step, _ in kept(trainer, "a")] == [6, 8]
    assert [a for _, a in kept(trainer, "a")] == [used.a, used.a]  # the rest is predicted
    trainer.evaluate()
    assert (tmp_path / "entropy_law.png").is_file()


def feed(callback, tmp_path, entropies, rewards=None, state=None, **arguments):
    """Logs as a trainer writes them."""
    from transformers import TrainerControl, TrainerState

    args = GRPOConfig(str(tmp_path), use_cpu=True, bf16=False, report_to=[], **arguments)
    state = state or TrainerState(is_world_process_zero=True)
    control = TrainerControl()
    for i, entropy in enumerate(entropies):
        state.global_step += 1
        logs = {"entropy": entropy, "reward": 0.5 if rewards is None else rewards[i]}
        state.log_history.append({**logs, "step": state.global_step})
        callback.on_log(args, state, control, logs=logs)
        if control.should_training_stop:
            break
    return args, state, control


def test_a_recorded_collapse_is_reported_once_in_words_and_can_stop(tmp_path):
    run = recorded("collapse")[0]
    expected, _ = first_alarm(run)
    with pytest.warns(UserWarning, match=f"Entropy collapse at step {expected}: .* nats.*`reward` went from") as said:
        _, state, control = feed(EntropyLawCallback(), tmp_path, run["entropy"], run["reward"])
    assert sum("Entropy" in str(warning.message) for warning in said) == 1
    assert not control.should_training_stop
    assert [entry["step"] for entry in state.log_history if "entropy_law/reason" in entry] == [expected]
    json.loads(json.dumps(state.log_history, allow_nan=False))
    draw_entropy_law(state.log_history, str(tmp_path / "x.png"))
    with pytest.warns(UserWarning, match="collapse"):
        _, state, control = feed(EntropyLawCallback(EntropyLawConfig(stop_on="collapse")), tmp_path, run["entropy"])
    assert control.should_training_stop
    assert state.global_step == expected
    run = recorded("explosion")[0]
    with pytest.warns(UserWarning, match="Entropy explosion at step .* random tokens"):
        _, _, control = feed(EntropyLawCallback(EntropyLawConfig(stop_on="collapse")), tmp_path, run["entropy"])
    assert not control.should_training_stop


def test_missing_and_odd_numbers(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        callback = law()
        odd = [None, math.nan, 0.5, math.inf, 0.4, "x", 0.45, 0.5]
        args, state, control = feed(callback, tmp_path, odd, [0.1, 0.2, None, 0.3, 0.4, 0.5, math.nan, 0.6])
        state.log_history.append({"step": 9, "eval_loss": 1.0})
        callback.on_log(args, state, control, logs={})
        callback.on_save(args, state, control)
        assert not any("entropy_law/a" in entry for entry in state.log_history)  # two points
    state.log_history[:] = [{"step": 1, "loss": 1.0}]
    with pytest.warns(UserWarning, match="no number was logged as 'entropy'"):
        callback.on_train_end(args, state, control)
    assert not draw_entropy_law(state.log_history, str(tmp_path / "y.png"))


def test_resuming_goes_on_with_the_history(tmp_path):
    settings = {"save_strategy": "steps", "save_steps": 3}
    sensitive = {"collapse_share": 0.999, "explosion_share": 1.0001, "alarm_window": 1}  # an alarm at almost every log
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        whole = run(tmp_path / "run", law(**sensitive), MethodTrainer, MethodTrainer.config_class, **settings)
        path = str(tmp_path / "run" / "checkpoint-3")
        again = run(tmp_path / "run", law(**sensitive), MethodTrainer, MethodTrainer.config_class, path, **settings)
    for name in ("a", "b", "ceiling_low", "steps_left", "alarm", "reason"):
        assert kept(again, name) == kept(whole, name)
    assert len(kept(whole, "alarm")) == 5
    late = [reason for step, reason in kept(whole, "reason") if step > 3]
    words = [str(w.message) for w in said if "Entropy" in str(w.message)]
    assert words == [reason for _, reason in kept(whole, "reason")] + late


def test_the_adaptive_control_gets_the_coefficient(tmp_path):
    adaptive = {"use_adaptive_entropy": True, "entropy_coef_max": 0.3, "entropy_coef_delta": 0.0}
    trainer = build(GRPOTrainer, GRPOConfig, out=tmp_path, **adaptive)
    config = {"control_coef": 0.2, "alarm_window": 1}
    callback = EntropyLawCallback(EntropyLawConfig(**config), trainer)
    feed(callback, tmp_path, [1.0, 0.9], **adaptive)
    assert trainer.entropy_coef == 0.0
    with pytest.warns(UserWarning, match="collapse"):
        _, state, _ = feed(callback, tmp_path, [1.0, 0.1], **adaptive)
    assert trainer.entropy_coef == 0.2
    with pytest.warns(UserWarning, match="explosion"):
        feed(callback, tmp_path, [3.0], state=state, **adaptive)
    assert trainer.entropy_coef == 0.0
    with pytest.warns(UserWarning, match="collapse"):
        greedy = EntropyLawCallback(EntropyLawConfig(control_coef=5.0, alarm_window=1), trainer)
        feed(greedy, tmp_path, [1.0, 0.1], **adaptive)
    assert trainer.entropy_coef == 0.3  # TRL's own bound
    with pytest.raises(ValueError, match=r"control_coef=0\.2.*use_adaptive_entropy=True"):
        EntropyLawCallback(EntropyLawConfig(**config))
    with pytest.raises(ValueError, match=r"control_coef=0\.2.*use_adaptive_entropy=True"):
        EntropyLawCallback(EntropyLawConfig(**config), build(GRPOTrainer, GRPOConfig, out=tmp_path))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("fit_min_points", 2),
        ("fit_window", 0),
        ("eval_every", 0),
        ("entropy_floor_warn", 0.0),
        ("alarm_window", 0),
        ("collapse_share", 1.0),
        ("explosion_share", 1.0),
        ("confidence", 1.0),
        ("stop_on", "both"),
        ("control_coef", -0.1),
    ],
)
def test_bad_settings_by_name(name, value):
    with pytest.raises(ValueError, match=f"`{name}` must be"):
        EntropyLawConfig(**{name: value})


def test_trackers_get_the_metrics(tmp_path):
    class Tracker(TrainerCallback):
        got = []

        def on_log(self, args, state, control, logs=None, **kwargs):
            self.got.append((state.global_step, dict(logs)))

    trainer = build(GRPOTrainer, GRPOConfig, out=tmp_path, max_steps=6, callbacks=[tracker := Tracker()])
    config = EntropyLawConfig(eval_every=1, alarm_window=1, collapse_share=0.999, explosion_share=1.001)
    trainer.add_callback(EntropyLawCallback(config, trainer))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer.train()
    kept = {entry["step"]: entry for entry in trainer.state.log_history if "entropy_law/alarm" in entry}
    assert len(kept) >= 4
    numbers = 0
    for step, logs in tracker.got:
        got = {name: value for name, value in logs.items() if name.startswith("entropy_law/")}
        words = {"entropy_law/alarm", "entropy_law/reason"}  # trackers take numbers
        assert got.keys().isdisjoint(words)
        if step in kept and "entropy" in logs:
            assert got == {k: v for k, v in kept[step].items() if k.startswith("entropy_law/") and k not in words}
            numbers += len(got)
    assert numbers >= 12


@pytest.mark.slow
def test_two_processes_stop_together(tmp_path):
    worker = Path(__file__).with_name("entropy_law_worker.py")
    launch(worker, 2, tmp_path)
    results = [json.loads((tmp_path / f"result_{i}.json").read_text()) for i in range(2)]
    assert results == [{"step": 4, "warnings": 1}, {"step": 4, "warnings": 0}]
