"""Token-importance weighting and soft multi-choice rewards (TW-GRPO; arXiv 2505.24718)."""

import math
import re
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from accelerate.utils import gather
from trl.import_utils import is_math_verify_available

from ..core import MethodConfig, MethodTrainer, Rollouts, TokenBatch
from ..tasks.embedded import completion_text


TOKENS_AT_ONCE = 128  # of which a distribution over the vocabulary is held


@dataclass
class TWGRPOConfig(MethodConfig):
    r"""
    Configuration of [`TWGRPOTrainer`]. Defaults are those of the authors' script. The published loss is a mean over
    the tokens of a micro-batch, TRL's `loss_type="bnpo"`; the weights suit every other.

    Parameters:
        tw_alpha (`float`, *optional*, defaults to `1.7`):
            Weight of the position at which a prompt's rollouts disagree most; where they agree most it is 1.
        tw_clamp (`float`, *optional*, defaults to `11.0`):
            Bound of the difference of log-probabilities.
        tw_ended (`str`, *optional*, defaults to `"uniform"`):
            How a rollout counts where it has no token: as a `"uniform"` distribution, which gives positions beyond
            the end of short rollouts a high weight, or not at all (`"ignore"`, ours).
        soft_reward (`bool`, *optional*, defaults to `True`):
            Whether [`soft_accuracy`], if it is one of the reward functions, gives partial credit; else only a full
            match counts.
    """

    tw_alpha: float = field(default=1.7, metadata={"help": "Weight where rollouts disagree most."})
    tw_clamp: float = field(default=11.0, metadata={"help": "Bound of differences of log-probabilities."})
    tw_ended: str = field(
        default="uniform",
        metadata={"help": "How a rollout counts after its end.", "choices": ["uniform", "ignore"]},
    )
    soft_reward: bool = field(default=True, metadata={"help": "Whether `soft_accuracy` gives partial credit."})

    def __post_init__(self):
        super().__post_init__()
        self.check_range("tw_alpha", 1 <= self.tw_alpha < math.inf, "at least 1 and finite")
        self.check_range("tw_clamp", self.tw_clamp > 0, "positive")
        self.check_choices("tw_ended")


# ------------------------------------------------------------------------------------------------------------- weights


def position_divergence(
    logps: torch.Tensor, mask: torch.Tensor, clamp: float = 11.0, ended: str = "uniform"
) -> torch.Tensor:
    """
    How much the rollouts of one prompt disagree at each position: the mean over rollouts of the sum over the
    vocabulary of exp(d) - d - 1, with d the mean log-probability minus the rollout's own. The sum is not weighted by
    probabilities.

    Args:
        logps (`torch.Tensor`):
            Log-probabilities of the whole vocabulary, shape `(G, T, V)`; masked positions may hold anything.
        mask (`torch.Tensor`):
            1 where the rollout has a token, shape `(G, T)`.
        clamp (`float`, *optional*, defaults to `11.0`):
            Bound of d.
        ended (`str`, *optional*, defaults to `"uniform"`):
            Whether a rollout without a token counts as `"uniform"`, or takes no part (`"ignore"`).

    Returns:
        `torch.Tensor`: Shape `(T,)`, without gradient.
    """
    valid = mask.bool().unsqueeze(2)
    if ended == "uniform":
        logps = torch.where(valid, logps.detach(), -math.log(logps.shape[2]))
        gap = (logps.mean(0) - logps).clamp_(-clamp, clamp)
        return (gap.exp() - gap - 1).sum(2).mean(0)
    count = valid.sum(0).clamp(min=1)
    logps = torch.where(valid, logps.detach(), 0.0)
    gap = torch.where(valid, (logps.sum(0) / count - logps).clamp_(-clamp, clamp), 0.0)
    return (gap.exp() - gap - 1).sum(2).sum(0) / count.squeeze(1)


def position_weights(divergence: torch.Tensor, alpha: float = 1.7) -> torch.Tensor:
    """
    Weight of each position: 1 at the smallest divergence of the prompt, `alpha` at the largest.

    Args:
        divergence (`torch.Tensor`):
            Shape `(..., T)`; T decides whether a position after all ends, of divergence 0, is among them.
        alpha (`float`, *optional*, defaults to `1.7`):
            Largest weight.

    Returns:
        `torch.Tensor`: Shape `(..., T)`.
    """
    low, high = divergence.aminmax(dim=-1, keepdim=True)
    return 1 + (alpha - 1) * (divergence - low) / (high - low + 1e-8)


def deal_groups(group_ids: torch.Tensor, processes: int) -> tuple[list[list[int]], bool]:
    """
    Share out groups, equally many to every process: each to the process that holds it, or in turn if some group lies
    on several.

    Args:
        group_ids (`torch.Tensor`):
            Of all rollouts, shape `(N,)`; every process holds as many rows.
        processes (`int`):
            Number of processes.

    Returns:
        `tuple[list[list[int]], bool]`: groups of each process, filled up with repeats; and whether they were dealt in
        turn, so that tokens must travel.
    """
    held = [part.unique().tolist() for part in group_ids.view(processes, -1)]
    groups = group_ids.unique().tolist()
    travelling = sum(map(len, held)) > len(groups)
    if travelling:
        held = [groups[process::processes] for process in range(processes)]
    most = max(map(len, held))
    return [share + (share or groups)[:1] * (most - len(share)) for share in held], travelling


# ------------------------------------------------------------------------------------------------------------- rewards


def _options(text: str) -> set[str]:
    tagged = re.search(r"<answer>(.*?)</answer>", text, re.DOTALL)
    chosen = tagged.group(1) if tagged else text
    return {option.strip() for option in chosen.replace(" ", "").split(",")}


def symbolically_equal(text: str, solution: str) -> bool:
    """Whether `math_verify`, if it is installed, takes the two for the same mathematical answer."""
    if not is_math_verify_available():
        return False
    from math_verify import parse, verify

    try:
        return bool(verify(parse(text), parse(solution)))
    except Exception:  # whatever a policy writes, it is not an answer then
        return False


def soft_choice(text: str, solution: str, equal: Callable[[str, str], bool] = symbolically_equal) -> float:
    """
    Credit for a choice of several options: their share of the right ones if all of them are right, else 0.

    Args:
        text (`str`), solution (`str`):
            Options separated by commas, within the first answer tag if there is one. White space around them does not
            count, nor do repeats; letters in upper and lower case differ.
        equal (`Callable`, *optional*):
            Whether two texts are the same answer in another form, which is worth 1.

    Returns:
        `float`: in [0, 1].

    Example:
    ```python
    >>> soft_choice("<answer>A, C</answer>", "<answer>A,B,C,D</answer>"), soft_choice("A,E", "A,B")
    (0.5, 0.0)
    ```
    """
    if equal(text, solution):
        return 1.0
    chosen, right = _options(text), _options(solution)
    return len(chosen) / len(right) if chosen <= right else 0.0


def soft_accuracy(completions: list, solution: list, **kwargs) -> list[float | None]:
    """
    TRL reward function: [`soft_choice`] of each completion.

    Args:
        completions (`list[str]` or `list[list[dict]]`):
            Completions, plain or conversational.
        solution (`list[str]`):
            Column `solution` of the data set.
        kwargs:
            Further columns; ignored.

    Returns:
        `list[float]`: in [0, 1]; 0 for a completion without text, None where there is no solution.
    """
    texts = [completion_text(completion) for completion in completions]
    return [
        None if wanted is None else 0.0 if text is None else soft_choice(text, wanted)
        for text, wanted in zip(texts, solution, strict=True)
    ]


def answer_format(completions: list, **kwargs) -> list[float]:
    """
    TRL reward function: 1 for a think block followed by an answer block that ends the text, with nothing but white
    space between and after them and no second opening tag of either kind; else 0. Arguments as in [`soft_accuracy`].
    """
    pattern = re.compile(r"<think>.*?</think>\s*<answer>.*?</answer>\s*\Z", re.DOTALL)
    texts = [completion_text(completion) or "" for completion in completions]
    return [
        float(text.count("<think>") == text.count("<answer>") == 1 and pattern.search(text) is not None)
        for text in texts
    ]


class TWGRPOTrainer(MethodTrainer):
    """
    TW-GRPO, from Reinforcing Video Reasoning with Focused Thinking ([arXiv
    2505.24718](https://huggingface.co/papers/2505.24718)). Positions at which the rollouts of a prompt disagree weigh
    up to `tw_alpha` times as much in the loss as those at which they agree. The paper's rewards for questions with
    several right options are [`soft_accuracy`] and [`answer_format`], which any trainer may use.

    The weights are those of the policy that generated, from its logits before any temperature, and stay the same for
    all updates of the generation. They cost one more forward pass per generation, of whole groups; distributions over
    the vocabulary exist for a few positions at a time. In the authors' code gradient also flows through the
    weights; that would need the distributions of all tokens at once, and is not offered.

    Logs `tw_grpo/weight` (mean over tokens) and `tw_grpo/divergence` (mean over positions).
    """

    config_class = TWGRPOConfig
    contradicts = {
        "spo": "with one rollout per prompt there is nothing to disagree, and all weights would be 1",
    }
    _name = "TW-GRPO"
    _paper = {
        "title": "Reinforcing Video Reasoning with Focused Thinking",
        "id": "2505.24718",
        "citation": """\
@article{dang2025reinforcing,
    title  = {{Reinforcing Video Reasoning with Focused Thinking}},
    author = {Jisheng Dang and Jingze Wu and Teng Wang and Xuanhui Lin and Nannan Zhu and Hongbo Chen and others},
    year   = 2025,
    eprint = {arXiv:2505.24718},
}""",
    }

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        if not self.args.soft_reward and soft_accuracy not in self.reward_funcs:
            raise ValueError(
                "`soft_reward` is False, but there is no partial credit to take away: none of the reward functions is "
                "trl_ext.methods.tw_grpo.soft_accuracy."
            )

    def shape_rewards(self, rollouts: Rollouts):
        if not self.args.soft_reward:
            soft = torch.tensor([function is soft_accuracy for function in self.reward_funcs])
            matrix = rollouts.reward_matrix
            partial = soft.to(matrix.device) & (matrix < 1)
            rollouts = rollouts.replace(reward_matrix=matrix.masked_fill(partial, 0.0))
        return super().shape_rewards(rollouts)

    def carry(self, rollouts: Rollouts):
        processes, process = self.accelerator.num_processes, self.accelerator.process_index
        group_ids, mask = rollouts.group_ids, rollouts.mask
        names = ("prompt_ids", "prompt_mask", "completion_ids", "completion_mask", "mask")
        parts, start = [getattr(rollouts, name) for name in names], rollouts.local.start
        shares, travelling = deal_groups(group_ids.cpu(), processes)
        if travelling:
            start = 0
            for i, name in enumerate(names):
                padded = self.accelerator.pad_across_processes(parts[i], dim=1, pad_first="prompt" in name)
                parts[i] = gather(padded)
        width = int(gather(torch.tensor([mask.shape[1]], device=mask.device)).max())
        groups, sizes = group_ids.unique(return_counts=True)
        largest, size = int(sizes.max()), self.args.per_device_train_batch_size
        # As many rows for a small group as for the largest, so that all processes make as many passes: under FSDP and
        # ZeRO-3 they wait for each other.
        filled = torch.arange(largest, device=mask.device)
        rows = [(group_ids == group).nonzero().squeeze(1) - start for group in shares[process]]
        counts = [len(members) for members in rows]
        rows = torch.stack([members[filled.clamp(max=len(members) - 1)] for members in rows])
        divergence = torch.zeros(len(rows), width, device=mask.device)
        at_once = max(1, size // largest)
        for first in range(0, len(rows), at_once):
            batch = rows[first : first + at_once]
            hidden = self._tw_hidden([part[batch.flatten()] for part in parts[:4]], size)
            for i, states in enumerate(hidden.view(*batch.shape, *hidden.shape[1:]), first):
                found = self._tw_divergence(states[: counts[i]], parts[4][rows[i, : counts[i]]])
                divergence[i, : len(found)] = found
        row = torch.searchsorted(groups, torch.tensor(shares, device=groups.device).flatten())
        table = divergence.new_empty(len(groups), width)
        table[row] = gather(divergence)
        self.log_metric("tw_grpo/divergence", table.mean())
        weights = position_weights(table, self.args.tw_alpha)
        local = torch.searchsorted(groups, group_ids[rollouts.local])
        return super().carry(rollouts) | {"tw_grpo": weights[local, : mask.shape[1]] * mask}

    def _tw_hidden(self, parts: list[torch.Tensor], size: int) -> torch.Tensor:
        """Hidden states of some rows, at most `size` in a pass, up to the longest completion."""
        prompt_ids, prompt_mask, completion_ids, completion_mask = parts
        end = max(1, int(completion_mask.sum(1).max()))
        parts = (prompt_ids, prompt_mask, completion_ids[:, :end], completion_mask[:, :end])
        passes = zip(*(part.split(size) for part in parts), strict=True)
        return torch.cat([self.completion_hidden_states(*inputs) for inputs in passes])

    def _tw_divergence(self, hidden: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Divergence of one group at each position for which there are hidden states."""
        at_once = max(1, TOKENS_AT_ONCE // len(hidden))
        return torch.cat(
            [
                position_divergence(
                    torch.log_softmax(self.head_logits(states), dim=-1), valid, self.args.tw_clamp, self.args.tw_ended
                )
                for states, valid in zip(
                    hidden.split(at_once, 1), mask[:, : hidden.shape[1]].split(at_once, 1), strict=True
                )
            ]
        )

    def token_weights(self, tokens: TokenBatch):
        weights, before = tokens.carried["tw_grpo"], super().token_weights(tokens)
        self.log_token_metric("tw_grpo/weight", (weights * tokens.mask).sum(), tokens.mask.sum())
        return weights if before is None else before * weights
