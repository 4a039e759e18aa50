import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from harness import build, difference, launch, parameters
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig
from transformers import AutoModelForCausalLM
from trl import GRPOConfig, GRPOTrainer, SFTConfig, SFTTrainer

from trl_ext import MethodTrainer, SubnetworkMaskCallback, UpdateSparsityCallback, UpdateSparsityConfig
from trl_ext.callbacks.update_sparsity import (
    MASK_FILE,
    MOVED_FILE,
    MaskedParameters,
    agreement,
    copy_weights,
    density,
    is_unchanged,
    load_mask,
    overlap,
    random_mask,
    rank_share,
    read_weights,
    save_mask,
    sparsity,
    sparsity_table,
    three_way_split,
    update_delta,
    update_mask,
)
from trl_ext.tasks import POLICY_PATH, arithmetic


START = {"w": [1, 0.5, 0.01, -0.25, 2, 0], "b": [0.001, 0.1]}
END = {"w": [1.001, 0.5005, 0.01002, -0.25, 2.02, 1e-6], "b": [0.001, 0.1004]}
TOLERANCES = [0, 1e-5, 1e-4, 1e-3]


# ------------------------------------------------------------------------------------------------------- the equations


@pytest.mark.parametrize(
    ("dtype", "shares"), [("bf16", [0.625, 0.75, 0.75, 0.875]), ("fp32", [0.25, 0.375, 0.5, 0.75])]
)
def test_worked_sparsity(dtype, shares):
    assert [sparsity(START, END, tolerance, dtype) for tolerance in TOLERANCES] == shares
    assert density(START, END, dtype) == 1 - shares[0]
    table = sparsity_table(START, END, TOLERANCES, [dtype])
    assert table["figures"][dtype] == dict(zip(["0", "1e-05", "0.0001", "0.001"], shares, strict=True)) | {
        "density": 1 - shares[0]
    }


def test_worked_deltas():
    weights = update_delta(START["w"], END["w"]).double()
    assert weights.tolist() == pytest.approx([0, 0, 0, 0, 0.015625, 9.98378e-07], abs=1e-11)
    assert update_delta(START["b"], END["b"], "bfloat16").double().tolist() == pytest.approx(
        [0, 0.000488281], abs=1e-8
    )
    assert update_delta(START["w"], END["w"]).dtype == torch.bfloat16


def test_worked_overlap():
    first, second = [1, 1, 1, 0, 0, 0, 1, 0], [1, 0, 1, 1, 0, 0, 1, 1]
    assert overlap(first, second) == (0.75, 0.6, 0.625, 0.5)
    split = ({"a": first[:3], "b": first[3:]}, {"b": second[3:], "a": second[:3]})
    assert overlap(*split) == (0.75, 0.6, 0.625, 0.5)
    assert overlap([0, 0], [0, 1]) == (None, 0.0, 0.5, 0.0)
    assert overlap([1, 0], np.zeros(2)) == (0.0, None, 0.0, 0.5)
    with pytest.raises(ValueError, match="same parameters"):
        overlap({"a": [1]}, {"b": [1]})
    with pytest.raises(ValueError, match="one shape"):
        overlap([1], [1, 0])
    with pytest.raises(ValueError, match="no entries"):
        overlap([], [])


@pytest.mark.parametrize(
    ("restore", "weights"), [(False, [0.7811, 1.9602, -1.172318]), (True, [0.7811, 2, -1.172318])]
)
def test_worked_masked_training(restore, weights):
    parameter = torch.nn.Parameter(torch.tensor([1.0, 2.0, -1.0], dtype=torch.float64))
    optimizer = torch.optim.AdamW([parameter], lr=0.1, weight_decay=0.1)
    masked = MaskedParameters({"w": parameter}, {"w": [1, 0, 1]})
    for gradient in ([1, 1, 1], [1, -1, 0.5]):
        optimizer.zero_grad()
        for _ in range(2):  # accumulated
            (parameter * torch.tensor(gradient, dtype=torch.float64) / 2).sum().backward()
        assert parameter.grad.tolist() == [gradient[0], 0, gradient[2]]
        optimizer.step()
        if restore:
            masked.restore()
    assert parameter.tolist() == pytest.approx(weights, abs=1e-6)
    assert optimizer.state[parameter]["exp_avg"][1] == optimizer.state[parameter]["exp_avg_sq"][1] == 0
    masked.remove()
    parameter.grad = None
    parameter.sum().backward()
    assert parameter.grad.tolist() == [1, 1, 1]


def test_masked_gradients_are_zero_though_they_were_not_numbers():
    parameter = torch.nn.Parameter(torch.ones(2))
    MaskedParameters({"w": parameter}, {"w": [1, 0]})
    (parameter * torch.tensor([2.0, math.inf])).sum().backward()
    (parameter * torch.tensor([2.0, math.nan])).sum().backward()
    assert parameter.grad.tolist() == [4, 0]


def test_tolerance_is_rounded_as_the_weights_are():
    bound = float(torch.tensor(1e-5, dtype=torch.bfloat16))
    assert bound > 1e-5
    assert sparsity([0.0], [bound], 1e-5) == 1
    assert sparsity([0.0], [bound], 1e-5, "fp32") == 0
    assert sparsity([0.0], [1.01 * bound], 1e-5) == 0
    assert sparsity([-4e-6], [4e-6], 1e-5) == 1  # absolute: a flip of the sign too


def test_numbers_that_are_none():
    start, end = [math.nan, 1.0, math.inf, 0.0], [math.nan, math.nan, math.inf, 0.0]
    assert is_unchanged(start, end, 1e-5).tolist() == [False, False, True, True]
    assert sparsity_table({"w": start}, {"w": end})["nan"] == 2


def test_what_is_in_one_model_only_is_excluded():
    start = {"both": torch.zeros(2), "gone": torch.zeros(2), "shape": torch.zeros(2), "int": torch.zeros(2).int()}
    end = {"new": torch.zeros(2), "int": torch.zeros(2).int(), "shape": torch.zeros(3), "both": torch.tensor([0.0, 1])}
    table = sparsity_table(start, end)
    assert table["excluded"] == ["gone", "shape", "int", "new"]
    assert [row["name"] for row in table["tensors"]] == ["both"]
    assert sparsity(start, end) == table["figures"]["bf16"]["1e-05"] == 0.5
    assert update_mask(start, end)["both"].tolist() == [False, True]
    with pytest.raises(ValueError, match="share no parameter"):
        sparsity({"a": [1.0]}, {"b": [1.0]})
    with pytest.raises(ValueError, match="share no parameter"):
        sparsity_table({"a": [1.0]}, {"b": [1.0]})
    with pytest.raises(ValueError, match="one shape"):
        sparsity([1.0], [1.0, 2.0])
    with pytest.raises(ValueError, match=r"`dtype`.*fp7"):
        sparsity([1.0], [1.0], dtype="fp7")


def test_layers_are_weighted_by_entries():
    start = {"m.layers.0.a": torch.zeros(3), "m.layers.0.b": torch.zeros(1), "m.layers.10.a": torch.zeros(2), "e": [0]}
    end = {**start, "m.layers.0.b": torch.ones(1), "m.layers.10.a": torch.ones(2)}
    layers = sparsity_table(start, end)["layers"]
    assert list(layers) == ["m.layers.0", "m.layers.10", "other"]
    assert layers["m.layers.0"]["figures"]["bf16"] == {"density": 0.25, "1e-05": 0.75}
    assert layers["m.layers.0"]["tensor_mean_density"] == {"bf16": 0.5}
    assert layers["m.layers.10"]["figures"]["bf16"]["density"] == 1


def test_ranks():
    zero, full = torch.zeros(3, 5), torch.eye(3, 5)
    first = torch.zeros(3, 5).index_fill_(0, torch.tensor([1]), 0.5)
    assert rank_share(zero, full) == 1
    assert rank_share(zero, first) == pytest.approx(1 / 3)
    start = {"a.weight": zero, "b.weight": zero, "norm.weight": zero, "bias": zero[0], "empty": zero[:0]}
    end = {"a.weight": full, "b.weight": first, "norm.weight": full, "bias": full[0], "empty": zero[:0]}
    assert rank_share(start, end) == pytest.approx((1 + 1 / 3) / 2)
    assert rank_share([0.0], [1.0]) is None
    # The update is rounded before its rank is taken: what bfloat16 does not store has no rank.
    assert rank_share(torch.ones(3, 5), 1 + 1e-4 * full) == 0
    assert rank_share(torch.ones(3, 5), 1 + 1e-4 * full, "fp32") == 1


ENTRY = st.floats(-2, 2, width=32) | st.sampled_from([0.0, 1e-5, -1e-5, 1e-3, math.nan])


@given(
    st.lists(st.tuples(ENTRY, ENTRY), min_size=1, max_size=20),
    st.sampled_from([0, 1e-5, 1e-3, 0.5]),
    st.sampled_from(["bf16", "fp16", "fp32"]),
    st.integers(0, 20),
)
@settings(deadline=None)
def test_counts_are_those_of_a_loop(entries, tolerance, dtype, cut):
    torch_dtype = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[dtype]
    start, end = ([row[i] for row in entries] for i in (0, 1))
    unchanged = []
    for one, two in entries:
        one, two = torch.tensor(one).to(torch_dtype).item(), torch.tensor(two).to(torch_dtype).item()
        change = torch.tensor(two - one, dtype=torch.float64).to(torch_dtype).item()
        unchanged.append(abs(change) <= torch.tensor(tolerance, dtype=torch_dtype).item())
    share = sum(unchanged) / len(entries)
    assert sparsity(start, end, tolerance, dtype) == share
    assert agreement(end, start, tolerance, dtype) == share
    parts = ({"a": x[:cut], "b": x[cut:]} for x in (start, end))
    assert sparsity(*parts, tolerance, dtype) == share  # however the entries are spread over parameters
    assert update_mask(start, end, tolerance, dtype).tolist() == [not same for same in unchanged]


@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=20))
@settings(deadline=None)
def test_overlap_and_split_are_those_of_sets(entries):
    first, second = (np.array([row[i] for row in entries]) for i in (0, 1))
    one, two = set(np.flatnonzero(first)), set(np.flatnonzero(second))
    share, n = overlap(first, second), len(entries)
    assert share.first == (len(one & two) / len(one) if one else None)
    assert share.second == (len(one & two) / len(two) if two else None)
    assert (share.first_chance, share.second_chance) == (len(two) / n, len(one) / n)
    split = three_way_split(first, first | second)
    assert sum(split.values()) == pytest.approx(1)
    assert (split["subnetwork"], split["cancelled"]) == (len(one) / n, len(two - one) / n)
    assert three_way_split({"a": first}, {"a": first | second}) == split


@given(shapes=st.lists(st.lists(st.integers(0, 5), max_size=3), max_size=3), seed=st.integers(0, 99))
@settings(deadline=None)
def test_packed_masks_come_back(tmp_path_factory, shapes, seed):
    masks = random_mask({str(i): shape for i, shape in enumerate(shapes)}, 0.4, seed)
    path = str(tmp_path_factory.mktemp("mask") / "mask.safetensors")
    save_mask(masks, path)
    loaded = load_mask(path)
    assert {n: m.tolist() for n, m in loaded.items()} == {n: m.tolist() for n, m in masks.items()}
    assert all(m.dtype == torch.bool for m in loaded.values())


def test_a_packed_mask_is_small(tmp_path):
    save_mask({"w": torch.ones(80, 1000, dtype=torch.bool)}, str(tmp_path / "mask"))
    assert 10_000 <= (tmp_path / "mask").stat().st_size < 11_000


def test_random_masks():
    shapes = {"a": (100, 100), "b": (50, 100)}
    masks = random_mask(shapes, 0.2, seed=1)
    assert masks["a"].float().mean() == pytest.approx(0.2, abs=0.02)
    assert (random_mask(dict(reversed(shapes.items())), 0.2, seed=1)["a"] == masks["a"]).all()
    share = overlap(masks, random_mask(shapes, 0.2, seed=2))
    assert share.first == pytest.approx(share.first_chance, abs=0.03)


def test_sparsity_follows_precision_and_learning_rate():
    shares = {}
    for dtype in (torch.bfloat16, torch.float32):
        for rate in (1e-6, 1e-5, 1e-4, 1e-3):
            torch.manual_seed(0)
            net = torch.nn.Sequential(torch.nn.Linear(32, 64), torch.nn.Tanh(), torch.nn.Linear(64, 8)).to(dtype)
            start = {name: p.detach().clone() for name, p in net.named_parameters()}
            optimizer = torch.optim.AdamW(net.parameters(), lr=rate, weight_decay=0)
            inputs, targets = torch.randn(64, 32, dtype=dtype), torch.randn(64, 8, dtype=dtype)
            for _ in range(20):
                optimizer.zero_grad()
                ((net(inputs) - targets) ** 2).mean().backward()
                optimizer.step()
            for compared in ("bf16", "fp32"):
                shares[dtype, rate, compared] = sparsity(start, dict(net.named_parameters()), 1e-5, compared)
    low, high = shares[torch.bfloat16, 1e-6, "bf16"], shares[torch.bfloat16, 1e-3, "bf16"]
    assert low > 0.99
    assert high < 0.1
    for rate in (1e-6, 1e-5):  # in float32, the sparsity is that of rounding for the comparison, or none
        kept, rounded = shares[torch.float32, rate, "fp32"], shares[torch.float32, rate, "bf16"]
        assert kept < rounded < shares[torch.bfloat16, rate, "bf16"]
    assert shares[torch.float32, 1e-4, "fp32"] < 0.1


# ------------------------------------------------------------------------------------------------------------ settings


@pytest.mark.parametrize(
    ("bad", "match"),
    [
        ({"sparsity_dtype": "int8"}, r"`sparsity_dtype` must be bf16.*'int8'"),
        ({"sparsity_tolerances": []}, "`sparsity_tolerances` must be at least one"),
        ({"sparsity_tolerances": [1e-5, -1]}, r"`sparsity_tolerances`.*-1"),
        ({"sparsity_tolerances": math.nan}, "`sparsity_tolerances`"),
        ({"sparsity_every": -1}, r"`sparsity_every`.*-1"),
        ({"mask_tolerance": -1e-5}, r"`mask_tolerance`.*-1e-05"),
        ({"mask_source": "random:1.5"}, r"`mask_source`.*random:1\.5"),
        ({"mask_source": "random:few"}, r"`mask_source`.*random:few"),
    ],
)
def test_settings_out_of_range(bad, match):
    with pytest.raises(ValueError, match=match):
        UpdateSparsityConfig(**bad)


def test_defaults():
    config = UpdateSparsityConfig()
    assert (config.sparsity_dtype, config.sparsity_tolerances, config.sparsity_every) == ("bfloat16", [1e-5], 0)
    assert (config.mask_tolerance, config.mask_source, config.mask_restore) == (0, None, True)
    assert UpdateSparsityConfig(sparsity_dtype="fp16", sparsity_tolerances=0).sparsity_tolerances == [0]


# ---------------------------------------------------------------------------------------------------------- measuring


def grpo(folder, *callbacks, trainer_class=GRPOTrainer, config_class=GRPOConfig, resume=None, **settings):
    """A short run; `callbacks` are made from the trainer."""
    trainer = build(trainer_class, config_class, out=folder, **settings)
    for callback in callbacks:
        trainer.add_callback(callback(trainer))
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def measuring(**settings):
    return lambda trainer: UpdateSparsityCallback(UpdateSparsityConfig(**settings), trainer)


def masking(source, **settings):
    return lambda trainer: SubnetworkMaskCallback(UpdateSparsityConfig(mask_source=str(source), **settings), trainer)


def logged(trainer, name):
    return [
        (e["step"], e[f"update_sparsity/{name}"]) for e in trainer.state.log_history if f"update_sparsity/{name}" in e
    ]


def weights_of(path=POLICY_PATH):
    return dict(AutoModelForCausalLM.from_pretrained(path).named_parameters())


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """A run without callbacks."""
    folder = tmp_path_factory.mktemp("plain")
    trainer = grpo(folder, max_steps=4, learning_rate=1e-4)
    trainer.save_model(str(folder))
    return trainer


def test_a_measured_run_is_the_same_run(tmp_path, plain):
    own = grpo(
        tmp_path,
        measuring(sparsity_every=3, sparsity_tolerances=[1e-5, 0], sparsity_rank=True, sparsity_track=True),
        max_steps=4,
        learning_rate=1e-4,
        logging_steps=2,
    )
    assert difference(own, plain) == 0
    start, end = weights_of(), parameters(own)
    assert logged(own, "bf16/1e-05") == [
        (3, logged(own, "bf16/1e-05")[0][1]),
        (4, pytest.approx(sparsity(start, end, 1e-5), abs=1e-12)),
    ]
    assert logged(own, "fp32/1e-05")[1][1] == pytest.approx(sparsity(start, end, 1e-5, "fp32"), abs=1e-12)
    assert logged(own, "bf16/0")[1][1] + logged(own, "bf16/density")[1][1] == pytest.approx(1)
    assert [value for _, value in logged(own, "trained_bits")] == [32, 32]
    # Its own entries leave those of the trainer as they were: all steps are in the averages of every second log.
    rewards = [entry["reward"] for entry in plain.state.log_history if "reward" in entry]
    means = [sum(rewards[i : i + 2]) / 2 for i in (0, 2)]
    assert [e["reward"] for e in own.state.log_history if "reward" in e] == pytest.approx(means)

    table = json.loads((tmp_path / "update_sparsity.json").read_text())
    assert table["step"] == 4
    assert table["trained_dtype"] == "fp32"
    assert table["start"]["path"] == POLICY_PATH
    assert table["entries"] == sum(p.numel() for p in end.values())
    assert [row["name"] for row in table["tensors"]] == list(end)
    assert table["figures"]["bf16"]["1e-05"] == logged(own, "bf16/1e-05")[1][1]
    for row in table["tensors"]:
        assert row["figures"]["fp32"]["density"] == density(start[row["name"]], end[row["name"]], "fp32")
    split = table["split"]
    assert split["subnetwork"] == pytest.approx(1 - sparsity(start, end, 1e-5))
    assert 0 < split["cancelled"] < split["never"] < 1
    ranks = [row["rank_share"] for row in table["tensors"] if len(row["shape"]) == 2]
    assert table["rank_share"] == pytest.approx(sum(ranks) / len(ranks)) == logged(own, "rank_share")[0][1]


def test_a_resumed_run_is_measured_from_its_own_start(tmp_path):
    settings = {"save_strategy": "steps", "save_steps": 2, "learning_rate": 1e-4}
    measure = measuring(sparsity_track=True)
    whole = grpo(tmp_path / "whole", measure, max_steps=4, **settings)
    checkpoint = str(tmp_path / "whole" / "checkpoint-2")
    assert Path(checkpoint, MOVED_FILE).is_file()
    resumed = grpo(tmp_path / "whole", measure, max_steps=4, resume=checkpoint, **settings)
    for name in ("bf16/1e-05", "fp32/density", "never", "cancelled"):
        assert logged(resumed, name) == logged(whole, name)
    # A trainer built from the checkpoint finds the start at the path that the checkpoint names.
    again = grpo(tmp_path / "whole", measure, max_steps=4, resume=checkpoint, model=checkpoint, **settings)
    assert logged(again, "bf16/1e-05") == logged(whole, "bf16/1e-05")

    state = json.loads(Path(checkpoint, "trainer_state.json").read_text())
    state["stateful_callbacks"]["trl_ext.update_sparsity"] = {"path": "/nowhere", "sha256": "0" * 64}
    Path(checkpoint, "trainer_state.json").write_text(json.dumps(state))
    with pytest.raises(ValueError, match=r"started from weights with hash 000000000000.*nowhere"):
        grpo(tmp_path / "whole", measure, max_steps=4, resume=checkpoint, **settings)


def test_weights_in_half_precision_have_one_figure(tmp_path):
    model = AutoModelForCausalLM.from_pretrained(POLICY_PATH, dtype=torch.bfloat16)
    trainer = grpo(tmp_path, measuring(), model=model, max_steps=1, learning_rate=1e-4)
    assert logged(trainer, "trained_bits") == [(1, 16)]
    assert not logged(trainer, "fp32/1e-05")
    assert 0 < logged(trainer, "bf16/1e-05")[0][1] < 1


def test_supervised_training(tmp_path):
    data = arithmetic().select(range(16)).map(lambda row: {"text": f"{row['prompt']}{row['answer']}"})
    args = SFTConfig(
        str(tmp_path), max_steps=2, use_cpu=True, bf16=False, report_to=[], learning_rate=1e-4, disable_tqdm=True,
        gradient_checkpointing=False, save_strategy="no",
    )  # fmt: skip
    trainer = SFTTrainer(POLICY_PATH, args, train_dataset=data.select_columns("text"))
    trainer.add_callback(UpdateSparsityCallback(trainer=trainer))
    trainer.add_callback(masking("random:0.5")(trainer))
    trainer.train()
    assert logged(trainer, "fp32/density")[0][1] == pytest.approx(0.5, abs=0.1)


def test_lora_is_measured_merged(tmp_path):
    lora = LoraConfig(
        target_modules=["q_proj", "embed_tokens"], modules_to_save=["model.norm"], r=2, task_type="CAUSAL_LM"
    )
    trainer = grpo(tmp_path, measuring(), max_steps=2, peft_config=lora, learning_rate=1e-2)
    before = parameters(trainer)
    measured = copy_weights(trainer.model)
    assert all((before[name] == weight).all() for name, weight in parameters(trainer).items())
    merged = dict(trainer.model.merge_and_unload().named_parameters())
    assert measured.keys() == merged.keys() == weights_of().keys()
    for name, weight in merged.items():
        assert (measured[name] - weight).abs().max() < 1e-7, name
    start = weights_of()
    changed = [name for name in merged if sparsity(start[name], measured[name], 0, "fp32") < 1]
    assert {name.split(".")[-2] for name in changed} == {"q_proj", "embed_tokens", "norm"}
    assert logged(trainer, "fp32/1e-05")[0][1] == pytest.approx(sparsity(start, measured, 1e-5, "fp32"))


def test_adapters_that_are_no_product_of_matrices_are_refused():
    lora = LoraConfig(target_modules=["q_proj"], use_dora=True, task_type="CAUSAL_LM")
    with pytest.raises(ValueError, match=r"q_proj.*DoRA.*merge it"):
        UpdateSparsityCallback(trainer=build(GRPOTrainer, GRPOConfig, peft_config=lora))


def test_tied_weights_count_once():
    class Tied(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.head = torch.nn.Embedding(3, 2), torch.nn.Linear(2, 3, bias=False)
            self.head.weight = self.embed.weight
            self.register_buffer("other", torch.zeros(9))

    assert [name for name, _ in read_weights(Tied())] == ["embed.weight"]


@pytest.mark.parametrize("callback", [measuring(), masking("random:0.5")])
def test_sharded_weights_are_refused(callback, monkeypatch):
    from accelerate.utils import DistributedType

    trainer = build(GRPOTrainer, GRPOConfig)
    monkeypatch.setattr(trainer.accelerator.state, "distributed_type", DistributedType.FSDP)
    with pytest.raises(ValueError, match=r"Callback needs whole parameters.*FSDP.*DDP"):
        callback(trainer)


# ------------------------------------------------------------------------------------------------------------- masking


HARD = {"learning_rate": 1e-3, "weight_decay": 0.5, "max_grad_norm": 0.01, "gradient_accumulation_steps": 2}
HARD |= {"per_device_train_batch_size": 4}


def frozen_entries_stay(trainer, masks):
    """Whether all entries outside the mask are at their start, and most of those inside are not."""
    start, end = weights_of(), parameters(trainer)
    moved = torch.cat([(end[name] != start[name])[mask].flatten() for name, mask in masks.items()])
    return all((end[name] == start[name])[~mask].all() for name, mask in masks.items()) and moved.float().mean() > 0.9


@pytest.mark.parametrize("trainer_class", [GRPOTrainer, MethodTrainer])
def test_frozen_entries_do_not_move(tmp_path, trainer_class):
    config_class = getattr(trainer_class, "config_class", GRPOConfig)
    trainer = grpo(tmp_path, masking("random:0.3"), trainer_class=trainer_class, config_class=config_class, **HARD)
    masks = load_mask(tmp_path / MASK_FILE)
    assert frozen_entries_stay(trainer, masks)
    for name, parameter in trainer.model.named_parameters():
        moments = trainer.optimizer.state[parameter]
        assert not moments["exp_avg"][~masks[name]].any()
        assert moments["exp_avg"][masks[name]].any()
    if trainer_class is GRPOTrainer:
        decayed = grpo(tmp_path / "decayed", masking("random:0.3", mask_restore=False), **HARD)
        assert not frozen_entries_stay(decayed, masks)


def test_the_clipped_norm_is_that_of_the_subnetwork(tmp_path):
    settings = {"max_steps": 1, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}
    probes = []

    class Probe(GRPOTrainer):
        def _clip_grad_norm(self, model):
            probes.append({name: p.grad.clone() for name, p in model.named_parameters()})
            return super()._clip_grad_norm(model)

    grpo(tmp_path, trainer_class=Probe, **settings)
    trainer = grpo(tmp_path, masking("random:0.3"), trainer_class=Probe, **settings)
    masks = load_mask(tmp_path / MASK_FILE)
    free, masked = probes
    assert all((torch.where(masks[name], free[name], 0) == masked[name]).all() for name in masks)
    norm = math.sqrt(sum(float((grad**2).sum()) for grad in masked.values()))
    assert trainer.state.log_history[0]["grad_norm"] == pytest.approx(norm, rel=1e-5)


def test_a_mask_of_ones_changes_nothing(tmp_path, plain):
    save_mask(
        {name: torch.ones(p.shape, dtype=torch.bool) for name, p in weights_of().items()}, str(tmp_path / "ones")
    )
    assert difference(grpo(tmp_path, masking(tmp_path / "ones"), max_steps=4, learning_rate=1e-4), plain) == 0


def test_a_mask_of_zeros_is_refused(tmp_path):
    masks = {name: torch.zeros(p.shape, dtype=torch.bool) for name, p in weights_of().items()}
    save_mask(masks, str(tmp_path / "zeros"))
    trainer = build(GRPOTrainer, GRPOConfig)
    with pytest.raises(ValueError, match="zero everywhere"):
        masking(tmp_path / "zeros")(trainer)
    with pytest.raises(ValueError, match="zero everywhere"):  # a finished run that changed nothing
        masking(POLICY_PATH)(trainer)
    masks.pop(next(iter(masks)))
    save_mask(masks, str(tmp_path / "less"))
    with pytest.raises(ValueError, match=r"must cover 'model\.embed_tokens\.weight'.*has none"):
        masking(tmp_path / "less")(trainer)


def test_the_subnetwork_of_a_finished_run(tmp_path, plain):
    trainer = build(GRPOTrainer, GRPOConfig, out=tmp_path, max_steps=4, learning_rate=1e-4)
    callback = masking(plain.args.output_dir, mask_tolerance=1e-5)(trainer)
    expected = update_mask(weights_of(), parameters(plain), 1e-5)
    assert all((callback.masks[name] == mask).all() for name, mask in expected.items())
    trainer.add_callback(callback)
    trainer.train()
    assert frozen_entries_stay(trainer, expected)
    assert agreement(parameters(trainer), parameters(plain)) > agreement(weights_of(), parameters(plain))


def test_a_masked_run_is_resumed(tmp_path):
    settings = HARD | {"save_strategy": "steps", "save_steps": 2, "max_steps": 4}
    whole = grpo(tmp_path, masking("random:0.3"), **settings)
    checkpoint = tmp_path / "checkpoint-2"
    resumed = grpo(tmp_path, masking("random:0.2"), resume=str(checkpoint), **settings)  # the checkpoint's mask counts
    assert difference(whole, resumed) == 0
    assert frozen_entries_stay(resumed, load_mask(checkpoint / MASK_FILE))
    (checkpoint / MASK_FILE).rename(tmp_path / "mask")
    with pytest.raises(ValueError, match=r"another mask than that of `mask_source` 'random:0.2'.*set `mask_source`"):
        grpo(tmp_path, masking("random:0.2"), resume=str(checkpoint), **settings)
    named = grpo(tmp_path, masking(tmp_path / "mask"), resume=str(checkpoint), **settings)
    assert difference(whole, named) == 0


def test_masks_that_cannot_be(tmp_path):
    with pytest.raises(ValueError, match="needs a `mask_source`"):
        SubnetworkMaskCallback(trainer=build(GRPOTrainer, GRPOConfig))
    with pytest.raises(ValueError, match="needs the `trainer`"):
        SubnetworkMaskCallback(UpdateSparsityConfig(mask_source="random:0.5"))
    with pytest.raises(ValueError, match=r"`mask_source` '.*nowhere' is neither"):
        masking(tmp_path / "nowhere")(build(GRPOTrainer, GRPOConfig))
    lora = LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM")
    with pytest.raises(ValueError, match=r"`peft_config` \(.*LORA.*leave the adapter out"):
        masking("random:0.5")(build(GRPOTrainer, GRPOConfig, peft_config=lora))


@pytest.mark.slow
def test_two_processes(tmp_path):
    worker = Path(__file__).with_name("update_sparsity_worker.py")
    launch(worker, 2, tmp_path)
    first, second = (json.loads((tmp_path / f"result_{i}.json").read_text()) for i in range(2))
    assert first == second  # hash of the weights, log
    assert first["log"][0]["step"] == 2
    assert first["frozen_moved"] == 0
    assert first["log"][0]["update_sparsity/fp32/density"] == pytest.approx(0.3, abs=0.05)
