import pytest
import torch
from harness import arithmetic, build, train
from hypothesis import given, settings
from hypothesis import strategies as st

from trl_ext import MixingError, VADEConfig, VADETrainer, mix
from trl_ext.core.prompts import make_generator, top_rows
from trl_ext.methods.vade import information_gain, vade_draws, vade_posterior_means, vade_update


def tensor(*values):
    return torch.tensor(values, dtype=torch.float64)


def test_worked_scores():
    found = information_gain(tensor(0.13, 0.32, 0.90, 1 / 3))
    assert found.tolist() == pytest.approx([0.098397, 0.147968, 0.009000, 0.148148], abs=1e-6)
    assert information_gain(tensor(0.5, 1.0), "variance").tolist() == [0.25, 0.0]


def test_worked_generation():
    """The numeric example of the paper's main figure, whose misprint 1.998 is 0.1998."""
    alpha, beta, draws = tensor(0.1, 2.7, 9.0), tensor(8.4, 5.3, 0.2), tensor(0.13, 0.32, 0.90)
    rows = top_rows(information_gain(draws), 2)
    assert rows.tolist() == [0, 1]
    alpha, beta = vade_update(alpha, beta, rows, torch.tensor([1, 4]), torch.tensor([7, 4]))
    assert alpha.tolist() == pytest.approx([1.02, 4.54, 8.991], abs=1e-6)
    assert beta.tolist() == pytest.approx([8.68, 5.06, 0.1998], abs=1e-6)
    assert vade_posterior_means(alpha, beta).tolist() == pytest.approx([0.172650, 0.477586, 0.892787], abs=1e-6)


def test_draws_are_those_of_the_posterior():
    alpha, beta = tensor(0.0, 3.0, 20.0).repeat(20_000), tensor(0.0, 1.0, 60.0).repeat(20_000)
    draws = vade_draws(alpha, beta, make_generator(0, "test")).view(-1, 3)
    for i, (a, b) in enumerate([(1, 1), (4, 2), (21, 61)]):
        mean, variance = a / (a + b), a * b / ((a + b) ** 2 * (a + b + 1))
        assert draws[:, i].mean().item() == pytest.approx(mean, abs=5 * (variance / 20_000) ** 0.5)
        assert draws[:, i].var().item() == pytest.approx(variance, rel=0.05)
    again = vade_draws(alpha, beta, make_generator(0, "test"))
    assert torch.equal(draws.flatten(), again)


@settings(max_examples=50, deadline=None)
@given(
    st.lists(st.tuples(st.floats(0, 50), st.floats(0, 50)), min_size=1, max_size=8), st.floats(0, 1), st.floats(0, 1)
)
def test_evidence_decays_once_per_generation(counts, fast, slow):
    alpha, beta = torch.tensor(counts, dtype=torch.float64).T
    rows = torch.arange(0, len(alpha), 2)
    nothing = torch.zeros(len(rows))
    for before, after in zip((alpha, beta), vade_update(alpha, beta, rows, nothing, nothing, fast, slow), strict=True):
        assert torch.equal(after[::2], fast * before[::2]) and torch.equal(after[1::2], slow * before[1::2])


def test_the_estimate_converges_and_follows_a_drift():
    """Visited every time with 8 rollouts, the evidence is 8 / (1 - 0.2) = 10, so the posterior mean scatters by about
    sqrt(p(1-p) / 13) around a value that the prior draws to 1/2 by a sixth."""
    generator, rows = torch.Generator().manual_seed(0), torch.arange(500)
    alpha = beta = torch.zeros(500, dtype=torch.float64)
    for rate in [0.2] * 10 + [0.8] * 5:
        successes = torch.binomial(torch.full((500,), 8.0), torch.full((500,), rate), generator=generator)
        alpha, beta = vade_update(alpha, beta, rows, successes, 8 - successes)
        expected = (10 * rate + 1) / 12
    assert (alpha + beta).mean().item() == pytest.approx(10, rel=1e-3)
    means = vade_posterior_means(alpha, beta)
    assert means.mean().item() == pytest.approx(expected, abs=0.01)
    assert means.std().item() < (0.16 / 13) ** 0.5
    # Not visited for 1 / (1 - 0.999) generations, two thirds of it are forgotten.
    nobody = torch.zeros(0, dtype=torch.long)
    for _ in range(1000):
        alpha, beta = vade_update(alpha, beta, nobody, nobody, nobody)
    assert (alpha + beta).mean().item() == pytest.approx(10 / torch.e, rel=0.01)


# -------------------------------------------------------------------------------------------------- in the trainer


def is_easy(prompt):
    return prompt[0] in "13579"


def easy_or_hard(prompts, completions, **kwargs):
    """Easy prompts are always solved, the others one time in four."""
    return [1.0 if is_easy(prompt) else float(i % 4 == 0) for i, prompt in enumerate(prompts)]


def halves():
    """Six easy prompts and six others."""
    prompts = arithmetic()["prompt"]
    rows = [[row for row, prompt in enumerate(prompts) if is_easy(prompt) == easy][:6] for easy in (True, False)]
    return arithmetic().select(rows[0] + rows[1])


def test_solved_prompts_are_left_alone():
    data = halves()
    trainer = train(VADETrainer, data=data, rewards=easy_or_hard, max_steps=20, max_completion_length=8)
    solved = torch.tensor(list(map(is_easy, data["prompt"])))
    visits = trainer.vade_visits.double()
    assert visits.sum() == 40 and visits[~solved].mean() > 3 * visits[solved].mean()
    rates = vade_posterior_means(trainer.vade_alpha, trainer.vade_beta)
    assert rates[solved & (visits > 0)].min() > 0.7 and rates[~solved & (visits > 1)].max() < 0.5
    table = trainer.prompt_table()
    assert table["vade/visits"].tolist() == visits.tolist()


def test_greedy_and_uniform_shares():
    data = arithmetic().select(range(12))
    settings = {"data": data, "rewards": lambda completions, **kw: [0.0] * len(completions), "max_steps": 1}
    greedy = train(VADETrainer, vade_selection="greedy", **settings)
    assert greedy.vade_visits.nonzero().flatten().tolist() == [0, 1]  # equal scores: the lower rows
    trainer = build(VADETrainer, vade_selection="greedy", vade_uniform_fraction=0.5, data=data)
    chosen = {tuple(trainer.choose_prompts(4, make_generator(0, i)).tolist()) for i in range(50)}
    assert all(rows[:2] == (0, 1) and len(set(rows)) == 4 for rows in chosen)
    assert {row for rows in chosen for row in rows} == set(range(12))


def test_a_prompt_chosen_twice_is_updated_once():
    data = arithmetic().select(range(2))
    rewards = lambda completions, **kw: [float(i % 4 == 0) for i in range(len(completions))]  # noqa: E731
    trainer = train(
        VADETrainer, data=data, rewards=rewards, per_device_train_batch_size=12, max_steps=2, vade_init=1.0
    )
    assert sorted((trainer.vade_alpha + trainer.vade_beta).tolist())[0] < 12
    assert trainer.vade_visits.tolist() == [2, 2]  # three groups of two prompts a generation
    assert trainer.vade_alpha.sum() == pytest.approx(3 + 0.2 * (3 + 0.2 * 2))


def test_unscored_prompts_count_as_not_chosen():
    trainer = train(
        VADETrainer, rewards=lambda completions, **kw: [None] * len(completions), vade_init=1.0, max_steps=2
    )
    assert trainer.vade_alpha.tolist() == pytest.approx([0.999**2] * 24) and not trainer.vade_visits.any()


def test_an_answer_that_was_cut_off_is_a_failure():
    settings = {"rewards": lambda completions, **kw: [1.0] * len(completions), "max_completion_length": 1}
    settings |= {"temperature": 3.0, "max_steps": 1}
    trainer = train(VADETrainer, vade_init=1.0, **settings)
    seen = trainer.vade_visits > 0
    assert seen.any() and (trainer.vade_beta[seen] > trainer.vade_alpha[seen]).all()
    masked = train(VADETrainer, vade_init=1.0, mask_truncated_completions=True, **settings)
    assert (masked.vade_beta <= 1).all()  # not counted at all


def test_bad_input():
    for name, value in {
        "vade_lambda_selected": 1.1,
        "vade_lambda_unselected": -0.1,
        "vade_score": "gain",
        "vade_selection": "best",
        "vade_init": -1.0,
        "vade_uniform_fraction": 1.0,
    }.items():
        with pytest.raises(ValueError, match=f"`{name}` must be"):
            VADEConfig("unused", use_cpu=True, bf16=False, **{name: value})
    with pytest.raises(MixingError, match=r"VADETrainer does not look at `prompt_weights`, which SPOTrainer provides"):
        mix("vade", "spo")
