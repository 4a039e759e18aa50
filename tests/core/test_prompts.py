import pytest
import torch
from trl.trainer.utils import RepeatSampler

from trl_ext.core.prompts import ShuffledOrder, draw_rows, make_generator, top_rows


@pytest.mark.conformance
@pytest.mark.parametrize("shuffle", [True, False])
def test_order_is_trls_over_epochs(shuffle):
    size, chunk, repeats = 23, 5, 2
    sampler = RepeatSampler(range(size), 1, chunk, repeats, shuffle, seed=7)
    theirs = []
    for _ in range(3):
        epoch = list(sampler)
        theirs += [epoch[i : i + chunk] for i in range(0, len(epoch), chunk * repeats)]
    order = ShuffledOrder(size, chunk, shuffle, seed=7)
    assert [order.rows(g).tolist() for g in range(len(theirs))] == theirs
    fresh = ShuffledOrder(size, chunk, shuffle, seed=7)  # as after a resume
    assert fresh.rows(9).tolist() == theirs[9] and fresh.rows(1).tolist() == theirs[1]


def test_few_prompts_are_repeated():
    order = ShuffledOrder(3, 7, shuffle=True, seed=7)
    first, second = order.rows(0).tolist(), order.rows(1).tolist()
    assert first[:3] == first[3:6] and sorted(first[:3]) == [0, 1, 2] and len(first) == 7
    assert sorted(second[:3]) == [0, 1, 2] and order.rows(0).tolist() == first


def test_top_rows():
    scores = torch.tensor([1.0, 3.0, 2.0, 3.0, 2.0, 2.0])
    assert [top_rows(scores, n).tolist() for n in (1, 2, 3, 4)] == [[1], [1, 3], [1, 2, 3], [1, 2, 3, 4]]
    assert top_rows(scores, 6).tolist() == [0, 1, 2, 3, 4, 5]
    assert top_rows(scores, 14).tolist() == [*range(6), *range(6), 1, 3]


def test_generators_depend_on_every_key():
    draws = {
        torch.rand(1, generator=make_generator(*keys)).item()
        for keys in [(0, "a"), (1, "a"), (0, "b"), (0, "a", 1), (0, "a", 1, 2), (0, "a", 2, 1)]
    }
    assert len(draws) == 6
    assert torch.equal(*(torch.rand(3, generator=make_generator(5, "x", 2)) for _ in range(2)))


def test_draws_follow_the_weights():
    weights = torch.tensor([1.0, 2.0, 0.0, 5.0])
    counts = torch.zeros(4)
    for i in range(4000):
        counts[draw_rows(weights, 1, make_generator(0, "test", i))] += 1
    assert counts[2] == 0
    assert torch.allclose(counts / 4000, weights / 8, atol=0.03)


def test_draws_repeat_only_if_they_must():
    generator = make_generator(0, "test")
    assert sorted(draw_rows(torch.tensor([1.0, 1e-6, 1.0]), 3, generator).tolist()) == [0, 1, 2]
    assert set(draw_rows(torch.tensor([1.0, 0.0, 1.0]), 5, generator).tolist()) == {0, 2}


@pytest.mark.parametrize("weights", [[0.0, 0.0], [1.0, -1.0], [1.0, float("nan")], [1.0, float("inf")]])
def test_bad_weights_are_named(weights):
    with pytest.raises(ValueError, match="prompt weights must be finite"):
        draw_rows(torch.tensor(weights), 1, make_generator(0, "test"))
