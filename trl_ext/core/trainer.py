"""
`MethodTrainer`: TRL's GRPO step with a hook at every joint where papers differ.

This file and `batches.py` are the only ones that rely on TRL's private members; `tests/core/test_contract.py` guards
each of them:

- `_generate_and_score_completions(inputs)`: once per generation, local rows in, a dict of local tensors out.
- `_tokenize_prompts(prompts)`, `_generate(prompts)`, `_generate_single_turn(...)`: tokens of all rows, in order.
- `_calculate_rewards(inputs, prompts, completions, completion_ids_list)`: the gathered `(N, K)`, NaN for None.
- `_get_per_token_logps_and_entropies(model, ids, mask, keep, ...)`: every forward pass of a policy.
- `_compute_loss(model, inputs)`: one forward pass; advantages and `epsilon_*` are read only after it.
- `get_high_entropy_mask`, `get_off_policy_mask`: masks that are multiplied into the loss.
- `_prepare_inputs`, `_buffered_inputs`, `_step`: when a generation is made, and its micro-batches.
- `get_train_dataloader`: takes its rows from `self.train_dataset`.
- `_metrics`, `_logs`, `_pending_extra_logs`, `_pending_metrics`: what is logged.
- `_save_checkpoint`, `_save_rng_state`, `_load_optimizer_and_scheduler`: when state is written and read.
- `_maybe_log_save_evaluate`: when a checkpoint is due.
- `trl.trainer.utils`: `nanstd`, `pad`, `split_pixel_values_by_grid`, `unsplit_pixel_values_by_grid`.
"""

import contextlib
import copy
import functools
import itertools
import random
import warnings
from collections.abc import Callable

import numpy as np
import torch
from accelerate.utils import gather, gather_object
from datasets import Dataset, IterableDataset
from peft import PeftModel
from tqdm.auto import tqdm
from trl import GRPOConfig, GRPOTrainer
from trl.models import prepare_deepspeed, prepare_fsdp
from trl.trainer.utils import add_fused_lm_head, create_model_from_path, pad

from . import card, mixing, state
from .batches import masked, merge_rows, take_examples, take_rows, trim
from .config import MethodConfig
from .hooks import Hooks
from .prompts import ShuffledOrder, check_prompts, make_generator
from .rewards import checked, usable_rewards
from .rollouts import Requests, Rollouts, Sample, Scored, TokenBatch, zero_signal


NEEDS = {"old_logps", "ref_logps", "entropies", "hidden_states"}
CARRIED = "carried/"  # prefix of the `carry` hook's entries in TRL's batches


class MethodTrainer(Hooks, GRPOTrainer):
    r"""
    TRL's [`~trl.GRPOTrainer`] with hooks. Without a subclass it is TRL's trainer, bit for bit.

    A method subclasses it, sets the class attributes of [`Hooks`] and overrides the hooks that its paper changes.
    Methods mix by inheritance (see [`mix`]).

    Takes the arguments of [`~trl.GRPOTrainer`]; `args` must be an instance of the class's `config_class`.

    Raises:
        ValueError: if a setting, or a combination of settings and methods, cannot be honoured; the message names the
            setting, its value and the remedy.
    """

    command: str | None = None  # what started the run, for the model card; None: this process's command line

    def __init_subclass__(cls, **kwargs):
        super().__init_subclass__(**kwargs)
        if "slug" not in cls.__dict__:
            in_package = cls.__module__.startswith("trl_ext.methods.")
            cls.slug = cls.__module__.rpartition(".")[2] if in_package else cls.__name__
        mixing.check_method(cls)
        mixing.check_mix(cls)
        if "config_class" not in cls.__dict__:
            parents = tuple(base for base in cls.__bases__ if issubclass(base, MethodTrainer))
            name = f"{cls.__name__.removesuffix('Trainer')}Config"
            cls.config_class = mixing.mixed_config(parents, name, cls.__module__, f"{cls.__qualname__}.config_class")

    def __init__(self, model, reward_funcs=None, args=None, train_dataset=None, *more, **kwargs):
        cls = type(self)
        if args is None:
            name = model if isinstance(model, str) else model.config._name_or_path
            args = cls.config_class(f"{name.rstrip('/').split('/')[-1]}-{cls.__name__.removesuffix('Trainer')}")
        if not isinstance(args, GRPOConfig if cls.config_class is MethodConfig else cls.config_class):
            raise TypeError(
                f"`args` of {cls.__name__} must be a {cls.config_class.__name__}, got a {type(args).__name__}."
            )
        self._check_args(args, train_dataset)
        # The state of the seam; None = not inside such a call.
        self._generation = 0  # the generation counter
        self._rollouts_spent = 0
        self._prepared = False
        self._scoring = False
        self._captured = None
        self._cached = self._generated = self._original_prompts = self._edited = None
        self._forwards = None
        self._loss_inputs = self._tokens = self._hidden = None
        self._entropy_mask = None
        self._token_metrics = {}
        self._watchers = []
        self._save_due = self._warned_of_length = False
        self._score_calls = 0
        super().__init__(model, reward_funcs, args, train_dataset, *more, **kwargs)
        self._wanted = {need for c in cls.__mro__ if "needs" in c.__dict__ for need in c.needs(args)}
        if unknown := self._wanted - NEEDS:
            raise TypeError(f"{cls.__name__}.needs names {sorted(unknown)}; choose from {sorted(NEEDS)}.")
        if "ref_logps" in self._wanted and self.beta == 0.0:
            raise ValueError(f"{cls.__name__} needs a reference model, which TRL makes only if `beta` is not 0.")
        self._indexed = isinstance(self.train_dataset, Dataset)
        if self._indexed:
            check_prompts(self.train_dataset, empty_text=bool(self._tokenizer("")["input_ids"]))
            chunk = args.generation_batch_size // args.num_generations
            self._order = ShuffledOrder(len(self.train_dataset), chunk, args.shuffle_dataset, args.seed)
            self._rows = self._remove_unused_columns(self.train_dataset, description="Training")
        self._opens_loss = self._overrides(
            "kl_weight", "log_ratio", "clip_range", "policy_loss", "token_weights", "aggregate_loss", "regularizers"
        )
        self._own_surrogate = self._overrides("log_ratio", "policy_loss", "aggregate_loss")

    def _check_args(self, args, train_dataset) -> None:
        cls = type(self)
        if args.num_generations == 1 and not any(
            "compute_advantages" in c.__dict__.get("replaces", ()) + c.ignores for c in mixing.methods_of(cls)
        ):
            raise ValueError(
                f"`num_generations` is 1, but {cls.__name__} compares the rollouts of a prompt with each other: set "
                "it to at least 2, or mix in a method with a baseline of its own, such as SPO."
            )
        replaced = [c for c in mixing.methods_of(cls) if "compute_advantages" in c.__dict__.get("replaces", ())]
        if args.multi_objective_aggregation != "sum_then_normalize" and replaced and "grpo" not in cls.blend:
            raise ValueError(
                f"`multi_objective_aggregation={args.multi_objective_aggregation!r}` is a way to TRL's advantages, "
                f"which {replaced[0].__name__} replaces: leave it at 'sum_then_normalize'."
            )
        if isinstance(train_dataset, IterableDataset):
            by_index = ("choose_prompts", "prompt_weights", "prompt_budgets", "edit_examples", "more_rollouts")
            by_index += ("observe", "prepare")
            if used := [hook for hook in by_index if self._overrides(hook)]:
                raise ValueError(
                    f"`train_dataset` is an IterableDataset, but {cls.__name__} overrides `{used[0]}`, which needs "
                    "rows by index: pass a `Dataset` (for example `Dataset.from_list(list(stream))`)."
                )
        elif isinstance(train_dataset, Dataset):
            chunk = args.generation_batch_size // args.num_generations
            if len(train_dataset) < chunk and not cls._overrides("choose_prompts", "prompt_weights"):
                raise ValueError(
                    f"`train_dataset` has {len(train_dataset)} rows, but one generation takes {chunk} prompts "
                    f"(`generation_batch_size` {args.generation_batch_size} / `num_generations` "
                    f"{args.num_generations}), so nothing would be trained: use more rows or a smaller batch."
                )
        if self._overrides("clip_range") and args.loss_type in ("sapo", "vespo"):
            raise ValueError(f"`loss_type={args.loss_type!r}` has no clip range, which {cls.__name__} sets.")
        if self._overrides("log_ratio", "policy_loss", "aggregate_loss") and args.loss_type == "vespo":
            raise ValueError(
                f"`loss_type='vespo'` is a surrogate of its own, and {cls.__name__} brings another: use 'dapo'."
            )
        if self._overrides("policy_loss"):
            if args.loss_type in ("cispo", "sapo"):
                other = {"cispo": "dapo", "sapo": "grpo"}[args.loss_type]
                raise ValueError(
                    f"`loss_type={args.loss_type!r}` is a surrogate of its own, and {cls.__name__} replaces the "
                    f"surrogate: use {other!r}, which aggregates alike."
                )
            if args.delta is not None:
                raise ValueError(f"`delta` bounds TRL's surrogate, which {cls.__name__} replaces: leave it unset.")
        if self._overrides("kl_weight") and args.beta == 0.0:
            raise ValueError(
                f"{cls.__name__} sets the weight of the KL term, but with `beta` 0 TRL makes no reference model: set "
                "`beta` to any positive number."
            )
        if self.whole_groups and args.per_device_train_batch_size % args.num_generations:
            raise ValueError(
                f"{cls.__name__} compares the rollouts of a prompt in a micro-batch: `per_device_train_batch_size` "
                f"({args.per_device_train_batch_size}) must be a multiple of `num_generations` "
                f"({args.num_generations})."
            )
        if self._overrides("token_mask") and (args.beta or args.entropy_coef or args.use_adaptive_entropy):
            raise ValueError(
                f"{cls.__name__} masks tokens, which would mask them in the KL term and the entropy bonus too: set "
                f"`beta` (now {args.beta}), `entropy_coef` (now {args.entropy_coef}) and `use_adaptive_entropy` (now "
                f"{args.use_adaptive_entropy}) to 0 and False."
            )
        if strictly_on_policy(args):
            for base in mixing.methods_of(cls):
                if base.needs_off_policy:
                    warnings.warn(
                        f"{base.__name__} {base.needs_off_policy} while training is strictly on-policy (one optimizer "
                        "step per generation). Raise `num_iterations`, or `steps_per_generation` above "
                        "`gradient_accumulation_steps`.",
                        stacklevel=4,
                    )

    @classmethod
    def _overrides(cls, *hooks: str) -> bool:
        return any(getattr(cls, hook) is not getattr(MethodTrainer, hook) for hook in hooks)

    # ------------------------------------------------------------------------------------------- for the methods

    def log_metric(self, name: str, value: float) -> None:
        """
        Log a number that is the same on every process.

        Args:
            name (`str`):
                `<method>/<quantity>`.
            value (`float`):
                Its value; averaged over a logging interval.
        """
        self._metrics["train" if self.model.training else "eval"][name].append(float(value))

    def log_token_metric(self, name: str, numerator: torch.Tensor, denominator: torch.Tensor) -> None:
        """
        Log a ratio of two sums over a micro-batch, taken over all processes (in one message for all such metrics).

        Args:
            name (`str`):
                `<method>/<quantity>`.
            numerator (`torch.Tensor`), denominator (`torch.Tensor`):
                Local scalars.
        """
        pair = (torch.as_tensor(value).detach() for value in (numerator, denominator))
        self._token_metrics[name] = tuple(value.to(self.accelerator.device, torch.float) for value in pair)

    def watch_tokens(self, watcher: Callable[[TokenBatch], None]) -> None:
        """
        Show every micro-batch of the loss, training and evaluation, to a function that only looks (and may call
        [`log_token_metric`]). It costs no forward pass, and the training stays the same, bit for bit.

        Args:
            watcher (`Callable`):
                Called on every process with its [`TokenBatch`], after all hooks and without gradient.
        """
        self._watchers.append(watcher)

    @property
    def rollouts_spent(self) -> int:
        """Rollouts generated so far for training: those of all steps and those outside, over all processes."""
        return self._rollouts_spent

    def reward_column(self, field: str) -> int:
        """
        Column of the reward function that a setting names.

        Args:
            field (`str`):
                Name of the setting; None in it means the first reward function.

        Returns:
            `int`: the column in the reward matrix.

        Raises:
            ValueError: if there is no such reward function; the message lists those there are.
        """
        name = getattr(self.args, field)
        if name is not None and name not in self.reward_func_names:
            raise ValueError(
                f"`{field}` names the reward function {name!r}, which there is not: choose one of "
                f"{', '.join(map(repr, self.reward_func_names))}."
            )
        return 0 if name is None else self.reward_func_names.index(name)

    @property
    def context_length(self) -> int | None:
        """Tokens that the policy was made for; None where its configuration does not say."""
        return getattr(self._causal_model.config.get_text_config(), "max_position_embeddings", None)

    def prompt_lengths(self, prompts: list) -> list[int]:
        """
        Tokens of prompts as they are rendered for generation.

        Args:
            prompts (`list`):
                Plain or conversational, all alike. Not for environments, whose tools belong to the rows of a batch.

        Returns:
            `list[int]`: their lengths.
        """
        return [len(ids) for ids in self._tokenize_prompts(prompts)[0]]

    def gather_flat(self, values: torch.Tensor) -> tuple[torch.Tensor, int]:
        """
        Gather tensors of different sizes, flattened and joined in the order of the processes.

        Args:
            values (`torch.Tensor`):
                This process's values, any shape.

        Returns:
            `tuple[torch.Tensor, int]`: the joined values, and where this process's begin.
        """
        flat = values.flatten()
        sizes = gather(torch.tensor([flat.numel()], device=flat.device)).tolist()
        padded = torch.nn.functional.pad(
            flat.to(torch.uint8) if flat.dtype == torch.bool else flat, (0, max(sizes) - len(flat))
        )
        rows = gather(padded).view(len(sizes), max(sizes))
        joined = torch.cat([row[:size] for row, size in zip(rows, sizes, strict=True)])
        return joined.to(flat.dtype), sum(sizes[: self.accelerator.process_index])

    def score_prompts(
        self,
        rows: torch.Tensor,
        n: int,
        dataset: Dataset | None = None,
        measure: Callable | None = None,
        seed: int | None = None,
    ) -> "torch.Tensor | tuple[torch.Tensor, list]":
        """
        Generate and score outside a training step, on whatever engine the trainer uses. The work is shared evenly by
        all processes, every one of which must call it. Random states, metrics and logs stay as they were; the
        rollouts count as spent.

        Args:
            rows (`torch.Tensor`):
                Rows of the data set, the same on every process.
            n (`int`):
                Rollouts per row.
            dataset ([`~datasets.Dataset`], *optional*):
                Where the rows lie; the training set by default. Rollouts of another one do not count as spent.
            measure (`Callable`, *optional*):
                Called once for each of the rows, on one of the processes, with the row and its list of n [`Sample`];
                returns whatever is to be known of them.
            seed (`int`, *optional*):
                The samples depend on it alone, and not on how often this was called before; for evaluations.

        Returns:
            `torch.Tensor`: Rewards of the K functions, shape `(len(rows), n, K)`, the same on every process; with
            `measure` a tuple of that and the list of what it returned, one for each of the rows, too.
        """
        if len(rows) == 0 or n == 0:
            rewards = torch.zeros(len(rows), n, len(self.reward_funcs))
            return rewards if measure is None else (rewards, [measure(int(row), []) for row in rows])
        examples = torch.as_tensor(rows).repeat_interleave(n)
        count, processes = len(examples), self.accelerator.num_processes
        # As many rows at once as a training generation has, which is known to fit, and evenly.
        most = self.args.per_device_train_batch_size * self.args.steps_per_generation * processes
        share = -(-count // (-(-count // most) * processes))
        padding = -count % (share * processes)
        examples = torch.cat([examples, examples[:1].expand(padding)])
        results, waiting, measured = [], {}, {}
        self._score_calls += seed is None
        purpose, key = ("score_prompts", self._score_calls) if seed is None else ("evaluation", seed)
        process, spent = self.accelerator.process_index, self._rollouts_spent
        # The processes that share an engine must draw alike: each of them samples all its tokens.
        sharing = self.args.vllm_tensor_parallel_size if self.use_vllm and self.vllm_mode == "colocate" else 1
        generator = make_generator(self.args.seed, purpose, key, process // sharing)
        with self._no_trace(), local_seed(generator, self.accelerator.device):
            chunks = examples.split(share * processes)
            hidden = self.args.disable_tqdm or not self.accelerator.is_main_process
            for i, chunk in enumerate(tqdm(chunks, desc="Scoring prompts", leave=False, disable=hidden)):
                self._score_only(
                    take_examples(self._rows if dataset is None else dataset, chunk[process * share :][:share]), 1
                )
                results.append(self._captured["matrix"])
                if measure is None:
                    continue
                # A row's samples may come from several chunks and processes: wait until all are there.
                prompt_ids, completion_ids, tool_mask, completions, *_ = self._generated
                truncated = [cut for _, cut in self._captured["facts"]]
                tool_mask = [None] * len(completions) if tool_mask is None else tool_mask
                parts = zip(prompt_ids, completion_ids, completions, truncated, tool_mask, strict=True)
                samples = [Sample(*part) for part in parts]
                for j, sample in enumerate(gather_object(samples), i * share * processes):
                    row = j // n
                    if row >= len(rows) or row % processes != process:
                        continue
                    sample.rewards = results[-1][j - i * share * processes].tolist()
                    waiting.setdefault(row, []).append(sample)
                    if len(waiting[row]) == n:
                        measured[row] = measure(int(rows[row]), waiting.pop(row))
        if dataset is not None:
            self._rollouts_spent = spent
        rewards = torch.cat(results)[:count].view(len(rows), n, -1)
        if measure is None:
            return rewards
        everything = {row: value for part in gather_object([measured]) for row, value in part.items()}
        return rewards, [everything[row] for row in range(len(rows))]

    def sequence_logps(self, prompts: list[list[int]], completions: list[list[int]]) -> list[torch.Tensor]:
        """
        Log-probabilities of given completions under the current policy, at the trainer's temperature and without
        gradient. Every process must call it, with its own lists; all make the same number of forward passes.

        Args:
            prompts (`list[list[int]]`), completions (`list[list[int]]`):
                Token ids.

        Returns:
            `list[torch.Tensor]`: One tensor per completion, of its length, on the CPU.
        """
        self._refuse_images()
        size, pad_id = self.args.per_device_train_batch_size, self._tokenizer.pad_token_id
        counts = torch.tensor([len(prompts)], device=self.accelerator.device)
        passes = -(-int(gather(counts).max()) // size)
        results = []
        for start in range(0, passes * size, size):
            # A process without rows left runs one token through, since the others wait for it under FSDP and ZeRO-3.
            chunk_p = prompts[start : start + size] or [[pad_id]]
            chunk_c = completions[start : start + size] or [[pad_id]]
            ids, masks = [], []
            for sequences, side in ((chunk_p, "left"), (chunk_c, "right")):
                rows = [torch.tensor(sequence, dtype=torch.long) for sequence in sequences]
                ids.append(pad(rows, padding_value=pad_id, padding_side=side))
                masks.append(pad([torch.ones_like(row) for row in rows], padding_value=0, padding_side=side))
            ids, masks = (torch.cat(part, dim=1).to(self.accelerator.device) for part in (ids, masks))
            keep = max(map(len, chunk_c))
            with torch.no_grad():
                logps, _, _ = super()._get_per_token_logps_and_entropies(self.model, ids, masks, keep)
            logps = logps.cpu()
            results += [logps[i, : len(c)] for i, c in enumerate(completions[start : start + size])]
        return results

    def completion_entropies(self, rollouts: Rollouts) -> torch.Tensor:
        """
        Full-vocabulary entropies of the current policy at the local tokens, in one extra pass: for what is wanted now
        and then; `needs` is for every generation.

        Args:
            rollouts ([`Rollouts`]):
                A generation.

        Returns:
            `torch.Tensor`: In nats, shape `(n, T)`, without gradient.
        """
        return self._score_again(rollouts, self.model, compute_entropy=True)[1]

    def _score_again(self, rollouts: Rollouts, model, **options) -> tuple:
        """One more pass over the local rollouts, without gradient; what TRL's own returns."""
        self._refuse_images()
        ids = torch.cat([rollouts.prompt_ids, rollouts.completion_ids], dim=1)
        masks = torch.cat([rollouts.prompt_mask, rollouts.completion_mask], dim=1)
        size, keep = self.args.per_device_train_batch_size, rollouts.completion_ids.shape[1]
        with torch.no_grad():
            return super()._get_per_token_logps_and_entropies(model, ids, masks, keep, batch_size=size, **options)

    def sample_logps(self, sample: Sample) -> torch.Tensor:
        """
        Log-probabilities of one sample's tokens under the current policy, with gradient and at the trainer's
        temperature. A forward pass of this process alone, which FSDP and DeepSpeed do not allow.

        Args:
            sample ([`Sample`]):
                From [`score_prompts`].

        Returns:
            `torch.Tensor`: Shape `(T,)`; 0 for tokens that a tool wrote.
        """
        self._refuse_images()
        ids = torch.tensor([[*sample.prompt_ids, *sample.completion_ids]], device=self.accelerator.device)
        policy = self.accelerator.unwrap_model(self.model)
        with torch.enable_grad():
            logps, _, _ = super()._get_per_token_logps_and_entropies(
                policy, ids, torch.ones_like(ids), len(sample.completion_ids)
            )
        mask = sample.tool_mask
        return logps[0] if mask is None else logps[0] * torch.tensor(mask, device=logps.device)

    @property
    def _causal_model(self):
        """The policy's language model with its LM head, below any wrapper and adapter."""
        model = self.accelerator.unwrap_model(self.model)
        return model.get_base_model() if isinstance(model, PeftModel) else model

    def head_logits(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """
        The policy's logits before any temperature, without gradient. Meant for a chunk of tokens at a time: a whole
        batch of logits is what TRL's fused head avoids.

        Args:
            hidden_states (`torch.Tensor`):
                Final hidden states, shape `(..., H)`.

        Returns:
            `torch.Tensor`: In float32, shape `(..., V)`.
        """
        model = self._causal_model
        config = model.config.get_text_config()
        for name in ("logit_scale", "output_multiplier", "lm_head_multiplier", "logits_scaling"):
            if getattr(config, name, None) is not None:
                raise ValueError(
                    f"{type(self).__name__} reads the logits of the LM head, which this model scales (`{name}`): this "
                    "is not supported."
                )
        with torch.no_grad():
            logits = model.get_output_embeddings()(hidden_states).float()
        cap = getattr(config, "final_logit_softcapping", None)
        return logits if cap is None else cap * torch.tanh(logits / cap)

    def completion_hidden_states(self, prompt_ids, prompt_mask, completion_ids, completion_mask) -> torch.Tensor:
        """
        Final hidden states of the current policy that predict the tokens of completions, without gradient, from one
        forward pass. Every process must call it equally often.

        Args:
            prompt_ids (`torch.Tensor`), prompt_mask (`torch.Tensor`):
                Tokens of the prompts, padded on the left, shape `(B, T_prompt)`.
            completion_ids (`torch.Tensor`), completion_mask (`torch.Tensor`):
                Tokens of the completions, padded on the right, shape `(B, T)`.

        Returns:
            `torch.Tensor`: Shape `(B, T, H)`, for [`head_logits`].
        """
        self._refuse_images()
        ids = torch.cat([prompt_ids, completion_ids], dim=1)
        masks = torch.cat([prompt_mask, completion_mask], dim=1)
        keep = completion_ids.shape[1]
        with torch.no_grad(), self._capture(keep):
            super()._get_per_token_logps_and_entropies(self.model, ids, masks, keep)
        hidden, self._hidden = self._hidden, None
        return hidden

    def _refuse_images(self) -> None:
        if self._is_vlm and self._indexed and {"image", "images"} & set(self.train_dataset.column_names):
            raise ValueError(
                f"{type(self).__name__} scores tokens again in a forward pass of its own, which does not see the "
                "images of `train_dataset`: use a setting or a method without that pass (for example "
                "`spo_rho_mode='constant'`, `gtpo_use_initial_entropy=False` or `gvm_grad_params=None`)."
            )

    def load_frozen_model(self, path: str):
        """
        Load a model that only scores tokens, prepared as TRL prepares its reference model.

        Args:
            path (`str`):
                A local directory or an id on the Hub.

        Returns:
            [`~transformers.PreTrainedModel`]: for [`frozen_logps`].
        """
        model = create_model_from_path(path, dtype=self.accelerator.unwrap_model(self.model).dtype)
        add_fused_lm_head(model, temperature=self.temperature, cast_lm_head_to_fp32=self.args.cast_lm_head_to_fp32)
        if self.is_deepspeed_enabled:
            return prepare_deepspeed(model, self.accelerator)
        if self.is_fsdp_enabled:
            return prepare_fsdp(model, self.accelerator)
        return self.accelerator.prepare_model(model.eval(), evaluation_mode=True)

    def frozen_logps(self, rollouts: Rollouts, model=None) -> torch.Tensor:
        """
        Log-probabilities of the local rollouts under a frozen model, at the trainer's temperature.

        Args:
            rollouts ([`Rollouts`]):
                A generation.
            model ([`~transformers.PreTrainedModel`], *optional*):
                From [`load_frozen_model`]; by default the policy with its LoRA adapter switched off.

        Returns:
            `torch.Tensor`: Shape `(n, T)`.
        """
        if model is not None:
            return self._score_again(rollouts, model)[0]
        with self.accelerator.unwrap_model(self.model).disable_adapter():
            return self._score_again(rollouts, self.model)[0]

    # ------------------------------------------------------------------------------------- prompts and rollouts

    def get_train_dataloader(self):
        if not self._indexed:
            return super().get_train_dataloader()
        # The loader is only a clock: prompts are bound when it is time to generate, so it need not decode them.
        dataset = self.train_dataset
        self.train_dataset = Dataset.from_dict({"prompt": range(max(len(dataset), self._order.chunk))})
        try:
            return super().get_train_dataloader()
        finally:
            self.train_dataset = dataset

    def _plan(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Row of the training set and group id of every rollout of the next generation, `(N,)` each."""
        size, n = self.args.generation_batch_size, self.args.generation_batch_size // self.num_generations
        rows = self.choose_prompts(n, make_generator(self.args.seed, "choose_prompts", self._generation))
        rows = torch.as_tensor(rows).cpu()
        name = type(self).__name__
        if rows.shape != (n,) or rows.min() < 0 or rows.max() >= len(self.train_dataset):
            raise ValueError(
                f"{name}.choose_prompts must return {n} rows between 0 and {len(self.train_dataset) - 1}, got a "
                f"tensor of shape {tuple(rows.shape)} from {rows.min().item()} to {rows.max().item()}."
            )
        budgets = torch.as_tensor(self.prompt_budgets(rows)).cpu()
        if budgets.shape != (n,) or budgets.min() < 0 or budgets.sum() != size:
            raise ValueError(
                f"{name}.prompt_budgets must return {n} numbers of rollouts, at least 0, with the sum {size}; got a "
                f"tensor of shape {tuple(budgets.shape)} with the sum {budgets.sum().item()}."
            )
        if self.whole_groups and (budgets != self.num_generations).any():
            raise ValueError(
                f"{name} keeps groups in one micro-batch, so every prompt needs `num_generations` rollouts."
            )
        group_ids = torch.arange(n).repeat_interleave(budgets)
        if budgets.unique().numel() > 1:  # hard prompts have long answers, so no process may get most of them
            group_ids = group_ids[
                torch.randperm(size, generator=make_generator(self.args.seed, "rows", self._generation))
            ]
        return rows[group_ids], group_ids

    def _generate_and_score_completions(self, inputs):
        training, everything = self.model.training, None
        groups_of = self.num_generations if training else self.num_generations_eval
        group_ids = torch.arange(len(inputs) * self.accelerator.num_processes) // groups_of
        prompt_index = torch.full_like(group_ids, -1)
        if training:
            if not self._prepared:
                self.prepare()
                self._prepared = True
            if self._indexed:
                prompt_index, group_ids = self._plan()
                start = self.accelerator.process_index * len(inputs)
                if self._overrides("more_rollouts"):
                    everything, rows = self._run_rounds(prompt_index, group_ids)
                    prompt_index, group_ids = everything.prompt_index[rows].cpu(), everything.group_ids[rows]
                inputs = self._examples(prompt_index[start : start + len(inputs)], group_ids[start:])
        self._forwards = []
        try:
            output = super()._generate_and_score_completions(inputs)
            rollouts = self._collect(output, prompt_index, group_ids, training)
        finally:
            self._forwards = self._cached = None
        if everything is not None:
            rollouts = rollouts.replace(everything=everything)
        else:
            self._rollouts_spent += len(rollouts) if training else 0
        rollouts = rollouts.replace(shaped=self.shape_rewards(rollouts))
        advantages = self.compute_advantages(rollouts)
        rollouts = rollouts.replace(advantages=advantages)
        output["advantages"] = advantages[rollouts.local] if advantages.dim() == 1 else advantages
        output["group_ids"] = rollouts.group_ids[rollouts.local]
        output["prompt_index"] = rollouts.prompt_index[rollouts.local]
        output["rewards"] = rollouts.rewards[rollouts.local]
        output["row_ids"] = torch.arange(len(rollouts), device=rollouts.group_ids.device)[rollouts.local]
        if training:
            rollouts = self._select(rollouts, output)
            self.observe(rollouts)
            self._generation += 1
            self._metrics["train"]["num_rollouts"] = [self._rollouts_spent]
        output |= {f"{CARRIED}{name}": value for name, value in self.carry(rollouts).items()}
        self._relog(rollouts)
        return output

    def _examples(self, prompt_index: torch.Tensor, group_ids: torch.Tensor) -> list[dict]:
        """The local rows of the training set, edited; `_edited` tells whose prompt was."""
        examples = take_examples(self._rows, prompt_index)
        if not self._overrides("edit_examples"):
            return examples
        prompts = [example["prompt"] for example in examples]
        edited = self.edit_examples(copy.deepcopy(examples), group_ids[: len(examples)].cpu())
        if len(edited) != len(examples):
            raise ValueError(
                f"{type(self).__name__}.edit_examples must return {len(examples)} examples, got {len(edited)}."
            )
        changed = [example["prompt"] != prompt for example, prompt in zip(edited, prompts, strict=True)]
        self._edited = torch.tensor(changed, device=self.accelerator.device)
        return edited

    def _score_only(self, examples: list[dict], num_generations: int) -> None:
        """Generate and score this process's rows; the results are in `_captured` and `_generated`."""
        sizes = self.num_generations, self.num_generations_eval
        self.num_generations = self.num_generations_eval = num_generations
        self._scoring = True
        try:
            super()._generate_and_score_completions(examples)
        finally:
            self._scoring = False
            self.num_generations, self.num_generations_eval = sizes
        self._rollouts_spent += len(examples) * self.accelerator.num_processes

    def _run_rounds(self, prompt_index, group_ids) -> tuple[Scored, torch.Tensor]:
        """All rollouts of this generation, and the rows to train on, which TRL will take as if it had made them."""
        scored, records = self._round(Requests(prompt_index, group_ids), self.num_generations)
        rounds = 1
        while (requests := self.more_rollouts(scored, rounds)) is not None:
            more, new = self._round(requests, 1)
            records |= {position + len(scored): record for position, record in new.items()}
            scored, rounds = scored.join(more), rounds + 1
        rows = torch.as_tensor(self.pick_rollouts(scored)).cpu()
        size = self.args.generation_batch_size
        if rows.shape != (size,) or rows.min() < 0 or rows.max() >= len(scored):
            raise ValueError(
                f"{type(self).__name__}.pick_rollouts must return {size} positions below {len(scored)}, got a tensor "
                f"of shape {tuple(rows.shape)} from {rows.min().item()} to {rows.max().item()}."
            )
        processes, process = self.accelerator.num_processes, self.accelerator.process_index
        owner = torch.arange(size) // (size // processes)
        # Only what must change its process travels.
        moving = {i: records[row] for i, row in enumerate(rows.tolist()) if row in records and owner[i] != process}
        moved = {i: record for part in gather_object([moving]) for i, record in part.items()}
        mine = [
            records[row] if row in records else moved[i] for i, row in enumerate(rows.tolist()) if owner[i] == process
        ]
        prompt_ids, completion_ids, tool_mask, completions, logprobs, extra, logged = zip(*mine, strict=True)
        self._cached = {
            "generated": (
                list(prompt_ids),
                list(completion_ids),
                None if tool_mask[0] is None else list(tool_mask),
                list(completions),
                None if logprobs[0] is None else list(logprobs),
                {key: [fields[key] for fields in extra] for key in extra[0]},
                None,
                [],
            ),
            "logged": {
                column: [columns.get(column) for columns in logged] for column in {k: 0 for c in logged for k in c}
            },
            "matrix": scored.reward_matrix[rows.to(scored.reward_matrix.device)],
            "changed": scored.changed_prompt[rows.to(scored.reward_matrix.device)],
        }
        return scored, rows

    def _round(self, requests: Requests, num_generations: int) -> tuple[Scored, dict[int, tuple]]:
        """Generate and score requests, dealt evenly; returns all of them and the records that this process holds."""
        device, processes = self.accelerator.device, self.accelerator.num_processes
        count = len(requests.prompt_index)
        share = -(-count // processes)
        start = self.accelerator.process_index * share
        positions = [position if position < count else 0 for position in range(start, start + share)]
        examples = self._examples(requests.prompt_index.cpu()[positions], requests.group_ids.cpu()[positions])
        changed = torch.full((count,), requests.prompts is not None, device=device)
        if self._overrides("edit_examples"):
            changed |= gather(self._edited)[:count]
        if requests.prompts is not None:
            self._original_prompts = [example["prompt"] for example in examples]
            for example, position in zip(examples, positions, strict=True):
                example["prompt"] = requests.prompts[position]
        logs = self._contents(self._logs_stores)
        self._score_only(examples, num_generations)
        self._original_prompts = None
        self._restore(self._logs_stores, logs)
        again = ["reward", "reward_std", "frac_reward_zero_std"]
        again += [f"rewards/{name}/{part}" for name in self.reward_func_names for part in ("mean", "std")]
        for name in [*again, *(key for key in self._metrics["train"] if key.startswith("sampling/"))]:
            self._metrics["train"][name].pop()  # TRL logs them for the rollouts that are picked
        prompt_ids, completion_ids, tool_mask, completions, logprobs, extra, *_ = self._generated
        records = {
            start + i: (
                prompt_ids[i],
                completion_ids[i],
                None if tool_mask is None else tool_mask[i],
                completions[i],
                None if logprobs is None else logprobs[i],
                {key: values[i] if isinstance(values, list) else values for key, values in extra.items()},
                {column: values[i] for column, values in self._captured["logged"].items()},
            )
            for i in range(share)
            if start + i < count
        }
        lengths, truncated = self._facts()
        scored = Scored(
            prompt_index=requests.prompt_index.to(device),
            group_ids=requests.group_ids.to(device),
            reward_matrix=self._captured["matrix"][:count],
            reward_weights=self.reward_weights.to(device),
            lengths=lengths[:count],
            truncated=truncated[:count],
            changed_prompt=changed,
        )
        return scored, records

    def _facts(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Lengths and truncation of what was scored last, `(N,)` each."""
        facts = torch.tensor(self._captured["facts"], device=self.accelerator.device)
        lengths, truncated = gather(facts).unbind(1)
        return lengths, truncated.bool()

    def _select(self, rollouts: Rollouts, output) -> Rollouts:
        """Mark which rows and tokens are trained on; `_rearrange` then drops the others."""
        if not self._overrides("select_rollouts", "token_mask"):
            return rollouts
        selected = self.select_rollouts(rollouts).to(rollouts.group_ids.device)
        if selected.shape != (len(rollouts),) or selected.dtype != torch.bool:
            raise ValueError(
                f"{type(self).__name__}.select_rollouts must return a boolean tensor of shape ({len(rollouts)},), got "
                f"{selected.dtype} of shape {tuple(selected.shape)}."
            )
        rollouts = rollouts.replace(selected=selected)
        tokens = self.token_mask(rollouts)
        kept = selected[rollouts.local]
        if tokens is not None:
            tool_mask = output.get("tool_mask", torch.ones_like(output["completion_mask"]))
            output["model_mask"] = output["completion_mask"] * tool_mask
            output["tool_mask"] = tool_mask * tokens.to(tool_mask.dtype)
            kept = kept & (output["completion_mask"] * output["tool_mask"]).any(dim=1)
        output["kept"] = kept
        rollouts = rollouts.replace(selected=gather(kept))
        self.log_metric("kept_rollouts", rollouts.selected.float().mean())
        return rollouts

    def _collect(self, output, prompt_index, group_ids, training) -> Rollouts:
        device, captured = self.accelerator.device, self._captured
        n = len(captured["completions"])
        start = self.accelerator.process_index * n
        mask = output["completion_mask"]
        if "tool_mask" in output:
            mask = mask * output["tool_mask"]
        wanted = self._forward_once(output)
        lengths, truncated = self._facts()
        if self._cached is not None:
            changed = self._cached["changed"]
        elif training and self._indexed and self._overrides("edit_examples"):
            changed = gather(self._edited)
        else:
            changed = torch.zeros_like(truncated)
        everything = Scored(
            prompt_index=prompt_index.to(device),
            group_ids=group_ids.to(device),
            reward_matrix=captured["matrix"],
            reward_weights=self.reward_weights.to(device),
            lengths=lengths,
            truncated=truncated,
            changed_prompt=changed,
        )
        return Rollouts(
            **vars(everything),
            everything=everything,
            local=slice(start, start + n),
            prompt_ids=output["prompt_ids"],
            prompt_mask=output["prompt_mask"],
            completion_ids=output["completion_ids"],
            completion_mask=output["completion_mask"],
            mask=mask,
            completions=captured["completions"],
            examples=captured["examples"],
            logged=captured["logged"],
            training=training,
            generation=self._generation,
            step=self.state.global_step,
            max_steps=self.state.max_steps,
            ref_logps=output.get("ref_per_token_logps"),
            **wanted,
        )

    def _generate(self, prompts):
        if self._cached is not None:
            return self._cached["generated"]
        function = self.rollout_func
        self.rollout_func = function and functools.partial(_with_tokens, function)
        try:
            self._generated = super()._generate(prompts)
        finally:
            self.rollout_func = function
        longest = max(map(len, self._generated[0])) + self.max_completion_length
        context = self.context_length or longest
        if longest > context and not self._warned_of_length:
            self._warned_of_length = True
            warnings.warn(
                f"A prompt and `max_completion_length` ({self.max_completion_length}) take up to {longest} tokens, "
                f"but the model was made for {context}: drop the longest prompts, or allow fewer tokens.",
                stacklevel=2,
            )
        return self._generated

    def _generate_single_turn(self, prompt_ids, images, multimodal_fields, num_generations, *args, **kwargs):
        # A vLLM server is asked for `num_generations` answers to every n-th prompt, which only suits equal groups of
        # one prompt each.
        if self.model.training and self._overrides("prompt_budgets", "edit_examples"):
            num_generations = 1
        training = self.model.training
        answer = super()._generate_single_turn(prompt_ids, images, multimodal_fields, num_generations, *args, **kwargs)
        if self.use_transformers_continuous_batching:
            self.model.train(training)  # TRL leaves it in training mode, and an evaluation would go on as training
        return answer

    def _calculate_rewards(self, inputs, prompts, completions, completion_ids_list):
        if self._cached is not None:
            matrix = self._cached["matrix"]
            for column, values in self._cached["logged"].items():
                self._pending_extra_logs[column].extend(values)
        else:
            prompts = prompts if self._original_prompts is None else self._original_prompts
            functions = self.reward_funcs
            self.reward_funcs = list(map(checked, functions, self.reward_func_names))
            try:
                matrix = super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)
            finally:
                self.reward_funcs = functions
        matrix = usable_rewards(matrix, self.reward_func_names)
        ends = {*self.eos_token_ids, self._tokenizer.pad_token_id}
        tool_mask = (self._cached["generated"] if self._cached is not None else self._generated)[2]
        lengths = [len(ids) for ids in completion_ids_list] if tool_mask is None else [sum(mask) for mask in tool_mask]
        self._captured = {
            "matrix": matrix,
            "completions": completions,
            "examples": inputs,
            "logged": {
                column: list(values)
                for column, values in self._pending_extra_logs.items()
                if len(values) == len(completions)
            },
            "facts": [[length, ids[-1] not in ends] for length, ids in zip(lengths, completion_ids_list, strict=True)],
        }
        return matrix

    def _forward_once(self, output) -> dict:
        """What `needs` asks for, from TRL's own pass if it made one, else from one extra pass."""
        wanted = self._wanted & {"old_logps", "entropies"}
        old = output.get("old_per_token_logps")
        if not wanted:
            return {"old_logps": old}
        # Under PEFT the reference pass uses the same model; only the result tells the passes apart.
        entropies = next((entropies for logps, entropies in self._forwards if logps is old), None)
        if old is None:
            names = ("pixel_values", "image_grid_thw", "num_images", "pixel_attention_mask", "spatial_shapes")
            names += ("num_tiles", "image_sizes", "token_type_ids", "mm_token_type_ids", "image_position_ids")
            ids = torch.cat([output["prompt_ids"], output["completion_ids"]], dim=1)
            masks = torch.cat([output["prompt_mask"], output["completion_mask"]], dim=1)
            mode = "train" if self.model.training else "eval"
            with torch.no_grad():
                old, entropies, _ = super()._get_per_token_logps_and_entropies(
                    self.model,
                    ids,
                    masks,
                    output["completion_ids"].size(1),
                    batch_size=getattr(self.args, f"per_device_{mode}_batch_size"),
                    compute_entropy="entropies" in wanted,
                    **{name: output[name] for name in names if name in output},
                )
        return {"old_logps": old, "entropies": entropies}

    def _relog(self, rollouts: Rollouts) -> None:
        """Make TRL's logs describe what is trained on."""
        advantages = rollouts.advantages
        if advantages.dim() == 2:
            mask = rollouts.mask
            advantages = gather((advantages * mask).sum(1) / mask.sum(1).clamp(min=1))
        logged = self._logs["advantages"]
        for _ in range(min(len(logged), len(advantages))):
            logged.pop()
        logged.extend(advantages.tolist())
        values = self._metrics["train" if rollouts.training else "eval"]["frac_reward_zero_std"]
        values.pop()
        if len(rollouts.group_ids.unique()) < len(rollouts):  # with one rollout per prompt it says nothing
            values.append(zero_signal(rollouts.raw_rewards, rollouts.group_ids).float().mean().item())

    def _prepare_inputs(self, generation_batch):
        before = self._buffered_inputs
        inputs = super()._prepare_inputs(generation_batch)
        if not self.model.training or self._buffered_inputs is before:
            return inputs
        if self.whole_groups or "kept" in self._buffered_inputs[0]:
            self._buffered_inputs = self._rearrange(self._buffered_inputs)
        return self._buffered_inputs[self._step % self.args.steps_per_generation]

    def _rearrange(self, batches: list[dict]) -> list[dict]:
        """
        Cut the generation anew: only kept rows, whole groups together if asked for. Every micro-batch of every process
        gets the same number of rows, because TRL gathers per row inside its loss; missing ones are filled up with rows
        whose tokens are all masked.
        """
        merged = merge_rows(batches)
        kept = merged.pop("kept", torch.ones_like(merged["group_ids"], dtype=torch.bool))
        units: dict[int, list[int]] = {}  # rows that must stay together, in TRL's shuffled order
        for row in kept.nonzero().squeeze(1).tolist():
            units.setdefault(int(merged["group_ids"][row]) if self.whole_groups else row, []).append(row)
        units, parts = list(units.values()), len(batches)
        cuts = [len(units) * i // parts for i in range(parts + 1)]
        chosen = [list(itertools.chain(*units[a:b])) for a, b in itertools.pairwise(cuts)]
        device, processes = kept.device, self.accelerator.num_processes
        sizes = gather(torch.tensor([max(map(len, chosen)), sum(map(len, chosen))], device=device)).view(-1, 2)
        size, total = max(1, int(sizes[:, 0].max())), int(sizes[:, 1].sum())
        if "tool_mask" not in merged and total < len(kept) * processes:
            merged["tool_mask"] = torch.ones_like(merged["completion_mask"])
        batches = []
        for rows in chosen:
            batch = take_rows(merged, rows + [0] * (size - len(rows)))
            for name in ("tool_mask", "model_mask", "advantages") if len(rows) < size else ():
                if name in batch:
                    batch[name][len(rows) :] = 0
            batch["group_ids"][len(rows) :] = -1
            batches.append(trim(batch))
        items = sum((masked(batch).sum() for batch in batches), torch.zeros((), device=device, dtype=torch.long))
        items = gather(items.view(1)).sum()
        rows = torch.tensor(total / (parts * processes), device=device)
        return [{**batch, "num_items_in_batch": items, "rows": rows} for batch in batches]

    @property
    def _logs_stores(self) -> list[dict]:
        return [self._logs, self._logs["rewards"], self._logs["extra"]]

    @staticmethod
    def _contents(stores: list[dict]) -> list[dict]:
        return [{key: list(part) for key, part in s.items() if not isinstance(part, dict)} for s in stores]

    @staticmethod
    def _restore(stores: list[dict], contents: list[dict]) -> None:
        # In place: TRL's stores make missing entries, of a bounded length, by themselves.
        for store, content in zip(stores, contents, strict=True):
            for key in [key for key, part in store.items() if not isinstance(part, dict)]:
                store[key].clear()
                store[key].extend(content.get(key, ()))
                if key not in content:
                    del store[key]

    @contextlib.contextmanager
    def _no_trace(self):
        """Whatever happens inside leaves metrics and logs as they were."""
        stores = [*self._logs_stores, *self._metrics.values(), self._pending_extra_logs, self._pending_metrics]
        contents = self._contents(stores)
        # TRL times its parts to the trackers by itself; trackio raises an error outside of a training run.
        trackers, self.args.report_to = self.args.report_to, []
        tokens = self.state.num_input_tokens_seen
        try:
            yield
        finally:
            self.args.report_to, self.state.num_input_tokens_seen = trackers, tokens
            self._restore(stores, contents)

    # ------------------------------------------------------------------------------------------------- the loss

    def _get_per_token_logps_and_entropies(self, model, input_ids, attention_mask, logits_to_keep, *args, **kwargs):
        if self._scoring:  # only rewards are wanted
            return torch.zeros(len(input_ids), logits_to_keep, device=input_ids.device), None, None
        recording = self._forwards is not None and model is not self.ref_model
        if recording and "entropies" in self._wanted:
            kwargs["compute_entropy"] = True
        in_loss = self._loss_inputs is not None and not recording
        with (
            self._capture(logits_to_keep) if in_loss and "hidden_states" in self._wanted else contextlib.nullcontext()
        ):
            result = super()._get_per_token_logps_and_entropies(
                model, input_ids, attention_mask, logits_to_keep, *args, **kwargs
            )
        if recording:
            self._forwards.append(result[:2])
        elif in_loss:
            self._open_loss(self._loss_inputs, *result[:2])
        return result

    @contextlib.contextmanager
    def _capture(self, keep: int):
        """Keep the hidden states that predict the last tokens, in place of a second pass."""

        def record(module, inputs, output):
            self._hidden = output.last_hidden_state[:, -keep - 1 : -1].detach()

        handle = self._causal_model.base_model.register_forward_hook(record)
        try:
            yield
        finally:
            handle.remove()

    def _compute_loss(self, model, inputs):
        if not self._opens_loss and not self._watchers and "rows" not in inputs:
            return super()._compute_loss(model, inputs)
        mode = "train" if self.model.training else "eval"
        accumulation = self.current_gradient_accumulation_steps if mode == "train" else 1.0
        self._entropy_mask = None
        self._loss_inputs = inputs = dict(inputs)  # the buffer's own dict is used again with `num_iterations` > 1
        kept = self.epsilon_low, self.epsilon_high, self.beta
        try:
            total = super()._compute_loss(model, inputs)
            tokens = self._tokens
        finally:
            self.epsilon_low, self.epsilon_high, self.beta = kept
            self._loss_inputs = self._tokens = self._hidden = None
        if self._own_surrogate:
            policy_loss = self._pipeline(tokens, inputs)
            total = total + policy_loss / accumulation
            for name in ("low_mean", "high_mean", "region_mean", "low_min", "high_max"):
                self._metrics[mode].pop(f"clip_ratio/{name}", None)  # of the surrogate that was silenced
            if self._entropy_bonus_enabled:  # TRL logged its part, which lacks the surrogate, on a scale of its own
                scale = accumulation if self.loss_type in ("dapo", "cispo") else 1.0
                self._metrics[mode]["policy_loss"][-1] += gather(policy_loss.detach() / scale).nanmean().item()
        for name, value in self.regularizers(tokens).items():
            total = total + value / accumulation
            self.log_token_metric(name, value, torch.ones_like(value))
        with torch.no_grad():
            for watcher in self._watchers:
                watcher(tokens)
        self._flush_token_metrics()
        return total

    def _open_loss(self, inputs, logps, entropies) -> None:
        """Between TRL's forward and its loss: run the hooks and hand their answers to TRL."""
        mask = inputs["completion_mask"]
        if "tool_mask" in inputs:
            mask = mask * inputs["tool_mask"]
        advantages = inputs["advantages"]
        if advantages.dim() == 1:
            advantages = advantages.unsqueeze(1).expand_as(logps)
        old = inputs.get("old_per_token_logps")
        parts = self.accelerator.num_processes * (self.args.steps_per_generation if self.model.training else 1)
        rows = inputs["rows"].item() if "rows" in inputs else len(logps)
        tokens = TokenBatch(
            logps=logps,
            old_logps=logps.detach() if old is None else old,
            ref_logps=inputs.get("ref_per_token_logps"),
            sampling_logps=inputs.get("sampling_per_token_logps"),
            hidden_states=self._hidden,
            entropies=entropies,
            advantages=advantages,
            mask=mask,
            model_mask=inputs.get("model_mask", mask),
            token_ids=inputs["completion_ids"],
            group_ids=inputs["group_ids"],
            prompt_index=inputs["prompt_index"],
            rewards=inputs["rewards"],
            row_ids=inputs["row_ids"],
            items=inputs["num_items_in_batch"].clamp(min=1.0) / parts,
            rows=max(rows, 1e-9),
            parts=parts,
            step=self.state.global_step,
            micro_step=self._step,
            training=self.model.training,
            carried={key.removeprefix(CARRIED): inputs[key] for key in inputs if key.startswith(CARRIED)},
        )
        tokens = tokens.replace(log_ratio=self.log_ratio(tokens))
        low, high = self.clip_range(tokens)
        if isinstance(low, torch.Tensor) != isinstance(high, torch.Tensor) and low is not None:
            low, high = (torch.as_tensor(b, device=logps.device).expand_as(logps) for b in (low, high))  # for clamp
        tokens = tokens.replace(ratio_low=low, ratio_high=high)
        self._tokens = tokens
        # TRL's means over rollouts count the rows that only fill up a micro-batch.
        filled = len(logps) / tokens.rows if self.loss_type in ("grpo", "sapo", "dr_grpo", "luspo") else 1.0
        self.beta = self.kl_weight(tokens) * filled
        if self._own_surrogate:
            # TRL adds everything but the surrogate: KL, entropy bonus, auxiliary loss and their metrics. A zero
            # advantage silences its surrogate, a ratio of 1 keeps 0 * inf out (its KL correction wants the true one).
            inputs["advantages"] = torch.zeros_like(inputs["advantages"])
            if not (self.beta and self.args.use_bias_correction_kl):
                inputs["old_per_token_logps"] = logps.detach()
            return
        weights = self.token_weights(tokens)
        if weights is not None or filled != 1.0:  # the surrogates are homogeneous in the advantage
            inputs["advantages"] = advantages * (filled if weights is None else filled * weights)
        if self._overrides("clip_range"):
            if self.loss_type == "cispo":
                if low is not None:
                    raise ValueError(f"`loss_type='cispo'` has no lower bound, which {type(self).__name__} sets.")
                self.epsilon_high = high
            else:
                self.epsilon_low, self.epsilon_high = 1 - low, high - 1

    def _pipeline(self, tokens: TokenBatch, inputs) -> torch.Tensor:
        """The surrogate with everything that TRL multiplies into it, reduced to a scalar."""
        per_token = self.policy_loss(tokens)
        weights = self.token_weights(tokens)
        if weights is not None:
            per_token = per_token * weights
        if self.off_policy_mask_threshold is not None:
            sampling = inputs.get("sampling_per_token_logps", tokens.old_logps)
            per_token = per_token * self.get_off_policy_mask(
                tokens.advantages, tokens.logps, sampling, tokens.mask, self.off_policy_mask_threshold
            )
        if self._entropy_mask is not None:
            per_token = per_token * self._entropy_mask
        if self.use_vllm and self.vllm_importance_sampling_correction:
            per_token = per_token * inputs["importance_sampling_ratio"]
        return self.aggregate_loss(per_token, tokens)

    def get_high_entropy_mask(self, entropies, mask, threshold):
        self._entropy_mask = super().get_high_entropy_mask(entropies, mask, threshold)
        return self._entropy_mask

    def _flush_token_metrics(self) -> None:
        if not self._token_metrics:
            return
        sums = torch.stack([part for pair in self._token_metrics.values() for part in pair])
        sums = self.accelerator.reduce(sums, reduction="sum").view(-1, 2).tolist()
        for name, (numerator, denominator) in zip(self._token_metrics, sums, strict=True):
            self.log_metric(name, numerator / denominator if denominator else torch.nan)
        self._token_metrics = {}

    # ----------------------------------------------------------------------------------------------- checkpoints

    @property
    def _inside_generation(self) -> bool:
        return self._step % (self.args.steps_per_generation * self.num_iterations) != 0

    @functools.cached_property
    def _fingerprint(self) -> str:
        """Identity of the prompts in their order: per-prompt state is keyed by row."""
        if not self._indexed:
            return ""
        return state.fingerprint(self.train_dataset["prompt"])

    def train(self, resume_from_checkpoint=None, *args, **kwargs):
        """
        TRL's, but `resume_from_checkpoint=True` takes the newest checkpoint that was written to its end, and says
        which ones it passed over.
        """
        if resume_from_checkpoint is True:
            resume_from_checkpoint = state.newest_complete(self.args.output_dir)
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def _maybe_log_save_evaluate(self, *args, **kwargs):
        if getattr(self.args, "save_between_generations", False):
            wait = self._inside_generation and not self.control.should_training_stop
            due = self.control.should_save or self._save_due
            self.control.should_save, self._save_due = due and not wait, due and wait
        return super()._maybe_log_save_evaluate(*args, **kwargs)

    def _save_checkpoint(self, model, trial):
        folder = f"{self._get_output_dir(trial=trial)}/checkpoint-{self.state.global_step}"
        if self.is_world_process_zero():
            state.mark_incomplete(folder)  # it may lie there from an earlier run
        super()._save_checkpoint(model, trial)

    def _save_rng_state(self, output_dir):
        # Here, not after `_save_checkpoint`: that ends with an upload, and with the deletion of older checkpoints.
        super()._save_rng_state(output_dir)
        self.save_state_of_method(output_dir)

    def save_state_of_method(self, folder: str) -> None:
        """
        Write everything that TRL does not save of a run: the methods' state, counters, and, inside a generation, its
        buffered rollouts. Every process must call it.

        Args:
            folder (`str`):
                An existing directory.
        """
        shared = {
            "format": 1,
            "trainer": type(self).__name__,
            "processes": self.accelerator.num_processes,
            "micro_step": self._step,
            "generation": self._generation,
            "rollouts_spent": self._rollouts_spent,
            "score_calls": self._score_calls,
            "prompts": self._fingerprint,
            "methods": self.method_state(),
        }
        local = {"methods": self.local_state()}
        if self._inside_generation:
            local["buffer"] = self._buffered_inputs
        state.save(folder, shared, local, self.accelerator)
        if self._indexed and self.is_world_process_zero() and (columns := self.prompt_table()):
            state.write_prompts(folder, self.train_dataset["prompt"], columns)

    def _load_optimizer_and_scheduler(self, checkpoint):
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is None:
            return
        shared, shares = state.load(checkpoint, self.accelerator)
        if shared["trainer"] != type(self).__name__:
            raise ValueError(
                f"{checkpoint} was written by {shared['trainer']} and cannot be resumed by {type(self).__name__}: use "
                "the same methods, or start anew from its weights."
            )
        if shared["prompts"] != self._fingerprint:
            raise ValueError(
                f"`train_dataset` differs from the one that {checkpoint} was trained on (other prompts or another "
                "order), so the state of its prompts would be mixed up: pass the same data set."
            )
        self._step, self._generation = shared["micro_step"], shared["generation"]
        self._rollouts_spent, self._score_calls = shared["rollouts_spent"], shared["score_calls"]
        self._prepared = self._generation > 0
        if self._inside_generation:
            if shared["processes"] != self.accelerator.num_processes:
                raise ValueError(
                    f"{checkpoint} was saved inside a generation by {shared['processes']} processes, whose buffered "
                    f"rollouts cannot be dealt to {self.accelerator.num_processes}: resume with as many, or from a "
                    "checkpoint at a generation's end."
                )
            self._buffered_inputs = state.to_device(shares[0]["buffer"], self.accelerator.device)
        try:
            self.load_method_state(shared["methods"])
            for share in shares:
                self.load_local_state(share["methods"])
        except (AttributeError, IndexError, KeyError, RuntimeError, TypeError) as error:
            raise ValueError(
                f"{checkpoint}/{state.SHARED}, or a {state.LOCAL.format('*')} beside it, does not hold the state of "
                f"{type(self).__name__} as it should ({type(error).__name__}: {error}): resume from another "
                "checkpoint, or start anew from its weights."
            ) from error

    # ------------------------------------------------------------------------------------------------ model card

    def create_model_card(self, model_name=None, dataset_name=None, tags=None):
        super().create_model_card(model_name=model_name, dataset_name=dataset_name, tags=tags)
        if self.is_world_process_zero():
            card.add_methods(self)


def strictly_on_policy(args) -> bool:
    """Whether there is at most one optimizer step per generation, so that old and current policy are the same."""
    return args.gradient_accumulation_steps % (args.steps_per_generation * args.num_iterations) == 0


def _with_tokens(rollout_func, prompts, trainer):
    """What a `rollout_func` returns, unless there is nothing in it to score."""
    output = rollout_func(prompts, trainer)
    for name in ("prompt_ids", "completion_ids"):
        empty = next((i for i, ids in enumerate(output.get(name, ())) if len(ids) == 0), None)
        if empty is not None:
            raise ValueError(
                f"`rollout_func` returned no token in `{name}` for prompt {empty}: return at least one, such as the "
                "end-of-sequence token."
            )
    return output


@contextlib.contextmanager
def local_seed(generator: torch.Generator, device: torch.device):
    """Seed the global generators of this process inside, and leave them untouched outside."""
    states = random.getstate(), np.random.get_state()
    kind = device.type if device.type not in ("cpu", "mps") else "cuda"
    with torch.random.fork_rng(devices=[] if device.type in ("cpu", "mps") else [device], device_type=kind):
        seed = int(torch.randint(2**31, (), generator=generator))
        random.seed(seed)
        np.random.seed(seed)
        torch.manual_seed(seed)
        try:
            yield
        finally:
            random.setstate(states[0])
            np.random.set_state(states[1])
