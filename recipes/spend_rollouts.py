# /// script
# dependencies = [
#     "trl-ext[reasoning,math]",
# ]
# ///
"""
Spend rollouts where they teach something: most prompts are too easy or too hard, and a group whose rewards are all
equal teaches nothing.

[Knapsack RL](https://huggingface.co/papers/2509.25849) moves rollouts, at a constant total, to prompts that are
sometimes solved; [dynamic sampling](https://huggingface.co/papers/2503.14476) generates further groups until all of
them have a signal.

```bash
accelerate launch recipes/spend_rollouts.py
accelerate launch recipes/spend_rollouts.py --methods dynamic_sampling
```

Watch `knapsack/nonzero_advantage`, or `ds/num_gen_batches` and `num_rollouts`, which tell what it costs. Knapsack RL
needs several visits of a prompt before it knows it, so a few hundred prompts suit a short run best.
"""

from trl_ext.recipe import main


if __name__ == "__main__":
    main(methods=["knapsack_rl"], defaults={"dataset_size": 200})
