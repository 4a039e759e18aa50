import pytest
import torch
from harness import build, difference, train
from test_clip_cov import ADVANTAGES, COVARIANCE, MASK, NEW, OLD

from trl_ext import KLCovConfig, KLCovTrainer, MethodTrainer
from trl_ext.methods.kl_cov import kl_cov_loss, kl_cov_selection


def worked_example(old):
    logps = NEW.clone().requires_grad_()
    selected = kl_cov_selection(COVARIANCE, MASK, 0.3)
    loss = (kl_cov_loss(logps - old, ADVANTAGES, selected, 1.0) * MASK).sum() / 7
    loss.backward()
    return selected, loss.item(), logps.grad


def test_worked_example():
    selected, loss, gradient = worked_example(OLD)
    assert selected.nonzero().tolist() == [[0, 0], [1, 2]]
    assert loss == pytest.approx(-0.132576, abs=1e-6)
    expected = [[-0.007324, -0.192837, -0.142857, -0.129262], [0.174486, 0.142857, -0.056210, 0]]
    assert torch.allclose(gradient, torch.tensor(expected, dtype=torch.float64), atol=1e-6)
    assert ((NEW - OLD).abs() * MASK).sum() / 7 == pytest.approx(0.164286, abs=1e-6)


def test_worked_example_on_policy():
    _, loss, gradient = worked_example(NEW)
    assert loss == pytest.approx(-0.142857, abs=1e-6)
    assert torch.allclose(gradient, -ADVANTAGES * MASK / 7, atol=1e-6)


def test_selection():
    cov = torch.tensor([[3.0, 1.0, 3.0, 9.0]])
    mask = torch.tensor([[1, 1, 1, 0]])
    assert kl_cov_selection(cov, mask, 0.4).tolist() == [[True, False, False, False]]  # the earlier of two equal ones
    assert kl_cov_selection(cov, mask, 0.7).tolist() == [[True, False, True, False]]
    assert kl_cov_selection(cov, mask, 1e-6).sum() == 1
    assert kl_cov_selection(-cov, mask, 0.4).tolist() == [[False, True, False, False]]  # signed, not by size
    assert kl_cov_selection(cov, torch.zeros_like(mask), 0.5).sum() == 0


def test_without_penalty_it_is_unclipped_grpo():
    settings = {"num_iterations": 2, "max_steps": 4, "learning_rate": 1e-2}
    free = train(KLCovTrainer, kl_cov_coef=0.0, **settings)
    unclipped = train(MethodTrainer, epsilon=1e9, epsilon_high=1e9, **settings)
    assert difference(free, unclipped) < 1e-6
    assert difference(train(KLCovTrainer, kl_cov_ratio=0.5, **settings), unclipped) > 1e-5


def test_strictly_on_policy_warns():
    with pytest.warns(UserWarning, match=r"KLCovTrainer has no effect beyond unclipped GRPO.*`num_iterations`"):
        build(KLCovTrainer)


def test_options_it_cannot_honour_are_named():
    for name, value in {"importance_sampling_level": "sequence", "loss_type": "cispo", "delta": 2.0}.items():
        with pytest.raises(ValueError, match=name):
            build(KLCovTrainer, num_iterations=2, **{name: value})


@pytest.mark.parametrize(
    ("field", "value"), [("kl_cov_ratio", 0.0), ("kl_cov_ratio", 2.0), ("kl_cov_coef", -1.0), ("kl_cov_scope", "typo")]
)
def test_settings_out_of_range_are_named(field, value):
    with pytest.raises(ValueError, match=f"`{field}` must be .*got {value!r}"):
        KLCovConfig("unused", use_cpu=True, bf16=False, **{field: value})
