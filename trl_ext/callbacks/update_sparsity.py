"""Update sparsity and subnetwork-only finetuning (Mukherjee et al., Reinforcement Learning Finetunes Small Subnetworks
in Large Language Models, arXiv 2505.11711)."""

import contextlib
import hashlib
import json
import math
import os
import re
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
from accelerate.utils import DistributedType, broadcast_object_list
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import Trainer, TrainerCallback

from ..core.prompts import make_generator


DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
SHORT = {dtype: name for name, dtype in DTYPES.items()}
MASK_FILE, MOVED_FILE, TABLE_FILE = (
    "subnetwork_mask.safetensors",
    "update_sparsity_moved.safetensors",
    "update_sparsity.json",
)
START, MASK = "trl_ext.update_sparsity", "trl_ext.subnetwork_mask"  # keys in the trainer's state


@dataclass
class UpdateSparsityConfig:
    r"""
    Configuration of [`UpdateSparsityCallback`] and [`SubnetworkMaskCallback`].

    Parameters:
        sparsity_dtype (`str`, *optional*, defaults to `"bfloat16"`):
            Precision to which both models are cast, and in which they are subtracted and compared: `"bf16"`,
            `"fp16"`, `"fp32"`, or these names in full.
        sparsity_tolerances (`list[float]`, *optional*, defaults to `[1e-5]`):
            Largest changes that count as none; 0 asks for equality.
        sparsity_every (`int`, *optional*, defaults to `0`):
            Optimizer steps between two measurements; 0 measures at the end of training only.
        sparsity_rank (`bool`, *optional*, defaults to `False`):
            Whether to compute the rank of every matrix's update at the end, which takes a singular value
            decomposition each.
        sparsity_track (`bool`, *optional*, defaults to `False`):
            Whether to follow after every step which entries have ever moved, for the split into never updated,
            cancelled and subnetwork; copies the weights to the CPU at every step.
        mask_source (`str`, *optional*):
            Subnetwork to train: folder or Hub id of a finished model that started from the same weights, a mask file
            or a folder with one, or `"random:<density>"`, drawn with the run's seed.
        mask_tolerance (`float`, *optional*, defaults to `0.0`):
            Change beyond which an entry belongs to the subnetwork of a finished model.
        mask_restore (`bool`, *optional*, defaults to `True`):
            Whether frozen entries are put back after every optimizer step; without it, weight decay moves them.
    """

    sparsity_dtype: str = "bfloat16"
    sparsity_tolerances: list[float] = field(default_factory=lambda: [1e-5])
    sparsity_every: int = 0
    sparsity_rank: bool = False
    sparsity_track: bool = False
    mask_source: str | None = None
    mask_tolerance: float = 0.0
    mask_restore: bool = True

    def __post_init__(self):
        if isinstance(self.sparsity_tolerances, (int, float)):
            self.sparsity_tolerances = [self.sparsity_tolerances]
        self.sparsity_tolerances = [float(tolerance) for tolerance in self.sparsity_tolerances]
        for name, fine, range_ in (
            ("sparsity_dtype", self.sparsity_dtype in {*SHORT.values(), *map(_full, SHORT)}, "bf16, fp16 or fp32"),
            (
                "sparsity_tolerances",
                self.sparsity_tolerances and all(0 <= t < math.inf for t in self.sparsity_tolerances),
                "at least one number, each at least 0",
            ),
            ("sparsity_every", self.sparsity_every >= 0, "at least 0 (0: at the end only)"),
            ("mask_tolerance", 0 <= self.mask_tolerance < math.inf, "at least 0"),
        ):
            if not fine:
                raise ValueError(f"`{name}` must be {range_}, but is {getattr(self, name)!r}.")
        if (self.mask_source or "").startswith("random:"):
            _density(self.mask_source)


def _full(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _density(source: str) -> float:
    with contextlib.suppress(ValueError):
        density = float(source.removeprefix("random:"))
        if 0 < density <= 1:
            return density
    raise ValueError(
        f"`mask_source` must name a density above 0 and up to 1 after 'random:', such as 'random:0.2', but is "
        f"{source!r}."
    )


# ------------------------------------------------------------------------------------------------------- the equations


def to_dtype(dtype) -> torch.dtype:
    """A torch dtype from itself or its name, such as `"bf16"` or `"bfloat16"`."""
    if isinstance(dtype, torch.dtype):
        return dtype
    found = DTYPES.get(dtype) or next((d for d in SHORT if _full(d) == dtype), None)
    if found is None:
        raise ValueError(f"`dtype` must be one of {', '.join(DTYPES)}, but is {dtype!r}.")
    return found


def _tensor(values) -> torch.Tensor:
    return values.detach() if isinstance(values, torch.Tensor) else torch.as_tensor(np.asarray(values, np.float64))


def _bits(mask) -> torch.Tensor:
    return mask if isinstance(mask, torch.Tensor) and mask.dtype == torch.bool else _tensor(mask) != 0


def matching(start: Mapping, end: Mapping) -> tuple[list[str], list[str]]:
    """
    Parameters that two models share, and those to exclude: in one model only, of another shape, or not floating (as
    quantised ones).

    Args:
        start (`Mapping`), end (`Mapping`):
            Parameters by name.

    Returns:
        `tuple[list[str], list[str]]`: names of the shared and of the excluded parameters, in the order of the models.
    """
    shared, excluded = [], []
    for name in dict.fromkeys([*start, *end]):
        both = name in start and name in end
        if both:
            first, second = _tensor(start[name]), _tensor(end[name])
            both = first.shape == second.shape and first.is_floating_point() and second.is_floating_point()
        (shared if both else excluded).append(name)
    return shared, excluded


def _pairs(start, end) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """The tensors to compare, of two models or two parameters."""
    if isinstance(start, Mapping):
        shared, _ = matching(start, end)
        yield from ((_tensor(start[name]), _tensor(end[name])) for name in shared)
    else:
        first, second = _tensor(start), _tensor(end)
        if first.shape != second.shape:
            raise ValueError(
                f"two versions of a parameter must have one shape, but have {tuple(first.shape)} and "
                f"{tuple(second.shape)}: compare models of the same architecture."
            )
        yield first, second


def update_delta(start, end, dtype="bf16") -> torch.Tensor:
    """
    Change of a parameter, `cast(end) - cast(start)`, both casts and the subtraction in `dtype`.

    Args:
        start, end (tensor or nested sequence of `float`):
            The parameter before and after, of any one shape.
        dtype (`str` or `torch.dtype`, *optional*, defaults to `"bf16"`):
            Precision.

    Returns:
        `torch.Tensor`: of the parameter's shape, in `dtype`.
    """
    dtype = to_dtype(dtype)
    return _tensor(end).to(dtype) - _tensor(start).to(dtype)


def is_unchanged(start, end, tolerance: float = 1e-5, dtype="bf16") -> torch.Tensor:
    """
    Whether each entry changed by at most the tolerance, which is rounded to `dtype` too; equal infinities did not
    change, NaN always did.

    Args:
        start, end (tensor or nested sequence of `float`):
            The parameter before and after, of any one shape.
        tolerance (`float`, *optional*, defaults to `1e-5`):
            Largest absolute change that counts as none.
        dtype (`str` or `torch.dtype`, *optional*, defaults to `"bf16"`):
            Precision of casts, subtraction and comparison.

    Returns:
        `torch.Tensor`: boolean, of the parameter's shape.
    """
    first, second = (_tensor(values).to(to_dtype(dtype)) for values in (start, end))
    bound = torch.tensor(tolerance, dtype=first.dtype, device=first.device)
    return ((second - first).abs() <= bound) | (first == second)


def sparsity(start, end, tolerance: float = 1e-5, dtype="bf16") -> float:
    """
    Share of entries that did not change, each entry of all parameters counting alike.

    Args:
        start, end (tensor, nested sequence of `float`, or a `Mapping` of them by name):
            One parameter, or a whole model with each tied parameter once. What [`matching`] excludes is not counted.
        tolerance (`float`, *optional*, defaults to `1e-5`):
            Largest absolute change that counts as none.
        dtype (`str` or `torch.dtype`, *optional*, defaults to `"bf16"`):
            Precision of casts, subtraction and comparison.

    Returns:
        `float`: between 0 and 1.

    Raises:
        ValueError: if there is nothing to compare.
    """
    masks = [is_unchanged(first, second, tolerance, dtype) for first, second in _pairs(start, end)]
    total = sum(mask.numel() for mask in masks)
    if not total:
        raise ValueError("the two models share no parameter entries: compare models of the same architecture.")
    return sum(int(mask.sum()) for mask in masks) / total


def density(start, end, dtype="bf16") -> float:
    """Share of entries that changed at all (tolerance 0), `1 - sparsity`; arguments as in [`sparsity`]."""
    return 1 - sparsity(start, end, 0.0, dtype)


def agreement(first, second, tolerance: float = 1e-4, dtype="bf16") -> float:
    """Share of entries in which two finished models agree to within the tolerance; arguments as in [`sparsity`]."""
    return sparsity(first, second, tolerance, dtype)


def update_mask(start, end, tolerance: float = 0.0, dtype="bf16"):
    """
    The subnetwork: entries that changed by more than the tolerance.

    Args:
        start, end (tensor, nested sequence of `float`, or a `Mapping` of them by name):
            One parameter, or a model.
        tolerance (`float`, *optional*, defaults to `0.0`):
            Largest absolute change that counts as none.
        dtype (`str` or `torch.dtype`, *optional*, defaults to `"bf16"`):
            Precision of casts, subtraction and comparison.

    Returns:
        `torch.Tensor` or `dict[str, torch.Tensor]`: boolean, of the parameters' shapes.
    """
    if isinstance(start, Mapping):
        names, _ = matching(start, end)
        return {name: update_mask(start[name], end[name], tolerance, dtype) for name in names}
    return ~is_unchanged(start, end, tolerance, dtype)


class Overlap(NamedTuple):
    """How much two subnetworks share: as a share of each, and what independent subnetworks of their sizes share."""

    first: float | None
    second: float | None
    first_chance: float
    second_chance: float


def overlap(first, second) -> Overlap:
    """
    Overlap of two subnetworks.

    Args:
        first, second (tensor or nested sequence of 0 and 1, or a `Mapping` of them by name):
            The masks, over the same entries.

    Returns:
        [`Overlap`]: `|I1 and I2| / |I1|` and `/ |I2|`, None for an empty subnetwork, and their chance levels
        `|I2| / n` and `|I1| / n`.

    Raises:
        ValueError: if the masks are not over the same entries, or over none.
    """
    firsts, seconds = (list(m.values()) if isinstance(m, Mapping) else [m] for m in (first, second))
    if isinstance(first, Mapping) and first.keys() == second.keys():
        seconds = [second[name] for name in first]
    elif isinstance(first, Mapping) or isinstance(second, Mapping):
        raise ValueError("two masks must be over the same parameters: compare subnetworks of one architecture.")
    both = size_1 = size_2 = total = 0
    for one, two in zip(map(_bits, firsts), map(_bits, seconds), strict=True):
        if one.shape != two.shape:
            raise ValueError(f"two masks must have one shape, but have {tuple(one.shape)} and {tuple(two.shape)}.")
        both, total = both + int((one & two).sum()), total + one.numel()
        size_1, size_2 = size_1 + int(one.sum()), size_2 + int(two.sum())
    if not total:
        raise ValueError("the masks have no entries: compare subnetworks of a model with parameters.")
    return Overlap(
        both / size_1 if size_1 else None, both / size_2 if size_2 else None, size_2 / total, size_1 / total
    )


def rank_share(start, end, dtype="bf16") -> float | None:
    """
    Mean over the matrices of the rank of their update as a share of the largest possible one. The update is taken in
    `dtype`, its rank in float32 with the default tolerance of [`torch.linalg.matrix_rank`].

    Args:
        start, end (tensor, nested sequence of `float`, or a `Mapping` of them by name):
            One matrix, or a model, of which all but matrices and weights of norms are skipped.
        dtype (`str` or `torch.dtype`, *optional*, defaults to `"bf16"`):
            Precision of the update.

    Returns:
        `float` or `None`: None if there is no matrix.
    """
    if isinstance(start, Mapping):
        names = [name for name in matching(start, end)[0] if "norm" not in name.lower()]
        start, end = {name: start[name] for name in names}, {name: end[name] for name in names}
    shares = []
    for first, second in _pairs(start, end):
        if first.ndim == 2 and first.numel():
            rank = torch.linalg.matrix_rank(update_delta(first, second, dtype).float())
            shares.append(int(rank) / min(first.shape))
    return sum(shares) / len(shares) if shares else None


def three_way_split(changed, moved) -> dict[str, float]:
    """
    Split of all entries by what happened to them over a run.

    Args:
        changed (tensor or nested sequence of 0 and 1, or a `Mapping` of them by name):
            Whether an entry ended changed, by [`update_mask`].
        moved (of the same form):
            Whether it was ever away from its start after a step.

    Returns:
        `dict[str, float]`: shares `never` (never updated), `cancelled` (moved, but ended unchanged) and `subnetwork`;
        their sum is 1.
    """
    if isinstance(changed, Mapping):
        pairs = [(_bits(changed[name]), _bits(moved[name])) for name in changed]
    else:
        pairs = [(_bits(changed), _bits(moved))]
    total = sum(one.numel() for one, _ in pairs)
    subnetwork = sum(int(one.sum()) for one, _ in pairs)
    cancelled = sum(int((two & ~one).sum()) for one, two in pairs)
    return {
        "never": (total - subnetwork - cancelled) / total,
        "cancelled": cancelled / total,
        "subnetwork": subnetwork / total,
    }


def sparsity_table(start: Mapping, end: Mapping, tolerances=(1e-5,), dtypes=("bf16",)) -> dict:
    """
    All figures of the change from one model to another.

    Args:
        start (`Mapping`), end (`Mapping`):
            Parameters by name, each tied parameter once.
        tolerances (sequence of `float`, *optional*, defaults to `(1e-5,)`):
            Largest changes that count as none.
        dtypes (sequence of `str`, *optional*, defaults to `("bf16",)`):
            Precisions to compare in.

    Returns:
        `dict`: `figures` by dtype and tolerance over all entries, with the `density` (share of entries with any
        change); `entries` and `nan` (entries that are NaN at the end), `excluded` names, `tensors` (a row of the same
        figures for each) and `layers` (entry-weighted figures per layer, and `tensor_mean_density`, the unweighted
        mean over its tensors that the authors' code prints).

    Raises:
        ValueError: if the models share no parameters.
    """
    names, excluded = matching(start, end)
    if not names:
        raise ValueError("the two models share no parameters: compare models of the same architecture.")
    rows, counts = [], []
    for name in names:
        first, second = _tensor(start[name]), _tensor(end[name])
        count = {"entries": first.numel(), "nan": int(second.isnan().sum())}
        for dtype in dtypes:
            for tolerance in (0.0, *tolerances):
                count[dtype, tolerance] = int(is_unchanged(first, second, tolerance, dtype).sum())
        counts.append(count)
        trained = SHORT.get(second.dtype, _full(second.dtype))
        rows.append(
            {"name": name, "shape": list(first.shape), "dtype": trained, **_figures([count], dtypes, tolerances)}
        )
    layers = {}
    for row, count in zip(rows, counts, strict=True):
        layer = re.search(r"^.*?\.\d+(?=\.)", row["name"])
        layers.setdefault(layer[0] if layer else "other", []).append((row, count))
    return {
        **_figures(counts, dtypes, tolerances),
        "excluded": excluded,
        "layers": {
            layer: {
                **_figures([count for _, count in parts], dtypes, tolerances),
                "tensor_mean_density": {
                    d: sum(row["figures"][d]["density"] for row, _ in parts) / len(parts) for d in dtypes
                },
            }
            for layer, parts in layers.items()
        },
        "tensors": rows,
    }


def _figures(counts: list[dict], dtypes, tolerances) -> dict:
    total = {key: sum(count[key] for count in counts) for key in counts[0]}
    n = max(total["entries"], 1)
    figures = {dtype: {"density": (total["entries"] - total[dtype, 0.0]) / n} for dtype in dtypes}
    for key, count in total.items():
        if isinstance(key, tuple) and key[1] in tolerances:
            figures[key[0]][f"{key[1]:g}"] = count / n
    return {"entries": total["entries"], "nan": total["nan"], "figures": figures}


# ---------------------------------------------------------------------------------------------------- models and masks


def read_weights(model) -> Iterator[tuple[str, torch.Tensor]]:
    """
    Name and weight of every parameter of a model, each tied one once. Under LoRA these are the weights that merging
    would give, under the names of the base model; the model itself is not touched.

    Args:
        model (`nn.Module`):
            A model, or a PEFT model with LoRA.

    Raises:
        ValueError: for adapters that are not a product of matrices added to the weight.
    """
    if not hasattr(model, "peft_config"):
        yield from ((name, parameter.detach()) for name, parameter in model.named_parameters())
        return
    from peft.tuners.lora import LoraLayer
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils import ModulesToSaveWrapper

    deltas, skipped, names = {}, set(), {}
    for path, module in model.named_modules():
        if isinstance(module, ModulesToSaveWrapper):
            for adapter, copy in module.modules_to_save.items():
                own = f"{path}.modules_to_save.{adapter}."
                if adapter in module.active_adapters:
                    skipped |= {f"{path}.original_module.{name}" for name, _ in copy.named_parameters()}
                    names |= {f"{own}{name}": f"{path}.{name}" for name, _ in copy.named_parameters()}
                else:
                    skipped |= {f"{own}{name}" for name, _ in copy.named_parameters()}
        if not isinstance(module, BaseTunerLayer):
            continue
        base = module.get_base_layer()
        if not isinstance(module, LoraLayer) or module.lora_variant or any(module.lora_bias.values()):
            raise ValueError(
                f"update sparsity measures merged LoRA weights, but {path!r} has an adapter of another kind "
                f"({type(module).__name__}, DoRA or with a bias): merge it and compare the two models by "
                "`sparsity_table`."
            )
        if not module.merged:  # otherwise it is in the weight
            adapters = [a for a in module.active_adapters if a in module.scaling]
            deltas[id(base.weight)] = [(module, adapter) for adapter in adapters]
        skipped |= {f"{path}.{name}" for name, _ in module.named_parameters() if not name.startswith("base_layer.")}
    for name, parameter in model.named_parameters():
        if name in skipped:
            continue
        name = names.get(name, name).removeprefix("base_model.model.").replace(".base_layer.", ".")
        weight = parameter.detach()
        for module, adapter in deltas.get(id(parameter), ()) if weight.is_floating_point() else ():
            weight = weight + module.get_delta_weight(adapter).detach().to(weight.dtype)
        yield name, weight


def copy_weights(model) -> dict[str, torch.Tensor]:
    """The weights of [`read_weights`] in their own precision, copied to the CPU."""
    return {name: weight.to("cpu", copy=True) for name, weight in read_weights(model)}


def weights_hash(weights: Mapping) -> str:
    """SHA-256 of the names, dtypes, shapes and bytes of a model's weights."""
    digest = hashlib.sha256()
    for name, weight in weights.items():
        digest.update(f"{name} {weight.dtype} {tuple(weight.shape)}\n".encode())
        digest.update(weight.cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def load_weights(model, path: str) -> dict[str, torch.Tensor]:
    """Weights of a saved model of the same class as `model`, in its precision, on the CPU."""
    dtype = next(model.parameters()).dtype
    return dict(read_weights(type(model).from_pretrained(path, dtype=dtype)))


def random_mask(shapes: Mapping, density: float, seed: int) -> dict[str, torch.Tensor]:
    """
    A subnetwork of independently drawn entries.

    Args:
        shapes (`Mapping`):
            Shape by the parameter's name.
        density (`float`):
            Probability of each entry to belong to it.
        seed (`int`):
            The same seed gives the same mask, whatever the order of the parameters.
    """
    return {
        name: torch.rand(tuple(shape), generator=make_generator(seed, f"subnetwork_mask/{name}")) < density
        for name, shape in shapes.items()
    }


def save_mask(masks: Mapping, path: str) -> None:
    """Write boolean tensors by name as packed bits, eight entries per byte, in a safetensors file."""
    packed = {name: torch.from_numpy(np.packbits(mask.cpu().numpy())) for name, mask in masks.items()}
    shapes = json.dumps({name: list(mask.shape) for name, mask in masks.items()})
    save_file(packed, f"{path}.partial", metadata={"shapes": shapes})
    os.replace(f"{path}.partial", path)


def load_mask(path: str) -> dict[str, torch.Tensor]:
    """Read what [`save_mask`] wrote."""
    with safe_open(path, "pt") as file:
        shapes = json.loads((file.metadata() or {}).get("shapes", "null"))
        if shapes is None:
            raise ValueError(f"{path} is not a mask: name a file written by `save_mask`, or the folder of a model.")
        return {
            name: torch.from_numpy(
                np.unpackbits(file.get_tensor(name).numpy(), count=math.prod(shape)).astype(bool).reshape(shape)
            )
            for name, shape in shapes.items()
        }


def check_masks(parameters: Mapping, masks: Mapping) -> None:
    """
    Refuse masks with which parameters cannot be trained.

    Args:
        parameters (`Mapping[str, nn.Parameter]`):
            Parameters by name.
        masks (`Mapping[str, torch.Tensor]`):
            Masks by name.

    Raises:
        ValueError: if a parameter has no mask of its shape, or nothing is left to train.
    """
    for name, parameter in parameters.items():
        if name not in masks or _bits(masks[name]).shape != parameter.shape:
            found = "none" if name not in masks else f"one of shape {tuple(_bits(masks[name]).shape)}"
            raise ValueError(
                f"the mask must cover {name!r} of shape {tuple(parameter.shape)}, but has {found} for it: take it "
                "from a run of the same model."
            )
    if not any(_bits(masks[name]).any() for name in parameters):
        raise ValueError("the mask is zero everywhere, so nothing would train: choose another `mask_source`.")


class MaskedParameters:
    """
    Trains only the entries of parameters inside a mask. Gradients are masked on their way into `.grad`, which is the
    same as masking their sum: accumulation, the average over processes, the norm for clipping and the optimizer all
    see zeros outside.

    Args:
        parameters (`Mapping[str, nn.Parameter]`):
            Parameters by name.
        masks (`Mapping[str, torch.Tensor]`):
            For each of them, True where an entry is trained.

    Raises:
        ValueError: as [`check_masks`].
    """

    def __init__(self, parameters: Mapping, masks: Mapping):
        check_masks(parameters, masks)
        masks = {name: _bits(masks[name]) for name in parameters}
        self._frozen, self._handles = [], []
        for name, parameter in parameters.items():
            if not masks[name].all():
                frozen = ~masks[name].to(parameter.device)
                self._frozen.append((parameter, frozen, parameter.detach().clone()))
                self._handles.append(parameter.register_hook(lambda grad, frozen=frozen: grad.masked_fill(frozen, 0)))

    @torch.no_grad()
    def restore(self) -> None:
        """Put the entries outside the mask back to where they were when this was built."""
        for parameter, frozen, start in self._frozen:
            parameter.copy_(torch.where(frozen, start, parameter))

    def remove(self) -> None:
        """Let all entries train again."""
        for handle in self._handles:
            handle.remove()


def _refuse_sharding(trainer, name: str, deepspeed: bool) -> None:
    """Refuse to go without a trainer, FSDP and ZeRO stage 3, or DeepSpeed altogether (`deepspeed`)."""
    if trainer is None:
        raise ValueError(f"{name} needs the `trainer` whose weights it is about, got None: {name}(config, trainer).")
    kind = trainer.accelerator.distributed_type
    if kind == DistributedType.DEEPSPEED:
        plugin = trainer.accelerator.state.deepspeed_plugin
        found = f"DeepSpeed ZeRO stage {plugin.zero_stage}" if deepspeed or plugin.zero_stage == 3 else None
    else:
        found = "FSDP" if kind == DistributedType.FSDP else None
    if found:
        raise ValueError(
            f"{name} needs whole parameters on every process, but {found} splits them: train with DDP or one "
            "process, or compare the saved models by `sparsity_table`."
        )


class UpdateSparsityCallback(TrainerCallback):
    """
    Measures which share of the weights a run leaves unchanged, of any TRL trainer. From Reinforcement Learning
    Finetunes Small Subnetworks in Large Language Models ([arXiv
    2505.11711](https://huggingface.co/papers/2505.11711)). Training does not change.

    The start are the weights that the trainer was built with; they are copied to the CPU of the main process, in their
    own precision. Their path and hash are part of every checkpoint, so a resumed run is measured from the same start:
    if the trainer was built with other weights then, the start is loaded from that path.

    Logged after every `sparsity_every`-th step and at the end, in the trainer's `log_history` and to its trackers:
    `update_sparsity/<dtype>/<tolerance>` (share of unchanged entries) and `update_sparsity/<dtype>/density` (share
    with any change, as at tolerance 0), each entry counting alike; `update_sparsity/nan` (number of NaN entries);
    `update_sparsity/trained_bits`, the precision in which the weights are trained, without which the figures say
    little. Weights in float32 are compared in float32 and bfloat16 as well. With `sparsity_track`:
    `update_sparsity/never`, `cancelled` and `subnetwork`; with `sparsity_rank`: `update_sparsity/rank_share`.
    `update_sparsity.json` in `output_dir` has the newest figures with a row per parameter.

    Under LoRA, the merged weights are measured (base weights that are quantised are excluded, and listed as such).

    Args:
        config ([`UpdateSparsityConfig`], *optional*):
            Settings.
        trainer (`Trainer`):
            The trainer, before training.

    Raises:
        ValueError: under FSDP or ZeRO stage 3, for adapters other than LoRA, and if a resumed run's start is lost.

    Example:
    ```python
    trainer = GRPOTrainer(...)
    trainer.add_callback(UpdateSparsityCallback(UpdateSparsityConfig(sparsity_every=100), trainer))
    ```
    """

    def __init__(self, config: UpdateSparsityConfig | None = None, trainer=None):
        self.config, self.trainer = config or UpdateSparsityConfig(), trainer
        _refuse_sharding(trainer, type(self).__name__, deepspeed=False)
        self._measured = None
        if trainer.accelerator.is_main_process:
            self._start = copy_weights(self._model)
            self._path = str(getattr(self._model.config, "_name_or_path", ""))
            if unlisted := [name for name, weight in self._start.items() if not weight.is_floating_point()]:
                warnings.warn(
                    f"UpdateSparsityCallback excludes {len(unlisted)} quantised parameters, such as {unlisted[0]}: "
                    "the figures are about the others only.",
                    stacklevel=2,
                )

    @property
    def _model(self):
        return self.trainer.accelerator.unwrap_model(self.trainer.model)

    def on_train_begin(self, args, state, control, **kwargs):
        _refuse_sharding(self.trainer, type(self).__name__, deepspeed=False)
        self._measured = self._moved = None
        if not state.is_world_process_zero:
            return
        known = state.stateful_callbacks.get(START)
        found = weights_hash(self._start)
        if known and known["sha256"] != found:
            self._path, found = known["path"], None
            with contextlib.suppress(OSError, ValueError, RuntimeError):
                self._start = load_weights(self._model, self._path)
                found = weights_hash(self._start)
            if found != known["sha256"]:
                raise ValueError(
                    f"the run started from weights with hash {known['sha256'][:12]}..., which are neither those that "
                    f"the trainer was built with nor those in {self._path!r}: build the trainer with the model that "
                    "the run started from, or leave UpdateSparsityCallback out."
                )
        self._identity = {"path": self._path, "sha256": found}
        state.stateful_callbacks[START] = self._identity
        if self.config.sparsity_track:
            self._moved = {n: torch.zeros(w.shape, dtype=torch.bool) for n, w in self._start.items()}
            path = os.path.join(_checkpoint(args, state), MOVED_FILE)
            if state.global_step:
                if not os.path.isfile(path):
                    raise ValueError(
                        f"`sparsity_track` follows the entries from the start, but there is no {path}: resume from a "
                        "checkpoint in `output_dir` that was written with it, or leave it out."
                    )
                self._moved = load_mask(path)

    def on_step_end(self, args, state, control, **kwargs):
        if self._moved is not None:
            for name, weight in read_weights(self._model):
                self._moved[name] |= update_mask(self._start[name], weight.cpu(), 0.0, self.config.sparsity_dtype)
        if self.config.sparsity_every and state.global_step % self.config.sparsity_every == 0:
            self._measure(args, state)

    def on_epoch_end(self, args, state, control, **kwargs):
        # Some trackers take nothing after the trainer's last log, which is before the end of training.
        if not args.load_best_model_at_end and (control.should_training_stop or state.global_step >= state.max_steps):
            self._measure(args, state, end=True)

    def on_train_end(self, args, state, control, **kwargs):
        if self._measured != (state.global_step, True):
            self._measure(args, state, end=True)
        self._moved = None

    def on_save(self, args, state, control, **kwargs):
        if self._moved is not None:
            save_mask(self._moved, os.path.join(_checkpoint(args, state), MOVED_FILE))

    def _measure(self, args, state, end: bool = False) -> None:
        """Measure on the main process, and log on all of them, as the trainer's other logs are."""
        before, self._measured = self._measured, (state.global_step, end)
        if before == (state.global_step, False) and not self.config.sparsity_rank:
            return
        metrics = self._figures(args, state, end) if state.is_world_process_zero else None
        # Not by the trainer's own `log`: that would average and clear the metrics of an unfinished logging interval.
        Trainer.log(self.trainer, broadcast_object_list([metrics])[0])

    def _figures(self, args, state, end: bool) -> dict[str, float]:
        """Measure, and write the table."""
        config, weights = self.config, copy_weights(self._model)
        chosen = SHORT[to_dtype(config.sparsity_dtype)]
        sizes = {}
        for weight in weights.values():
            if weight.is_floating_point():
                sizes[weight.dtype] = sizes.get(weight.dtype, 0) + weight.numel()
        trained = max(sizes, key=sizes.get)
        dtypes = dict.fromkeys([chosen, *(["bf16", "fp32"] if trained == torch.float32 else [])])
        table = sparsity_table(self._start, weights, config.sparsity_tolerances, list(dtypes))
        metrics = {f"{dtype}/{name}": x for dtype, part in table["figures"].items() for name, x in part.items()}
        metrics |= {"nan": table["nan"], "trained_bits": 8 * trained.itemsize}
        head = {
            "step": state.global_step,
            "start": self._identity,
            "trained_dtype": SHORT.get(trained, _full(trained)),
        }
        if self._moved is not None:
            mask = update_mask(self._start, weights, config.sparsity_tolerances[0], chosen)
            head["split"] = three_way_split(mask, self._moved)
            metrics |= head["split"]
        if end and config.sparsity_rank:
            for row in table["tensors"]:
                name = row["name"]
                row["rank_share"] = rank_share({name: self._start[name]}, {name: weights[name]}, chosen)
            shares = [row["rank_share"] for row in table["tensors"] if row["rank_share"] is not None]
            if shares:
                head["rank_share"] = metrics["rank_share"] = sum(shares) / len(shares)
        os.makedirs(args.output_dir, exist_ok=True)
        path = os.path.join(args.output_dir, TABLE_FILE)
        with open(f"{path}.partial", "w", encoding="utf-8") as file:
            json.dump(head | table, file, indent=1)
        os.replace(f"{path}.partial", path)
        return {f"update_sparsity/{name}": float(value) for name, value in metrics.items()}


def _checkpoint(args, state) -> str:
    """Folder of the checkpoint that this step writes, or that a run with this step was resumed from."""
    return os.path.join(args.output_dir, f"checkpoint-{state.global_step}")


class SubnetworkMaskCallback(TrainerCallback):
    """
    Trains only a subnetwork of any TRL trainer's model: entries outside of a mask do not move. From Reinforcement
    Learning Finetunes Small Subnetworks in Large Language Models ([arXiv
    2505.11711](https://huggingface.co/papers/2505.11711)).

    Gradients are masked before they are accumulated and clipped, and frozen entries are put back after the optimizer
    step, so that weight decay does not move them either; their optimizer state stays zero. Frozen tensors are kept a
    second time for this. The mask is written to every checkpoint and to `output_dir` as packed bits
    (`subnetwork_mask.safetensors`). A resumed run takes it from the checkpoint in `output_dir`, and trains with no
    other mask than the one it began with.

    Args:
        config ([`UpdateSparsityConfig`]):
            Settings, with a `mask_source`.
        trainer (`Trainer`):
            The trainer, before training, built with the weights to start from.

    Raises:
        ValueError: without a `mask_source`, if the mask is zero everywhere or does not fit the model, with LoRA or
            another adapter, under FSDP or DeepSpeed.

    Example:
    ```python
    trainer = GRPOTrainer(...)
    trainer.add_callback(SubnetworkMaskCallback(UpdateSparsityConfig(mask_source="runs/full"), trainer))
    ```
    """

    def __init__(self, config: UpdateSparsityConfig | None = None, trainer=None):
        self.config = config = config or UpdateSparsityConfig()
        self.trainer = trainer
        _refuse_sharding(trainer, type(self).__name__, deepspeed=True)
        model = trainer.accelerator.unwrap_model(trainer.model)
        if hasattr(model, "peft_config"):
            raise ValueError(
                "SubnetworkMaskCallback masks the model's own weights, but the trainer has a `peft_config` "
                f"({', '.join(str(c.peft_type) for c in model.peft_config.values())}): leave the adapter out."
            )
        if not config.mask_source:
            raise ValueError(
                "SubnetworkMaskCallback needs a `mask_source`: a finished model, a mask file or 'random:<density>'."
            )
        self.masks = self._find(model)
        check_masks(self._parameters(), self.masks)
        self._masked = None

    def _parameters(self) -> dict:
        model = self.trainer.accelerator.unwrap_model(self.trainer.model)
        return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}

    def _find(self, model) -> dict[str, torch.Tensor]:
        config, source, parameters = self.config, str(self.config.mask_source), self._parameters()
        if source.startswith("random:"):
            shapes = {name: parameter.shape for name, parameter in parameters.items()}
            return random_mask(shapes, _density(source), self.trainer.args.seed)
        for path in (source, os.path.join(source, MASK_FILE)):
            if os.path.isfile(path):
                return load_mask(path)
        try:
            finished = load_weights(model, source)
        except (OSError, ValueError, RuntimeError) as error:
            raise ValueError(
                f"`mask_source` {source!r} is neither a mask file, nor a folder or Hub id of a model ({error}): name "
                "a finished run, or 'random:<density>'."
            ) from error
        return update_mask(copy_weights(model), finished, config.mask_tolerance, config.sparsity_dtype)

    def on_train_begin(self, args, state, control, **kwargs):
        known = state.stateful_callbacks.get(MASK)
        path = os.path.join(_checkpoint(args, state), MASK_FILE)
        if known and os.path.isfile(path):
            self.masks = load_mask(path)
        found = weights_hash(self.masks)
        if known and known["sha256"] != found:
            raise ValueError(
                f"the run was trained with another mask than that of `mask_source` {self.config.mask_source!r} "
                f"(hash {known['sha256'][:12]}..., not {found[:12]}...): set `mask_source` to the checkpoint, which "
                f"holds it as {MASK_FILE}."
            )
        state.stateful_callbacks[MASK] = {"sha256": found}
        self._masked = MaskedParameters(self._parameters(), self.masks)

    def on_optimizer_step(self, args, state, control, **kwargs):
        if self.config.mask_restore:
            self._masked.restore()

    def on_save(self, args, state, control, **kwargs):
        if args.should_save:
            save_mask(self.masks, os.path.join(_checkpoint(args, state), MASK_FILE))

    def on_train_end(self, args, state, control, **kwargs):
        self._masked.remove()
        if args.should_save:
            os.makedirs(args.output_dir, exist_ok=True)
            save_mask(self.masks, os.path.join(args.output_dir, MASK_FILE))
