"""The embedded task: sums of two numbers, an exact-match reward and a tiny policy that already solves some of them."""

import random
from pathlib import Path


POLICY_PATH = str(Path(__file__).resolve().parent / "tiny_policy")
"""Directory of the tiny policy: a character-level Qwen2 model for `model=` of any trainer."""

CHAIN_SUM_CONFIG = {"min_terms": 2, "max_terms": 3, "min_digits": 1, "max_digits": 2}
"""Settings of reasoning_gym's `chain_sum` on which the tiny policy was warmed up."""

MAX_NUMBER = 99
TRAIN_SIZE = 4500
TEST_SIZE = 500
_TEST_SEED = 20_240  # the test split never changes, so that the warm-up can leave it out


def _pairs():
    return [(a, b) for a in range(MAX_NUMBER + 1) for b in range(a, MAX_NUMBER + 1)]


def _test_pairs():
    return random.Random(_TEST_SEED).sample(_pairs(), TEST_SIZE)


def arithmetic(split: str = "train", conversational: bool = False, seed: int = 0):
    """
    Sums of two numbers between 0 and 99. No sum of one split is in the other, in either order of its two numbers.

    Args:
        split (`str`, *optional*, defaults to `"train"`):
            `"train"` (4,500 rows) or `"test"` (500 rows, left out of the sums on which the tiny policy was warmed up).
        conversational (`bool`, *optional*, defaults to `False`):
            Whether each prompt is a list with one user message instead of plain text.
        seed (`int`, *optional*, defaults to `0`):
            Chooses the sums of the train split and their order. The test split has the same sums for all seeds.

    Returns:
        `datasets.Dataset`: with the columns `prompt` (`"12+34="`, or `[{"role": "user", "content": "12+34="}]`) and
        `answer` (`"46"`).

    Example:

    ```python
    >>> from trl_ext.tasks import arithmetic

    >>> sorted(arithmetic("test")[0])
    ['answer', 'prompt']
    ```
    """
    from datasets import Dataset

    held_out = _test_pairs()
    if split == "train":
        rng = random.Random(seed)
        pairs = rng.sample(sorted(set(_pairs()) - set(held_out)), TRAIN_SIZE)
    elif split == "test":
        rng = random.Random(_TEST_SEED + 1)
        pairs = held_out
    else:
        raise ValueError(f"split={split!r}: the embedded sums have no such split. Use 'train' or 'test'.")
    pairs = [pair if rng.random() < 0.5 else pair[::-1] for pair in pairs]
    prompts = [f"{a}+{b}=" for a, b in pairs]
    if conversational:
        prompts = [[{"role": "user", "content": prompt}] for prompt in prompts]
    return Dataset.from_dict({"prompt": prompts, "answer": [str(a + b) for a, b in pairs]})


def completion_text(completion) -> str | None:
    """
    Text of a completion as TRL hands it to reward functions.

    Args:
        completion (`str` or `list[dict]`):
            Plain text, or messages, of which the last one counts. Content made of parts gives the text parts joined.

    Returns:
        `str` or `None`: `None` where there is no text.
    """
    if isinstance(completion, (list, tuple)):
        completion = completion[-1] if completion else None
    if isinstance(completion, dict):
        completion = completion.get("content")
    if isinstance(completion, (list, tuple)):
        parts = [part.get("text") for part in completion if isinstance(part, dict)]
        completion = "".join(part for part in parts if isinstance(part, str))
    return completion if isinstance(completion, str) else None


def exact_match(completions: list, answer: list[str], **kwargs) -> list[float]:
    """
    TRL reward function: is the completion the answer?

    Args:
        completions (`list[str]` or `list[list[dict]]`):
            Completions, plain or conversational.
        answer (`list[str]`):
            Column `answer` of the data set, one per completion.
        kwargs:
            Further columns; ignored.

    Returns:
        `list[float]`: 1.0 where the completion without surrounding white space equals the answer, else 0.0.

    Example:

    ```python
    >>> exact_match(["46", " 47"], answer=["46", "46"])
    [1.0, 0.0]
    ```
    """
    texts = [completion_text(completion) for completion in completions]
    return [
        float(text is not None and wanted is not None and text.strip() == str(wanted).strip())
        for text, wanted in zip(texts, answer, strict=True)
    ]
