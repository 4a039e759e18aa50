import shutil

import pytest
import torch
from harness import POLICY_PATH, build, difference, train
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer

from trl_ext import KDRLConfig, KDRLTrainer, MethodTrainer
from trl_ext.methods.kdrl import kd_beta, kd_divergence, kd_keep, kd_loss


STUDENT = torch.tensor([[0.5, 0.4], [0.25, 0.8]], dtype=torch.float64)
TEACHER = torch.tensor([[0.6, 0.2], [0.5, 0.8]], dtype=torch.float64).log()
ADVANTAGES = torch.tensor([[0.707106], [-0.707106]], dtype=torch.float64)
CORRECT, IDS = torch.tensor([True, False]), torch.zeros(2, dtype=torch.long)


def loss_and_gradient(estimator, mask):
    logps = STUDENT.log().requires_grad_()
    loss = kd_loss(logps, TEACHER, torch.ones(2, 2), kd_keep(CORRECT, IDS, mask), estimator)
    policy = -((logps - logps.detach()).exp() * ADVANTAGES).sum() / 4
    (policy + 0.1 * loss).backward()
    return policy.item(), loss.item(), logps.grad


@pytest.mark.parametrize(
    ("estimator", "mask", "loss", "gradient"),
    [
        ("k2", "none", 0.124268, [[-0.181335, -0.159448], [0.159448, 0.176777]]),
        ("k2", "response", 0.060057, [[-0.176777, -0.176777], [0.159448, 0.176777]]),
        ("k2", "group", 0.0, [[-0.176777, -0.176777], [0.176777, 0.176777]]),
        ("k3", "none", 0.129420, [[-0.181777, -0.164276], [0.151777, 0.176777]]),
        ("k3", "response", 0.076713, [[-0.176777, -0.176777], [0.151777, 0.176777]]),
    ],
)
def test_worked_examples(estimator, mask, loss, gradient):
    policy, found, found_gradient = loss_and_gradient(estimator, mask)
    assert policy == pytest.approx(0, abs=1e-9) and found == pytest.approx(loss, abs=1e-6)
    assert torch.allclose(found_gradient, torch.tensor(gradient, dtype=torch.float64), atol=1e-6)


@pytest.mark.parametrize(
    ("estimator", "expected"),
    [("k2", [0.138796, -0.219580, 0.080784]), ("k3", [0.153615, -0.285522, 0.131906])],
)
def test_expected_gradients(estimator, expected):
    """k2's expected gradient is that of the reverse KL divergence, k3's that of the forward one."""
    logits = torch.tensor([0.3, -0.2, 0.5], dtype=torch.float64, requires_grad=True)
    teacher = torch.tensor([0.2, 0.5, 0.3], dtype=torch.float64)
    logps = logits.log_softmax(0)
    (logps.detach().exp() * kd_divergence(logps, teacher.log(), estimator)).sum().backward()
    assert torch.allclose(logits.grad, torch.tensor(expected, dtype=torch.float64), atol=1e-6)


def test_schedule():
    assert [kd_beta(step) for step in (0, 40, 80, 280)] == pytest.approx([0.005, 0.003, 0.001, 0.001])


def test_extreme_teachers():
    logps = torch.tensor([[-0.1, -40.0]], requires_grad=True)
    teacher = torch.tensor([[-torch.inf, -0.1]])
    for estimator in ("k2", "k3"):
        loss = kd_loss(logps, teacher, torch.ones(1, 2), torch.tensor([True]), estimator)
        (gradient,) = torch.autograd.grad(loss, logps)
        assert loss.isfinite() and gradient.isfinite().all()
    empty = kd_loss(logps, teacher, torch.zeros(1, 2), torch.tensor([True]))
    empty.backward()
    assert empty == 0 and (logps.grad == 0).all()


def test_in_a_run(teacher):
    plain = train(MethodTrainer)
    trainer = train(KDRLTrainer, kd_teacher=teacher, kd_beta_init=0.5)
    assert difference(trainer, plain) > 1e-5
    logged = trainer.state.log_history[0]
    assert logged["kd/loss"] > 0 and logged["kd/beta"] == 0.5 and logged["kd/kept"] == 1
    same = train(KDRLTrainer, kd_teacher=POLICY_PATH, kd_beta_init=0.5, max_steps=1)
    assert same.state.log_history[0]["kd/loss"] == pytest.approx(0, abs=1e-9)
    off = train(KDRLTrainer, kd_teacher=teacher, kd_beta_init=0.0, kd_beta_min=0.0)
    assert difference(off, plain) < 1e-7


def test_teacher_log_probabilities_are_the_teachers(teacher):
    class Checking(KDRLTrainer):
        def carry(self, rollouts):
            carried = super().carry(rollouts)
            model = AutoModelForCausalLM.from_pretrained(teacher)
            ids = torch.cat([rollouts.prompt_ids, rollouts.completion_ids], 1)
            masks = torch.cat([rollouts.prompt_mask, rollouts.completion_mask], 1)
            start = rollouts.prompt_ids.shape[1]
            with torch.no_grad():
                logits = model(ids, attention_mask=masks).logits[:, start - 1 : -1] / 0.7
            expected = logits.log_softmax(-1).gather(2, rollouts.completion_ids.unsqueeze(2)).squeeze(2)
            gap = (carried["kd/teacher_logps"] - expected)[rollouts.mask.bool()]
            assert gap.abs().max() < 1e-4
            self.checked = True
            return carried

    assert train(Checking, kd_teacher=teacher, temperature=0.7, max_steps=1).checked


def test_the_base_of_an_adapter_as_the_teacher():
    lora = LoraConfig(target_modules=["q_proj", "v_proj"], init_lora_weights="gaussian")
    trainer = train(KDRLTrainer, kd_teacher="base", peft_config=lora, learning_rate=1e-2, max_steps=4)
    assert trainer.state.log_history[0]["kd/loss"] == pytest.approx(0, abs=1e-9)
    assert trainer.state.log_history[3]["kd/loss"] > 0


@pytest.mark.parametrize("norm", ["all", "kept"])
def test_the_update_does_not_depend_on_the_split(teacher, norm):
    settings = {"kd_teacher": teacher, "kd_beta_init": 0.5, "kd_mask": "response", "kd_mask_norm": norm}
    settings |= {"optim": "sgd", "learning_rate": 0.1}
    whole = train(KDRLTrainer, **settings)
    split = train(KDRLTrainer, per_device_train_batch_size=4, gradient_accumulation_steps=2, **settings)
    assert difference(whole, split) < 1e-6


def test_few_kept_tokens_are_divided_by_their_number(teacher):
    """One wrong answer in eight micro-batches: less than one kept token for some."""
    rewards = lambda completions, **kw: [float(i > 0) for i in range(len(completions))]  # noqa: E731
    settings = {"kd_teacher": teacher, "kd_beta_init": 0.5, "kd_mask": "response", "kd_mask_norm": "kept"}
    settings |= {"optim": "sgd", "learning_rate": 0.1, "max_steps": 1, "rewards": rewards}
    whole = train(KDRLTrainer, **settings)
    split = train(KDRLTrainer, per_device_train_batch_size=1, gradient_accumulation_steps=8, **settings)
    assert whole.state.log_history[0]["kd/loss"] > 0 and difference(whole, split) < 1e-6


def test_another_end_token_of_the_teacher_is_left_out(teacher, tmp_path):
    class Watching(KDRLTrainer):
        def regularizers(self, tokens):
            found = super().regularizers(tokens)
            ends = (tokens.token_ids == self._tokenizer.eos_token_id) & tokens.mask.bool()
            self.ends = ends.sum()
            (gradient,) = torch.autograd.grad(found["kd/loss"], tokens.logps, retain_graph=True)
            self.moved, self.others = (gradient[ends] != 0).sum(), (gradient[tokens.mask.bool() & ~ends] != 0).sum()
            return found

    shutil.copytree(teacher, tmp_path / "other")
    tokenizer = AutoTokenizer.from_pretrained(teacher)
    tokenizer.eos_token = "<|unk|>"
    tokenizer.save_pretrained(tmp_path / "other")
    other = train(Watching, kd_teacher=str(tmp_path / "other"), max_completion_length=8, max_steps=1)
    same = train(Watching, kd_teacher=teacher, max_completion_length=8, max_steps=1)
    assert other.ends > 0 and other.moved == 0 and other.others > 0
    assert same.moved == same.ends > 0


def test_ratios_that_k3_cuts_are_logged(teacher):
    class Far(KDRLTrainer):
        def frozen_logps(self, rollouts, model=None):
            logps = super().frozen_logps(rollouts, model)
            return torch.where(torch.arange(len(logps)).unsqueeze(1) < 4, -29.0, logps)

    trainer = train(Far, kd_teacher=teacher, kd_estimator="k3", max_steps=1)
    assert 0.2 < trainer.state.log_history[0]["kd/far"] < 0.8


def test_bad_input(teacher, tmp_path):
    with pytest.raises(ValueError, match="`kd_teacher` must be given"):
        build(KDRLTrainer)
    with pytest.raises(ValueError, match="no LoRA adapter"):
        build(KDRLTrainer, kd_teacher="base")
    with pytest.raises(ValueError, match="`kd_teacher` 'no/such-model' is neither"):
        build(KDRLTrainer, kd_teacher="no/such-model")
    other = AutoTokenizer.from_pretrained(POLICY_PATH)
    other.add_tokens(["<another>"])
    shutil.copytree(teacher, tmp_path / "other")
    other.save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match="another vocabulary"):
        build(KDRLTrainer, kd_teacher=str(tmp_path / "other"))
    with pytest.warns(UserWarning, match="`beta` is 0.1"):
        build(KDRLTrainer, kd_teacher=teacher, beta=0.1)
    with pytest.warns(UserWarning, match="strictly on-policy"):
        build(KDRLTrainer, kd_teacher=teacher, num_iterations=2)
    for name, value in {"kd_estimator": "k1", "kd_beta_init": -1.0, "kd_beta_min": 1.0, "kd_mask": "typo"}.items():
        with pytest.raises(ValueError, match=f"`{name}` must be"):
            KDRLConfig("unused", use_cpu=True, bf16=False, **{name: value})
