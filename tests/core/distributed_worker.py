"""Runs under torchrun: trains every case and lets every process save what it saw."""

import os
import sys
from pathlib import Path


sys.path.insert(0, str(Path(__file__).parents[1]))
os.environ |= {"HF_HUB_OFFLINE": "1", "TRL_EXPERIMENTAL_SILENCE": "1", "TOKENIZERS_PARALLELISM": "false"}

import torch
from harness import POLICY_PATH, arithmetic, parameters, scripted, train
from transformers import AutoModelForCausalLM

from trl_ext import MethodTrainer, TokenEntropyCallback, mix
from trl_ext.core import Requests


torch.set_num_threads(1)


def digit_reward(completions, **kwargs):
    return [float(text[:1] in "13579") for text in completions]


def rare_reward(completions, **kwargs):
    return [float(text[:1] == "7") for text in completions]


def timed_reward(completions, log_extra, **kwargs):
    log_extra("duration", [None if text[:1] == "4" else float(len(text)) for text in completions])
    return digit_reward(completions)


def step_timed_reward(completions, log_extra, **kwargs):
    """Durations per step, but only on the processes that have an answer of one digit."""
    log_extra("duration", [[0.5, 7.0] if len(text) == 1 else float(len(text)) for text in completions])
    return digit_reward(completions)


def recording(base):
    """The trainer class with a record of what its hooks saw."""

    class Recording(base):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            self.seen = []
            if base is MethodTrainer:
                self.add_callback(TokenEntropyCallback(self))

        def observe(self, rollouts):
            super().observe(rollouts)
            self.seen.append(
                {
                    "prompts": rollouts.prompt_index.tolist(),
                    "groups": rollouts.group_ids.tolist(),
                    "rewards": rollouts.rewards.tolist(),
                    "lengths": rollouts.lengths.tolist(),
                    "advantages": rollouts.advantages.tolist() if rollouts.advantages.dim() == 1 else None,
                }
            )

    return Recording


def hinted(rows):
    data = arithmetic().select(range(rows))
    return data.add_column("solution", [["add", "units first"]] * rows)


class DroppingTrainer(MethodTrainer):
    """Keeps rows so unevenly that the second of two processes has none left."""

    def select_rollouts(self, rollouts):
        return super().select_rollouts(rollouts) & (torch.arange(len(rollouts)) < len(rollouts) // 2)


class RoundsTrainer(MethodTrainer):
    """Asks for an odd number of further rollouts and trains on some of them."""

    replaces = ("more_rollouts", "pick_rollouts")

    def more_rollouts(self, scored, rounds):
        return Requests(torch.tensor([1, 2, 3]), torch.tensor([90, 90, 91])) if rounds < 3 else None

    def pick_rollouts(self, scored):
        return torch.arange(self.args.generation_batch_size) + 3


class BudgetTrainer(MethodTrainer):
    replaces = ("prompt_budgets",)

    def prompt_budgets(self, rows):
        return torch.tensor([7, 3, 5, 1])[: len(rows)]


class MeasuringTrainer(MethodTrainer):
    """Keeps what it measures of samples that come from several chunks and processes."""

    def prepare(self):
        super().prepare()
        rewards, found = self.score_prompts(
            torch.tensor([3, 1, 2]), 8, measure=lambda row, samples: [row, *(s.completion_ids for s in samples)]
        )
        self.found = {"rewards": rewards, "samples": found}

    def method_state(self):
        return super().method_state() | {"found": self.found}


# name: (trainer class, settings)
CASES = {
    "neutral": (MethodTrainer, {}),
    "grpo loss": (MethodTrainer, {"loss_type": "grpo"}),
    "budgets": (BudgetTrainer, {}),
    "dropping": (DroppingTrainer, {"loss_type": "grpo"}),
    "dropping, dapo": (DroppingTrainer, {}),
    "rounds": (RoundsTrainer, {}),
    "measuring": (MeasuringTrainer, {}),
    "spo": (mix("spo").Trainer, {"spo_offline_n": 1}),
    "spo constant": (mix("spo").Trainer, {"spo_offline_n": 0, "spo_rho_mode": "constant"}),
    "clip_cov global": (
        mix("clip_cov").Trainer,
        {"clip_cov_scope": "global", "clip_cov_ratio": 0.2, "clip_cov_low": 0.01},
    ),
    "capo": (mix("capo").Trainer, {"capo_tau_fisher": 40.0, "capo_tau_hessian": 0.0, "num_iterations": 2}),
    "high_entropy_tokens global": (
        mix("high_entropy_tokens").Trainer,
        {"het_scope": "global", "het_rule": "threshold", "loss_type": "bnpo"},
    ),
    "high_entropy_tokens global, dapo": (mix("high_entropy_tokens").Trainer, {"het_scope": "global"}),
    "kl_cov global": (mix("kl_cov").Trainer, {"kl_cov_scope": "global", "kl_cov_ratio": 0.2}),
    "gdpo_nvidia": (
        mix("gdpo_nvidia").Trainer,
        {
            "rewards": [digit_reward, rare_reward],
            "gdpo_batch_norm": "token",
            "gdpo_condition": ["rare_reward:digit_reward:1"],
        },
    ),
    "bapo": (
        mix("bapo").Trainer,
        {"bapo_target": 0.52, "bapo_high_start": 1.0, "bapo_high_step": 0.01, "num_iterations": 2},
    ),
    "epo": (
        mix("epo").Trainer,
        {"epo_coef": 0.1, "epo_kappa_low": 0.8, "epo_kappa_high": 1.2, "num_iterations": 2},
    ),
    # The likelihood term is a mean over each process's micro-batch, as in the authors' code.
    "gppo": (mix("gppo").Trainer, {"gppo_pos_coef": 0.0, "epsilon": 0.01, "epsilon_high": 0.01, "num_iterations": 2}),
    "grpo_d": (mix("grpo_d").Trainer, {"kl_beta_max": 0.5, "num_iterations": 2}),
    "grpo_lambda": (mix("grpo_lambda").Trainer, {"lambda_top": 0.5}),
    "bnpo": (mix("bnpo").Trainer, {}),
    "ngrpo": (mix("ngrpo").Trainer, {}),
    "dcpo": (mix("dcpo").Trainer, {"rows": 4, "num_iterations": 2}),
    "duration_aware": (mix("duration_aware").Trainer, {"duration_normalize": "ema", "rewards": timed_reward}),
    "duration_aware steps": (mix("duration_aware").Trainer, {"rewards": step_timed_reward}),
    "deficit_sampler": (mix("deficit_sampler").Trainer, {}),
    "deficit_sampler + spo": (mix("deficit_sampler", "spo").Trainer, {"spo_offline_n": 0, "spo_rho_mode": "constant"}),
    "dynamic_sampling": (mix("dynamic_sampling").Trainer, {}),
    "knapsack_rl": (
        mix("knapsack_rl").Trainer,
        {"rows": 4, "knapsack_min_history": 1, "knapsack_zero_rollouts": 1},
    ),
    "empg": (mix("empg").Trainer, {}),
    "d3s": (mix("d3s").Trainer, {"d3s_n_final": 2, "d3s_k_init": 0.5}),
    "d3s within": (mix("d3s").Trainer, {"d3s_level": "within", "d3s_k_init": 0.5, "loss_type": "grpo"}),
    # The constraint looks at the divergence of each process's micro-batch, as in the authors' code.
    "disco": (mix("disco").Trainer, {"disco_beta": 0.0, "num_iterations": 2}),
    "llds": (mix("llds").Trainer, {"num_iterations": 2}),
    "gvm": (mix("gvm").Trainer, {"rows": 4, "gvm_presamples": 4, "gvm_update_steps": 2}),
    "gvm raft": (mix("gvm").Trainer, {"rows": 4, "gvm_presamples": 4, "gvm_loss": "raft", "num_iterations": 2}),
    "kdrl": (mix("kdrl").Trainer, {"kd_teacher": POLICY_PATH, "kd_beta_init": 0.5, "num_iterations": 2}),
    "rest_grpo": (mix("rest_grpo").Trainer, {"rows": 8, "rest_num_samples": 4}),
    "riskpo": (mix("riskpo").Trainer, {"riskpo_bundle_size": 2, "riskpo_credit": "sum-mean"}),
    "stratified_grpo": (mix("stratified_grpo").Trainer, {"stratified_key": "builtins:len"}),
    # TRL's entropy bonus is a mean over each process's micro-batch.
    "one_shot_rlvr": (mix("one_shot_rlvr").Trainer, {"rows": 4, "num_generations": 4, "entropy_coef": 0.0}),
    "scaf_grpo": (mix("scaf_grpo").Trainer, {"scaf_exempt_steps": 0, "rewards": rare_reward}),
    "blend of bnpo and spo": (
        mix("bnpo", "spo", blend={"bnpo": 0.5, "spo": 0.5}).Trainer,
        {"spo_offline_n": 0, "spo_rho_mode": "constant"},
    ),
    "vade": (mix("vade").Trainer, {}),
    "vas": (mix("vas").Trainer, {"rows": 8, "vas_num_rollouts": 2, "vas_update_steps": 2}),
    "vas online": (mix("vas").Trainer, {"rows": 8, "vas_scoring": "online"}),
    "knapsack_rl + empg + llds": (
        mix("knapsack_rl", "empg", "llds").Trainer,
        {"rows": 4, "knapsack_min_history": 1, "num_iterations": 2},
    ),
    "dynamic_sampling + d3s + clip_cov": (
        mix("dynamic_sampling", "d3s", "clip_cov").Trainer,
        {"clip_cov_scope": "global", "clip_cov_ratio": 0.2, "clip_cov_low": 0.01},
    ),
    # Groups of unequal sizes, of which some lie on both processes.
    "knapsack_rl + gtpo": (
        mix("knapsack_rl", "gtpo").Trainer,
        {"rows": 4, "knapsack_min_history": 1, "knapsack_zero_rollouts": 1},
    ),
    "knapsack_rl + tw_grpo": (
        mix("knapsack_rl", "tw_grpo").Trainer,
        {"rows": 4, "knapsack_min_history": 1, "knapsack_zero_rollouts": 1},
    ),
    "gtpo": (mix("gtpo").Trainer, {}),
    "tw_grpo": (mix("tw_grpo").Trainer, {}),
    "puct": (mix("puct").Trainer, {"rows": 4}),
    "ttt_discover": (mix("ttt_discover").Trainer, {"max_grad_norm": 0.0, "learning_rate": 1e-4}),
    "ttt_discover + puct": (
        mix("ttt_discover", "puct").Trainer,
        {"rows": 8, "entropic_kl_coef": 0.1, "rewards": rare_reward},
    ),
    "clip_cov + spo": (
        mix("clip_cov", "spo").Trainer,
        {"clip_cov_scope": "global", "clip_cov_ratio": 0.2, "clip_cov_low": 0.01, "spo_offline_n": 0},
    ),
}


def main(folder: str, *names: str) -> None:
    processes = int(os.environ["WORLD_SIZE"])
    for name in names or CASES:
        cls, settings = CASES[name]
        settings = dict(settings)
        trainer = train(
            recording(cls),
            cls.config_class,
            # In double precision, so that a difference is an error and not the order of a sum.
            model=AutoModelForCausalLM.from_pretrained(POLICY_PATH, dtype=torch.float64),
            data=hinted(settings.pop("rows", 24)),
            rewards=settings.pop("rewards", digit_reward),
            rollout_func=scripted,
            optim="sgd",
            learning_rate=settings.pop("learning_rate", 0.05),
            max_steps=4,
            out=folder,
            per_device_train_batch_size=16 // processes,
            **settings,
        )
        assert trainer.accelerator.num_processes == processes, "the launcher started another number of processes"
        result = {"seen": trainer.seen, "state": trainer.method_state(), "parameters": parameters(trainer)}
        watched = ("token_entropy/threshold", "token_entropy/high", "token_entropy/drift")
        result["watched"] = [entry.get(name) for entry in trainer.state.log_history for name in watched]
        result["logged"] = list(trainer._logs["advantages"])
        torch.save(result, f"{folder}/{name}_{processes}_{trainer.accelerator.process_index}.pt")


if __name__ == "__main__":
    main(*sys.argv[1:])
