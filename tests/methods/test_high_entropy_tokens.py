import math

import pytest
import torch
from harness import build, difference, train
from hypothesis import given, settings
from hypothesis import strategies as st

from trl_ext import HighEntropyTokensConfig, HighEntropyTokensTrainer, MethodTrainer, mix
from trl_ext.core.loss import aggregate, clipped_loss, renormalised_selection
from trl_ext.methods.high_entropy_tokens import high_entropy_mask


pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


def f64(*values):
    return torch.tensor(values, dtype=torch.float64)


ENTROPIES = f64([0.1, 2.0, 0.3, 0.05, 1.2], [0.7, 0.0, 0.9, 3.0, 0.2])
MASK = f64([1, 1, 1, 1, 1], [1, 1, 1, 1, 0])
SELECTED = [[0, 1], [1, 3]]


def test_worked_example():
    selected, threshold = high_entropy_mask(ENTROPIES, MASK)
    assert selected.nonzero().tolist() == SELECTED and threshold == 2.0
    log_ratio = f64([0.1], [-0.1]).expand(2, 5).clone().requires_grad_()
    per_token = clipped_loss(log_ratio, f64([1.0], [-1.0]).expand(2, 5), 0.8, 1.28)
    ours = aggregate(per_token * renormalised_selection(selected, MASK, "bnpo"), MASK, "bnpo", 0, 0, 0)
    trls = aggregate(per_token * selected, MASK, "bnpo", 0, 0, 0)
    for loss, value, slopes in ((ours, -0.100167, [-0.552585, 0.452419]), (trls, -0.022259, [-0.122797, 0.100537])):
        (gradient,) = torch.autograd.grad(loss, log_ratio, retain_graph=True)
        assert loss.item() == pytest.approx(value, abs=1e-6)
        assert gradient[selected].tolist() == pytest.approx(slopes, abs=1e-6)
        assert (gradient[~selected] == 0).all()


def test_worked_example_of_ties():
    entropies = f64(0, 0, 0, 0, 1, 1, 1, 1, 1, 1)
    mask = torch.ones(10)
    assert high_entropy_mask(entropies, mask, 0.2)[0].nonzero().flatten().tolist() == [4, 5]
    assert high_entropy_mask(entropies, mask, 0.2, "threshold")[0].sum() == 6


@pytest.mark.parametrize(
    ("n", "ratio", "count"),
    # 100 * 0.07 is a little above 7, so that `math.ceil` says 8; a fraction below 1e-4 is dropped.
    [(100, 0.07, 7), (7, 0.3, 3), (9, 0.2, 2), (1, 0.2, 1), (3, 1e-6, 1), (5, 1.0, 5), (10_000, 0.200000001, 2000)],
)
def test_number_of_selected_tokens(n, ratio, count):
    entropies = torch.randn(n, generator=torch.Generator().manual_seed(0)).abs()
    assert high_entropy_mask(entropies, torch.ones(n), ratio)[0].sum() == count


def test_without_any_token_nothing_is_selected():
    selected, threshold = high_entropy_mask(ENTROPIES, torch.zeros(2, 5))
    assert not selected.any() and threshold.isnan()
    assert (renormalised_selection(selected, torch.zeros(2, 5), "bnpo") == 0).all()


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.sampled_from([0.0, 0.5, 1.0, 2.0]), st.booleans()), min_size=1, max_size=24),
    st.floats(0.01, 1.0),
)
def test_the_selected_tokens_are_the_highest(cells, ratio):
    entropies, mask = f64(*(value for value, _ in cells)), torch.tensor([keep for _, keep in cells])
    selected, threshold = high_entropy_mask(entropies.masked_fill(~mask, torch.nan), mask, ratio)
    assert not (selected & ~mask).any()
    if not mask.any():
        return
    # By sorting (descending entropy, position) in plain Python.
    order = sorted(mask.nonzero().flatten().tolist(), key=lambda i: (-cells[i][0], i))
    count = max(1, int(len(order) * ratio + 0.9999))
    assert selected.nonzero().flatten().tolist() == sorted(order[:count])
    assert threshold == cells[order[count - 1]][0]
    above, _ = high_entropy_mask(entropies.masked_fill(~mask, torch.nan), mask, ratio, "threshold")
    assert above.tolist() == (mask & (entropies >= threshold)).tolist()


def explicit_loss(per_token, selected, mask, loss_type):
    """The reductions with the selected tokens only, as if there were no others."""
    rows = [row[keep] for row, keep in zip(per_token, selected & mask.bool(), strict=True)]
    if loss_type in ("grpo", "sapo"):
        return sum(row.mean() if len(row) else 0.0 for row in rows) / len(rows)
    if loss_type == "dr_grpo":
        return sum(row.sum() for row in rows) / (len(rows) * 7)
    if loss_type == "luspo":
        return sum(row.sum() for row in rows) / len(rows)
    return torch.cat(rows).mean()


@pytest.mark.parametrize("loss_type", ["grpo", "sapo", "bnpo", "dapo", "cispo", "vespo", "dr_grpo", "luspo"])
def test_dropped_tokens_leave_the_normaliser(loss_type):
    generator = torch.Generator().manual_seed(1)
    per_token = torch.randn(4, 7, generator=generator, dtype=torch.float64)
    mask = (torch.arange(7) < torch.tensor([[7], [4], [3], [0]])).double()
    selected = torch.rand(4, 7, generator=generator) < 0.5
    selected[2] = False  # a row without selected tokens
    weights = renormalised_selection(selected, mask, loss_type)
    assert weights.dtype == torch.float64 and (weights[~(selected & mask.bool())] == 0).all()
    # A generation of this micro-batch alone, for which the estimate of `dapo` is exact.
    loss = aggregate(per_token * weights, mask, loss_type, mask.sum(), 4.0, 7)
    assert loss.item() == pytest.approx(explicit_loss(per_token, selected, mask, loss_type).item(), abs=1e-12)


@pytest.mark.parametrize("loss_type", ["grpo", "bnpo", "dr_grpo"])
def test_one_selection_after_another_is_their_intersection(loss_type):
    generator = torch.Generator().manual_seed(2)
    mask = (torch.arange(9) < torch.tensor([[9], [5], [7]])).double()
    first, second = (torch.rand(3, 9, generator=generator) < 0.7 for _ in range(2))
    inner = renormalised_selection(first, mask, loss_type)
    outer = renormalised_selection(second, mask * first, loss_type)
    assert torch.allclose(inner * outer, renormalised_selection(first & second, mask, loss_type))


def test_totals_of_several_processes():
    """Two processes with 6 and 2 tokens, of which 1 and 2 are selected: the mean of their losses is the whole's."""
    losses, masks = (f64([1, 2, 3, 4, 5, 6]), f64([7, 8])), (torch.ones(1, 6), torch.ones(1, 2))
    picks = (torch.tensor([[0, 0, 1, 0, 0, 0]]).bool(), torch.ones(1, 2).bool())
    parts = []
    for values, mask, pick in zip(losses, masks, picks, strict=True):
        weights = renormalised_selection(pick, mask, "bnpo", (mask.sum(), torch.tensor(3 / 2)))
        parts.append(aggregate(values * weights, mask, "bnpo", 0, 0, 0))
    assert sum(parts).item() / 2 == pytest.approx((3 + 7 + 8) / 3)


# Completions that differ, so that the selected tokens have a signal.
LIVELY = {"per_device_train_batch_size": 16, "max_completion_length": 8, "temperature": 2.0}


class Recording(HighEntropyTokensTrainer):
    def token_weights(self, tokens):
        weights = super().token_weights(tokens)
        self.record = [*getattr(self, "record", []), (tokens, weights)]
        return weights


@pytest.mark.parametrize("loss_type", ["bnpo", "grpo", "dapo"])
def test_the_run_follows_the_equations(loss_type):
    trainer = train(Recording, loss_type=loss_type, het_ratio=0.3, max_steps=4, **LIVELY)
    for (tokens, weights), log in zip(trainer.record, trainer.state.log_history, strict=False):
        mask = tokens.mask.bool()
        count = max(1, int(int(mask.sum()) * 0.3 + 0.9999))
        chosen = weights > 0
        assert chosen.sum() == count and not (chosen & ~mask).any()
        assert tokens.entropies[chosen].min() >= tokens.entropies[mask & ~chosen].max()
        loss = explicit_loss(-tokens.advantages, chosen, tokens.mask.double(), loss_type)  # ratios are 1
        assert log["loss"] == pytest.approx(loss.item(), abs=1e-6)
        assert log["high_entropy_tokens/kept"] == pytest.approx(count / int(mask.sum()), abs=1e-6)
        assert log["high_entropy_tokens/threshold"] == pytest.approx(tokens.entropies[chosen].min().item(), abs=1e-6)
    assert any(math.fabs(log["loss"]) > 1e-3 for log in trainer.state.log_history if "loss" in log)


def test_the_share_of_clipped_tokens_is_that_of_all():
    class Moved(HighEntropyTokensTrainer):
        def log_ratio(self, tokens):
            return super().log_ratio(tokens) + 1.0  # a ratio of e everywhere

        def token_weights(self, tokens):
            self.raised = ((tokens.advantages > 0) * tokens.mask).sum() / tokens.mask.sum()
            return super().token_weights(tokens)

    trainer = train(Moved, max_steps=1, **LIVELY)
    assert 0 < trainer.raised < 1
    found = trainer.state.log_history[0]["high_entropy_tokens/clipped"]
    assert found == pytest.approx(trainer.raised.item())


def test_trls_mask_is_another_normaliser():
    """With TRL's normaliser and its treatment of ties it is TRL's own mask, else the gradient is larger."""
    common = {
        "loss_type": "bnpo",
        "epsilon": 0.2,
        "epsilon_high": 0.28,
        "optim": "sgd",
        "max_grad_norm": 1e9,
        **LIVELY,
    }
    trls = train(MethodTrainer, top_entropy_quantile=0.2, max_steps=1, **common)
    same = train(HighEntropyTokensTrainer, het_rule="threshold", het_normalize="all", max_steps=1, **common)
    assert difference(same, trls) < 1e-8
    ours = train(HighEntropyTokensTrainer, het_rule="threshold", max_steps=1, **common)
    assert difference(ours, trls) > 1e-5
    norms = [trainer.state.log_history[0]["grad_norm"] for trainer in (same, ours)]
    kept = ours.state.log_history[0]["high_entropy_tokens/kept"]
    assert norms[1] / norms[0] == pytest.approx(1 / kept, rel=1e-3)


def test_a_global_scope_of_one_process_is_local():
    settings = {"het_rule": "threshold", "gradient_accumulation_steps": 2, **LIVELY}
    parts = [
        train(HighEntropyTokensTrainer, het_scope=scope, loss_type=loss_type, **settings)
        for loss_type in ("bnpo", "dapo")
        for scope in ("local", "global")
    ]
    assert difference(*parts[:2]) <= 1e-7 and difference(*parts[2:]) <= 1e-7
    assert difference(parts[0], parts[2]) > 1e-5


class Spy(MethodTrainer):
    """Half of the weight for every token; records the tokens that it is shown."""

    replaces = ("token_weights",)
    slug = "clip_cov"  # stands where that would

    def token_weights(self, tokens):
        self.shown = tokens.mask
        return torch.full_like(tokens.logps, 0.5)


def test_mixed_methods_see_the_selected_tokens_only():
    class Mixed(Recording, Spy):
        pass

    trainer = train(Mixed, max_steps=2, loss_type="bnpo")
    tokens, weights = trainer.record[-1]
    assert torch.equal(trainer.shown.bool(), weights > 0)
    assert weights.sum() == pytest.approx(tokens.mask.sum() / 2)
    order = [base.__name__ for base in mix("capo", "clip_cov", "high_entropy_tokens").Trainer.__mro__]
    assert order[1] == "HighEntropyTokensTrainer"


@pytest.mark.parametrize("loss_type", ["grpo", "dr_grpo", "luspo"])
def test_losses_without_a_mean_over_tokens_are_announced(loss_type):
    with pytest.warns(UserWarning, match=f"`loss_type` is '{loss_type}'"):
        build(HighEntropyTokensTrainer, loss_type=loss_type)


@pytest.mark.filterwarnings("error:.*HighEntropyTokensTrainer:UserWarning")
def test_token_means_are_not_and_the_clip_range_is_dapos():
    for loss_type in ("bnpo", "dapo"):
        trainer = build(HighEntropyTokensTrainer, loss_type=loss_type)
    assert (trainer.epsilon_low, trainer.epsilon_high) == (0.2, 0.28)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("het_ratio", 0.0),
        ("het_ratio", 1.5),
        ("het_scope", "typo"),
        ("het_rule", "typo"),
        ("het_normalize", "typo"),
        ("top_entropy_quantile", 0.5),
    ],
)
def test_settings_out_of_range_are_named(field, value):
    with pytest.raises(ValueError, match=f"`{field}` must be .*got {value!r}"):
        HighEntropyTokensConfig("unused", use_cpu=True, bf16=False, **{field: value})
