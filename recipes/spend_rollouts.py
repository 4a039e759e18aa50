# /// script
# dependencies = [
#     "trl-ext[reasoning,math]",
# ]
# ///
"""
Spend rollouts where they teach something: most prompts are too easy or too hard, and a group whose rewards are all
equal teaches nothing.

[Knapsack RL](https://huggingface.co/papers/2509.25849) moves rollouts, at a constant total, to prompts that are
sometimes solved. [VADE](https://huggingface.co/papers/2511.18902) and
[VAS](https://huggingface.co/papers/2509.21268) choose the prompts instead, by what they know of their success.
[GVM](https://huggingface.co/papers/2505.02391) samples beforehand and deals rollouts by gradient norms.
[Dynamic sampling](https://huggingface.co/papers/2503.14476) generates further groups until all of them have a signal.

```bash
accelerate launch recipes/spend_rollouts.py
accelerate launch recipes/spend_rollouts.py --methods vade
accelerate launch recipes/spend_rollouts.py --methods vade knapsack_rl
accelerate launch recipes/spend_rollouts.py --methods vas --vas_scoring online
accelerate launch recipes/spend_rollouts.py --methods gvm
accelerate launch recipes/spend_rollouts.py --methods dynamic_sampling
```

Watch `num_rollouts`, which tells what they cost, `frac_reward_zero_std`, and `prompt_difficulty.png`, the spread of
the estimated success rates over training; `trl_ext_prompts.parquet` in the output folder has what is known of every
prompt. Knapsack RL needs several visits of a prompt before it knows it, so a few hundred prompts suit a short run
best.

In a simulation of 2,000 prompts (`benchmarks/mechanisms/samplers.py`, 5 seeds) the share of rollouts with a signal is
0.62 with uniform sampling, 0.74 with VADE and 0.78 with Knapsack RL at the same rollouts; VAS reaches 0.70 and GVM
0.87, but of all rollouts they spend, those of their estimates included, only 0.15 and 0.44 teach (ReST-GRPO's filter:
0.77 and 0.32).
"""

from trl_ext.recipe import main


if __name__ == "__main__":
    main(methods=["knapsack_rl"], defaults={"dataset_size": 200})
