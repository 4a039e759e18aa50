# /// script
# dependencies = [
#     "trl-ext[reasoning,math]",
# ]
# ///
"""
Keep the entropy of the policy from collapsing, with Clip-Cov or KL-Cov ([The Entropy Mechanism of Reinforcement
Learning for Reasoning Language Models](https://huggingface.co/papers/2505.22617)).

Use it where training stops to improve because all samples of a prompt have become the same.

```bash
accelerate launch recipes/entropy_control.py
accelerate launch recipes/entropy_control.py --methods kl_cov --kl_cov_ratio 0.02
```

Both act while the policy moves away from the one that generated (KL-Cov not at all before), so each generation is used
for several optimizer steps.

Expect, with the embedded policy and sums on a CPU (two cores, about a minute, seed 1): held-out accuracy from 39% to
52% with Clip-Cov and to 54% with KL-Cov, each gain +- 5 points (95%). The curve of the entropy is in
`training_curve.png`; answers of a few tokens are too short to show what the methods do for long reasoning.
"""

from trl_ext.recipe import main


if __name__ == "__main__":
    main(methods=["clip_cov"], defaults={"steps_per_generation": 4})
