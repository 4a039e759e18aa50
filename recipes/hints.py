# /// script
# dependencies = [
#     "trl-ext[reasoning,math]",
# ]
# ///
"""
Learn from prompts that no rollout solves ([Scaf-GRPO](https://huggingface.co/papers/2510.19807)): the policy is asked
again with hints from the data set, and a success with its hint takes the place of one failed rollout.

Use it where many groups get no reward at all and the data has hints, from vague to concrete, in columns of lists.

```bash
accelerate launch recipes/hints.py
accelerate launch recipes/hints.py --dataset my_hinted_prompts.jsonl --scaf_hint_columns knowledge planning solution \
    --rewards accuracy_reward --model_name_or_path Qwen/Qwen2.5-Math-1.5B --paper
```

The embedded policy has never seen a hint, so with `recipes/data/hinted_sums.jsonl` expect `scaf/rescued_groups` in
the logs, and no gain over `recipes/train.py`.
"""

from pathlib import Path

from trl_ext.recipe import main


if __name__ == "__main__":
    data = Path(__file__).parent / "data" / "hinted_sums.jsonl"
    main(methods=["scaf_grpo"], defaults={"dataset": str(data), "rewards": ["exact_match"]})
