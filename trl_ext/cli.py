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
    parser.parse_args(argv)
    list_methods()


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
