import pytest
import torch
from harness import SETTINGS, build, difference, parameters, train
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import HfArgumentParser
from trl import GRPOConfig, GRPOTrainer

from trl_ext import GDPONvidiaConfig, GDPONvidiaTrainer, MethodTrainer, MixingError, mix
from trl_ext.core.rollouts import group_advantages, normalized_sum_advantages, zero_signal
from trl_ext.methods.gdpo_nvidia import gdpo_advantages, gdpo_conditioned, gdpo_token_whitening
from trl_ext.tasks import POLICY_PATH, arithmetic


NAN = float("nan")
IDS = torch.arange(2).repeat_interleave(4)
ONES = torch.ones(2, dtype=torch.float64)
REWARDS = torch.tensor([[1, 0], [1, 1], [0, 1], [0, 1], [1, 1], [0, 0], [0, 0], [0, 0]], dtype=torch.float64)
LENGTHS = torch.tensor([10, 20, 30, 40, 5, 5, 5, 5])


def is_close(found, expected):
    return found.tolist() == pytest.approx(expected, abs=1e-6)


def even(completions, **kwargs):
    return [float(sum(map(ord, text)) % 2) for text in completions]


def third(completions, **kwargs):
    return [float(sum(map(ord, text)) % 3 == 0) for text in completions]


def config(**fields):
    return GDPONvidiaConfig("unused", use_cpu=True, bf16=False, **fields)


def test_worked_example_of_two_rewards():
    last = [-0.693900] * 3
    assert is_close(gdpo_advantages(REWARDS, ONES, IDS), [-0.439899, 0.947901, -0.254001, -0.254001, 2.081700, *last])
    summed = [-0.499900, 1.499700, -0.499900, -0.499900, 1.499850, -0.499950, -0.499950, -0.499950]
    assert is_close(group_advantages(REWARDS.sum(1), IDS), summed)
    tokens = gdpo_advantages(REWARDS, ONES, IDS, "token", lengths=LENGTHS)
    assert is_close(tokens, [-0.617664, 1.457473, -0.339648, -0.339648, 3.152833, -0.997440, -0.997440, -0.997440])


def test_worked_example_of_one_reward():
    rewards, weight = torch.tensor([[1], [0], [1], [1], [1], [1], [0], [0]], dtype=torch.float64), ONES[:1]
    single = [0.499900, -1.499700, 0.499900, 0.499900, 0.865875, 0.865875, -0.865875, -0.865875]
    assert is_close(gdpo_advantages(rewards, weight, IDS), single)
    twice = [0.539996, -1.619988, 0.539996, 0.539996, 0.935326, 0.935326, -0.935326, -0.935326]
    assert is_close(normalized_sum_advantages(rewards, weight, IDS), twice)
    assert is_close(gdpo_advantages(rewards, -weight, IDS), [-a for a in single])


def test_worked_example_of_missing_rewards():
    rewards = torch.tensor([[1, NAN], [0, 1], [1, 0], [0, NAN]], dtype=torch.float64)
    ids = torch.zeros(4, dtype=torch.long)
    assert is_close(gdpo_advantages(rewards, ONES, ids, missing="zero"), [0.398089, 0.689442, 0.398089, -1.485620])
    assert is_close(gdpo_advantages(rewards, ONES, ids), [1.204469, -0.220993, 0.220993, -1.204469])


def test_worked_example_of_a_condition():
    shaped = gdpo_conditioned(REWARDS, [(1, 0, 1.0)])
    assert shaped[:, 1].tolist() == [0, 1, 0, 0, 1, 0, 0, 0] and torch.equal(shaped[:, 0], REWARDS[:, 0])
    expected = [0.209028, 1.351105, -0.780066, -0.780066, 1.713115, -0.571038, -0.571038, -0.571038]
    assert is_close(gdpo_advantages(shaped, ONES, IDS), expected)


def test_conditions_read_the_original_rewards():
    rewards = torch.tensor([[0.0, 1.0, 1.0], [1.0, 1.0, NAN], [NAN, 1.0, 1.0], [1.0, 0.0, 1.0]])
    found = gdpo_conditioned(rewards, [(1, 0, 1.0), (2, 1, 0.5)])
    # The second reward of the first row is set to 0, but the third still sees it reached; missing stays missing.
    assert torch.equal(found[:, 1], torch.tensor([0.0, 1.0, 0.0, 0.0]))
    assert torch.equal(found[:, 2].nan_to_num(nan=-1.0), torch.tensor([1.0, -1.0, 1.0, 0.0]))
    both = gdpo_conditioned(rewards, [(2, 0, 1.0), (2, 1, 0.5)])
    assert both[:, 2].nan_to_num(nan=-1.0).tolist() == [0, -1, 0, 0]
    assert gdpo_conditioned(torch.full((1, 2), 0.1), [(1, 0, 0.1)])[0, 1] == torch.tensor(0.1)  # reached in float32


def test_without_the_batch_norm_it_is_the_sum_of_group_advantages():
    weights = torch.tensor([2.0, -0.5], dtype=torch.float64)
    parts = [group_advantages(column, IDS) for column in REWARDS.unbind(1)]
    assert torch.allclose(gdpo_advantages(REWARDS, weights, IDS, "none"), 2 * parts[0] - 0.5 * parts[1])


def test_a_weight_of_zero_removes_a_column():
    weights, other = torch.tensor([1.0, 0.0], dtype=torch.float64), REWARDS.clone()
    other[:, 1] = torch.arange(8)
    assert torch.equal(gdpo_advantages(REWARDS, weights, IDS), gdpo_advantages(other, weights, IDS))
    # Such a column is no signal: the last group is flat without it.
    flat = torch.tensor([[1, 0], [0, 1], [0, 1], [0, 1], [0, 1], [0, 0], [0, 1], [0, 0]], dtype=torch.float64)
    for zero_flat, expected in ((True, True), (False, False)):
        found = gdpo_advantages(flat, weights, IDS, "token", lengths=LENGTHS, zero_flat=zero_flat)
        assert (found[4:] == 0).all() == expected


def test_only_whitening_over_tokens_touches_groups_without_a_signal():
    rewards = REWARDS.clone()
    rewards[4:] = 0.3
    assert gdpo_advantages(rewards, ONES, IDS)[4:].abs().max() < 1e-15  # the batch mean, which is 0 but for rounding
    assert (gdpo_advantages(rewards, ONES, IDS, "none")[4:] == 0).all()
    whitened = gdpo_advantages(rewards, ONES, IDS, "token", lengths=LENGTHS)
    totals = gdpo_advantages(rewards, ONES, IDS, "none", eps=1e-6)
    mean = (totals * LENGTHS).sum() / 120
    deviation = ((totals - mean) ** 2 * LENGTHS).sum() / 119
    assert mean != 0 and torch.allclose(whitened[4:], (-mean / (deviation + 1e-8).sqrt()).expand(4))
    forced = gdpo_advantages(rewards, ONES, IDS, "token", lengths=LENGTHS, zero_flat=True)
    assert (forced[4:] == 0).all() and torch.equal(forced[:4], whitened[:4])


@pytest.mark.parametrize("batch_norm", ["sequence", "token", "none"])
def test_equal_rewards_are_no_signal_whatever_their_rounding(batch_norm):
    """The mean of seven float32 tenths is not a tenth; two normalisations would make 0.3 of that."""
    rewards = torch.full((14, 2), 0.1)
    ids = torch.arange(2).repeat_interleave(7)
    found = gdpo_advantages(rewards, torch.ones(2), ids, batch_norm, lengths=torch.arange(14))
    assert (found == 0).all()


def test_whitening_ignores_unscored_rollouts_and_survives_no_tokens():
    totals = torch.tensor([1.0, -1.0, NAN, 3.0], dtype=torch.float64)
    found = gdpo_token_whitening(totals, torch.tensor([2, 3, 100, 0]))
    assert found[2].isnan()
    assert torch.equal(found[:2], gdpo_token_whitening(totals[:2], torch.tensor([2, 3])))
    repeated = totals[[0, 0, 1, 1, 1]]
    assert torch.allclose(found[:2], ((repeated - repeated.mean()) / (repeated.var() + 1e-8).sqrt())[[0, 2]])
    assert gdpo_token_whitening(totals, torch.zeros(4))[:2].isfinite().all()


values = st.one_of(st.sampled_from([0.0, 0.5, 1.0, NAN]), st.floats(-2, 2, width=32))


@settings(max_examples=100, deadline=None)
@given(st.lists(st.lists(values, min_size=3, max_size=3), min_size=1, max_size=16), st.integers(1, 5), st.data())
def test_with_the_defaults_it_is_trls_form(rows, size, data):
    rewards, ids = torch.tensor(rows), torch.arange(len(rows)) // size
    weights = torch.tensor(data.draw(st.lists(st.sampled_from([1.0, 0.5, 0.0, -1.0]), min_size=3, max_size=3)))
    found, trls = gdpo_advantages(rewards, weights, ids), normalized_sum_advantages(rewards, weights, ids)
    flat = torch.stack([zero_signal(column, ids) for column in rewards.unbind(1)], dim=1)
    inexact = (
        flat & ~rewards.isnan() & (rewards * 2 != (rewards * 2).round())
    )  # where TRL is left with a rounding error
    if not inexact.any():
        assert torch.equal(found, trls)
    assert found.isfinite().all() and (found[rewards.isnan().all(1)] == 0).all()


@settings(max_examples=50, deadline=None)
@given(
    st.lists(st.lists(values, min_size=2, max_size=2), min_size=4, max_size=16),
    st.sampled_from(["sequence", "token", "none"]),
)
def test_a_missing_reward_as_zero(rows, batch_norm):
    rewards = torch.tensor(rows, dtype=torch.float64)
    ids, lengths = torch.arange(len(rows)) // 4, torch.arange(len(rows))
    found = gdpo_advantages(rewards, ONES, ids, batch_norm, "zero", lengths=lengths)
    assert torch.equal(found, gdpo_advantages(rewards.nan_to_num(nan=0.0), ONES, ids, batch_norm, lengths=lengths))


def test_the_share_of_flat_groups_is_that_of_what_is_trained_on():
    def first(completions, **kwargs):
        return [1.0 if i % 4 == 0 else None for i in range(len(completions))]

    def varied(completions, **kwargs):
        return [float(i) for i in range(len(completions))]

    settings = {"max_steps": 1, "reward_weights": [1.0, 0.0]}
    for missing, share in {"zero": 0.0, "ignore": 1.0}.items():
        trainer = train(GDPONvidiaTrainer, rewards=[first, varied], gdpo_missing=missing, **settings)
        assert trainer.state.log_history[0]["gdpo_nvidia/flat"] == share


class TestRuns:
    SETTINGS = {"rewards": [even, third], "per_device_train_batch_size": 16, "max_steps": 2}

    def trl(self, rewards, **more):
        args = GRPOConfig("unused", **SETTINGS | {"per_device_train_batch_size": 16, "max_steps": 2}, **more)
        trainer = GRPOTrainer(POLICY_PATH, rewards, args, arithmetic().select(range(24)))
        trainer.train()
        return trainer

    def test_defaults_are_trls_normalize_then_sum(self):
        more = {"reward_weights": [1.0, 0.5]}
        plain = self.trl([even, third], multi_objective_aggregation="normalize_then_sum", **more)
        ours = train(GDPONvidiaTrainer, **self.SETTINGS, **more)
        assert difference(ours, plain) == 0.0
        assert difference(train(MethodTrainer, **self.SETTINGS, **more), plain) > 0

    def test_one_reward_function_is_plain_grpo(self):
        settings = {**self.SETTINGS, "rewards": third}
        assert difference(train(GDPONvidiaTrainer, **settings), self.trl(third)) == 0.0
        assert difference(train(GDPONvidiaTrainer, gdpo_batch_norm="token", **settings), self.trl(third)) > 0

    def test_condition_and_whitening(self):
        class Checking(GDPONvidiaTrainer):
            def observe(self, rollouts):
                super().observe(rollouts)
                raw, shaped = rollouts.reward_matrix, rollouts.shaped
                assert torch.equal(shaped[:, 0], raw[:, 0])
                assert torch.equal(shaped[:, 1], raw[:, 1] * (raw[:, 0] >= 1))
                lengths, weights = rollouts.mask.sum(1), torch.ones(2)
                expected = gdpo_advantages(shaped, weights, rollouts.group_ids, "token", lengths=lengths)
                assert torch.equal(rollouts.advantages, expected)
                self.gdpo_changed = getattr(self, "gdpo_changed", 0) + int((shaped != raw).sum())

        trainer = train(Checking, gdpo_condition=[("third", "even", 1)], gdpo_batch_norm="token", **self.SETTINGS)
        log = trainer.state.log_history[0]
        assert trainer.gdpo_changed > 0 and 0 < log["gdpo_nvidia/conditioned"] < 1 and "gdpo_nvidia/flat" in log
        assert all(p.isfinite().all() for p in parameters(trainer).values())

    def test_missing_rewards(self):
        def none(completions, **kwargs):
            return [None if i % 4 == 0 else float(i % 4 == 1) for i in range(len(completions))]

        settings = {**self.SETTINGS, "rewards": [even, none]}
        ignoring, filling = (train(GDPONvidiaTrainer, gdpo_missing=m, **settings) for m in ("ignore", "zero"))
        assert difference(ignoring, filling) > 0


def test_conditions_are_given_as_tuples_text_or_indices():
    rules = {"a": [("third", "even", 0.5)], "b": ["third:even:0.5"], "c": [(1, 0, 0.5)], "d": ["1:0:.5"]}
    for condition in rules.values():
        assert build(GDPONvidiaTrainer, rewards=[even, third], gdpo_condition=condition).gdpo_rules == [(1, 0, 0.5)]
    parser = HfArgumentParser(GDPONvidiaConfig)
    argv = ["--output_dir", "x", "--use_cpu", "--bf16", "false", "--gdpo_condition", "third:even:0.5", "a:b:-1"]
    (args,) = parser.parse_args_into_dataclasses(argv)
    assert args.gdpo_condition == [("third", "even", 0.5), ("a", "b", -1.0)]
    (args,) = parser.parse_dict({"output_dir": "x", "use_cpu": True, "bf16": False, "gdpo_condition": [["a", 1, 2]]})
    assert args.gdpo_condition == [("a", 1, 2.0)]
    assert config(gdpo_condition=args.gdpo_condition).gdpo_condition == args.gdpo_condition


def test_bad_input():
    fields = {"gdpo_batch_norm": "typo", "gdpo_missing": "typo", "gdpo_eps": 0.0}
    for name, value in fields.items():
        with pytest.raises(ValueError, match=f"`{name}` must be"):
            config(**{name: value})
    for rule in ("third:even", ("third", "even"), "third:even:high", ("third", "even", NAN), (0.5, 1, 1.0), 3):
        with pytest.raises(ValueError, match="`gdpo_condition` must be a list of"):
            config(gdpo_condition=[rule])
    for rule, message in (
        ("thrid:even:1", "'thrid', which there is not: choose one of 'even', 'third', or an index below 2"),
        ((1, 2, 0.5), "2, which there is not"),
        ((-1, 0, 0.5), "-1, which there is not"),
    ):
        with pytest.raises(ValueError, match=f"`gdpo_condition` names the reward function {message}"):
            build(GDPONvidiaTrainer, rewards=[even, third], gdpo_condition=[rule])
    with pytest.raises(ValueError, match="'even', which is the name of several"):
        build(GDPONvidiaTrainer, rewards=[even, even], gdpo_condition=["even:0:1"])
    with pytest.warns(UserWarning, match="`scale_rewards` is 'none', which has no effect"):
        build(GDPONvidiaTrainer, rewards=[even, third], scale_rewards="none")


def test_rewards_that_are_already_summed_are_refused():
    class Summing(MethodTrainer):
        replaces = ("shape_rewards",)

        def shape_rewards(self, rollouts):
            return rollouts.raw_rewards

    trainer, args = mix("gdpo_nvidia", Summing)
    for condition in ([], ["third:even:1"]):
        with pytest.raises(ValueError, match=r"one column per reward function, .* returned their sum"):
            train(trainer, args, rewards=[even, third], gdpo_condition=condition)
    with pytest.raises(MixingError, match="both replace `compute_advantages`"):
        mix("gdpo_nvidia", "bnpo")
