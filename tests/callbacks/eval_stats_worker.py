"""Run under torchrun: several processes evaluate together."""

import hashlib
import json
import sys
from pathlib import Path


sys.path.insert(0, str(Path(__file__).parents[1]))

from harness import arithmetic, build

from trl_ext import EvalStatsCallback, EvalStatsConfig, MethodTrainer
from trl_ext.callbacks.evaluation import RECORD, line_of


def fixed(prompts, trainer):
    """A `rollout_func` whose completions depend on nothing but the prompt and the step."""
    tokenizer = trainer.processing_class
    completion_ids = []
    for prompt in prompts:
        digest = hashlib.sha256(f"{prompt}|{trainer.state.global_step}".encode()).hexdigest()
        completion_ids.append([*tokenizer(str(int(digest[:4], 16) % 100))["input_ids"], tokenizer.eos_token_id])
    prompt_ids = tokenizer([p if isinstance(p, str) else p[-1]["content"] for p in prompts])["input_ids"]
    return {"prompt_ids": prompt_ids, "completion_ids": completion_ids, "logprobs": None}


if __name__ == "__main__":
    trainer = build(
        MethodTrainer,
        out=sys.argv[1],
        rollout_func=fixed,
        eval_dataset=arithmetic().select(range(30, 38)),
        eval_strategy="steps",
        eval_steps=2,
        max_steps=4,
        per_device_train_batch_size=4,
        per_device_eval_batch_size=4,
    )
    config = EvalStatsConfig(eval_num_samples=3, eval_at_start=True)
    held_out = arithmetic().select(range(40, 45))
    trainer.add_callback(EvalStatsCallback(config, trainer, held_out, answer=lambda text: text[:1] or None))
    trainer.train()
    history = [json.loads(line_of(entry)) for entry in trainer.state.log_history if RECORD in entry]
    Path(sys.argv[1], f"result_{trainer.accelerator.process_index}.json").write_text(json.dumps({"lines": history}))
