# /// script
# dependencies = [
#     "trl-ext[reasoning,math]",
# ]
# ///
"""
Keep the entropy of the policy alive in a long off-policy run, with Clip-Cov or KL-Cov ([The Entropy Mechanism of
Reinforcement Learning for Reasoning Language Models](https://huggingface.co/papers/2505.22617)) or another method that
acts on the loss.

Use it where training stops to improve because all samples of a prompt have become the same, or where it becomes
unstable because a generation is used for many updates.

```bash
accelerate launch recipes/entropy_control.py
accelerate launch recipes/entropy_control.py --methods kl_cov --kl_cov_ratio 0.02
accelerate launch recipes/entropy_control.py --methods epo              # an entropy bonus with a corridor
accelerate launch recipes/entropy_control.py --methods high_entropy_tokens --loss_type bnpo
accelerate launch recipes/entropy_control.py --methods gppo             # clipped tokens keep a bounded gradient
accelerate launch recipes/entropy_control.py --methods bapo             # clip bounds that balance the two signs
accelerate launch recipes/entropy_control.py --methods clip_cov epo     # any mix, on top of any advantages
```

Most of them act while the policy moves away from the one that generated (KL-Cov, GPPO and BAPO not at all before), so
each generation is used for several optimizer steps. CAPO (`--methods capo --loss_type grpo`) drops the tokens whose
step would be too large; GTPO is for one step per generation (`--methods gtpo --steps_per_generation 1`).

Expect, with the embedded policy and sums on a CPU (two cores, about a minute, seed 1): held-out accuracy from 39% to
52% with Clip-Cov and to 54% with KL-Cov, each gain +- 5 points (95%). The curve of the entropy is in
`training_curve.png`; answers of a few tokens are too short to show what the methods do for long reasoning.
"""

from trl_ext.recipe import main


if __name__ == "__main__":
    main(methods=["clip_cov"], defaults={"steps_per_generation": 4})
