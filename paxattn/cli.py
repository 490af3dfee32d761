"""`paxattn generate | plan | doctor`."""

from __future__ import annotations

import contextlib
import os
import re
import sys
from collections.abc import Callable, Iterator
from fractions import Fraction
from importlib import metadata
from pathlib import Path
from typing import IO, Any, ClassVar

import click
import jax
import platformdirs
from flax import nnx
from rich.filesize import decimal
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn
from rich.table import Table

import paxattn
from paxattn.attention import implementations
from paxattn.display import Output, Report, Search, show_live, show_plain, show_plan, summary
from paxattn.generate import Stream, stream
from paxattn.memory import plan as memory_plan
from paxattn.models import CheckpointError, Decoder, DecoderConfig, bundled, load
from paxattn.models.config import read_config
from paxattn.requests import GenerateOptions
from paxattn.sampling import SamplingParams
from paxattn.speculative import DraftModel, NGram

_DTYPES = ("float32", "bfloat16", "float16")


def main() -> None:
    """Entry point: one clear line for bad input, quiet for a closed pipe or Ctrl-C."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:  # closed before we started
            setattr(sys, name, open(os.devnull, mode))  # noqa: SIM115
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
    except (CheckpointError, ValueError, TypeError, OSError, RuntimeError, OverflowError) as error:
        if isinstance(error, BrokenPipeError):
            # Whoever read our output has enough. Python flushes stdout at exit: give it a sink.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            sys.exit(0)
        _fail(str(error), 1)
    except (click.Abort, KeyboardInterrupt):
        _fail("interrupted", 130)


def _fail(message: str, code: int) -> None:
    line = " ".join(message.split())
    click.echo(f"paxattn: error: {line}", err=True)
    sys.exit(code)


def _devices() -> list[jax.Device]:
    try:
        return jax.devices()
    except (RuntimeError, AssertionError) as error:  # the latter where a platform has no device
        asked = os.environ.get("JAX_PLATFORMS")
        why = str(error) or f"none of JAX_PLATFORMS={asked}; unset it to use what is there"
        raise click.ClickException(f"JAX found no device: {why}") from None


def _not_empty(context: click.Context, option: click.Parameter, value: str | None) -> str | None:
    if value == "":
        raise click.BadParameter("is empty", context, option)
    return value


@click.group(
    invoke_without_command=True,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
@click.version_option(paxattn.__version__, prog_name="paxattn")
@click.pass_context
def cli(context: click.Context) -> None:
    """Paged attention for JAX: generate text, plan memory, inspect this machine."""
    if context.invoked_subcommand is None:
        click.echo(context.get_help())


@cli.command(
    epilog="""\b
    Examples:
      paxattn generate -p "def read_config(path):" -p "class Stack:"
      paxattn generate --prompt-file prompts.txt --temperature 0.8 --top-p 0.95
      paxattn generate -p "import os" --temperature 0.8 --num-samples 4
      paxattn generate -p "import os" --num-beams 4
      paxattn generate -p "import os" --draft ngram
      echo "import os" | paxattn generate
    """
)
@click.option("--prompt", "-p", "prompts", multiple=True, help="A prompt; may be repeated.")
@click.option(
    "--prompt-file",
    type=click.File("r", encoding="utf-8-sig"),
    help="One prompt per line; - for standard input (the default without --prompt).",
)
@click.option(
    "--model",
    "-m",
    callback=_not_empty,
    help="Checkpoint directory or hub id.  [default: the small bundled model of Python code]",
)
@click.option(
    "--max-new-tokens",
    "-n",
    type=click.IntRange(0),
    default=64,
    show_default=True,
    help="Of each prompt.",
)
@click.option(
    "--temperature", "-t", type=float, default=0.0, show_default=True, help="0 is greedy."
)
@click.option("--top-k", type=int, default=0, help="Keep the k most likely tokens.  [default: all]")
@click.option(
    "--top-p", type=float, default=1.0, help="Keep the likeliest tokens of this mass.  [default: 1]"
)
@click.option(
    "--min-p",
    type=float,
    default=0.0,
    help="Keep tokens at least this likely, relative to the likeliest.  [default: 0]",
)
@click.option(
    "--repetition-penalty",
    type=float,
    default=1.0,
    show_default=True,
    help="Above 1: make tokens that came already less likely.",
)
@click.option(
    "--seed",
    type=click.IntRange(0, 2**32 - 1),
    default=0,
    show_default=True,
    help="The next prompts use seed + 1, seed + 2, ... (modulo 2**32).",
)
@click.option(
    "--num-samples",
    type=click.IntRange(1),
    default=1,
    show_default=True,
    help="Completions of each prompt, which share its pages; needs --temperature to differ.",
)
@click.option(
    "--num-beams",
    type=click.IntRange(1),
    help="Beam search instead of sampling.  [default: off]",
)
@click.option(
    "--length-penalty",
    type=float,
    default=1.0,
    show_default=True,
    help="Beams: above 0 favours long completions.",
)
@click.option(
    "--early-stopping",
    type=click.Choice(["false", "true", "never"]),
    default="false",
    show_default=True,
    help="Beams: when a search ends, as transformers has it.",
)
@click.option(
    "--draft",
    callback=_not_empty,
    help='Speculate: "ngram", or a small checkpoint of the same vocabulary.  [default: off]',
)
@click.option(
    "--draft-tokens",
    type=click.IntRange(1),
    default=4,
    show_default=True,
    help="Guesses per step.",
)
@click.option("--stop", multiple=True, help="End a completion at this string; may be repeated.")
@click.option("--ignore-eos", is_flag=True, help="Go on past the model's end-of-text token.")
@click.option(
    "--dtype",
    type=click.Choice(_DTYPES),
    help="Of weights and cache.  [default: the checkpoint's; float32 on a CPU]",
)
@click.option(
    "--page-size",
    type=click.IntRange(1, 256),
    default=16,
    show_default=True,
    help="Tokens per page.",
)
@click.option(
    "--num-pages", type=click.IntRange(1), help="Pages in the pool.  [default: enough for all]"
)
@click.option("--quiet", "-q", is_flag=True, help="Only the text: no progress, no summary.")
def generate(
    prompts: tuple[str, ...],
    prompt_file: IO[str] | None,
    model: str | None,
    max_new_tokens: int,
    seed: int,
    num_samples: int,
    num_beams: int | None,
    length_penalty: float,
    early_stopping: str,
    draft: str | None,
    draft_tokens: int,
    stop: tuple[str, ...],
    ignore_eos: bool,
    dtype: str | None,
    page_size: int,
    num_pages: int | None,
    quiet: bool,
    **sampling: Any,
) -> None:
    """Complete prompts, all at once, out of one paged KV cache."""
    texts = _read_prompts(prompts, prompt_file)
    seeds = [(seed + i * num_samples) % 2**32 for i in range(len(texts))]
    params = [SamplingParams(seed=one, **sampling) for one in seeds]
    for one in params:
        one.validate()
    if num_beams and (sampling["temperature"] or num_samples > 1 or draft or stop):
        raise click.UsageError(
            "--num-beams does not go with --temperature, --num-samples, --draft or --stop"
        )
    _use_compilation_cache()
    _devices()
    if dtype is None and jax.default_backend() == "cpu":
        dtype = "float32"  # CPUs emulate 16-bit arithmetic, slowly
    log = Output(stderr=True, quiet=quiet)
    with _loading(log) as progress:
        checkpoint = load(model or bundled(), dtype=dtype, progress=progress)
    if checkpoint.tokenizer is None:
        raise click.UsageError(f"{model} has no tokenizer.json, so it cannot read text prompts")
    options: GenerateOptions = {
        "tokenizer": checkpoint.tokenizer,
        "max_new_tokens": max_new_tokens,
        "stop_token_ids": () if ignore_eos else checkpoint.stop_token_ids,
        "page_size": page_size,
        "num_pages": num_pages,
    }
    running: Stream | Search
    if num_beams:
        running = Search(
            lambda: paxattn.generate(
                checkpoint.model,
                texts,
                num_beams=num_beams,
                length_penalty=length_penalty,
                early_stopping={"true": True, "false": False}.get(early_stopping, early_stopping),
                **options,
            )
        )
    else:
        options["sampling"] = params
        options["num_samples"] = num_samples
        options["draft"] = _drafter(draft, draft_tokens, dtype)
        options["stop"] = stop
        running = stream(checkpoint.model, texts, steps_per_read=2, **options)
    shown = [text for text in texts for _ in range(num_samples)]
    report = Report(len(shown))
    if sys.stdout.isatty() and not quiet:
        show_live(running, shown, report, log)
    else:
        show_plain(running, shown, report, log)
    if not quiet:
        summary(log, report, running.stats(), checkpoint.config.max_positions)
    short = report.reasons.count("out_of_pages")
    if short:
        raise click.ClickException(
            f"{short} of {len(shown)} completions ran out of pages: raise --num-pages above "
            f"{running.stats().num_pages}"
        )


def _drafter(draft: str | None, num_tokens: int, dtype: str | None) -> NGram | DraftModel | None:
    if draft is None:
        return None
    if draft == "ngram":
        return NGram(num_tokens=num_tokens)
    return DraftModel(model=load(draft, dtype=dtype).model, num_tokens=num_tokens)


def _read_prompts(prompts: tuple[str, ...], file: IO[str] | None) -> list[str]:
    texts = list(prompts)
    if file is None and not texts:
        if sys.stdin.isatty():
            raise click.UsageError("no prompt: pass --prompt, --prompt-file or standard input")
        file = click.open_file("-", encoding="utf-8-sig")
    if file is not None:
        try:
            texts += [line.rstrip("\r\n") for line in file if line.strip()]
        except UnicodeDecodeError as error:
            raise click.UsageError(f"{file.name} is not UTF-8 text: {error}") from None
    if not texts:
        raise click.UsageError("no prompt: the input is empty")
    empty = [i for i, text in enumerate(texts) if not text]
    if empty:
        raise click.UsageError(f"prompt {empty[0]} is empty: a model needs something to start from")
    return texts


def _use_compilation_cache() -> None:
    """Keep compiled programs between runs, unless JAX was told where already."""
    if not jax.config.jax_compilation_cache_dir:  # type: ignore[attr-defined]
        jax.config.update(
            "jax_compilation_cache_dir", str(Path(platformdirs.user_cache_dir("paxattn")) / "jax")
        )
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)


@contextlib.contextmanager
def _loading(log: Output) -> Iterator[Callable[[int, int], None]]:
    columns = (TextColumn("loading"), BarColumn(), DownloadColumn())
    with Progress(*columns, console=log, transient=True, disable=not log.is_terminal) as progress:
        task = progress.add_task("loading", total=None)
        yield lambda done, total: progress.update(task, completed=done, total=total)


class _Bytes(click.ParamType):
    """A number of bytes: 24GiB, 80GB, 512MiB or a plain integer."""

    name = "bytes"
    _UNITS: ClassVar = {f"{p}{u}": base ** (i + 1) for u, base in (("B", 1000), ("iB", 1024))
                        for i, p in enumerate("KMGT")}  # fmt: skip

    def convert(self, value: Any, param: Any, ctx: Any) -> int:
        match = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)\s*([KMGT]i?B|B?)", str(value).strip())
        if match is None or len(match[1]) > 30:
            self.fail(
                f"{str(value)[:40]!r} is not a size such as 24GiB, 80GB or 512MiB", param, ctx
            )
        size = int(Fraction(match[1]) * self._UNITS.get(match[2], 1))
        if size >= 2**63:
            self.fail(f"{value} is more than any device has", param, ctx)
        return size


@cli.command(
    epilog="""\b
    Examples:
      paxattn plan --model DIR --memory 24GiB --mean-len 500
      paxattn plan --layers 32 --kv-heads 8 --head-dim 128 --weights 16GB --memory 80GB
    """
)
@click.option(
    "--model", "-m", callback=_not_empty, help="Checkpoint directory: gives shapes and weights."
)
@click.option("--layers", type=click.IntRange(1), help="Without --model: layers.")
@click.option("--kv-heads", type=click.IntRange(1), help="Without --model: KV heads per layer.")
@click.option("--head-dim", type=click.IntRange(1), help="Without --model: elements per head.")
@click.option(
    "--weights", type=_Bytes(), help="Bytes of the weights.  [default: the model's, or 0]"
)
@click.option(
    "--memory", type=_Bytes(), help="Budget, such as 24GiB.  [default: the first device's memory]"
)
@click.option(
    "--max-len",
    type=click.IntRange(1),
    help="Tokens a sequence may grow to.  [default: the model's positions, or 2048]",
)
@click.option(
    "--mean-len",
    type=click.IntRange(1),
    help="Tokens of a typical sequence.  [default: a quarter of --max-len]",
)
@click.option(
    "--shared-prefix", type=click.IntRange(0), default=0, help="Tokens all share.  [default: 0]"
)
@click.option(
    "--page-size",
    type=click.IntRange(1, 256),
    default=16,
    show_default=True,
    help="Tokens per page.",
)
@click.option(
    "--dtype",
    type=click.Choice(_DTYPES),
    default="bfloat16",
    show_default=True,
    help="Of the cache and, with --model, its weights.",
)
def plan(
    model: str | None,
    layers: int | None,
    kv_heads: int | None,
    head_dim: int | None,
    weights: int | None,
    memory: int | None,
    max_len: int | None,
    mean_len: int | None,
    shared_prefix: int,
    page_size: int,
    dtype: str,
) -> None:
    """Tell how many sequences fit a device or a byte budget, paged and reserved naively."""
    given = {"--layers": layers, "--kv-heads": kv_heads, "--head-dim": head_dim}
    both = [name for name, value in given.items() if value is not None]
    if model is not None and both:
        raise click.UsageError(f"--model and {both[0]} both tell the shapes: pass one of them")
    if model is not None:
        config = read_config(Path(model))
        shapes = (config.num_layers, config.num_kv_heads, config.head_dim)
        max_len = max_len or config.max_positions
        weights = _weight_bytes(config, dtype) if weights is None else weights
    elif layers and kv_heads and head_dim:
        shapes = (layers, kv_heads, head_dim)
        max_len = max_len or 2048
    else:
        raise click.UsageError("pass --model, or all of --layers, --kv-heads and --head-dim")
    if memory is None:
        memory = (_devices()[0].memory_stats() or {}).get("bytes_limit")
        if memory is None:
            raise click.UsageError("this device does not report its memory: pass --memory")
    sizes = memory_plan(
        memory_bytes=memory,
        weight_bytes=weights or 0,
        num_layers=shapes[0],
        num_kv_heads=shapes[1],
        head_dim=shapes[2],
        max_len=max_len,
        mean_len=mean_len or max(1, max_len // 4),
        dtype=dtype,
        page_size=page_size,
        shared_prefix=shared_prefix,
    )
    show_plan(sizes, dtype)


def _weight_bytes(config: DecoderConfig, dtype: str) -> int:
    """Bytes of a model's weights, from its shapes alone."""
    model = nnx.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0), dtype=dtype, stacked=True))
    leaves = jax.tree.leaves(nnx.state(model, nnx.Param))
    return sum(leaf.size * leaf.dtype.itemsize for leaf in leaves)


@cli.command()
def doctor() -> None:
    """Show versions, devices, and which attention implementations this machine can use."""
    console = Output(highlight=False)
    versions = Table(show_header=False, box=None, pad_edge=False)
    versions.add_row("paxattn", paxattn.__version__)
    versions.add_row("python", sys.version.split()[0])
    for name in ("jax", "jaxlib", "flax", "numpy", "safetensors", "tokenizers"):
        versions.add_row(name, metadata.version(name))
    console.print(versions)
    console.print()

    devices = Table("device", "platform", "kind", "memory", box=None, pad_edge=False)
    for device in _devices():
        limit = (device.memory_stats() or {}).get("bytes_limit")
        size = decimal(limit) if limit else "not reported"
        devices.add_row(str(device), device.platform, device.device_kind, size)
    console.print(devices)
    console.print()

    choices = Table("attention", "available", "why", box=None, pad_edge=False)
    for name, available, reason in implementations():
        choices.add_row(name, "yes" if available else "no", reason)
    console.print(choices)
    if jax.default_backend() == "cpu":
        console.print()
        console.print(
            'No accelerator is in use. With an NVIDIA GPU install "paxattn[cuda]", on a TPU host '
            '"paxattn[tpu]".',
            markup=False,
        )
