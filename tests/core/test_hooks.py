"""Every hook does what its docstring says, inside real training steps."""

import pytest
import torch
from datasets import Dataset
from harness import arithmetic, build, difference, parameters, scripted, train
from peft import LoraConfig
from trl import GRPOConfig, GRPOTrainer

from trl_ext import MethodConfig, MethodTrainer
from trl_ext.core import Requests


def method(**namespace):
    """A method class made of some hooks."""
    replaces = tuple(name for name in namespace if name not in ("needs", "observe", "regularizers", "whole_groups"))
    body = {"replaces": namespace.pop("replaces", replaces), "config_class": MethodConfig, **namespace}
    return type("FakeTrainer", (MethodTrainer,), body)


class Recorder(MethodTrainer):
    """Keeps what `observe` sees and every micro-batch that is trained on."""

    config_class = MethodConfig

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.seen, self.batches = [], []

    def observe(self, rollouts):
        super().observe(rollouts)
        self.seen.append(rollouts)

    def _compute_loss(self, model, inputs):
        self.batches.append(inputs)
        return super()._compute_loss(model, inputs)


def recording(**namespace):
    return type("RecordingFake", (method(**namespace), Recorder), {})


# ------------------------------------------------------------------------------------------- prompts and budgets


def test_chosen_prompts_are_trained_on():
    trainer = train(recording(choose_prompts=lambda self, n, generator: torch.tensor([5, 1])))
    for rollouts in trainer.seen:
        assert rollouts.prompt_index.tolist() == [5] * 4 + [1] * 4
        assert rollouts.group_ids.tolist() == [0] * 4 + [1] * 4
    decoded = trainer.processing_class.batch_decode(trainer.seen[0].prompt_ids, skip_special_tokens=True)
    assert decoded == [trainer.train_dataset["prompt"][5]] * 4 + [trainer.train_dataset["prompt"][1]] * 4


def test_a_data_set_smaller_than_a_generation_is_repeated_where_prompts_are_chosen():
    data = arithmetic().select(range(2))
    for chooser in (
        {"choose_prompts": lambda self, n, generator: torch.tensor([1, 0, 0, 1])},
        {"prompt_weights": lambda self: torch.ones(2)},
        {"prompt_weights": lambda self: None},
    ):
        trainer = train(recording(**chooser), data=data, per_device_train_batch_size=16)
        assert trainer.state.global_step == 3
        assert {row for rollouts in trainer.seen for row in rollouts.prompt_index.tolist()} == {0, 1}


def test_weights_decide_which_prompts_are_drawn():
    weights = torch.zeros(24)
    weights[[3, 7]] = 1.0
    trainer = train(recording(prompt_weights=lambda self: weights))
    assert {row for rollouts in trainer.seen for row in rollouts.prompt_index.tolist()} == {3, 7}


def test_unequal_budgets():
    trainer = train(recording(prompt_budgets=lambda self, rows: torch.tensor([7, 1])), rollout_func=scripted)
    for rollouts in trainer.seen:
        large = rollouts.group_ids == 0
        assert large.sum() == 7
        group = rollouts.rewards[large]
        expected = (group - group.mean()) / (group.std() + 1e-4)
        assert torch.allclose(rollouts.advantages[large], expected) and rollouts.advantages[~large] == 0
    # Rows are spread over the processes, in another order each time.
    assert len({tuple(rollouts.group_ids.tolist()) for rollouts in trainer.seen}) > 1
    assert list(trainer._logs["advantages"]) == trainer.seen[-1].advantages.tolist()
    flat = [rollouts.rewards[rollouts.group_ids == 0].unique().numel() == 1 for rollouts in trainer.seen]
    zero = [value * 7 / 8 + 1 / 8 for value in flat]
    assert [log["frac_reward_zero_std"] for log in trainer.state.log_history[:-1]] == pytest.approx(zero)


def test_a_budget_of_zero_drops_the_prompt():
    trainer = train(recording(prompt_budgets=lambda self, rows: torch.tensor([8, 0])))
    assert all(rollouts.group_ids.unique().tolist() == [0] for rollouts in trainer.seen)


@pytest.mark.parametrize(
    ("hook", "answer", "message"),
    [
        ("choose_prompts", torch.tensor([0, 24]), "between 0 and 23"),
        ("choose_prompts", torch.tensor([0]), r"must return 2 rows"),
        ("prompt_budgets", torch.tensor([4, 3]), "sum 8"),
        ("prompt_budgets", torch.tensor([9, -1]), "at least 0"),
        ("select_rollouts", torch.ones(3, dtype=torch.bool), r"shape \(8,\)"),
        ("pick_rollouts", torch.tensor([0, 1]), "must return 8 positions"),
    ],
)
def test_wrong_answers_are_named(hook, answer, message):
    hooks = {hook: lambda self, *args: answer}
    if hook == "pick_rollouts":
        hooks["more_rollouts"] = lambda self, scored, rounds: None
    with pytest.raises(ValueError, match=message):
        train(method(**hooks))


# ------------------------------------------------------------------------------------------------- extra rounds


def test_no_further_round_is_trl_exactly():
    trainer = train(method(more_rollouts=lambda self, scored, rounds: None), num_iterations=2)
    assert difference(trainer, train(GRPOTrainer, GRPOConfig, num_iterations=2)) == 0.0


def test_extra_rounds():
    rounds = []

    def more(self, scored, number):
        rounds.append((number, len(scored)))
        if number < 3:
            return Requests(torch.tensor([9, 9, 9]), torch.tensor([50, 50, 50]))
        return None

    def pick(self, scored):
        return torch.tensor([0, 1, 2, 3, 8, 9, 10, 13])

    trainer = train(recording(more_rollouts=more, pick_rollouts=pick), max_steps=2, rollout_func=scripted)
    assert rounds == [(1, 8), (2, 11), (3, 14)] * 2
    for rollouts in trainer.seen:
        assert len(rollouts.everything) == 14 and len(rollouts) == 8
        assert rollouts.prompt_index[4:].tolist() == [9] * 4
        assert rollouts.group_ids[4:].tolist() == [50] * 4
        rewards = rollouts.everything.raw_rewards[torch.tensor([0, 1, 2, 3, 8, 9, 10, 13])]
        assert torch.equal(rollouts.rewards, rewards)
    assert trainer.state.log_history[0]["num_rollouts"] == 14
    # The completions that are trained on are those that were scored.
    texts = trainer.processing_class.batch_decode(trainer.seen[-1].completion_ids, skip_special_tokens=True)
    assert texts == trainer.seen[-1].completions
    assert [float(sum(map(ord, text)) % 2) for text in texts] == trainer.seen[-1].rewards.tolist()


def test_changed_prompts_are_trained_on_and_rewarded_as_the_original():
    asked = []

    def reward(prompts, completions, **kwargs):
        asked.append(list(prompts))
        return [float(len(text) % 2) for text in completions]

    def more(self, scored, number):
        if number > 1:
            return None
        return Requests(torch.tensor([2]), torch.tensor([0]), prompts=["hint:1+1="])

    def pick(self, scored):
        return torch.tensor([8, 1, 2, 3, 4, 5, 6, 7])

    trainer = train(recording(more_rollouts=more, pick_rollouts=pick), max_steps=1, rewards=reward)
    rollouts = trainer.seen[0]
    decoded = trainer.processing_class.batch_decode(rollouts.prompt_ids, skip_special_tokens=True)
    assert decoded[0] == "hint:1+1=" and rollouts.changed_prompt.tolist() == [True] + [False] * 7
    assert asked[1] == [trainer.train_dataset["prompt"][2]]


# ------------------------------------------------------------------------------------------- rewards, advantages


def test_shaped_rewards_reach_the_advantages_and_not_the_logs():
    trainer = train(recording(shape_rewards=lambda self, rollouts: 10 - rollouts.raw_rewards), scale_rewards="none")
    plain = train(MethodTrainer, max_steps=1, scale_rewards="none")
    rollouts = trainer.seen[0]
    assert torch.equal(rollouts.rewards, 10 - rollouts.raw_rewards)
    assert trainer.state.log_history[0]["reward"] == plain.state.log_history[0]["reward"]
    groups = rollouts.rewards.view(2, 4)
    assert torch.equal(rollouts.advantages, (groups - groups.mean(1, keepdim=True)).flatten())


def test_logged_advantages_are_those_trained_on():
    trainer = train(recording(compute_advantages=lambda self, rollouts: torch.arange(8.0)))
    assert list(trainer._logs["advantages"]) == list(range(8))
    assert sorted(trainer.batches[-1]["advantages"].tolist()) == list(range(8))


def test_advantages_per_token():
    def per_token(self, rollouts):
        advantages = MethodTrainer.compute_advantages(self, rollouts)[rollouts.local]
        return advantages.unsqueeze(1).expand(rollouts.mask.shape).clone()

    trainer = train(method(compute_advantages=per_token))
    plain = train(MethodTrainer)
    assert difference(trainer, plain) == 0.0
    assert list(trainer._logs["advantages"]) == pytest.approx(list(plain._logs["advantages"]))


def test_evaluation_reads_and_never_writes():
    calls = {"observe": 0, "more_rollouts": 0, "select_rollouts": 0}

    class Counting(MethodTrainer):
        config_class = MethodConfig

        def observe(self, rollouts):
            super().observe(rollouts)
            calls["observe"] += 1

        def more_rollouts(self, scored, rounds):
            calls["more_rollouts"] += 1
            return super().more_rollouts(scored, rounds)

        def select_rollouts(self, rollouts):
            calls["select_rollouts"] += 1
            return super().select_rollouts(rollouts)

    trainer = build(Counting, eval_dataset=arithmetic("test").select(range(4)), per_device_eval_batch_size=8)
    trainer.evaluate()
    assert not any(calls.values()) and trainer._generation == 0
    trainer.train()
    assert all(count == 3 for count in calls.values())


# ------------------------------------------------------------------------------------------------------ selection


KEPT = torch.tensor([1, 0, 1, 1, 0, 0, 1, 0], dtype=torch.bool)


def one_sgd_step(trainer_class, **settings):
    """Parameters' change in one step of plain SGD with rate 1, hence minus the gradient."""
    before = parameters(build(trainer_class, **settings))
    settings = {"max_steps": 1, "optim": "sgd", "learning_rate": 1.0, "max_grad_norm": 0.0, **settings}
    trainer = train(trainer_class, rollout_func=scripted, **settings)
    after = parameters(trainer)
    return trainer, {name: before[name] - after[name] for name in before}


def gradient_by_hand(trainer, rollouts, token_mask, loss_type):
    """Of the on-policy loss over the tokens in `token_mask`, written down from its definition."""
    model = build(MethodTrainer).model
    ids = torch.cat([rollouts.prompt_ids, rollouts.completion_ids], dim=1)
    attention = torch.cat([rollouts.prompt_mask, rollouts.completion_mask], dim=1)
    logits = model(ids, attention_mask=attention).logits[:, rollouts.prompt_ids.shape[1] - 1 : -1]
    logps = logits.log_softmax(-1).gather(2, rollouts.completion_ids.unsqueeze(2)).squeeze(2)
    terms = -rollouts.advantages.unsqueeze(1) * logps * token_mask
    rows = token_mask.any(1)
    if loss_type == "dapo":
        loss = terms.sum() / token_mask.sum()
    elif loss_type == "grpo":
        loss = (terms.sum(1)[rows] / token_mask.sum(1)[rows]).mean()
    else:
        loss = terms.sum() / (rows.sum() * trainer.max_completion_length)
    loss.backward()
    return {name: p.grad for name, p in model.named_parameters()}


@pytest.mark.parametrize("loss_type", ["dapo", "grpo", "dr_grpo"])
@pytest.mark.parametrize("split", [{}, {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}])
@pytest.mark.parametrize("own_pipeline", [False, True])
def test_dropped_rollouts_leave_the_batch_and_the_normaliser(loss_type, split, own_pipeline):
    hooks = {"select_rollouts": lambda self, rollouts: KEPT}
    if own_pipeline:
        hooks["log_ratio"] = lambda self, tokens: tokens.logps - tokens.old_logps
    trainer, change = one_sgd_step(recording(**hooks), loss_type=loss_type, **split)
    rollouts = trainer.seen[0]
    assert rollouts.advantages[KEPT].abs().sum() > 0
    expected = gradient_by_hand(trainer, rollouts, rollouts.mask * KEPT.unsqueeze(1), loss_type)
    for name, gradient in expected.items():
        assert torch.allclose(change[name], gradient, atol=1e-6), name
    rows = sum(len(batch["advantages"]) for batch in trainer.batches)
    assert rows == 4  # half of the forward and backward pass is saved


@pytest.mark.parametrize("loss_type", ["dapo", "grpo", "dr_grpo"])
def test_masked_tokens_leave_the_normaliser(loss_type):
    def mask(self, rollouts):
        keep = torch.ones_like(rollouts.mask)
        keep[:, 0] = 0
        keep[2] = 0
        return keep

    trainer, change = one_sgd_step(recording(token_mask=mask), loss_type=loss_type)
    rollouts = trainer.seen[0]
    expected = gradient_by_hand(trainer, rollouts, rollouts.mask * mask(trainer, rollouts), loss_type)
    for name, gradient in expected.items():
        assert torch.allclose(change[name], gradient, atol=1e-6), name


def test_keeping_everything_is_trl_exactly():
    everything = method(select_rollouts=lambda self, rollouts: torch.ones(8, dtype=torch.bool))
    assert difference(train(everything), train(MethodTrainer)) < 1e-7


def test_dropping_everything_changes_nothing():
    nothing = method(select_rollouts=lambda self, rollouts: torch.zeros(8, dtype=torch.bool))
    assert difference(train(nothing), build(MethodTrainer)) == 0.0


def test_token_masks_refuse_terms_that_they_would_mask_too():
    masking = method(token_mask=lambda self, rollouts: None)
    for name, value in {"beta": 0.1, "entropy_coef": 0.1, "use_adaptive_entropy": True}.items():
        with pytest.raises(ValueError, match=f"`{name}`"):
            build(masking, **{name: value})


def test_whole_groups_stay_together():
    trainer = train(
        recording(whole_groups=True, replaces=()), steps_per_generation=4, max_steps=12, per_device_train_batch_size=4
    )
    orders = set()
    for start in range(0, 12, 4):
        groups = [batch["group_ids"].unique().tolist() for batch in trainer.batches[start : start + 4]]
        assert all(len(group) == 1 for group in groups) and len({group[0] for group in groups}) == 4
        orders.add(tuple(group[0] for group in groups))
    assert len(orders) > 1  # still shuffled
    with pytest.raises(ValueError, match="per_device_train_batch_size"):
        build(method(whole_groups=True, replaces=()), per_device_train_batch_size=2, steps_per_generation=2)


# ------------------------------------------------------------------------------------------------------- the loss


def test_clip_ranges_and_weights_that_change_nothing():
    def bounds(self, tokens):
        low, high = MethodTrainer.clip_range(self, tokens)
        return torch.full_like(tokens.logps, low), torch.full_like(tokens.logps, high)

    settings = {"num_iterations": 3, "max_steps": 6, "learning_rate": 1e-2}
    plain = train(MethodTrainer, **settings)
    assert difference(train(method(clip_range=bounds), **settings), plain) < 1e-6
    ones = method(token_weights=lambda self, tokens: torch.ones_like(tokens.logps))
    assert difference(train(ones, **settings), plain) == 0.0


def test_a_clip_range_acts():
    closed = method(clip_range=lambda self, tokens: (1.0, torch.ones_like(tokens.logps)))
    settings = {"num_iterations": 3, "max_steps": 6, "learning_rate": 1e-2}
    assert difference(train(closed, **settings), train(MethodTrainer, **settings)) > 1e-4
    with pytest.raises(ValueError, match="lower bound"):
        train(closed, loss_type="cispo")


def test_weight_zero_stops_the_gradient():
    nothing = method(token_weights=lambda self, tokens: torch.zeros_like(tokens.logps))
    assert difference(train(nothing), build(MethodTrainer)) == 0.0


@pytest.mark.parametrize("split", [{}, {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}])
def test_regularizers_are_added_logged_and_independent_of_the_split(split):
    class Regularized(MethodTrainer):
        config_class = MethodConfig

        def regularizers(self, tokens):
            weight = next(p for p in self.model.parameters() if p.requires_grad)
            return super().regularizers(tokens) | {"fake/term": 0.5 * (weight**2).sum()}

    _, without = one_sgd_step(MethodTrainer, **split)
    trainer, change = one_sgd_step(Regularized, **split)
    start = parameters(build(MethodTrainer))
    name = next(iter(start))
    assert torch.allclose(change[name] - without[name], start[name], atol=1e-5)
    assert trainer.state.log_history[0]["fake/term"] == pytest.approx(0.5 * (start[name] ** 2).sum().item())


class Needy(Recorder):
    @classmethod
    def needs(cls, args):
        return {"old_logps", "entropies"}


def scoring_passes(cls, config, **settings):
    """Forward passes without gradient that compute log-probabilities, and the trainer."""
    passes = []
    trainer = build(cls, config, max_steps=1, **settings)

    def count(module, args, kwargs):
        if "labels" in kwargs:
            passes.append(torch.is_grad_enabled())

    trainer.model.register_forward_pre_hook(count, with_kwargs=True)
    trainer.train()
    return passes.count(False), trainer


@pytest.mark.parametrize(("settings", "theirs", "ours"), [({}, 0, 1), ({"num_iterations": 2}, 1, 1)])
def test_needs_cost_at_most_one_pass(settings, theirs, ours):
    assert scoring_passes(GRPOTrainer, GRPOConfig, **settings)[0] == theirs
    count, trainer = scoring_passes(Needy, MethodConfig, **settings)
    assert count == ours
    rollouts = trainer.seen[0]
    mask = rollouts.mask.bool()
    assert (rollouts.entropies[mask] > 0).any() and (rollouts.old_logps[mask] < 0).all()
    assert difference(trainer, train(MethodTrainer, max_steps=1, **settings)) == 0.0


def test_a_reference_that_does_not_exist_is_named():
    with pytest.raises(ValueError, match="`beta`"):
        build(method(needs=classmethod(lambda cls, args: {"ref_logps"}), replaces=()))


# ---------------------------------------------------------------------------------------------- outside of a step


def test_score_prompts_leaves_no_trace():
    class Scoring(MethodTrainer):
        config_class = MethodConfig

        def prepare(self):
            super().prepare()
            self.scores = [self.score_prompts(torch.tensor([3, 1, 4]), 5) for _ in range(2)]

    trainer, plain = train(Scoring), train(MethodTrainer)
    assert difference(trainer, plain) == 0.0
    assert trainer.scores[0].shape == (3, 5, 1) and trainer.scores[0].isfinite().all()
    assert not torch.equal(*trainer.scores)
    assert torch.equal(train(Scoring).scores[1], trainer.scores[1])
    for a, b in zip(trainer.state.log_history[:-1], plain.state.log_history[:-1], strict=True):
        drop = ("step_time", "num_rollouts", "num_tokens")
        assert {k: v for k, v in a.items() if k not in drop} == {k: v for k, v in b.items() if k not in drop}
    assert trainer.state.log_history[0]["num_rollouts"] == plain.state.log_history[0]["num_rollouts"] + 32


def test_samples_are_measured_by_row():
    trainer = build(MethodTrainer, rewards=[lambda completions, **kw: [float(len(c)) for c in completions]] * 2)
    tokenizer, rows = trainer.processing_class, torch.tensor([6, 2, 9])

    def measure(row, samples):
        prompt = tokenizer.decode(samples[0].prompt_ids)
        assert all(tokenizer.decode(s.completion_ids, skip_special_tokens=True) == s.completion for s in samples)
        assert [s.truncated for s in samples] == [s.completion_ids[-1] != tokenizer.eos_token_id for s in samples]
        assert [s.rewards for s in samples] == [[len(s.completion)] * 2 for s in samples]
        return row, prompt, len(samples), sum(s.rewards[0] for s in samples)

    for n in (3, 11):  # 11 samples of a row come from several chunks of 8
        rewards, measured = trainer.score_prompts(rows, n, measure=measure)
        assert [found[:3] for found in measured] == [(r, trainer.train_dataset["prompt"][r], n) for r in (6, 2, 9)]
        assert [found[3] for found in measured] == rewards[:, :, 0].sum(1).tolist()
    assert trainer.score_prompts(rows, 0, measure=lambda row, samples: (row, samples))[1][2] == (9, [])


def test_score_prompts_scores_the_right_rows():
    def length_of_prompt(prompts, completions, **kwargs):
        return [float(len(prompt)) for prompt in prompts]

    data = Dataset.from_dict({"prompt": ["1" * n for n in range(1, 25)], "answer": ["1"] * 24})
    trainer = build(MethodTrainer, data=data, rewards=length_of_prompt)
    assert trainer.score_prompts(torch.tensor([6, 2]), 3)[:, :, 0].tolist() == [[7.0] * 3, [3.0] * 3]
    other = Dataset.from_dict({"prompt": ["12345"]})
    assert trainer.score_prompts(torch.tensor([0]), 2, dataset=other).tolist() == [[[5.0], [5.0]]]
    assert trainer.score_prompts(torch.tensor([0]), 0).shape == (1, 0, 1)


def test_sequence_logps_are_those_of_the_policy():
    trainer = build(MethodTrainer)
    prompts, completions = [[5, 6, 7], [8]] * 5, [[9, 10], [11, 12, 13]] * 5
    found = trainer.sequence_logps(prompts, completions)
    for prompt, completion, logps in zip(prompts, completions, found, strict=True):
        logits = trainer.model(torch.tensor([prompt + completion])).logits[0, len(prompt) - 1 : -1]
        expected = logits.log_softmax(-1)[range(len(completion)), completion]
        assert torch.allclose(logps, expected, atol=1e-5)


# ------------------------------------------------------------------------------------------------------ bad input


def test_bad_rewards_are_named():
    def infinite(completions, **kwargs):
        return [float("inf")] * len(completions)

    def short(completions, **kwargs):
        return [1.0]

    with pytest.raises(ValueError, match=r"'infinite'.*infinite reward"):
        train(MethodTrainer, rewards=infinite)
    with pytest.raises(ValueError, match=r"'short' returned 1 rewards, but 8"):
        train(MethodTrainer, rewards=short)


def test_bad_construction_is_named():
    with pytest.raises(ValueError, match=r"`num_generations` is 1"):
        build(MethodTrainer, num_generations=1)
    with pytest.raises(ValueError, match=r"3 rows, but one generation takes 4 prompts"):
        build(MethodTrainer, data=arithmetic().select(range(3)), steps_per_generation=2)
    with pytest.raises(TypeError, match=r"must be a MethodConfig|must be a FakeConfig"):
        MethodTrainer("unused", args=object())
    stream = arithmetic().to_iterable_dataset()
    with pytest.raises(ValueError, match=r"IterableDataset.*prompt_weights"):
        build(method(prompt_weights=lambda self: None), data=stream)
    with pytest.raises(TypeError, match="needs names"):
        build(method(needs=classmethod(lambda cls, args: {"typo"}), replaces=()))


def test_streams_still_train_without_a_sampler():
    stream = arithmetic().select(range(24)).to_iterable_dataset()
    assert difference(train(MethodTrainer, data=stream), train(GRPOTrainer, GRPOConfig, data=stream)) == 0.0


# --------------------------------------------------------------------------------------------- edited examples


def shouting(self, examples, group_ids):
    for example, group in zip(examples, group_ids.tolist(), strict=True):
        if group % 2:
            example["prompt"] = "9+9="
        example["note"] = group
    return examples


@pytest.mark.parametrize("rounds", [False, True])
def test_edited_examples_are_what_is_answered_and_scored(rounds):
    scored = []

    def reward(prompts, completions, note, log_extra, **kwargs):
        scored.extend(zip(prompts, note, strict=True))
        log_extra("seconds", [0.5 + n for n in note])
        return [float(i % 2) for i in range(len(prompts))]

    more = {"more_rollouts": lambda self, scored, rounds: None} if rounds else {}
    data = arithmetic().select(range(24))
    trainer = train(recording(edit_examples=shouting, **more), rewards=reward, max_steps=1, data=data)
    (rollouts,) = trainer.seen
    assert [note for _, note in scored] == [0] * 4 + [1] * 4
    decoded = trainer.processing_class.batch_decode(rollouts.prompt_ids, skip_special_tokens=True)
    assert decoded[4:] == ["9+9="] * 4 and "9+9=" not in decoded[:4] and decoded == [prompt for prompt, _ in scored]
    assert rollouts.changed_prompt.tolist() == [False] * 4 + [True] * 4
    assert trainer.train_dataset["prompt"] == arithmetic().select(range(24))["prompt"]
    # Columns of the data set, of the edit and of the reward function.
    assert rollouts.column("note") == [0] * 4 + [1] * 4
    assert rollouts.column("seconds") == [0.5] * 4 + [1.5] * 4
    assert list(trainer._logs["extra"]["seconds"]) == [0.5] * 4 + [1.5] * 4
    assert len(rollouts.column("answer")) == 8
    with pytest.raises(ValueError, match=r"no column 'weight'.*'answer'.*'seconds'"):
        rollouts.column("weight")


def test_an_edit_keeps_the_number_of_examples():
    with pytest.raises(ValueError, match="edit_examples must return 8 examples, got 7"):
        train(recording(edit_examples=lambda self, examples, group_ids: examples[1:]))


# ------------------------------------------------------------------------------------------ KL weight, hidden states


def test_the_kl_weight_is_the_methods():
    settings = {"num_iterations": 2, "max_steps": 4}
    weak = train(method(kl_weight=lambda self, tokens: 0.3), beta=0.9, **settings)
    assert difference(weak, train(MethodTrainer, beta=0.3, **settings)) == 0.0
    falling = train(method(kl_weight=lambda self, tokens: 0.9 - 0.3 * tokens.step), beta=0.9, **settings)
    assert difference(falling, weak) > 1e-6
    with pytest.raises(ValueError, match="`beta` 0 TRL makes no reference model"):
        build(method(kl_weight=lambda self, tokens: 0.3))


@pytest.mark.parametrize("lora", [False, True])
def test_hidden_states_give_the_log_probabilities(lora):
    found = []

    class Looking(MethodTrainer):
        @classmethod
        def needs(cls, args):
            return {"hidden_states", "old_logps"}

        def compare(self, hidden_states, ids, logps, mask):
            logits = self.head_logits(hidden_states) / self.temperature
            gap = logits.log_softmax(-1).gather(2, ids.unsqueeze(2)).squeeze(2) - logps
            found.append((gap * mask).abs().max().item())

        def regularizers(self, tokens):
            assert not tokens.hidden_states.requires_grad
            self.compare(tokens.hidden_states, tokens.token_ids, tokens.logps, tokens.mask)
            return super().regularizers(tokens)

        def observe(self, rollouts):
            super().observe(rollouts)
            parts = rollouts.prompt_ids, rollouts.prompt_mask, rollouts.completion_ids, rollouts.completion_mask
            hidden_states = self.completion_hidden_states(*parts)
            self.compare(hidden_states, rollouts.completion_ids, rollouts.old_logps, rollouts.mask)

    settings = {"peft_config": LoraConfig(target_modules=["q_proj"])} if lora else {}
    train(Looking, temperature=0.7, **settings)
    assert len(found) == 6 and max(found) < 1e-5
