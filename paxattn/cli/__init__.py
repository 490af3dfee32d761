"""`paxattn generate | serve | bench | plan | doctor`: the entry point; a file for each command."""

from __future__ import annotations

import io
import os
import sys

import click

import paxattn
from paxattn.cli.bench import bench
from paxattn.cli.doctor import doctor
from paxattn.cli.generate import generate
from paxattn.cli.plan import plan
from paxattn.cli.serve import serve


def main() -> None:
    """Entry point: one clear line for bad input, quiet for a closed pipe or Ctrl-C."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:  # closed before we started
            setattr(sys, name, open(os.devnull, mode))  # noqa: SIM115
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a terminal may lack what a model writes
    try:
        # Not `cli()`: click would turn a closed pipe into exit code 1 before we see it.
        with cli.make_context("paxattn", sys.argv[1:]) as context:
            cli.invoke(context)
        sys.stdout.flush()
    except click.exceptions.Exit as done:
        sys.exit(done.exit_code)
    except click.ClickException as error:
        hint = ""
        if isinstance(error, click.UsageError) and error.ctx is not None:
            hint = f" (see {error.ctx.command_path} --help)"
        _fail(f"{error.format_message()}{hint}", error.exit_code)
    except (ValueError, TypeError, OSError, RuntimeError, OverflowError, MemoryError) as error:
        if isinstance(error, BrokenPipeError):
            # Whoever read our output has enough. Python flushes stdout at exit: give it a sink.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            sys.exit(0)
        _fail(str(error) or type(error).__name__, 1)
    except (click.Abort, KeyboardInterrupt):
        _fail("interrupted", 130)


def _fail(message: str, code: int) -> None:
    line = " ".join(message.split())
    click.echo(f"paxattn: error: {line}", err=True)
    sys.exit(code)


@click.group(
    invoke_without_command=True,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
@click.version_option(paxattn.__version__, prog_name="paxattn")
@click.pass_context
def cli(context: click.Context) -> None:
    """Paged attention for JAX: generate and serve text, time attention, plan memory."""
    if context.invoked_subcommand is None:
        click.echo(context.get_help())


for command in (generate, serve, bench, plan, doctor):
    cli.add_command(command)
