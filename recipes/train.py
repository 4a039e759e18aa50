# /// script
# dependencies = [
#     "trl-ext[reasoning,math]",
# ]
# ///
"""
Train with any method, any mix of methods, or none (GRPO as TRL has it).

Usage, from one command on a laptop to a model of your own:

```bash
accelerate launch recipes/train.py                                  # GRPO, embedded policy and sums
accelerate launch recipes/train.py --methods clip_cov spo           # a mix
accelerate launch --config_file recipes/accelerate/zero3.yaml recipes/train.py \
    --methods spo --paper --model_name_or_path Qwen/Qwen3-8B --dataset my_prompts.jsonl --rewards accuracy_reward
```

`--help` lists the options of the methods that are named beside it.

Expect from the first command (two CPU cores, about a minute): held-out accuracy from 38% to 54%; over seeds 1, 2, 3
it rose by 15.0, 13.8 and 17.6 points, each +- 4.8 (95%).
"""

from trl_ext.recipe import main


if __name__ == "__main__":
    main()
