import json
import math
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset
from harness import arithmetic, build, difference, exact_match, launch, parity_reward, scripted
from transformers import TrainerCallback
from trl import GRPOConfig, GRPOTrainer

from trl_ext import EvalStatsCallback, EvalStatsConfig, MethodTrainer, mix
from trl_ext.callbacks.evaluation import RECORD, summarise, temperature_of
from trl_ext.compare import compare_evaluations, read_evaluation
from trl_ext.core.state import fingerprint
from trl_ext.evaluation import (
    bootstrap_interval,
    clustered_se,
    detectable_difference,
    maj_at_k,
    monotonicity,
    normal_interval,
    pass_at_k,
    pass_hat_k,
    variance_split,
)


HELD_OUT = arithmetic().select(range(30, 36))


def make(folder, config=None, trainer_class=MethodTrainer, answer=None, dataset=None, **settings):
    """A trainer with the callback, if there is a config."""
    evaluation = {"eval_strategy": "steps", "eval_steps": 2, "per_device_eval_batch_size": 4, "max_steps": 4}
    settings = {"eval_dataset": HELD_OUT} | evaluation | settings
    trainer = build(trainer_class, out=folder, **settings)
    if config is not None:
        trainer.add_callback(EvalStatsCallback(EvalStatsConfig(**config), trainer, dataset, answer))
    return trainer


def lines(folder):
    return [json.loads(line) for line in (Path(folder) / "evaluations.jsonl").read_text().splitlines()]


def entries(trainer):
    return [entry for entry in trainer.state.log_history if RECORD in entry]


def training_logs(trainer):
    timed = ("runtime", "per_second", "step_time")
    return [
        {name: value for name, value in entry.items() if not any(part in name for part in timed)}
        for entry in trainer.state.log_history
        if RECORD not in entry
    ]


@pytest.mark.parametrize(
    "settings",
    [
        {"optim": "sgd", "learning_rate": 0.1, "logging_steps": 3},
        {"eval_strategy": "no", "logging_steps": 3},
        {"num_iterations": 2, "gradient_accumulation_steps": 2},
        {"trainer_class": mix("spo").Trainer, "spo_offline_n": 1},  # samples outside its steps, too
    ],
    ids=["sgd", "no other evaluation", "several updates", "spo"],
)
def test_training_does_not_change(tmp_path, settings):
    settings = {"max_steps": 5} | settings
    alone = make(tmp_path / "a", **settings)
    alone.train()
    config = {"eval_num_samples": 3, "eval_at_start": True, "eval_temperature": 1.3}
    watched = make(tmp_path / "b", config, **settings)
    watched.train()
    assert difference(alone, watched) == 0.0
    assert training_logs(watched) == training_logs(alone)
    assert watched.rollouts_spent == alone.rollouts_spent
    assert watched._score_calls == alone._score_calls
    steps = [0, 5] if settings.get("eval_strategy") == "no" else [0, 2, 4, 5]
    assert [entry["step"] for entry in entries(watched)] == steps
    assert watched.model.training == alone.model.training


class Tracker(TrainerCallback):
    """Keeps what trackers are given."""

    def __init__(self):
        self.seen = []

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.seen.append((state.global_step, dict(logs)))


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run with checkpoints, and what a tracker saw of it."""
    folder, tracker = tmp_path_factory.mktemp("run"), Tracker()
    trainer = make(
        folder,
        {"eval_num_samples": 4, "eval_at_start": True},
        callbacks=[tracker],
        save_strategy="steps",
        save_steps=2,
        max_steps=6,
        eval_on_start=True,  # of the trainer: at the same step, so there is one evaluation of it
        metric_for_best_model="eval_stats/pass@1",
        load_best_model_at_end=True,
    )
    trainer.train()
    return folder, trainer, tracker


def test_what_is_logged_and_kept(run):
    folder, trainer, tracker = run
    history = lines(folder)
    assert [line["step"] for line in history] == [0, 2, 4, 6]
    seen = {step: logs for step, logs in tracker.seen if "eval_stats/pass@1" in logs}
    scores = []
    for entry, line in zip(entries(trainer), history, strict=True):
        successes, counts = np.array(line["successes"]), line["counts"]
        assert counts == [4] * 6 and line["n"] == 4
        assert line["prompts"] == fingerprint(HELD_OUT["prompt"])
        assert line["settings"] == {
            "num_samples": 4,
            "temperature": 1.0,
            "reward": "parity_reward",
            "success_threshold": 0.5,
            "unscored": "wrong",
        }
        rates = successes / 4
        scores.append(rates.mean())
        low, high = normal_interval(rates.mean(), clustered_se(rates))
        split = variance_split([[1] * c + [0] * (4 - c) for c in successes])
        boot = bootstrap_interval(rates, seed=[0, line["step"]])
        expected = {
            "pass@1": rates.mean(),
            "pass@1_low": low,
            "pass@1_high": high,
            "pass@1_boot_low": boot[0],
            "pass@1_boot_high": boot[1],
            "pass@4": pass_at_k(counts, successes, 4).mean(),
            "pass_hat@2": pass_hat_k(counts, successes, 2).mean(),
            "pass_hat@2_high": normal_interval(0, clustered_se(pass_hat_k(counts, successes, 2)))[1]
            + pass_hat_k(counts, successes, 2).mean(),
            "sampling_variance": split.sampling,
            "prompt_variance": split.prompt,
            "detectable_difference": detectable_difference(clustered_se(rates)),
            "unscored": 0.0,
        }
        if len(scores) > 1:
            expected["monotonicity"] = monotonicity(scores)
        for name, value in expected.items():
            assert line["summary"][name] == pytest.approx(value, abs=1e-12), name
        numbers = {f"eval_stats/{name}": value for name, value in line["summary"].items()}
        assert {name: entry[name] for name in numbers} == numbers
        logged = seen[line["step"]]
        assert {name: logged[name] for name in numbers} == numbers
        assert all(isinstance(value, (int, float)) for value in logged.values())
    assert len(seen) == len([1 for _, logs in tracker.seen if "eval_stats/pass@1" in logs])  # once per step
    assert len(set(scores)) > 1
    best = max(history, key=lambda line: line["score"])
    assert trainer.state.best_metric == best["score"]
    assert trainer.state.best_global_step == best["step"]


def test_a_resumed_run_goes_on_with_its_history(run, tmp_path):
    folder, _, _ = run
    whole = lines(folder)
    config = {"eval_num_samples": 4, "eval_at_start": True}
    settings = {"save_strategy": "steps", "save_steps": 2, "eval_on_start": True}
    again = make(tmp_path / "new", config, **settings)  # a folder that knows nothing
    again.train(resume_from_checkpoint=f"{folder}/checkpoint-2")
    assert lines(tmp_path / "new") == whole[:3]
    # Later lines are dropped before the first new one comes.
    (tmp_path / "new" / "evaluations.jsonl").write_text("".join(json.dumps(line) + "\n" for line in whole))
    seen = []

    class Look(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            seen.append([line["step"] for line in lines(tmp_path / "new")])

    again = make(tmp_path / "new", config, **settings)
    again.add_callback(Look())
    again.train(resume_from_checkpoint=f"{folder}/checkpoint-2")
    assert seen == [[0, 2], [0, 2]]
    assert lines(tmp_path / "new") == whole[:3]
    fresh = make(tmp_path / "new", {"eval_num_samples": 2}, max_steps=2)
    fresh.train()  # another run in an old folder
    assert [(line["step"], line["n"]) for line in lines(tmp_path / "new")] == [(2, 2)]


def test_evaluations_outside_of_a_training(tmp_path):
    trainer = make(tmp_path, {"eval_num_samples": 4, "eval_at_start": True}, eval_strategy="no", max_steps=2)
    metrics = trainer.evaluate()
    assert 0 <= metrics["eval_stats/pass@1"] <= 1
    first = lines(tmp_path)
    assert [line["step"] for line in first] == [0]
    calls = trainer.state.log_history.copy()
    trainer.train()
    assert [line["step"] for line in lines(tmp_path)] == [0, 2]  # the end is evaluated in any case
    assert lines(tmp_path)[0] == first[0]
    assert [entry for entry in calls if RECORD in entry] == [e for e in entries(trainer) if e["step"] == 0]
    before = lines(tmp_path)
    trainer.evaluate()  # at a step that there is
    after = lines(tmp_path)
    assert [line["step"] for line in after] == [0, 2]
    assert after[1]["successes"] == before[1]["successes"]  # the same model, the same draws
    with torch.no_grad():
        for parameter in trainer.model.parameters():
            parameter.zero_()
    trainer.evaluate()
    assert lines(tmp_path)[1]["successes"] != before[1]["successes"]
    # A new trainer on an old folder adds to what is there.
    other = make(tmp_path, {"eval_num_samples": 2})
    other.evaluate()
    assert [(line["step"], line["n"]) for line in lines(tmp_path)] == [(0, 2), (2, 4)]
    found = compare_evaluations([read_evaluation(str(tmp_path), 2)], [first[0]])
    assert found.prompts == 6


def test_one_prompt_and_one_sample(tmp_path):
    with pytest.warns(UserWarning, match="`eval_num_samples` is 1: there is only pass@1"):
        trainer = make(tmp_path, {"eval_num_samples": 1}, eval_dataset=HELD_OUT.select([0]))
    metrics = trainer.evaluate()
    names = {name for name in metrics if name.startswith("eval_stats/")}
    assert names == {"eval_stats/pass@1", "eval_stats/unscored"}  # nothing that is undefined
    line = lines(tmp_path)[0]
    assert line["counts"] == [1] and line["score"] == line["successes"][0]


def partly_scored(prompts, completions, **kwargs):
    """No score for every second sample of a prompt, nor for any of the first prompt."""
    seen, rewards = {}, []
    for prompt, reward in zip(prompts, parity_reward(completions), strict=True):
        key = str(prompt)
        seen[key] = seen.get(key, 0) + 1
        rewards.append(reward if seen[key] % 2 and key != str(HELD_OUT[0]["prompt"]) else None)
    return rewards


def test_unscored_samples(tmp_path):
    # As many rows at once as all samples, so that the reward function sees each prompt's together.
    settings = {"rewards": partly_scored, "per_device_train_batch_size": 24}
    found = {}
    for kind in ("wrong", "drop"):
        trainer = make(tmp_path / kind, {"eval_num_samples": 4, "eval_unscored": kind}, **settings)
        trainer.evaluate()
        found[kind] = lines(tmp_path / kind)[0]
    wrong, drop = found["wrong"], found["drop"]
    assert wrong["successes"] == drop["successes"] and sum(drop["successes"]) > 0
    assert (wrong["counts"], drop["counts"]) == ([4] * 6, [0, 2, 2, 2, 2, 2])
    assert wrong["summary"]["unscored"] == drop["summary"]["unscored"] == pytest.approx(14 / 24)
    assert wrong["score"] == pytest.approx(sum(wrong["successes"]) / 24)
    assert drop["score"] == pytest.approx(sum(drop["successes"]) / 10)
    assert "pass@4" in wrong["summary"] and "pass@4" not in drop["summary"]  # no prompt has 4 samples
    assert "pass@2" in drop["summary"]


def test_nothing_scored(tmp_path):
    trainer = make(
        tmp_path,
        {"eval_num_samples": 2, "eval_unscored": "drop"},
        rewards=[lambda completions, **kwargs: [None] * len(completions), parity_reward],
        answer=lambda text: text,
    )
    with pytest.warns(UserWarning, match="No sample was scored: .*`eval_reward`"):
        trainer.evaluate()
    line = lines(tmp_path)[0]
    assert line["score"] is None and line["summary"] == {"unscored": 1.0}
    json.loads(json.dumps(trainer.state.log_history[-1], allow_nan=False))


def test_the_reward_that_counts(tmp_path):
    config = {"eval_num_samples": 2, "eval_reward": "two", "eval_success_threshold": 1.5}

    def two(completions, **kwargs):
        return [2.0] * len(completions)

    trainer = make(tmp_path, config, rewards=[parity_reward, two])
    trainer.evaluate()
    assert lines(tmp_path)[0]["score"] == 1.0
    trainer = make(tmp_path, config | {"eval_success_threshold": 2.0}, rewards=[parity_reward, two])
    trainer.evaluate()
    assert lines(tmp_path)[0]["score"] == 0.0  # above, not at


def short(text):
    return text.strip()[:1] or None


def test_majorities_and_short_answers(tmp_path):
    seen = {}

    def answer(text):
        seen.setdefault("texts", []).append(text)
        return short(text)

    config = {"eval_num_samples": 4, "eval_ks": (3,), "eval_lr_threshold": 1.0}
    dataset = HELD_OUT.add_column("first", [int(str(row["answer"])[0]) for row in HELD_OUT])
    trainer = make(tmp_path, config, rewards=exact_match, dataset=dataset, answer=answer)
    callback = trainer.callback_handler.callbacks[-1]
    record, summary = callback._sample(0)
    texts = np.array(seen["texts"]).reshape(6, 4)
    rewards = np.array(exact_match(texts.flatten().tolist(), answer=np.repeat(HELD_OUT["answer"], 4)))
    correct = rewards.reshape(6, 4) > 0.5
    assert correct.sum(1).tolist() == record["successes"]
    right = [{short(t) for t in row if sum(2 * c[row_ == short(t)] - 1) > 0} for row, c, row_ in cases(texts, correct)]
    expected = [maj_at_k([short(t) for t in row], gold, 3) for row, gold in zip(texts, right, strict=True)]
    assert summary["maj@3"] == pytest.approx(np.mean(expected))
    assert 0 < np.mean(expected) < 1
    assert "exact_match" not in summary
    seen.clear()
    trainer = make(tmp_path, config | {"eval_answer_column": "first"}, dataset=dataset, answer=answer)
    _, summary = trainer.callback_handler.callbacks[-1]._sample(0)
    texts, golds = np.array(seen["texts"]).reshape(6, 4), [str(gold) for gold in dataset["first"]]
    pairs = list(zip(texts, golds, strict=True))
    expected = [maj_at_k([short(t) for t in row], gold, 3) for row, gold in pairs]
    same = np.mean([[short(t) == gold for t in row] for row, gold in pairs])
    assert summary["maj@3"] == pytest.approx(np.mean(expected))
    assert summary["exact_match"] == summary["levenshtein"] == pytest.approx(same)
    assert 0 < same < 1


def cases(texts, correct):
    for row, c in zip(texts, correct, strict=True):
        yield row, c, np.array([short(t) for t in row])


def test_an_imperfect_verifier(tmp_path):
    def lenient(completions, **kwargs):
        return [1.0] * len(completions)

    config = {"eval_num_samples": 4, "eval_reward": "parity_reward", "eval_weak_reward": "lenient"}
    trainer = make(tmp_path, config | {"eval_fp_cost": (0, 50)}, rewards=[lenient, parity_reward])
    metrics = trainer.evaluate()
    score = metrics["eval_stats/pass@1"]
    assert 0 < score < 1
    assert metrics["eval_stats/accepted_accuracy"] == score  # it accepts everything, the first sample at once
    assert metrics["eval_stats/best_k@cost_0"] == 1
    assert metrics["eval_stats/value@cost_0"] == pytest.approx(score, abs=0.05)
    assert metrics["eval_stats/best_k@cost_50"] == 0 and metrics["eval_stats/value@cost_50"] == 0.0


def test_greedy_decoding_is_reported_and_leaves_no_trace(tmp_path):
    trainer = make(tmp_path, {"eval_num_samples": 3, "eval_temperature": 0.0})
    before = trainer.generation_config
    with pytest.warns(
        UserWarning, match="All 3 samples of every prompt are the same text.*`eval_temperature`"
    ) as said:
        trainer.evaluate()
        trainer.evaluate()
    assert sum("same text" in str(w.message) for w in said) == 1
    assert trainer.generation_config is before and before.temperature == 1.0 and before.do_sample
    assert lines(tmp_path)[0]["settings"]["temperature"] == 0.0
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="All")
        make(tmp_path, {"eval_num_samples": 3, "eval_temperature": 1.5}).evaluate()


def test_temperature_changes_the_samples(tmp_path):
    drawn = {}
    for temperature in (None, 1.0, 0.2, 5.0):
        trainer = make(tmp_path, {"eval_num_samples": 8, "eval_temperature": temperature})
        callback, drawn[temperature] = trainer.callback_handler.callbacks[-1], {}
        callback.answer = lambda text, kept=drawn[temperature]: kept.setdefault(text, text)
        callback._sample(0)
    assert drawn[None] == drawn[1.0]
    assert len(drawn[0.2]) < len(drawn[1.0]) < len(drawn[5.0])


def test_the_temperature_of_vllm():
    class Engine:
        temperature = 1.0

    class Trainer:
        use_vllm, vllm_generation = True, Engine()

    with pytest.raises(KeyError), temperature_of(Trainer, 0.3):
        assert Trainer.vllm_generation.temperature == 0.3
        raise KeyError
    assert Trainer.vllm_generation.temperature == 1.0


def test_several_evaluation_sets_are_one_evaluation(tmp_path):
    sets = {"one": HELD_OUT.select(range(4)), "two": HELD_OUT.select(range(2, 6))}
    with pytest.raises(ValueError, match=r"`dataset` must be one `Dataset`.*got dict"):
        make(tmp_path, {}, eval_dataset=sets)
    trainer = make(tmp_path, {"eval_num_samples": 2}, eval_dataset=sets, dataset=HELD_OUT, max_steps=2)
    trainer.train()
    assert [entry["step"] for entry in entries(trainer)] == [2]
    assert len(lines(tmp_path)[0]["successes"]) == 6


def test_prompts_without_enough_samples_are_skipped():
    config = EvalStatsConfig(eval_num_samples=4, eval_ks=(3,))
    summary = summarise([1, 2, 0, 0], [4, 2, 3, 0], config)
    assert summary["pass@1"] == pytest.approx((0.25 + 1 + 0) / 3)
    assert summary["pass@3"] == pytest.approx((0.75 + 0) / 2)
    assert summary["pass_hat@3"] == 0.0
    assert summarise([0], [0], config) == {}


def test_refusals_by_name(tmp_path):
    with pytest.raises(ValueError, match=r"`trainer` must be a trl_ext\.MethodTrainer.*got GRPOTrainer.*for bit"):
        EvalStatsCallback(trainer=build(GRPOTrainer, GRPOConfig, out=tmp_path, eval_dataset=HELD_OUT))
    with pytest.raises(ValueError, match=r"`trainer` must be .* got NoneType"):
        EvalStatsCallback()
    trainer = build(MethodTrainer, out=tmp_path)
    for dataset in (None, HELD_OUT.select([]), Dataset.from_dict({"text": ["x"]}), HELD_OUT.to_iterable_dataset()):
        with pytest.raises(ValueError, match="`dataset` must be one `Dataset` with at least one row and a column 'pr"):
            EvalStatsCallback(trainer=trainer, dataset=dataset)
    for name in ("eval_reward", "eval_weak_reward"):
        with pytest.raises(ValueError, match=f"`{name}` names the reward function 'x'.*'parity_reward'"):
            EvalStatsCallback(EvalStatsConfig(**{name: "x"}), trainer, HELD_OUT)
    for column, answer in (("answer", None), ("x", short)):
        with pytest.raises(ValueError, match=f"`eval_answer_column='{column}'` needs an `answer` function"):
            EvalStatsCallback(EvalStatsConfig(eval_answer_column=column), trainer, HELD_OUT, answer)
    own = build(MethodTrainer, out=tmp_path, rollout_func=scripted)
    EvalStatsCallback(EvalStatsConfig(), own, HELD_OUT)
    with pytest.raises(ValueError, match=r"`eval_temperature=0.5` cannot be handed to a `rollout_func`"):
        EvalStatsCallback(EvalStatsConfig(eval_temperature=0.5), own, HELD_OUT)
    trainer.use_vllm, trainer.args.generation_kwargs = True, {"temperature": 0.1}
    with pytest.raises(ValueError, match=r"`eval_temperature=0.5` would be overruled .*`generation_kwargs`"):
        EvalStatsCallback(EvalStatsConfig(eval_temperature=0.5), trainer, HELD_OUT)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("eval_num_samples", 0),
        ("eval_num_samples", 2.5),
        ("eval_ks", (11,)),
        ("eval_ks", 0),
        ("eval_alpha", 1.0),
        ("eval_power", 0.0),
        ("eval_bootstrap", 0),
        ("eval_seed", -1),
        ("eval_fp_cost", (1, -1)),
        ("eval_lr_threshold", 0.0),
        ("eval_lr_threshold", 1.5),
        ("eval_temperature", -0.1),
        ("eval_success_threshold", math.nan),
        ("eval_unscored", "skip"),
    ],
)
def test_bad_settings_by_name(name, value):
    with pytest.raises(ValueError, match=f"`{name}` must be"):
        EvalStatsConfig(**{name: value})


def test_defaults():
    config = EvalStatsConfig()
    assert (config.eval_num_samples, config.eval_ks, config.eval_alpha, config.eval_power) == (
        10,
        (1, 2, 4, 8),
        0.05,
        0.8,
    )
    assert (config.eval_bootstrap, config.eval_seed, config.eval_fp_cost) == (1000, 0, (0, 1, 2, 4, 8))
    assert EvalStatsConfig(eval_num_samples=1).eval_ks == (1,)
    assert EvalStatsConfig(eval_ks=[10, 5]).eval_ks == (1, 5, 10)
    assert EvalStatsConfig(eval_fp_cost=2).eval_fp_cost == (2,)


@pytest.mark.slow
def test_two_processes_agree(tmp_path):
    worker = Path(__file__).with_name("eval_stats_worker.py")
    results = {}
    for processes in (1, 2):
        folder = tmp_path / str(processes)
        folder.mkdir()
        launch(worker, processes, folder)
        results[processes] = [json.loads((folder / f"result_{i}.json").read_text()) for i in range(processes)]
        assert lines(folder) == results[processes][0]["lines"]
    first, second = results[2]
    assert first == second  # also what only the main process writes to files
    assert [line["step"] for line in first["lines"]] == [0, 2, 4]
    # 5 prompts with 3 samples, which do not divide among 2 processes; scripted, so the same on one
    assert [line["counts"] for line in first["lines"]] == [[3] * 5] * 3
    assert first == results[1][0]
