"""`kubectl_complete-finetune`: what kubectl runs to complete `kubectl finetune`. Prints a proposal a line, then how they are meant."""

import os
import shlex
import sys

import typer

from finetune_operator.cli import app

NO_FILES = ":4"
"""The last line that kubectl expects: these are all there are, files are none of them."""


def main() -> None:
    """Entry of the console script: the arguments are the words after `kubectl finetune`, the last one unfinished."""
    words = sys.argv[1:] or [""]
    os.environ |= {
        "_FINETUNE_COMPLETE": "complete_bash",
        "COMP_WORDS": shlex.join(["finetune", *words[:-1]]) + f" {words[-1]}",
        "COMP_CWORD": str(len(words)),
    }
    try:
        typer.main.get_command(app).main(args=[], prog_name="finetune")
    except SystemExit:
        typer.echo()
    typer.echo(NO_FILES)
