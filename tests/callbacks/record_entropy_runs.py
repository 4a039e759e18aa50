"""
Records `data/entropy_runs.json`: entropy and reward of short runs of TRL's own `GRPOTrainer` on the embedded policy,
on which the alarms of `trl_ext.callbacks.entropy_law` were set (`"set"`) and are tested (`"test"`).

    python tests/callbacks/record_entropy_runs.py LINES [RECIPE:SEED...]   # one JSON line per run; default: all again
    python tests/callbacks/record_entropy_runs.py merge LINES...           # writes the data file

Seeds above 10 are for testing.
"""

import json
import sys
import warnings
from pathlib import Path


sys.path.insert(0, str(Path(__file__).parents[1]))
DATA = Path(__file__).parent / "data" / "entropy_runs.json"

# Rewards, learning rate, entropy settings, steps. A few prompts seen again and again and a reward that is easy to game
# collapse without control; a bonus that outweighs the reward explodes.
RECIPES = {
    "parity, fast": ("parity", 5e-4, {}, 130),
    "parity, faster": ("parity", 8e-4, {}, 110),
    "exact, fast": ("exact", 3e-4, {}, 130),
    "parity, slow": ("parity", 3e-5, {}, 100),
    "exact, slow": ("exact", 2e-5, {}, 100),
    "parity, controlled": (
        "parity",
        5e-4,
        {"use_adaptive_entropy": True, "entropy_target": 0.4, "entropy_coef_delta": 0.01, "entropy_coef_max": 0.1},
        130,
    ),
    "exact, steady": ("exact", 5e-5, {}, 100),
    "parity, held": (
        "parity",
        1e-4,
        {
            "use_adaptive_entropy": True,
            "entropy_coef": 0.05,
            "entropy_target": 0.45,
            "entropy_coef_delta": 0.01,
            "entropy_coef_max": 0.1,
        },
        100,
    ),
    "bonus": ("parity", 5e-4, {"entropy_coef": 0.2}, 60),
    "bonus, slower": ("exact", 2e-4, {"entropy_coef": 0.5}, 80),
}


def record(name, seed):
    from harness import build, exact_match, parity_reward
    from trl import GRPOConfig, GRPOTrainer

    reward, rate, control, steps = RECIPES[name]
    trainer = build(
        GRPOTrainer,
        GRPOConfig,
        rewards={"parity": parity_reward, "exact": exact_match}[reward],
        learning_rate=rate,
        max_steps=steps,
        per_device_train_batch_size=32,
        num_generations=8,
        seed=seed,
        **control,
    )
    trainer.train()
    logs = [entry for entry in trainer.state.log_history if "entropy" in entry]
    curves = {key: [round(entry[key], 4) for entry in logs] for key in ("entropy", "reward")}
    return {"recipe": name, "seed": seed, "split": "test" if seed > 10 else "set", **curves}


def kind(entropy):
    """
    What a run is, by the entropy it ends with (its last ten steps against its first ten) and, for a collapse that was
    cured later, the lowest mean of ten steps.
    """
    means = [sum(entropy[i : i + 10]) for i in range(len(entropy) - 9)]
    if min(means) < 0.25 * means[0]:
        return "collapse"
    if means[-1] > 2 * means[0]:
        return "explosion"
    return "healthy" if 0.7 <= means[-1] / means[0] <= 1.4 else "between"


if __name__ == "__main__":
    if sys.argv[1] == "merge":
        runs = [json.loads(line) for path in sys.argv[2:] for line in Path(path).read_text().splitlines()]
        runs = {(run["recipe"], run["seed"]): {"kind": kind(run["entropy"]), **run} for run in runs}
        runs = [run for _, run in sorted(runs.items())]
        DATA.write_text("[\n" + ",\n".join(json.dumps(run) for run in runs) + "\n]\n")
    else:
        warnings.filterwarnings("ignore")
        jobs = [job.split(":") for job in sys.argv[2:]]
        for name, seed in jobs or [(run["recipe"], run["seed"]) for run in json.loads(DATA.read_text())]:
            with open(sys.argv[1], "a") as lines:
                lines.write(json.dumps(record(name, int(seed))) + "\n")
