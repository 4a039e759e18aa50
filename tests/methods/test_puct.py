import math
import sys

import pytest
import torch
from harness import arithmetic, build, difference, parity_reward, scripted, train
from hypothesis import given, settings
from hypothesis import strategies as st

from trl_ext import MethodTrainer, MixingError, PUCTConfig, PUCTTrainer, mix
from trl_ext.methods.puct import Archive, State, append_solution, reward_and_text


NAN = math.nan


def names(states):
    return [state.content or f"s{state.id}" for state in states]


def worked():
    """Two seeds, two children of the first, and one failed rollout from the second."""
    archive = Archive([1.0, 0.5])
    first, second = archive.states.values()
    archive.update(first, [(2.0, "a")])
    archive.update(first, [(1.5, "b")])
    archive.update(second, [None])
    return archive


# --------------------------------------------------------------------------------------------- the worked example


def test_worked_example():
    archive = Archive([1.0, 0.5])
    assert archive.scores() == pytest.approx({0: 1.333333, 1: 0.666667}, abs=1e-6)
    archive = worked()
    assert (archive.n, archive.m, archive.T) == ({0: 2, 1: 1}, {0: 2.0}, 3)
    assert archive.scores() == pytest.approx({2: 2.4, 0: 2.066667, 3: 1.8, 1: 0.55}, abs=1e-6)
    assert names(archive.pick(3)) == ["a", "b", "s1"]


# ------------------------------------------------------------------------------------------------- the archive


def test_exploration_and_the_scale_of_flat_values():
    archive = Archive([2.0, 2.0, 2.0], c=3.0)
    bonus = [3.0 * 1e-6 * weight / 6 for weight in (3, 2, 1)]  # the scale's least value, ties by insertion
    assert archive.scores() == pytest.approx({i: 2 + b for i, b in enumerate(bonus)}, abs=1e-12)
    assert names(Archive([0.0, 1.0], c=0.0).pick(1)) == ["s1"]
    assert Archive([]).pick(2) == [] and Archive([]).scores() == {}


def test_when_all_are_blocked_the_picks_repeat():
    archive = worked()
    assert names(archive.pick(5)) == ["a", "b", "s1", "a", "b"]
    assert names(Archive([1.0]).pick(3)) == ["s0"] * 3


def test_a_pick_blocks_ancestors_that_are_no_longer_archived():
    archive = Archive([0.0], topk_children=1)
    seed = archive.states[0]
    archive.update(seed, [(1.0, "parent")])
    parent = archive.states[1]
    archive.update(parent, [(5.0, "child")])
    archive.update(seed, [(2.0, "better parent")])
    archive.trim()
    assert names(archive.states.values()) == ["s0", "child", "better parent"]  # "parent" is gone
    assert archive.n == {0: 3, 1: 1} and archive.m == {0: 2.0, 1: 5.0}
    assert names(archive.pick(2)) == ["child", "better parent"]
    archive.update(archive.states[2], [(4.0, "grandchild")])
    assert archive.n == {0: 4, 1: 2, 2: 1}  # also the one that is gone


def test_an_update_with_several_children():
    archive = Archive([0.0])
    seed = archive.states[0]
    assert archive.update(seed, [(1.0, "x"), None, (3.0, "z"), (2.0, "y")]) == 2
    assert names(archive.states.values()) == ["s0", "z", "y"] and archive.T == 1 and archive.n == {0: 1}
    # A duplicate uses up its place, and the parent learns from children that are not archived.
    assert archive.update(seed, [(9.0, "z"), (0.5, "w"), (0.4, "v")]) == 1
    assert names(archive.states.values()) == ["s0", "z", "y", "w"] and archive.m == {0: 9.0}
    assert archive.update(seed, [None, None]) == 0 and archive.T == 3 and archive.m == {0: 9.0}


def test_trimming():
    archive = Archive([-9.0, -8.0], topk_children=2, max_size=4)
    first, second = list(archive.states.values())
    for value in (1.0, 3.0, 2.0):
        archive.update(first, [(value, f"a{value:g}")])
    for value in (0.5, 4.0):
        archive.update(second, [(value, f"b{value:g}")])
    archive.trim()
    assert names(archive.states.values()) == ["s0", "s1", "a3", "b4"]  # the best two, beside the seeds
    everything = Archive([0.0], topk_children=0, max_size=0)
    everything.update(everything.states[0], [(1.0, "x"), (2.0, "y"), (3.0, "z")])
    assert len(everything.states) == 4
    everything.trim()
    assert names(everything.states.values()) == ["s0"]


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.integers(-3, 3), min_size=1, max_size=4),
    st.lists(st.lists(st.one_of(st.none(), st.integers(-4, 9)), min_size=1, max_size=3), max_size=25),
    st.integers(1, 3),
    st.integers(1, 8),
)
def test_invariants(seeds, steps, topk, size):
    archive = Archive([float(seed) for seed in seeds], topk_children=topk, max_size=size)
    best, rollouts = {}, 0
    for values in steps:
        picks = archive.pick(2)
        assert len(picks) == 2
        first, second = picks
        if first.id != second.id:  # of other lineages
            assert first.id not in second.ancestors and second.id not in first.ancestors
        for parent, value in zip(picks, values, strict=False):
            archive.update(parent, [None if value is None else (value, str(value))])
            rollouts += 1
            if value is not None:
                best[parent.id] = max(best.get(parent.id, value), value)
        archive.trim()
    kept = list(archive.states.values())
    assert [state.row for state in kept if not state.ancestors] == list(range(len(seeds)))
    assert len(kept) <= max(size, len(seeds))
    parents = [state.ancestors[0] for state in kept if state.ancestors]
    assert all(parents.count(parent) <= topk for parent in parents)
    assert (archive.m, archive.T) == (best, rollouts)
    assert sum(archive.n.get(seed, 0) for seed in range(len(seeds))) == rollouts  # each reaches one seed
    contents = [state.content for state in kept if state.ancestors]
    assert len(set(contents)) == len(contents)
    assert all(state.row == state.ancestors[-1] for state in kept if state.ancestors)
    copy = Archive([0.0] * len(seeds), topk_children=topk, max_size=size)
    copy.load_state_dict(archive.state_dict())
    assert copy.scores() == archive.scores() and copy.pick(3) == archive.pick(3)


def test_the_highest_score_is_picked_first_whatever_the_order_of_insertion():
    generator = torch.Generator().manual_seed(0)
    archive = Archive(torch.randn(50, generator=generator).tolist())
    scores = archive.scores()
    assert [scores[state.id] for state in archive.pick(50)] == sorted(scores.values(), reverse=True)


# --------------------------------------------------------------------------------------- rendering and parsing


def test_the_default_functions():
    state, message = State(7, 0.5, 0, [0], "x = 3"), {"role": "user", "content": "Solve."}
    text = append_solution(state, {"prompt": "Solve."})
    assert text.startswith("Solve.\n\n") and "x = 3" in text and "0.5" in text
    assert append_solution(State(0, 0.0, 0), {"prompt": "Solve."}) == "Solve."
    prompt = [{"role": "system", "content": "Be good."}, message]
    found = append_solution(state, {"prompt": prompt})
    assert found[0] == prompt[0] and found[1] == {"role": "user", "content": text} and message["content"] == "Solve."
    parts = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Solve."}]}]
    found = append_solution(state, {"prompt": parts})[0]["content"]
    assert found[:2] == parts[0]["content"] and "x = 3" in found[2]["text"]
    assert reward_and_text("12", {}, 0.25) == (0.25, "12") and reward_and_text("", {}, 0.25) is None
    turns = [{"role": "assistant", "content": "1"}, {"role": "tool", "content": "2"}]
    assert reward_and_text([*turns, {"role": "assistant", "content": "3"}], {}, 1.0) == (1.0, "3")
    assert reward_and_text([], {}, 1.0) is None


# ------------------------------------------------------------------------------------------------- in a real run


def last_digit(completions, **kwargs):
    texts = [c if isinstance(c, str) else c[-1]["content"] for c in completions]
    return [float(text[-1]) if text[-1:].isdigit() else None for text in texts]


def render(state, example):
    return example["prompt"] if state.content is None else f"{state.content}+{example['extra']}="


def parse(completion, example, reward):
    assert example["extra"] == 5
    return None if reward == 3 else (-reward, completion)


class Recording(PUCTTrainer):
    def choose_prompts(self, n, generator):
        rows = super().choose_prompts(n, generator)
        self.before = self.puct_archive.state_dict()
        return rows

    def observe(self, rollouts):
        super().observe(rollouts)
        self.record = [*getattr(self, "record", []), (self.before, list(self.puct_picks), rollouts)]


@pytest.mark.parametrize("conversational", [False, True])
def test_groups_go_on_from_archived_states(conversational):
    data = arithmetic(conversational=conversational).select(range(6))
    trainer = train(Recording, data=data, rewards=last_digit, max_steps=4)
    edited = 0
    for before, picks, rollouts in trainer.record:
        archive = Archive([0.0] * 6)
        archive.load_state_dict(before)
        assert archive.pick(2) == picks
        for i, group in enumerate(rollouts.group_ids.tolist()):
            state, example = picks[group], rollouts.examples[i]
            assert rollouts.prompt_index[i] == state.row
            assert example["prompt"] == append_solution(state, data[state.row])
            assert rollouts.changed_prompt[i] == (state.content is not None)
            edited += state.content is not None
            child = None
            if not rollouts.raw_rewards[i].isnan():
                child = reward_and_text(rollouts.completions[i], example, rollouts.raw_rewards[i].item())
            archive.update(state, [child])
        archive.trim()
        after = archive.state_dict()
    assert after == trainer.puct_archive.state_dict() and after["T"] == 32
    assert edited >= 8  # solutions soon beat the seeds
    logs = trainer.state.log_history[:-1]
    best = [log["puct/best"] for log in logs if "puct/best" in log]
    assert best == sorted(best) and best[-1] == max(state["value"] for state in after["states"])
    assert logs[-1]["puct/size"] == len(after["states"]) and 0 < logs[0]["puct/valid"] <= 1


def test_own_functions_by_import_path():
    data = arithmetic().select(range(4)).add_column("extra", [5] * 4)
    trainer = train(
        Recording,
        data=data,
        rewards=last_digit,
        max_steps=3,
        puct_render=f"{__name__}:render",
        puct_parse=f"{__name__}:parse",
    )
    _, picks, rollouts = trainer.record[-1]
    assert {rollouts.examples[i]["prompt"] for i in range(8)} == {render(s, data[s.row]) for s in picks}
    found = [state for state in trainer.puct_archive.states.values() if state.ancestors]
    assert found and all(state.value <= 0 and state.value != -3 for state in found)


def test_rollouts_without_a_value_only_count():
    def hopeless(completions, **kwargs):
        return [None if i % 2 else 1.0 for i in range(len(completions))]

    trainer = build(PUCTTrainer, rewards=hopeless, max_steps=2)
    trainer.puct_parse = lambda completion, example, reward: (NAN, completion)
    trainer.train()
    archive = trainer.puct_archive
    assert archive.T == 16 and sum(archive.n.values()) == 16 and not archive.m and len(archive.states) == 24
    assert trainer.state.log_history[0]["puct/valid"] == 0


def test_seed_values_from_a_column():
    values = [0.1 * row for row in range(24)]
    data = arithmetic().select(range(24)).add_column("score", values)
    trainer = train(
        Recording, data=data, puct_value_column="score", rewards=lambda completions, **kw: [-1.0] * 8, max_steps=1
    )
    assert names(trainer.record[0][1]) == ["s23", "s22"]
    for bad, row in (([0.0] * 23 + [NAN], 23), ([1.0, None] + [0.0] * 22, 1)):
        data = arithmetic().select(range(24)).add_column("score", bad)
        with pytest.raises(ValueError, match=f"`puct_value_column` 'score' has no finite value in row {row}"):
            build(PUCTTrainer, data=data, puct_value_column="score")


def test_resuming_goes_on_with_the_same_archive(tmp_path):
    common = {"rewards": last_digit, "out": tmp_path, "max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    whole = train(PUCTTrainer, **common)
    resumed = train(PUCTTrainer, resume=str(tmp_path / "checkpoint-2"), **common)
    assert difference(whole, resumed) == 0
    assert whole.puct_archive.state_dict() == resumed.puct_archive.state_dict()


def test_evaluation_leaves_the_archive_alone():
    trainer = build(PUCTTrainer, eval_dataset=arithmetic("test").select(range(4)), per_device_eval_batch_size=8)
    trainer.evaluate()
    assert trainer.puct_archive.T == 0


def test_reuse_climbs_where_single_attempts_cannot():
    """A solution may be one digit longer than the one it starts from: only reuse reaches ten digits."""

    def climbing(base):
        class Climbing(base):
            def __init__(self, *args, **kwargs):
                super().__init__(*args, **kwargs)
                self.reached = 0

            def observe(self, rollouts):
                super().observe(rollouts)
                self.reached = max(self.reached, int(rollouts.rewards.nan_to_num(0).max()))

        return Climbing

    def render_length(state, example):
        return "1" * round(state.value) + "="

    def longer(prompts, completions, **kwargs):
        return [
            float(prompt.count("1") + text[:1].isdigit()) for prompt, text in zip(prompts, completions, strict=True)
        ]

    data = arithmetic().select(range(2)).map(lambda example: {"prompt": "="})
    common = {"data": data, "rewards": longer, "rollout_func": scripted, "max_steps": 10}
    with_reuse = build(climbing(PUCTTrainer), **common)
    with_reuse.puct_render = render_length
    with_reuse.puct_parse = lambda completion, example, reward: (reward, f"{reward}{completion}")
    with_reuse.train()
    assert with_reuse.reached == 10
    assert train(climbing(MethodTrainer), **common).reached == 1


def test_the_whole_paper():
    trainer, config = mix("ttt_discover", "puct")
    trainer = train(trainer, config, rewards=last_digit, max_steps=3, entropic_kl_coef=0.1)
    assert trainer.puct_archive.T == 24
    log = trainer.state.log_history[1]
    assert log["puct/best"] >= 1 and log["entropic/effective_size"] > 1


# -------------------------------------------------------------------------------------------------- bad input


def test_settings_out_of_range_are_named():
    for name, value in {"puct_c": -1.0, "puct_topk_children": -1, "puct_max_size": -1}.items():
        with pytest.raises(ValueError, match=f"`{name}` must be at least 0"):
            PUCTConfig("unused", use_cpu=True, bf16=False, **{name: value})


def test_bad_functions_and_columns(tmp_path, monkeypatch):
    for path, reason in {
        "nowhere": "must be an import path",
        "no_such_module:f": "could not be imported",
        "math:nothing": "has no function 'nothing'",
    }.items():
        for name in ("puct_render", "puct_parse"):
            with pytest.raises(ValueError, match=f"`{name}` .*{reason}"):
                build(PUCTTrainer, **{name: path})
    with pytest.raises(ValueError, match="`puct_value_column` is 'score', which the data set has not"):
        build(PUCTTrainer, puct_value_column="score")
    with pytest.raises(ValueError, match="every seed needs a finite value"):
        Archive([math.inf])
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [part for part in sys.path if part])
    (tmp_path / "my_puct_task.py").write_text("def render(state, example):\n    return example['prompt']\n")
    assert build(PUCTTrainer, puct_render="my_puct_task:render").puct_render.__module__ == "my_puct_task"


@pytest.mark.parametrize("other", ["dcpo", "dynamic_sampling", "knapsack_rl", "scaf_grpo", "spo"])
def test_refused_mixes(other):
    with pytest.raises(MixingError, match=r"PUCTTrainer and .* contradict each other"):
        mix("puct", other)


def test_rewards_may_be_shaped():
    """The archive holds the scores of the task, not what advantages are made of."""

    class Shaping(Recording):
        replaces = ("shape_rewards",)

        def shape_rewards(self, rollouts):
            return 100 * rollouts.reward_matrix

    trainer = train(Shaping, rewards=parity_reward, max_steps=2)
    values = {state.value for state in trainer.puct_archive.states.values()}
    assert values == {0.0, 1.0}
