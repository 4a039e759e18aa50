"""
What every method must stand, parametrised over the methods: one battery, no copy of it per method. What needs further
training runs of every method (LoRA, other splits of the batch, no signal at all) is marked slow, and run by CI.
"""

import pytest
import torch
from harness import arithmetic, difference, parameters, scripted, sparse_reward, train, train_mix
from peft import LoraConfig

from trl_ext import MethodTrainer, mix
from trl_ext.core.mixing import list_methods
from trl_ext.core.rollouts import PER_ROLLOUT


pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")
METHODS = list_methods()


def each(names):
    """One case per method; those of a method run in one worker, which has it trained."""
    return pytest.mark.parametrize(
        "name", [pytest.param(name, marks=pytest.mark.xdist_group(f"battery-{name}")) for name in names]
    )


@pytest.fixture(scope="module")
def plain():
    return train(
        MethodTrainer,
        data=arithmetic().select(range(4)),
        rewards=sparse_reward,
        num_iterations=2,
        max_steps=4,
        per_device_train_batch_size=16,
    )


# Where rollouts are set in relation to others than those of their group, by chance.
ALONE = {"duration_aware": {"duration_normalize": "none"}, "riskpo": {"riskpo_bundle_size": 1}}


def capturing(base):
    class Capturing(base):
        def observe(self, rollouts):
            super().observe(rollouts)
            self.__dict__["rollouts"] = rollouts

        def regularizers(self, tokens):
            self.__dict__["tokens"] = tokens
            return super().regularizers(tokens)

    return Capturing


@pytest.fixture(scope="module")
def trained(teacher):
    cache = {}

    def get(name):
        if name not in cache:
            cache[name] = train_mix([name], teacher, wrap=capturing, **ALONE.get(name, {}))
        return cache[name]

    return get


@each(METHODS)
def test_it_is_not_plain_grpo(name, trained, plain):
    assert difference(trained(name), plain) > 1e-6


# Settings under which a method is plain GRPO, and the largest difference that rounding may make.
NEUTRAL = {
    "bapo": ({"bapo_low_start": 0.8, "bapo_low_max": 0.8, "bapo_high_start": 1.2, "bapo_high_max": 1.2}, 1e-6),
    "capo": ({"capo_tau_fisher": 0.0, "capo_tau_hessian": 0.0, "loss_type": "dapo"}, 0.0),
    "clip_cov": ({"clip_cov_low": 1e8, "clip_cov_high": 1e9, "epsilon": 0.2, "epsilon_high": 0.2}, 0.0),
    "d3s": ({"d3s_n_init": 4, "d3s_n_final": 4, "d3s_k_init": 1.0, "d3s_k_final": 1.0}, 1e-6),
    "dcpo": ({"dcpo_use_sas": False, "dcpo_use_dac": False, "dcpo_use_otm": False}, 1e-6),
    "duration_aware": ({"duration_min": 100.0}, 0.0),
    "dynamic_sampling": ({"ds_max_num_gen_batches": 1}, 0.0),
    "empg": ({"empg_k": 0.0, "empg_zeta": 0.0, "empg_center": False}, 1e-6),
    "epo": ({"epo_coef": 0.0}, 0.0),
    "gdpo_nvidia": ({"gdpo_batch_norm": "sequence"}, 0.0),
    "gppo": ({"gppo_beta_low": 0.0, "gppo_beta_high": 0.0, "gppo_pos_coef": 0.0, "epsilon_high": 0.2}, 1e-6),
    "grpo_lambda": ({"lambda_top": 0.0}, 0.0),
    "high_entropy_tokens": ({"het_ratio": 1.0, "epsilon_high": 0.2}, 0.0),
    "kdrl": ({"kd_beta_init": 0.0, "kd_beta_min": 0.0}, 1e-6),
    "knapsack_rl": ({"knapsack_min_history": 10_000, "knapsack_advantage_clip": None}, 0.0),
    "llds": ({"llds_coef": 0.0}, 1e-6),
    "rest_grpo": ({"rest_n_sub": 0}, 0.0),
    "scaf_grpo": ({"scaf_exempt_steps": 100}, 0.0),
    "stratified_grpo": ({"stratified_key": "tool_calls"}, 0.0),  # of which there are none
    "tw_grpo": ({"tw_alpha": 1.0}, 0.0),
}


@pytest.mark.shows("neutral settings are TRL's GRPO")
@each(METHODS)
def test_neutral_settings_are_plain_grpo(name, teacher, plain, record_property):
    if name not in NEUTRAL:
        record_property("refused", "no settings make it GRPO")
        return
    settings, tolerance = NEUTRAL[name]
    assert difference(train_mix([name], teacher, **settings), plain) <= tolerance


@pytest.mark.shows("LoRA")
@each(METHODS)
@pytest.mark.slow
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


@pytest.mark.shows("unscored rewards")
@each(METHODS)
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


def nothing_to_learn(completions, trainer_state, **kwargs):
    """One generation all wrong, one all right, one not scored at all."""
    return [[0.0, 1.0, None][trainer_state.global_step // 2 % 3]] * len(completions)


@each(METHODS)
@pytest.mark.slow
def test_no_signal_at_all(name, teacher):
    """Finite parameters, whatever the method makes of it."""
    trainer = train_mix([name], teacher, rewards=nothing_to_learn, max_steps=6)
    assert all(p.isfinite().all() for p in parameters(trainer).values())


# Statistics that are taken per micro-batch, by the authors' code.
PER_MICRO_BATCH = {
    "bapo": "the search of the bounds",
    "capo": "the moments move once per micro-batch; a token's fate does not with `capo_optimizer='sgd'`",
    "clip_cov": "the covariances, unless `clip_cov_scope='global'`",
    "disco": "the constraint",
    "gppo": "the likelihood term",
    "high_entropy_tokens": "the threshold, unless `het_scope='global'`",
    "kl_cov": "the covariances, unless `kl_cov_scope='global'`",
}


@pytest.mark.shows("any split of the batch")
@each(METHODS)
@pytest.mark.slow
@pytest.mark.parametrize("loss_type", ["dapo", "grpo"])
def test_the_update_does_not_depend_on_the_split(name, loss_type, teacher, record_property):
    settings = {"optim": "sgd", "learning_rate": 0.05, "loss_type": loss_type, "rollout_func": scripted}
    whole = train_mix([name], teacher, **settings)
    split = train_mix([name], teacher, per_device_train_batch_size=4, gradient_accumulation_steps=4, **settings)
    gap = difference(whole, split)
    if name in PER_MICRO_BATCH:
        record_property(
            "refused", f"per micro-batch, as in the authors' code: {PER_MICRO_BATCH[name]}; here {gap:.0e}"
        )
    else:
        assert gap < 1e-6


@each(METHODS)
def test_no_attribute_shadows_one_of_trls(name, trained, plain):
    """A method's attributes carry its own name; TRL's `beta` or `epsilon_low` would be easy to overwrite."""
    trainer = trained(name)
    prefixes = {field.split("_")[0] for field in mix(name).Config._declared} | {name.split("_")[0]}
    foreign = set(vars(trainer)) - set(vars(plain)) - {"rollouts", "tokens"}  # which the test adds
    assert {key for key in foreign if key.lstrip("_").split("_")[0] not in prefixes} == set()


@each(METHODS)
def test_state_goes_through_a_file_and_back(name, trained, tmp_path):
    trainer = trained(name)
    path = tmp_path / "state.pt"
    torch.save([trainer.method_state(), trainer.local_state()], path)
    shared, local = torch.load(path, weights_only=True)
    assert repr(shared) == repr(trainer.method_state()) and repr(local) == repr(trainer.local_state())


# ------------------------------------------------------- the hooks themselves, on a generation and its micro-batch


def rearranged(rollouts, rows, **changes):
    """The generation with its rollouts in another order, or only some of them."""
    parts = {}
    for name, value in vars(rollouts).items():
        if isinstance(value, torch.Tensor) and name != "reward_weights":
            parts[name] = value[rows]
        elif isinstance(value, list):
            parts[name] = [value[row] for row in rows.tolist()]
    parts |= {"shaped": None, "advantages": None, "selected": None, "local": slice(0, len(rows))}
    parts["logged"] = {key: [values[row] for row in rows.tolist()] for key, values in rollouts.logged.items()}
    made = rollouts.replace(**parts | changes)
    everything = {name: getattr(made, name) for name in PER_ROLLOUT}
    return made.replace(everything=rollouts.everything.replace(**everything))


def advantages_of(trainer, rollouts):
    rollouts = rollouts.replace(shaped=trainer.shape_rewards(rollouts))
    found = trainer.compute_advantages(rollouts)
    return found.double() * (rollouts.mask if found.dim() == 2 else 1)


def generations(rollouts):
    """Rewards of a generation with every kind of group: mixed, equal, partly and wholly unscored."""
    nan = torch.nan
    for rewards in (
        [1, 0, 0, 0, 1, 1, 1, 1, 0, 0, 0, 0, 1, 1, 0, 1],
        [1, 0, nan, 0, nan, nan, nan, nan, 0, nan, nan, nan, 1, 1, 0, nan],
    ):
        matrix = torch.tensor(rewards, dtype=torch.float).unsqueeze(1)
        yield rearranged(rollouts, torch.arange(len(rollouts)), reward_matrix=matrix)


@each(METHODS)
def test_permuted_rollouts_have_permuted_advantages(name, trained):
    trainer = trained(name)
    for rollouts in generations(trainer.rollouts):
        table = torch.arange(len(rollouts)).view(-1, 4)
        order = table.gather(
            1, torch.rand(table.shape, generator=torch.Generator().manual_seed(1)).argsort(1)
        ).flatten()
        found = advantages_of(trainer, rearranged(rollouts, order))
        assert (found - advantages_of(trainer, rollouts)[order]).abs().max() < 1e-5


@each(METHODS)
def test_unscored_rollouts_influence_nobody(name, trained):
    trainer = trained(name)
    *_, rollouts = generations(trainer.rollouts)
    found = advantages_of(trainer, rollouts)
    assert (found[~rollouts.scored] == 0).all() and found.isfinite().all()
    kept = rollouts.scored.nonzero().squeeze(1)
    assert (advantages_of(trainer, rearranged(rollouts, kept)) - found[kept]).abs().max() < 1e-5


@each(METHODS)
def test_groups_of_one_rollout(name, trained):
    trainer = trained(name)
    rollouts = next(generations(trainer.rollouts))
    alone = rearranged(rollouts, torch.arange(0, len(rollouts), 4))
    assert advantages_of(trainer, alone).isfinite().all()


@each(METHODS)
def test_float32_agrees_with_float64(name, trained):
    trainer = trained(name)
    for rollouts in generations(trainer.rollouts):
        double = rollouts.replace(reward_matrix=rollouts.reward_matrix.double())
        single, oracle = advantages_of(trainer, rollouts), advantages_of(trainer, double)
        assert (single - oracle).abs().max() <= 1e-4 * (1 + oracle.abs().max())


# What these compare rewards with is not shifted: a range, a best reward, a threshold, a history.
NOT_SHIFT_INVARIANT = {"bnpo", "dcpo", "grpo_lambda", "ngrpo", "riskpo", "spo"}


@each(sorted(set(METHODS) - NOT_SHIFT_INVARIANT))
def test_a_constant_added_to_all_rewards_changes_nothing(name, trained):
    trainer = trained(name)
    for rollouts in generations(trainer.rollouts):
        shifted = rollouts.replace(reward_matrix=rollouts.reward_matrix + 0.75)
        shifted = shifted.replace(everything=shifted.everything.replace(reward_matrix=shifted.reward_matrix))
        assert (advantages_of(trainer, shifted) - advantages_of(trainer, rollouts)).abs().max() < 1e-5


def loss_of(trainer, tokens, logps, entropies, mask, advantages):
    """The whole loss of a method on a micro-batch, as a function of what the policy says."""
    logps, entropies = logps.clone().requires_grad_(), entropies.clone().requires_grad_()
    tokens = tokens.replace(logps=logps, entropies=entropies, mask=mask, model_mask=mask, advantages=advantages)
    tokens = tokens.replace(log_ratio=trainer.log_ratio(tokens))
    low, high = trainer.clip_range(tokens)
    if isinstance(low, torch.Tensor) != isinstance(high, torch.Tensor):
        low, high = (torch.as_tensor(bound).expand_as(logps) for bound in (low, high))
    tokens = tokens.replace(ratio_low=low, ratio_high=high)
    per_token, weights = trainer.policy_loss(tokens), trainer.token_weights(tokens)
    loss = trainer.aggregate_loss(per_token if weights is None else per_token * weights, tokens)
    loss = loss + sum(trainer.regularizers(tokens).values())
    loss.backward()
    nothing = torch.zeros_like(logps)
    return loss.item(), *(nothing if part.grad is None else part.grad for part in (logps, entropies))


@each(METHODS)
@pytest.mark.parametrize("spread", [0.1, 3.0, 25.0])
def test_gradients_are_finite_and_masked_tokens_take_no_part(name, spread, trained):
    """With ratios far beyond any bound, rows without tokens, and anything at all in masked places."""
    trainer, generator = trained(name), torch.Generator().manual_seed(0)
    tokens = trainer.tokens
    mask = tokens.mask * (torch.rand(tokens.mask.shape, generator=generator) < 0.8)
    mask[2] = 0
    if trainer.importance_sampling_level == "sequence":
        spread = min(spread, 3.0)
    old = tokens.old_logps
    logps = old + spread * (2 * torch.rand(old.shape, generator=generator) - 1)
    entropies = 2 * torch.rand(old.shape, generator=generator)
    advantages = torch.randn(old.shape[0], 1, generator=generator).expand(old.shape) * (
        tokens.rewards != 0.5
    ).unsqueeze(1)
    first = loss_of(trainer, tokens, logps, entropies, mask, advantages)
    assert all(torch.as_tensor(part).isfinite().all() for part in first)
    outside = mask == 0
    assert (first[1][outside] == 0).all() and (first[2][outside] == 0).all()
    other = loss_of(
        trainer, tokens, logps.masked_fill(outside, -9.0), entropies.masked_fill(outside, 5.0), mask, advantages
    )
    assert other[0] == pytest.approx(first[0], rel=1e-5, abs=1e-6)
    assert torch.allclose(other[1], first[1], rtol=1e-4, atol=1e-6)
