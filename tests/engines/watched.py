"""A run that writes down what it asks of its generation engine, and a check that every answer found its row."""

from collections import Counter

import torch
from accelerate.utils import gather_object
from harness import arithmetic, train_mix


HARD = arithmetic()["prompt"][:2]


class Watched:
    """
    Attributes:
        calls (`list[Call]`):
            This process's requests to the engine.
        scored (`list[tuple[list, list, list]]`):
            Prompts, completions and rewards of every call of the reward function.
        budgets (`list[tuple[list, list]]`):
            Rows and their numbers of rollouts, of every generation.
        rollouts (`list[Rollouts]`):
            What every generation trained on.
    """

    def __init__(self):
        self.calls, self.scored, self.budgets, self.rollouts = [], [], [], []

    def reward(self, prompts, completions, **kwargs):
        """Two of the four prompts are not solved at first; in extra rounds every second answer is good."""
        if len(self.calls) > 1 and self.calls[-2].generation == self.calls[-1].generation:
            rewards = [float(i % 2) for i in range(len(completions))]
        else:
            pairs = zip(prompts, completions, strict=True)
            rewards = [float(sum(map(ord, text)) % 2 and prompt not in HARD) for prompt, text in pairs]
        self.scored.append((prompts, completions, rewards))
        return rewards

    def run(self, *names, **settings):
        """Generations of 16 rollouts of a mix, each for two optimizer steps; see [`train_mix`]."""
        if "spo" in names:
            settings = {"num_generations": 1, "spo_offline_n": 2} | settings
        settings = {"max_steps": 6, "learning_rate": 3e-3} | settings
        return train_mix(names, None, wrap=self.wrap, rewards=self.reward, **settings)

    def wrap(self, trainer_class):
        watched = self

        # Only `__init__`: a class that overrides a hook would be taken for a method.
        class Watching(trainer_class):
            slug = trainer_class.slug

            def __init__(self, *args, **kwargs):
                super().__init__(*args, **kwargs)
                single_turn, budgets, observe = self._generate_single_turn, self.prompt_budgets, self.observe

                def watched_turn(prompt_ids, *args, **kwargs):
                    answer = single_turn(prompt_ids, *args, **kwargs)
                    watched.calls.append(Call(self, prompt_ids, *answer))
                    return answer

                def watched_budgets(rows):
                    answer = budgets(rows)
                    watched.budgets.append((rows.tolist(), answer.tolist()))
                    return answer

                def watched_observe(rollouts):
                    watched.rollouts.append(rollouts)
                    observe(rollouts)

                self._generate_single_turn = watched_turn
                self.prompt_budgets, self.observe = watched_budgets, watched_observe

        Watching.__name__ = trainer_class.__name__
        return Watching

    def check(self, trainer):
        """Every answer belongs to its prompt, from the engine over the reward function to the row trained on."""
        decode, questions = trainer.processing_class.batch_decode, trainer.train_dataset["prompt"]
        made = {}
        for call, (prompts, completions, rewards) in zip(self.calls, self.scored, strict=True):
            assert call.completions == completions
            assert all(question in prompt for question, prompt in zip(prompts, call.prompts, strict=True))
            made.setdefault(call.generation, []).extend(zip(call.prompts, completions, rewards, strict=True))
        assert len(self.rollouts) == trainer.args.max_steps / 2
        for generation, rollouts in enumerate(self.rollouts):
            asked = [questions[row] for row in rollouts.prompt_index[rollouts.local].tolist()]
            prompts = decode(rollouts.prompt_ids, skip_special_tokens=True)
            completions = decode(rollouts.completion_ids, skip_special_tokens=True)
            assert completions == rollouts.completions
            rewards = rollouts.raw_rewards[rollouts.local].tolist()
            trained = Counter(zip(prompts, completions, rewards, strict=True))
            assert trained <= Counter(gather_object(made[generation]))
            assert all(question in prompt for question, prompt in zip(asked, prompts, strict=True))
            changed = [prompt != question for prompt, question in zip(prompts, asked, strict=True)]
            assert changed == rollouts.changed_prompt[rollouts.local].tolist()


class Call:
    """
    A request to the engine and its answer.

    Attributes:
        prompts (`list[str]`), completions (`list[str]`):
            As text.
        generation (`int`):
            Generations before it.
        gap (`float`):
            Largest difference between the engine's log-probabilities, where it gave any, and the policy's.
    """

    def __init__(self, trainer, prompts, completions, logprobs):
        decode, policy = trainer.processing_class.batch_decode, trainer.accelerator.unwrap_model(trainer.model)
        self.prompts = decode(prompts, skip_special_tokens=True)
        self.completions = decode(completions, skip_special_tokens=True)
        self.generation = trainer._generation
        self.gap = 0.0
        for prompt, completion, given in zip(prompts, completions, logprobs or [], strict=logprobs is not None):
            ids = torch.tensor([[*prompt, *completion]])
            with torch.no_grad():
                logits = policy(input_ids=ids).logits[0, len(prompt) - 1 : -1] / trainer.temperature
            expected = logits.log_softmax(-1).gather(1, ids[0, len(prompt) :, None]).squeeze(1)
            gaps = [abs(a - b) for a, b in zip(given, expected.tolist(), strict=True) if a is not None]
            self.gap = max([self.gap, *gaps])
