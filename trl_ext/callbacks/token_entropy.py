"""Which tokens carry the entropy, and what drives it down: looked up in the forward pass of the loss."""

import json
import os

import torch
from accelerate.utils import reduce
from transformers import TrainerCallback

from ..methods.clip_cov import covariance_sums, token_covariance
from .entropy_law import entropy_drift


SHOWN = 20  # tokens in the picture
KEPT = 200  # tokens in the file


def top_entropies(entropies: torch.Tensor, share: float = 0.2) -> torch.Tensor:
    """
    The highest entropies, as many as Beyond the 80/20 Rule (arXiv 2506.01939) trains on.

    Args:
        entropies (`torch.Tensor`):
            In nats, shape `(n,)`.
        share (`float`, *optional*, defaults to `0.2`):
            Share of them, rounded up to whole ones.

    Returns:
        `torch.Tensor`: Descending, shape `(k,)`.
    """
    return entropies.topk(min(len(entropies), int(share * len(entropies) + 0.9999))).values


class TokenEntropyCallback(TrainerCallback):
    """
    The entropy token by token, on a [`MethodTrainer`], from the forward pass that the loss makes anyway; training does
    not change. Logs, over the tokens that enter the loss:

    - `token_entropy/top_share`: share of a micro-batch's entropy that the fifth of its tokens with the most of it
      carries.
    - `token_entropy/high`: share of tokens above the threshold that a fifth of them passed in the first micro-batch
      (`token_entropy/threshold`, in nats): from 0.2 it falls when the forks in the reasoning close, and rises when
      entropy spreads.
    - `token_entropy/covariance`: mean over tokens of the centred product of log-probability and advantage, in a
      micro-batch; `token_entropy/drift`: covariance of `log p` and `p * A` over the responses to a prompt, once per
      generation. The entropy falls in proportion to these (Eq. 10 and 9 of The Entropy Mechanism, [arXiv
      2505.22617](https://huggingface.co/papers/2505.22617)).

    At every checkpoint and at the end `token_entropy.json` in `output_dir` lists the 200 tokens that carried the most
    entropy since the last time (`token`, `id`, `count`, `mean` in nats, `share` of all entropy), and
    `token_entropy.png` draws it beside the curves.

    Args:
        trainer ([`MethodTrainer`]):
            The trainer.
        top_share (`float`, *optional*, defaults to `0.2`):
            The fifth (Beyond the 80/20 Rule, arXiv 2506.01939).
        threshold (`float`, *optional*):
            A threshold in nats in place of the run's own.

    Raises:
        ValueError: if the trainer is not a [`MethodTrainer`], or `top_share` not in (0, 1].

    Example:
    ```python
    trainer = ClipCovTrainer(...)
    trainer.add_callback(TokenEntropyCallback(trainer))
    ```
    """

    def __init__(self, trainer, top_share: float = 0.2, threshold: float | None = None):
        if not hasattr(trainer, "watch_tokens"):
            raise ValueError(
                f"`trainer` is a {type(trainer).__name__}, which does not show its tokens: use a method's trainer, or "
                "MethodTrainer, which is TRL's GRPOTrainer with hooks."
            )
        if not 0 < top_share <= 1:
            raise ValueError(f"`top_share` must be in (0, 1], got {top_share!r}.")
        self.trainer, self.top_share, self.threshold = trainer, top_share, threshold
        self._rows, self._sums, self._since = [], None, 0
        trainer.watch_tokens(self._watch)

    def on_train_begin(self, args, state, control, **kwargs):
        self._since = state.global_step
        known = [entry["token_entropy/threshold"] for entry in state.log_history if "token_entropy/threshold" in entry]
        if known:  # a resumed run goes on with its own
            self.threshold = known[-1]

    def _watch(self, tokens) -> None:
        if not tokens.training:
            return
        trainer, valid = self.trainer, tokens.mask.bool()
        entropies = tokens.entropies[valid].float()
        if self.threshold is None:
            first = top_entropies(trainer.gather_flat(entropies)[0], self.top_share)
            self.threshold = first[-1].item() if len(first) else None
        count, top = valid.sum(), top_entropies(entropies, self.top_share)
        trainer.log_token_metric("token_entropy/top_share", top.sum(), entropies.sum())
        if self.threshold is not None:
            trainer.log_metric("token_entropy/threshold", self.threshold)
            trainer.log_token_metric("token_entropy/high", (entropies >= self.threshold).sum(), count)
        sums = covariance_sums(tokens.logps, tokens.advantages, valid)
        sums[0].clamp_(min=1)
        covariance = token_covariance(tokens.logps, tokens.advantages, valid, sums)
        trainer.log_token_metric("token_entropy/covariance", covariance.sum(), count)
        self._add_up(tokens.token_ids[valid], entropies)
        self._drift(tokens, valid)

    def _add_up(self, ids, entropies) -> None:
        """Entropy and number of the tokens by id."""
        if self._sums is None:
            size = self.trainer.model.config.get_text_config().vocab_size
            self._sums = torch.zeros(2, max(size, len(self.trainer._tokenizer)), device=entropies.device)
        self._sums.index_add_(1, ids, torch.stack([entropies, torch.ones_like(entropies)]))

    def _drift(self, tokens, valid) -> None:
        """Once all rollouts of a generation were seen for the first time, the covariance over each group."""
        parts = self.trainer.args.steps_per_generation
        place = tokens.micro_step % (parts * self.trainer.num_iterations)
        if place >= parts:
            return
        if place == 0:
            self._rows = []
        lengths = valid.sum(1)
        means = [torch.where(valid, part, 0.0).sum(1) / lengths for part in (tokens.logps, tokens.advantages)]
        self._rows.append(torch.stack([tokens.group_ids.double(), *(mean.double() for mean in means)], dim=1))
        if place == parts - 1:
            complete = len(self._rows) == parts  # not so if the run was resumed inside of the generation
            rows = self.trainer.gather_flat(torch.cat(self._rows))[0].view(-1, 3)
            groups, logps, advantages = rows[~rows.isnan().any(1)].T  # rows without tokens are filling
            if complete and len(groups):
                self.trainer.log_metric("token_entropy/drift", entropy_drift(logps, advantages, groups))

    def on_save(self, args, state, control, **kwargs):
        if self._sums is None:
            return
        entropy, count = reduce(self._sums, reduction="sum").double().cpu()
        since, self._sums, self._since = self._since, None, state.global_step
        if not state.is_world_process_zero:
            return
        ids = entropy.topk(min(KEPT, int((count > 0).sum()))).indices.tolist()
        tokens = [
            {
                "token": self.trainer._tokenizer.decode([i]),
                "id": i,
                "count": int(count[i]),
                "mean": (entropy[i] / count[i]).item(),
                "share": (entropy[i] / entropy.sum().clamp(min=1e-12)).item(),
            }
            for i in ids
        ]
        table = {"steps": [since, state.global_step], "tokens": tokens}
        with open(os.path.join(args.output_dir, "token_entropy.json"), "w", encoding="utf-8") as file:
            json.dump(table, file, indent=1, ensure_ascii=False)
        draw_token_entropy(table, state.log_history, os.path.join(args.output_dir, "token_entropy.png"))

    on_train_end = on_save


def draw_token_entropy(table: dict, log_history: list[dict], path: str) -> None:
    """
    Draw which tokens carry the entropy, and the curves of [`TokenEntropyCallback`].

    Args:
        table (`dict`):
            Contents of `token_entropy.json`.
        log_history (`list[dict]`):
            Of the trainer.
        path (`str`):
            Where to write the picture.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 5), layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.add_gridspec(2, 2)
    bars = figure.add_subplot(grid[:, 0])
    shown = table["tokens"][:SHOWN]
    bars.barh(range(len(shown)), [entry["share"] for entry in shown], color="tab:blue")
    # A backslash form keeps line breaks, dollar signs and letters without a glyph out of the labels.
    labels = [ascii(entry["token"])[1:-1].replace("$", r"\$") or "(empty)" for entry in shown]
    bars.set_yticks(
        range(len(shown)), [f"{label} ({entry['mean']:.2f})" for label, entry in zip(labels, shown, strict=True)]
    )
    bars.invert_yaxis()
    bars.set_xlabel("share of all entropy (mean nats of the token)")
    bars.set_title("steps {} to {}".format(*table["steps"]))
    names = [("top_share", "high"), ("covariance", "drift")]
    for row, pair in enumerate(names):
        axes = figure.add_subplot(grid[row, 1])
        for name in pair:
            points = [(e["step"], e[key]) for e in log_history if (key := f"token_entropy/{name}") in e]
            axes.plot(*zip(*points, strict=True) if points else ([], []), label=name)
        axes.grid(alpha=0.3)
        axes.legend()
    axes.set_xlabel("optimizer steps")
    figure.savefig(path, dpi=120)
