import pickle
import subprocess
import sys
from dataclasses import dataclass, field

import pytest
import torch
from harness import build, difference, train
from trl import GRPOConfig, TrlParser

import trl_ext
from trl_ext import ClipCovTrainer, KLCovTrainer, MethodConfig, MethodTrainer, MixingError, SPOConfig, SPOTrainer, mix
from trl_ext.core.mixing import list_methods, methods_of


def advantage(name, **body):
    return type(name, (MethodTrainer,), {"compute_advantages": lambda self, rollouts: None, **body})


def test_order_of_names_does_not_matter():
    assert mix("spo", "clip_cov") == mix("clip_cov", "spo") == mix(SPOTrainer, "clip_cov")
    trainer, config = mix("spo", "clip_cov")
    assert trainer.__name__ == "ClipCovSPOTrainer" and config.__name__ == "ClipCovSPOConfig"
    assert trainer._name == "Clip-Cov + SPO" and trainer.config_class is config
    assert mix("spo") == (SPOTrainer, SPOConfig)


def test_mixed_defaults_are_those_of_the_class_that_declares_them():
    args = mix("clip_cov", "spo").Config("unused", use_cpu=True, bf16=False)
    assert (args.num_generations, args.epsilon, args.epsilon_high) == (1, 1.0, 1.0)
    assert args.spo_rho_max == 0.96 and args.learning_rate == GRPOConfig("unused", use_cpu=True).learning_rate

    @dataclass
    class Handwritten(ClipCovTrainer.config_class, SPOConfig):
        mine: int = 3

    args = Handwritten("unused", use_cpu=True, bf16=False, spo_d_half=0.1)
    assert (args.num_generations, args.epsilon, args.mine, args.spo_d_half) == (1, 1.0, 3, 0.1)


def test_classes_written_by_hand_get_the_mixed_config():
    class Mine(ClipCovTrainer, SPOTrainer):
        pass

    assert issubclass(Mine.config_class, SPOConfig) and Mine.config_class("x", use_cpu=True).num_generations == 1
    assert [base.__name__ for base in methods_of(Mine)] == ["ClipCovTrainer", "SPOTrainer"]


def test_a_config_without_the_decorator_is_an_error():
    class Forgotten(ClipCovTrainer.config_class, SPOConfig):
        pass

    with pytest.raises(TypeError, match="must be decorated"):
        Forgotten("unused", use_cpu=True)


@dataclass
class FirstConfig(MethodConfig):
    temperature: float = field(default=0.6, metadata={"help": "Sampling temperature."})


@dataclass
class SecondConfig(MethodConfig):
    temperature: float = field(default=0.8, metadata={"help": "Sampling temperature."})


class FirstTrainer(MethodTrainer):
    config_class = FirstConfig

    def shape_rewards(self, rollouts):
        return super().shape_rewards(rollouts)


class SecondTrainer(MethodTrainer):
    config_class = SecondConfig

    def shape_rewards(self, rollouts):
        return super().shape_rewards(rollouts)


def test_disagreeing_defaults_must_be_given():
    trainer, config = mix(FirstTrainer, SecondTrainer)
    with pytest.raises(MixingError, match=r"`temperature` must be given.*0.6 in FirstConfig.*0.8 in SecondConfig"):
        config("unused", use_cpu=True, bf16=False)
    assert config("unused", use_cpu=True, bf16=False, temperature=0.7).temperature == 0.7
    (parsed,) = TrlParser(config).parse_args_and_config(
        ["--output_dir", "x", "--use_cpu", "--temperature", "0.5", "--bf16", "false"]
    )
    assert parsed.temperature == 0.5 and isinstance(parsed, config)

    @dataclass
    class Decided(FirstConfig, SecondConfig):
        temperature: float = 0.9

    assert Decided("unused", use_cpu=True, bf16=False).temperature == 0.9
    assert issubclass(trainer, FirstTrainer)


def test_two_replacers_are_refused_with_both_names():
    first = advantage("OneTrainer", replaces=("compute_advantages",))
    second = advantage("TwoTrainer", replaces=("compute_advantages",))
    with pytest.raises(MixingError, match=r"OneTrainer.*TwoTrainer both replace `compute_advantages`"):
        mix(first, second)
    with pytest.raises(MixingError, match="both replace"):
        type("Both", (first, second), {})


def test_contradictions_are_refused_with_the_reason():
    for pair in (("clip_cov", "kl_cov"), ("kl_cov", "clip_cov")):
        with pytest.raises(MixingError, match=r"ClipCovTrainer and KLCovTrainer contradict each other: both act"):
            mix(*pair)
    with pytest.raises(MixingError, match="contradict"):
        type("Both", (KLCovTrainer, ClipCovTrainer), {})


def test_ignored_hooks_are_refused():
    deaf = type("DeafTrainer", (MethodTrainer,), {"ignores": ("compute_advantages",)})
    with pytest.raises(MixingError, match=r"DeafTrainer does not look at `compute_advantages`.*SPOTrainer provides"):
        mix(deaf, "spo")


def test_refiners_come_before_replacers():
    class ARefiner(MethodTrainer):
        def compute_advantages(self, rollouts):
            return 2 * super().compute_advantages(rollouts)

    zero = advantage("AAReplacer", replaces=("compute_advantages",))
    assert [base.__name__ for base in mix(zero, ARefiner).Trainer.__bases__] == ["ARefiner", "AAReplacer"]
    with pytest.raises(MixingError, match="would never run: name ARefiner first"):
        type("Wrong", (zero, ARefiner), {})


def test_runs_after():
    class AFirst(MethodTrainer):
        def shape_rewards(self, rollouts):
            return super().shape_rewards(rollouts)

    class BSecond(AFirst.__bases__[0]):
        runs_after = ("AFirst",)

        def shape_rewards(self, rollouts):
            return super().shape_rewards(rollouts)

    assert [base.__name__ for base in mix(AFirst, BSecond).Trainer.__bases__] == ["BSecond", "AFirst"]
    AFirst.runs_after = ("BSecond",)
    with pytest.raises(MixingError, match="cannot be ordered"):
        mix(type("C", (AFirst,), {"slug": "AFirst"}), type("D", (BSecond,), {"slug": "BSecond"}))


def test_an_override_that_forgets_super_is_an_error():
    with pytest.raises(TypeError, match=r"Silent.compute_advantages does not call super\(\): declare `replaces"):
        advantage("Silent")
    with pytest.raises(TypeError, match=r"Rude.observe must call super\(\)"):
        type("Rude", (MethodTrainer,), {"observe": lambda self, rollouts: None})
    with pytest.raises(TypeError, match="cannot be replaced"):
        type("Odd", (MethodTrainer,), {"replaces": ("observe",)})


@pytest.mark.parametrize("protocol", [2, 5])
def test_mixed_classes_pickle_into_a_new_process(protocol, tmp_path):
    trainer, config = mix("clip_cov", "spo")
    args = config("unused", use_cpu=True, bf16=False, spo_d_half=0.5)
    blob = tmp_path / "mix.pkl"
    blob.write_bytes(pickle.dumps((trainer, args), protocol))
    code = (
        f"import pickle; t, a = pickle.load(open({str(blob)!r}, 'rb')); import trl_ext; "
        "assert t is trl_ext.mix('spo', 'clip_cov').Trainer and type(a) is t.config_class and a.spo_d_half == 0.5"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    own = mix(FirstTrainer, "spo")
    assert pickle.loads(pickle.dumps(own.Config, protocol)) is own.Config


def test_names_are_checked():
    with pytest.raises(ValueError, match=r"unknown method 'typo'; known methods: .*clip_cov"):
        mix("typo")
    with pytest.raises(MixingError, match="named twice"):
        mix("spo", "spo")
    with pytest.raises(ValueError, match="at least one"):
        mix()


def test_public_names_are_complete():
    for slug in list_methods():
        trainer = mix(slug).Trainer
        assert trainer.slug == slug and getattr(trl_ext, trainer.__name__) is trainer
        assert getattr(trl_ext, trainer.config_class.__name__) is trainer.config_class
        assert {"title", "id", "citation"} <= trainer._paper.keys() and "_name" in trainer.__dict__
    assert set(trl_ext.__all__) <= set(dir(trl_ext))
    with pytest.raises(AttributeError):
        trl_ext.NoSuchTrainer  # noqa: B018


def test_a_mix_trains_and_names_both_papers_in_its_card(tmp_path):
    trainer = train(*mix("clip_cov", "spo"), out=tmp_path / "run", spo_offline_n=1)
    logged = trainer.state.log_history[-2]
    assert "clip_cov/selected" in logged and "spo/value" in logged
    (tmp_path / "run").mkdir(exist_ok=True)
    trainer.create_model_card()
    card = (tmp_path / "run" / "README.md").read_text()
    for text in ("2509.13232", "2505.22617", "Clip-Cov + SPO", "vonwerra2020trl", "xu2025single", "cui2025entropy"):
        assert text in card, text
    assert "| `num_generations` | `1` |" in card and "`spo_d_half`" in card


def test_wrong_config_class_is_named():
    with pytest.raises(TypeError, match=r"`args` of SPOTrainer must be a SPOConfig, got a MethodConfig"):
        build(SPOTrainer, MethodConfig, num_generations=2)


# --------------------------------------------------------------------------------------------------------- blends


def first_advantages(self, rollouts):
    return torch.arange(len(rollouts), dtype=torch.float)


def second_advantages(self, rollouts):
    return torch.ones(len(rollouts))


One = advantage("OneTrainer", replaces=("compute_advantages",), compute_advantages=first_advantages)
Two = advantage("TwoTrainer", replaces=("compute_advantages",), compute_advantages=second_advantages)


def watched(cls, seen):
    class Watched(cls):
        def observe(self, rollouts):
            super().observe(rollouts)
            seen.append(rollouts)

    return Watched


class Doubling(MethodTrainer):
    def compute_advantages(self, rollouts):
        return 2 * super().compute_advantages(rollouts)


def test_a_blend_is_the_weighted_sum():
    cls, config = mix(One, Doubling, Two, blend={"OneTrainer": 0.5, "TwoTrainer": -3})
    seen = []
    trainer = train(watched(cls, seen), config, max_steps=1)
    assert seen[0].advantages.tolist() == [
        2 * (0.5 * i - 3) for i in range(8)
    ]  # what refines the advantages refines the sum
    assert trainer.state.log_history[0]["blend/OneTrainer"] == 0.5
    assert trainer.state.log_history[0]["blend/TwoTrainer"] == -3


def test_a_blend_with_trls_own_advantages():
    weights = {"grpo": 1.0, "ngrpo": 0.0}
    blended, config = mix("ngrpo", blend=weights)
    settings = {"epsilon": 0.2, "epsilon_high": 0.2, "ngrpo_drop_all_max": False}
    assert difference(train(blended, config, **settings), train(MethodTrainer)) == 0.0


def test_a_blend_with_advantages_per_token():
    def per_token(self, rollouts):
        return 0.5 * rollouts.mask.float()

    cls, config = mix(
        One,
        advantage("Tokens", replaces=("compute_advantages",), compute_advantages=per_token),
        blend={"OneTrainer": 1, "Tokens": 2},
    )
    seen = []
    train(watched(cls, seen), config, max_steps=1)
    expected = torch.arange(8.0).unsqueeze(1) + seen[0].mask
    assert torch.equal(seen[0].advantages, expected)


def test_blends_are_cached_and_pickled():
    pair = mix("spo", "bnpo", blend={"spo": 0.5, "bnpo": 1e-20})
    assert pair == mix("bnpo", "spo", blend={"bnpo": 1e-20, "spo": 0.5})
    assert pair != mix("bnpo", "spo", blend={"bnpo": 0.5, "spo": 0.5})
    assert pair.Trainer.__name__ == "BNPOSPOBlendTrainer"
    code = "import pickle, sys; c = pickle.load(sys.stdin.buffer); print(c.Trainer.__doc__, c.Config.__name__)"
    result = subprocess.run([sys.executable, "-c", code], input=pickle.dumps(pair), capture_output=True, check=True)
    assert b"1e-20 bnpo" in result.stdout and b"BNPOSPOBlendConfig" in result.stdout
    three = mix("spo", "bnpo", "clip_cov", blend={"spo": 0.5, "bnpo": 0.5})
    assert three.Trainer.__name__ == "BNPOSPOBlendClipCovTrainer" and pickle.loads(pickle.dumps(three)) == three


@pytest.mark.parametrize(
    ("blend", "message"),
    [
        ({"spo": 0.5}, "'bnpo' is missing"),
        ({"spo": 0.5, "bnpo": 0.5, "empg": 1}, "'empg', which has no advantages of its own"),
        ({"spo": 0.5, "bnpo": float("nan")}, "finite numbers, got nan for 'bnpo'"),
        ({"spo": 0.5, "bnpo": "much"}, "finite numbers"),
    ],
)
def test_a_blend_that_does_not_fit(blend, message):
    with pytest.raises(ValueError, match=message):
        mix("spo", "bnpo", "empg", blend=blend)
    with pytest.raises(ValueError, match="at least two"):
        mix("spo", blend={"spo": 1})
    with pytest.raises(MixingError, match="contradict"):
        mix("clip_cov", "kl_cov", "spo", blend={"grpo": 1, "spo": 1})


def test_trls_ways_to_its_own_advantages_are_refused_where_another_replaces_them():
    settings = {"multi_objective_aggregation": "normalize_then_sum"}
    with pytest.raises(ValueError, match=r"`multi_objective_aggregation=.normalize_then_sum.` .* which NGRPOTrainer"):
        build(mix("ngrpo").Trainer, **settings)
    for blend in ({"bnpo": 0.5, "ngrpo": 0.5}, {"bnpo": 0.5, "ngrpo": 0.5, "grpo": 1.0}):
        cls, config = mix("bnpo", "ngrpo", blend=blend)
        if "grpo" in blend:
            build(cls, config, **settings)
        else:
            with pytest.raises(ValueError, match="which BNPONGRPOBlendTrainer replaces"):
                build(cls, config, **settings)
