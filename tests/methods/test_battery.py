"""What every method must stand, parametrised over the methods: one battery, no copy of it per method."""

import pytest
import torch
from harness import difference, make_teacher, parameters, scripted, train_mix
from peft import LoraConfig

from trl_ext import MethodTrainer, mix
from trl_ext.core.mixing import list_methods


pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")
METHODS = list_methods()


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    return make_teacher(tmp_path_factory.mktemp("teacher") / "model")


@pytest.fixture(scope="module")
def plain():
    from harness import arithmetic, sparse_reward, train

    return train(
        MethodTrainer,
        data=arithmetic().select(range(4)),
        rewards=sparse_reward,
        num_iterations=2,
        max_steps=4,
        per_device_train_batch_size=16,
    )


@pytest.mark.parametrize("name", METHODS)
def test_it_is_not_plain_grpo(name, teacher, plain):
    assert difference(train_mix([name], teacher), plain) > 1e-6


# Settings under which a method is plain GRPO, and the largest difference that rounding may make.
NEUTRAL = {
    "clip_cov": ({"clip_cov_low": 1e8, "clip_cov_high": 1e9, "epsilon": 0.2, "epsilon_high": 0.2}, 0.0),
    "d3s": ({"d3s_n_init": 4, "d3s_n_final": 4, "d3s_k_init": 1.0, "d3s_k_final": 1.0}, 1e-6),
    "dynamic_sampling": ({"ds_max_num_gen_batches": 1}, 0.0),
    "empg": ({"empg_k": 0.0, "empg_zeta": 0.0, "empg_center": False}, 1e-6),
    "grpo_lambda": ({"lambda_top": 0.0}, 0.0),
    "kdrl": ({"kd_beta_init": 0.0, "kd_beta_min": 0.0}, 1e-6),
    "knapsack_rl": ({"knapsack_min_history": 10_000, "knapsack_advantage_clip": None}, 0.0),
    "llds": ({"llds_coef": 0.0}, 1e-6),
    "scaf_grpo": ({"scaf_exempt_steps": 100}, 0.0),
}


@pytest.mark.parametrize("name", NEUTRAL)
def test_neutral_settings_are_plain_grpo(name, teacher, plain):
    settings, tolerance = NEUTRAL[name]
    assert difference(train_mix([name], teacher, **settings), plain) <= tolerance


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("conversational", [False, True])
def test_lora(name, conversational, teacher):
    lora = LoraConfig(target_modules=["q_proj", "v_proj"])
    settings = {"peft_config": lora, "conversational": conversational, "learning_rate": 1e-2}
    trainer = train_mix([name], teacher, **settings)
    changed = {
        key: p.abs().max().item() for key, p in parameters(trainer).items() if "lora_B" in key
    }  # which are 0 at the start
    assert changed and all(0 < size < float("inf") for size in changed.values())


def hostile(completions, **kwargs):
    """None for two of four, and a whole group of None."""
    return [None if i % 4 < 2 or i >= 12 else float(i % 4 == 2) for i in range(len(completions))]


@pytest.mark.parametrize("name", METHODS)
def test_unscored_rewards(name, teacher):
    seen = []

    def watching(base):
        class Watching(base):
            def observe(self, rollouts):
                super().observe(rollouts)
                advantages = rollouts.advantages
                if advantages.dim() == 2:
                    advantages = advantages.abs().sum(1)
                assert (advantages[~rollouts.scored] == 0).all() and advantages.isfinite().all()
                seen.append(rollouts.scored)

        return Watching

    trainer = train_mix([name], teacher, wrap=watching, rewards=hostile)
    assert len(seen) == 2 and not seen[0].all() and seen[0].any()
    assert all(p.isfinite().all() for p in parameters(trainer).values())


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("value", [0.0, 1.0, None])
def test_no_signal_at_all(name, value, teacher):
    """All right, all wrong, nothing scored: finite parameters, whatever the method makes of it."""
    trainer = train_mix([name], teacher, rewards=lambda completions, **kw: [value] * len(completions))
    assert all(p.isfinite().all() for p in parameters(trainer).values())


# Statistics that are taken per micro-batch, by the authors' code.
PER_MICRO_BATCH = {"clip_cov", "kl_cov", "disco"}


@pytest.mark.parametrize("name", sorted(set(METHODS) - PER_MICRO_BATCH))
@pytest.mark.parametrize("loss_type", ["dapo", "grpo"])
def test_the_update_does_not_depend_on_the_split(name, loss_type, teacher):
    settings = {"optim": "sgd", "learning_rate": 0.05, "loss_type": loss_type, "rollout_func": scripted}
    whole = train_mix([name], teacher, **settings)
    split = train_mix([name], teacher, per_device_train_batch_size=4, gradient_accumulation_steps=4, **settings)
    assert difference(whole, split) < 1e-6


@pytest.mark.parametrize("name", METHODS)
def test_no_attribute_shadows_one_of_trls(name, teacher, plain):
    """A method's attributes carry its own name; TRL's `beta` or `epsilon_low` would be easy to overwrite."""
    trainer = train_mix([name], teacher)
    prefixes = {field.split("_")[0] for field in mix(name).Config._declared} | {name.split("_")[0]}
    foreign = set(vars(trainer)) - set(vars(plain))
    assert {key for key in foreign if key.lstrip("_").split("_")[0] not in prefixes} == set()


@pytest.mark.parametrize("name", METHODS)
def test_state_goes_through_a_file_and_back(name, teacher, tmp_path):
    trainer = train_mix([name], teacher)
    path = tmp_path / "state.pt"
    torch.save([trainer.method_state(), trainer.local_state()], path)
    shared, local = torch.load(path, weights_only=True)
    assert repr(shared) == repr(trainer.method_state()) and repr(local) == repr(trainer.local_state())
