import asyncio
import hashlib
import itertools
import math

import pytest
import torch
from harness import arithmetic, build, difference, scripted, train
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer
from trl import TrlParser

from trl_ext import MethodTrainer, MixingError, ReSTGRPOConfig, ReSTGRPOTrainer, mix
from trl_ext.core.prompts import make_generator
from trl_ext.methods.rest_grpo import (
    build_rest_dataset,
    continue_prompt,
    continuing_template,
    rest_cut,
    rest_draw_count,
    rest_draw_probabilities,
    rest_draws,
    rest_prefixes,
    rest_reward,
    rest_statistics,
)
from trl_ext.tasks import POLICY_PATH


NAN = math.nan
SOLUTION = "def f():\n    x=1\n\n    return x\n\n"


def statistics_of(*groups):
    values = torch.tensor(list(itertools.chain(*groups)), dtype=torch.float64)
    ids = torch.arange(len(groups)).repeat_interleave(torch.tensor([len(group) for group in groups]))
    return rest_statistics(values, ids)


# --------------------------------------------------------------------------------------------- the worked examples


def test_worked_example_of_a_kept_prompt():
    rewards = [0, 0.2, 1, 0.5, 0.9]
    std, best = statistics_of(rewards)
    assert std.item() == pytest.approx(0.386782, abs=1e-6) and best.item() == 2
    assert rest_prefixes(SOLUTION) == [
        "def f():\n",
        "def f():\n    x=1\n",
        "def f():\n    x=1\n\n",
        "def f():\n    x=1\n\n    return x\n",
    ]
    expected = [0.269551, 0.256073, 0.243270, 0.231106]
    assert rest_draw_probabilities(4).tolist() == pytest.approx(expected, abs=1e-6) and rest_draw_count(4, 0.5) == 2
    items = build_rest_dataset(torch.tensor([rewards]).double(), [["", "", SOLUTION, "", ""]])
    assert items[0] == (0, "") and len(items) == 3
    assert all(row == 0 and partial in rest_prefixes(SOLUTION) for row, partial in items[1:])


def test_worked_example_of_dropped_prompts_and_one_without_prefixes():
    rewards = torch.tensor([[0, 0, 0, 0, 0.1], [1, 1, 1, 1, 1], [0.4, 0.5, 0.3, 0.2, 0.1]], dtype=torch.float64)
    assert rest_statistics(rewards.flatten(), torch.arange(3).repeat_interleave(5))[0].tolist() == pytest.approx(
        [0.04, 0, 0.141421], abs=1e-6
    )
    assert build_rest_dataset(rewards, [SOLUTION] * 3) == [(2, "")]
    assert build_rest_dataset(rewards, [SOLUTION] * 3, n_sub=0) == [(0, ""), (1, ""), (2, "")]


@pytest.mark.parametrize(("length", "count", "expected"), [(5, 3, 2.8975), (20, 10, 8.8238), (50, 25, 15.8320)])
def test_worked_expected_lengths(length, count, expected):
    mean = (torch.arange(1, length + 1) * rest_draw_probabilities(length)).sum().item()
    assert mean == pytest.approx(expected, abs=5e-5) and rest_draw_count(length, 0.5) == count
    drawn = torch.cat([rest_draws(length, 0.5, 0.95, make_generator(0, "test", i)) for i in range(2000)])
    assert len(drawn) == 2000 * count and (drawn + 1.0).mean().item() == pytest.approx(expected, rel=0.02)


# ------------------------------------------------------------------------------------------------------ its parts


def test_unscored_samples_have_no_part():
    std, best = statistics_of([NAN, 0, 1, NAN, 1], [NAN, 1], [NAN, NAN], [0.5], [0.1] * 7)
    assert std[0] == pytest.approx(math.sqrt(2 / 9)) and std[1:4].isnan().all() and std[4] == 0
    assert best.tolist() == [2, 1, -1, 0, 0]
    rewards = torch.tensor([[NAN, 0, 1], [NAN, NAN, 1], [NAN, NAN, NAN]])
    found = build_rest_dataset(rewards, [["a", "b", "c"]] * 3, std_threshold=0.0)
    assert found == [(0, ""), (0, "c\n")]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.lists(st.one_of(st.just(NAN), st.floats(-2, 2)), min_size=1, max_size=6), min_size=1, max_size=4))
def test_statistics_are_their_definition(groups):
    stds, bests = statistics_of(*groups)
    for group, std, best in zip(groups, stds.tolist(), bests.tolist(), strict=True):
        scored = [value for value in group if not math.isnan(value)]
        if len(scored) < 2:
            assert math.isnan(std)
        else:
            mean = sum(scored) / len(scored)
            assert std == pytest.approx(math.sqrt(sum((v - mean) ** 2 for v in scored) / len(scored)), abs=1e-9)
        assert best == (group.index(max(scored)) if scored else -1)


def test_thresholds_are_reached_by_equality_also_in_single_precision():
    rewards = torch.tensor([[0.9, 0.8], [0.9, 0.9 - 0.0999]], dtype=torch.float32)
    assert build_rest_dataset(rewards, ["x", "x"], n_sub=1) == [(0, ""), (0, "x\n")]  # 0.05 and 0.9


def test_beginnings():
    for empty in ("", "  \n\n "):
        assert rest_prefixes(empty) == []
    assert rest_prefixes("one line") == ["one line\n"] and rest_prefixes("one line", drop_full=True) == []
    assert rest_prefixes("\na") == ["\n", "\na\n"]
    assert rest_prefixes("a</s>b</s>", "</s>") == ["a</s>", "a</s>b</s>"]
    assert rest_prefixes("A. B. C", ". ", drop_full=True) == ["A. ", "A. B. "]
    assert build_rest_dataset(torch.tensor([[0.0, 1.0]]), ["\n"], n_sub=3) == [(0, "")]


def test_numbers_of_draws():
    assert [rest_draw_count(4, n) for n in (1, 1.0, 7, "all", 0, 0.3)] == [1, 4, 7, 4, 0, 2]
    assert rest_draw_count(10, 0.1) == 1 and rest_draw_count(3, 1 / 3) == 1  # no more for a rounding error
    assert rest_draws(3, "all").tolist() == [0, 1, 2] and rest_draws(0, 5).tolist() == []
    assert len(rest_draws(2, 9, 0.5, make_generator(0, "test"))) == 9


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.text("ab \n", max_size=12), min_size=1, max_size=5),
    st.sampled_from([1, 3, 0.5, 1.0, "all"]),
    st.booleans(),
    st.integers(0, 5),
)
def test_items_are_prompts_and_beginnings_of_their_best_solutions(texts, n_sub, drop_full, seed):
    rewards = torch.tensor([[0.0, 1.0]] * len(texts))
    solutions = [["wrong", text] for text in texts]
    items = build_rest_dataset(rewards, solutions, n_sub=n_sub, drop_full=drop_full, seed=seed)
    assert items == build_rest_dataset(rewards, texts, n_sub=n_sub, drop_full=drop_full, seed=seed)
    assert [row for row, partial in items if not partial] == list(range(len(texts)))
    for row, text in enumerate(texts):
        mine = [partial for i, partial in items if i == row and partial]
        lines = len(text.rstrip().split("\n")) - drop_full if text.strip() else 0
        assert len(mine) == (rest_draw_count(lines, n_sub) if lines else 0)
        for partial in mine:
            assert (text.rstrip() + "\n").startswith(partial) and partial.endswith("\n")
    # What a prompt draws does not depend on the others.
    alone = build_rest_dataset(rewards[-1:], texts[-1:], [len(texts) - 1], n_sub=n_sub, drop_full=drop_full, seed=seed)
    assert alone == [item for item in items if item[0] == len(texts) - 1]


def test_iterations_draw_anew():
    rewards, text = torch.tensor([[0.0, 1.0]]), "\n".join("abcdefghijklmnopqrst")
    found = {tuple(build_rest_dataset(rewards, [text], iteration=i)) for i in range(5)}
    assert len(found) == 5


# --------------------------------------------------------------------------------------------------------- rewards


def test_cutting_at_stop_strings():
    assert rest_cut("a END b STOP", ["STOP", "END"]) == ("a ", 7)
    assert rest_cut("aENDING", ["END", "ENDING"]) == ("a", 3) and rest_cut("aENDING", ["ENDING", "END"]) == ("a", 0)
    assert rest_cut("abc", ["x"]) == ("abc", None) and rest_cut("abc") == ("abc", None)


def test_rewards_of_whole_solutions():
    seen = []

    def verifier(completions, prompts, answer, **kwargs):
        seen.append((completions, prompts, answer, sorted(kwargs)))
        return [None if text == "none" else 0.5 for text in completions]

    reward = rest_reward(verifier, ["#"])
    prompts, answers = ["p u1", "p", "p"], [1, 2, 3]
    found = reward(
        prompts=prompts,
        completions=["v#1234", "none", "w"],
        partial_state=["u1", "", None],
        answer=answers,
        trainer_state=None,
    )
    assert found == [pytest.approx(0.5 + 1e-3 - 4e-6, abs=1e-9), None, 0.5] and reward.__name__ == "verifier"
    assert seen == [(["u1v", "none", "w"], ["p ", "p", "p"], answers, ["trainer_state"])]
    user, turn = {"role": "user", "content": "p"}, {"role": "assistant", "content": "v#"}
    found = reward(
        prompts=[[user, {"role": "assistant", "content": "u"}], [user]],
        completions=[[turn], [turn]],
        partial_state=["u", ""],
        answer=[1, 2],
    )
    assert [len(prompt) for prompt in seen[-1][1]] == [1, 1] and len(found) == 2
    assert [completion[0]["content"] for completion in seen[-1][0]] == ["uv", "v"] and turn["content"] == "v#"


def test_a_verifier_that_fails():
    def strict(completions, answer, **kwargs):
        return [int(text) / part for text, part in zip(completions, answer, strict=True)]

    async def slow(completions, answer, **kwargs):
        return strict(completions, answer)

    calls = {"completions": ["4#", "x#ab", "6"], "answer": [4, 1, 0], "prompts": ["p"] * 3}
    expected = pytest.approx([1 + 1e-3, 1e-3 - 2e-6, 0.0])
    with pytest.warns(UserWarning, match="the reward function 'strict' failed .*ValueError"):
        assert rest_reward(strict, ["#"])(**calls) == expected
    with pytest.warns(UserWarning, match="'slow' failed .*ZeroDivisionError"):
        assert asyncio.run(rest_reward(slow, ["#"])(**calls)) == expected


# --------------------------------------------------------------------------------------------------- conversations


@pytest.mark.parametrize("ending", ["", "\n", "{% if true %}x{% endif %}\n", "\n\n"])
def test_a_conversation_goes_on_in_the_last_turn(ending):
    tokenizer = AutoTokenizer.from_pretrained(POLICY_PATH)
    template = tokenizer.chat_template + ending
    prompt = [{"role": "system", "content": "Add."}, {"role": "user", "content": "1+2="}]

    def render(messages, template, **kwargs):
        kwargs = {"add_generation_prompt": True, "tokenize": False} | kwargs
        return tokenizer.apply_chat_template(messages, chat_template=template, **kwargs)

    changed, plain = continuing_template(template), render(prompt, template)
    assert render(prompt, changed) == plain
    assert render(continue_prompt(prompt, "3\n"), changed) == plain + "3\n"
    assert render(continue_prompt(continue_prompt(prompt, "3\n"), " 4"), changed) == plain + "3\n 4"
    parts = [{"role": "assistant", "content": [{"type": "text", "text": "3"}]}]
    assert render(continue_prompt(prompt + parts, "4"), changed) == plain + "34"
    assert render(continue_prompt(prompt, "3"), template) != plain + "3"  # a new turn
    whole = continue_prompt(prompt, "3")
    assert render(whole, changed, add_generation_prompt=False) == render(whole, template, add_generation_prompt=False)
    assert len(prompt) == 2 and continue_prompt(prompt, "") is prompt


# --------------------------------------------------------------------------------------------------- in a real run

DIGITS = "2718"


def one_digit_right(prompts, trainer):
    """Writes up to four lines; each is right about half of the time, and a wrong one spoils the solution."""
    tokenizer = trainer.processing_class
    state = scripted(prompts, trainer)["completion_ids"]
    completions = []
    for prompt, ids in zip(prompts, state, strict=True):
        done = prompt.count("\n")
        bits = hashlib.sha256(repr(ids).encode()).digest()[0]
        lines = [DIGITS[i] if bits >> i & 1 else "0" for i in range(done, 4)]
        completions.append([*tokenizer("\n".join(lines))["input_ids"], tokenizer.eos_token_id])
    return {"prompt_ids": tokenizer(list(prompts))["input_ids"], "completion_ids": completions, "logprobs": None}


def all_lines(completions, **kwargs):
    """Share of the lines that are right, up to the first wrong one."""
    scores = []
    for text in completions:
        lines = text.rstrip("\n").split("\n") if text else []
        right = len(list(itertools.takewhile(lambda pair: pair[0] == pair[1], zip(lines, DIGITS, strict=False))))
        scores.append(float(right == 4 == len(lines)))
    return scores


class Watching(ReSTGRPOTrainer):
    def observe(self, rollouts):
        super().observe(rollouts)
        self.rest_seen = [*getattr(self, "rest_seen", []), (self.rest_iteration, list(self.rest_picks), rollouts)]


LINES = {
    "rewards": all_lines,
    "rollout_func": one_digit_right,
    "rest_num_samples": 16,
    "max_steps": 12,
    "max_completion_length": 9,
}


def test_groups_go_on_from_beginnings_where_rewards_vary_more():
    data = arithmetic().select(range(8))
    trainer = train(Watching, data=data, **LINES)
    items = [item for item in trainer.rest_items if item[1]]
    assert items and all("".join(f"{digit}\n" for digit in DIGITS).startswith(partial) for _, partial in items)
    rewards = {False: [], True: []}
    seen = {}
    for iteration, picks, rollouts in trainer.rest_seen:
        for i, group in enumerate(rollouts.group_ids.tolist()):
            partial, example, row = picks[group], rollouts.examples[i], int(rollouts.prompt_index[i])
            assert example["prompt"] == data[row]["prompt"] + partial and example["partial_state"] == partial
            assert rollouts.changed_prompt[i] == bool(partial)
            whole = partial + rollouts.completions[i]
            assert rollouts.raw_rewards[i] == all_lines([whole])[0]
            rewards[bool(partial)].append(rollouts.raw_rewards[i].item())
        seen.setdefault(iteration, []).extend((int(rollouts.prompt_index[4 * g]), p) for g, p in enumerate(picks))
    mean = {key: sum(values) / len(values) for key, values in rewards.items()}
    assert mean[True] > mean[False] + 0.1
    assert set(seen) == {1, 2} and len(seen[1]) % 2 == 0
    log = trainer.state.log_history[0]
    assert log["rest_grpo/iteration"] == 1 and 0 < log["rest_grpo/prefixed"] < 1
    assert 1 <= log["rest_grpo/prefix_length"] <= 4 and 0 < log["rest_grpo/kept"] <= 1
    assert len(seen[1]) in (log["rest_grpo/items"], log["rest_grpo/items"] - 1)  # one pass, without the odd one
    assert trainer.rollouts_spent == 12 * 8 + 2 * 8 * 16
    table = trainer.prompt_table()["rest_grpo/items"]
    assert table.sum() == len(trainer.rest_items) and len(table) == 8


def test_prompts_whose_rewards_do_not_vary_are_never_trained_on():
    data = arithmetic().select(range(6))
    good = {data[row]["prompt"] for row in (1, 4)}

    def reward(prompts, completions, **kwargs):
        return [float(p in good and i % 2) for i, p in enumerate(prompts)]

    trainer = train(Watching, data=data, rewards=reward, max_steps=3, rest_accept_threshold=math.inf)
    assert trainer.rest_items == [(1, ""), (4, "")] and trainer.rest_iteration == 2
    for _, _, rollouts in trainer.rest_seen:
        assert sorted(rollouts.prompt_index[::4].tolist()) == [1, 4] and not rollouts.changed_prompt.any()
    assert trainer.state.log_history[0]["rest_grpo/kept"] == pytest.approx(1 / 3)


def test_the_policy_goes_on_with_a_conversation():
    """On the trainer's own engine: the tokens of the prompt are those of the prompt, then of the beginning."""

    def reward(completions, **kwargs):
        texts = [completion[0]["content"] for completion in completions]
        return [float(i % 2 and text.strip() != "") for i, text in enumerate(texts)]

    data = arithmetic(conversational=True).select(range(4))
    trainer = train(Watching, data=data, rewards=reward, max_steps=4)
    tokenizer, checked = trainer.processing_class, 0
    for _, picks, rollouts in trainer.rest_seen:
        for i, group in enumerate(rollouts.group_ids.tolist()):
            ids = rollouts.prompt_ids[i][rollouts.prompt_mask[i].bool()].tolist()
            text = tokenizer.apply_chat_template(
                data[int(rollouts.prompt_index[i])]["prompt"], add_generation_prompt=True, tokenize=False
            )
            assert tokenizer.decode(ids) == text + picks[group]
            checked += bool(picks[group])
    assert checked >= 8


def test_a_beginning_that_the_data_set_brings():
    data = arithmetic().select(range(4))
    data = data.map(lambda row: {"prompt": row["prompt"] + "so:", "partial_state": "so:"})
    seen = []

    def reward(prompts, completions, **kwargs):
        seen.extend(zip(prompts, completions, strict=True))
        return [float(i % 2) for i in range(len(completions))]

    trainer = train(Watching, data=data, rewards=reward, max_steps=2)
    assert all(prompt.endswith("=") and text.startswith("so:") for prompt, text in seen)
    for _, picks, rollouts in trainer.rest_seen:
        for i, group in enumerate(rollouts.group_ids.tolist()):
            assert rollouts.examples[i]["partial_state"] == "so:" + picks[group]
    assert any(partial for _, partial in trainer.rest_items)


def test_a_reward_function_may_take_beginnings_itself():
    seen = []

    def reward(completions, partial_state=None, **kwargs):
        seen.append(partial_state)
        return [float(i % 2) for i in range(len(completions))]

    trainer = train(Watching, rewards=reward, data=arithmetic().select(range(2)), max_steps=2, rest_iterations=1)
    assert trainer.reward_funcs == [reward]
    assert [part is None for part in seen][-2:] == [False, False] and seen[0] is None
    picked = [picks[g] for _, picks, rollouts in trainer.rest_seen for g in rollouts.group_ids.tolist()]
    assert list(itertools.chain(*seen[-2:])) == picked


def test_stop_strings_in_training():
    def reward(completions, **kwargs):
        assert not any("1" in text for text in completions)
        return [float(i % 2) for i in range(len(completions))]

    trainer = train(Watching, rewards=[reward, reward], rest_stop_strings=["1"], max_steps=2, rest_stop_bonus=0.25)
    found = 0
    for _, _, rollouts in trainer.rest_seen:
        for i, text in enumerate(rollouts.completions):
            first, second = rollouts.reward_matrix[i].tolist()
            after = len(text) - text.find("1") - 1
            assert first - second == pytest.approx(0.25 - 1e-6 * after if "1" in text else 0.0, abs=1e-7)
            found += "1" in text
    assert found and not any("1" in partial for _, partial in trainer.rest_items)


def test_resuming_inside_an_iteration_does_not_sample_again(tmp_path):
    common = {**LINES, "out": tmp_path, "max_steps": 5, "save_strategy": "steps", "save_steps": 2}
    common["data"] = arithmetic().select(range(8))
    whole = train(ReSTGRPOTrainer, **common)
    resumed = train(ReSTGRPOTrainer, resume=str(tmp_path / "checkpoint-2"), **common)
    assert difference(whole, resumed) == 0 and whole.method_state() == resumed.method_state()
    assert resumed._score_calls == whole._score_calls == whole.rest_iteration
    assert resumed.rollouts_spent == whole.rollouts_spent


def test_without_beginnings_nothing_is_sampled():
    data = {"data": arithmetic().select(range(8)), "max_steps": 3}
    trainer = train(ReSTGRPOTrainer, rest_n_sub=0, **data)
    assert trainer.rollouts_spent == 24 and trainer.rest_iteration == 0
    assert difference(trainer, train(MethodTrainer, **data)) == 0


# ------------------------------------------------------------------------------------------------------- bad input


def test_settings_out_of_range_are_named():
    wrong = {
        "rest_std_threshold": [-0.1, math.inf],
        "rest_accept_threshold": [NAN],
        "rest_n_sub": [-1, 0.0, 1.5, True, "some", None],
        "rest_decay": [0.0, 1.0],
        "rest_num_samples": [1],
        "rest_iterations": [0],
        "rest_prefix_unit": [""],
        "rest_stop_strings": [["a", ""]],
        "rest_stop_bonus": [-1.0],
        "rest_trailing_penalty": [-1.0],
        "rest_max_prompt_length": [0],
        "rest_on_empty": ["ignore"],
    }
    for name, values in wrong.items():
        for value in values:
            with pytest.raises(ValueError, match=f"`{name}` must be"):
                ReSTGRPOConfig("unused", use_cpu=True, bf16=False, **{name: value})


@pytest.mark.parametrize(("text", "value"), [("1", 1), ("1.0", 1.0), ("0.25", 0.25), ("all", "all")])
def test_numbers_of_draws_on_the_command_line(text, value):
    arguments = ["--output_dir", "unused", "--use_cpu", "true", "--bf16", "false", "--rest_n_sub", text]
    (args,) = TrlParser(ReSTGRPOConfig).parse_args_and_config(arguments)
    assert args.rest_n_sub == value and type(args.rest_n_sub) is type(value)


def test_nothing_left_to_train_on():
    data = arithmetic().select(range(4))
    constant = {"data": data, "rewards": lambda completions, **kwargs: [0.5] * len(completions), "max_steps": 1}
    with pytest.raises(ValueError, match=r"dropped all 4 prompts in iteration 1: .* `rest_std_threshold` \(0.05\)"):
        train(ReSTGRPOTrainer, **constant)
    with pytest.warns(UserWarning, match="so all of them are trained on"):
        trainer = train(ReSTGRPOTrainer, rest_on_empty="unfiltered", **constant)
    assert trainer.rest_items == [(row, "") for row in range(4)]


def test_long_prompts_are_left_out():
    data = arithmetic().select(range(8))
    limit = max(map(len, data["prompt"])) + 2
    common = {**LINES, "data": data, "max_steps": 1}
    limited, everything = (train(ReSTGRPOTrainer, rest_max_prompt_length=n, **common) for n in (limit, None))
    fitting = [(row, partial) for row, partial in everything.rest_items if len(data[row]["prompt"] + partial) <= limit]
    assert limited.rest_items == fitting and any(partial for _, partial in fitting)
    assert len(fitting) < len(everything.rest_items)
    with pytest.raises(ValueError, match="`rest_max_prompt_length` is 1, and"):
        train(ReSTGRPOTrainer, rest_max_prompt_length=1, **common)


class HasTools(MethodTrainer):
    """A trainer with tools, which the embedded policy's chat template does not know."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.tools = [len]


class WithTools(ReSTGRPOTrainer, HasTools):
    config_class = ReSTGRPOConfig


def test_what_cannot_be_cut_is_refused():
    with pytest.raises(ValueError, match="`rest_prefix_unit` cuts a solution that the policy writes alone"):
        build(WithTools)

    def partly_external(prompts, trainer):
        output = scripted(prompts, trainer)
        output["env_mask"] = [[int(i != 1) for i in range(len(ids))] for ids in output["completion_ids"]]
        return output

    def reward(completions, **kwargs):
        return [float(i % 2) for i in range(len(completions))]

    settings = {"rewards": reward, "rollout_func": partly_external, "max_steps": 1}
    with pytest.raises(ValueError, match=r"`env_mask`.*set `rest_accept_threshold` to infinity"):
        train(ReSTGRPOTrainer, **settings)
    assert train(ReSTGRPOTrainer, rest_accept_threshold=math.inf, **settings).state.global_step == 1


@pytest.mark.parametrize("other", ["dcpo", "dynamic_sampling", "gvm", "knapsack_rl", "scaf_grpo", "spo"])
def test_refused_mixes(other):
    with pytest.raises(MixingError, match=r"ReSTGRPOTrainer and .* contradict each other"):
        mix("rest_grpo", other)
