"""The command `trl-ext`, also `python -m trl_ext`."""

import argparse

import trl_ext


def main(argv: list[str] | None = None) -> None:
    """
    Entry point.

    Args:
        argv (`list[str]`, *optional*):
            Arguments; those of the process by default.
    """
    parser = argparse.ArgumentParser(prog="trl-ext", description=trl_ext.__doc__)
    parser.add_argument("--version", action="version", version=f"trl-ext {trl_ext.__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")
    commands.add_parser("methods", help="list the methods: name, classes, paper, hooks")
    select = commands.add_parser("select", help="select training examples by the variance of their success rates")
    select.add_argument("run", help="folder or checkpoint of a run with the method one_shot_rlvr")
    select.add_argument("--output", required=True, help="file to write, .jsonl: a --dataset for the next run")
    select.add_argument("--num_selected", type=int, default=1, help="prompts to select (default 1)")
    select.add_argument("--repeat_to", type=int, default=128, help="rows to write (default 128)")
    select.add_argument("--min_epochs", type=int, default=2, help="visits that a prompt needs (default 2)")
    select.add_argument("--dataset", default="arithmetic", help="data of that run, as given to the recipe")
    select.add_argument("--dataset_size", type=int, help="as given to the recipe")
    select.add_argument("--dataset_train_split", default="train", help="as given to the recipe")
    select.add_argument("--prompt_column", default="prompt", help="as given to the recipe")
    select.add_argument("--seed", type=int, default=42, help="of that run (default 42, TRL's)")
    compare = commands.add_parser("compare", help="say whether two runs with an EvalStatsCallback differ")
    compare.add_argument("run_a", help="output_dir of a run, or those of several seeds joined by commas")
    compare.add_argument("run_b", help="the other one, or the other ones")
    compare.add_argument("--step", type=int, help="optimizer step of the evaluations (default: the last ones)")
    compare.add_argument("--alpha", type=float, default=0.05, help="chance of a false difference (default 0.05)")
    compare.add_argument("--power", type=float, default=0.8, help="chance of finding a true one (default 0.8)")
    report = commands.add_parser("report", help="write a report on a run, finished or not")
    report.add_argument("run", help="output_dir of any TRL trainer")
    report.add_argument("--output", help="file to write (default: report.html or report.md in the run's folder)")
    report.add_argument("--format", choices=["html", "markdown"], help="default: by the ending of --output, or html")
    args = vars(parser.parse_args(argv))
    command = {"methods": list_methods, "select": select_examples, "compare": compare_runs, "report": report_run}[
        args.pop("command")
    ]
    try:
        command(**args)
    except (ValueError, OSError) as error:
        parser.exit(2, f"trl-ext: error: {error}\n")


def list_methods() -> None:
    """Print a table of all methods."""
    from rich.console import Console
    from rich.table import Table

    from .core import mixing

    table = Table("name", "class", "paper", "hooks", title="methods of trl_ext")
    for slug in mixing.list_methods():
        trainer = mixing.find_method(slug)
        table.add_row(slug, trainer.__name__, f"arXiv {trainer._paper['id']}", ", ".join(mixing.joints_of(trainer)))
    Console().print(table)


def compare_runs(**settings) -> None:
    """Say whether two runs differ; see [`~trl_ext.compare.compare_runs`]."""
    from . import compare

    compare.compare_runs(**settings)


def report_run(run: str, output: str | None = None, format: str | None = None) -> None:
    """Write the report on a run; see [`~trl_ext.report.write_report`]."""
    from .report import write_report

    print(f"The report is in {write_report(run, output, format)}.")


def select_examples(
    run: str,
    output: str,
    num_selected: int = 1,
    repeat_to: int = 128,
    min_epochs: int = 2,
    dataset: str = "arithmetic",
    dataset_size: int | None = None,
    dataset_train_split: str = "train",
    prompt_column: str = "prompt",
    seed: int = 42,
) -> None:
    """
    Write the training examples whose success rates varied most over a run (one-shot RLVR, arXiv 2504.20571).

    Args:
        run (`str`):
            Folder or checkpoint of a run with the method `one_shot_rlvr`.
        output (`str`):
            File to write, one example per line.
        num_selected (`int`, *optional*, defaults to `1`):
            Prompts to select.
        repeat_to (`int`, *optional*, defaults to `128`):
            Rows to write; the selected prompts are repeated in turn.
        min_epochs (`int`, *optional*, defaults to `2`):
            Visits that a prompt needs.
        dataset (`str`), dataset_size (`int`), dataset_train_split (`str`), prompt_column (`str`), seed (`int`):
            The data of that run, as in [`~trl_ext.tasks.load_data`].

    Raises:
        ValueError: if the run has no histories, too few, or was trained on other data.
        FileNotFoundError: if there is no such run.
    """
    import os

    import torch

    from .core import state
    from .methods.one_shot_rlvr import historical_variance, rank_examples, repeat_examples
    from .tasks.data import load_data
    from .tasks.embedded import TRAIN_SIZE

    path = os.path.join(run, state.SHARED)
    if not os.path.isfile(path):
        raise FileNotFoundError(f"there is no {path}: name the folder of a finished run, or one of its checkpoints.")
    saved = torch.load(path, map_location="cpu", weights_only=True)
    histories = saved["methods"].get("one_shot_rlvr")
    if histories is None:
        raise ValueError(f"{run} recorded no success rates: train with --methods one_shot_rlvr first.")
    ranked = rank_examples(histories, min_epochs)
    if not 1 <= num_selected <= len(ranked):
        raise ValueError(
            f"`num_selected` must be between 1 and {len(ranked)}, the prompts of {run} with at least {min_epochs} "
            f"visits, got {num_selected}: train longer, or lower it."
        )
    rows = load_data(
        dataset,
        train_split=dataset_train_split,
        size=dataset_size or TRAIN_SIZE,
        seed=seed,
        prompt_column=prompt_column,
    ).train
    if state.fingerprint(rows["prompt"]) != saved["prompts"]:
        raise ValueError(
            f"`dataset` {dataset!r} with `seed` {seed} is not the data that {run} was trained on: give the options of "
            "that run."
        )
    chosen = ranked[:num_selected]
    rows.select(repeat_examples(chosen, repeat_to)).to_json(output)
    for row in chosen:
        rates = histories[row]
        print(
            f"row {row}: variance {historical_variance(rates):.6f}, mean {sum(rates) / len(rates):.3f} over "
            f"{len(rates)} visits: {str(rows[row]['prompt'])[:100]}"
        )
    print(f"{repeat_to} rows are in {output}: train on them with --dataset {output}.")
