# /// script
# dependencies = [
#     "trl-ext[reasoning,math]",
# ]
# ///
"""
Learn from a teacher while learning from rewards ([KDRL](https://huggingface.co/papers/2506.02208)): the policy is
pulled towards a stronger model at the tokens that it samples itself.

Use it where a larger model of the same family is at hand and rewards alone are slow.

```bash
accelerate launch recipes/spo.py      # makes a teacher for the embedded policy, in runs/spo
accelerate launch recipes/distill.py
accelerate launch recipes/distill.py --model_name_or_path deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B \
    --kd_teacher Skywork/Skywork-OR1-Math-7B --dataset my_prompts.jsonl --rewards accuracy_reward --paper
```
"""

from trl_ext.recipe import main


if __name__ == "__main__":
    main(methods=["kdrl"], defaults={"kd_teacher": "runs/spo", "kd_beta_init": 0.1, "kd_beta_min": 0.01})
