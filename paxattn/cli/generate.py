"""`paxattn generate`."""

from __future__ import annotations

import sys
from typing import IO, Any

import click

import paxattn
from paxattn.cli.common import (
    dtype_here,
    dtype_option,
    kv_dtype_option,
    load_checkpoint,
    model_option,
    not_empty,
    page_size_option,
)
from paxattn.display import Output, Report, Search, show_live, show_plain, summary
from paxattn.generate import Stream, stream
from paxattn.models import load
from paxattn.requests import GenerateOptions
from paxattn.sampling import SamplingParams
from paxattn.speculative import DraftModel, NGram


@click.command(
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
@model_option
@click.option(
    "--max-new-tokens",
    "-n",
    type=click.IntRange(0),
    default=64,
    show_default=True,
    help="Of each prompt.",
)
@click.option("--temperature", "-t", type=float, help="0 is greedy.  [default: 0]")
@click.option("--top-k", type=int, help="Keep the k most likely tokens.  [default: all]")
@click.option("--top-p", type=float, help="Keep the likeliest tokens of this mass.  [default: 1]")
@click.option(
    "--min-p",
    type=float,
    help="Keep tokens at least this likely, relative to the likeliest.  [default: 0]",
)
@click.option(
    "--repetition-penalty",
    type=float,
    help="Above 1: make tokens that came already less likely.  [default: 1]",
)
@click.option(
    "--frequency-penalty",
    type=float,
    help="Above 0: make tokens less likely each time they are generated.  [default: 0]",
)
@click.option(
    "--presence-penalty",
    type=float,
    help="Above 0: make tokens that were generated less likely.  [default: 0]",
)
@click.option(
    "--seed",
    type=click.IntRange(0, 2**32 - 1),
    default=0,
    show_default=True,
    help="The next samples and prompts use seed + 1, seed + 2, ... (modulo 2**32).",
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
    callback=not_empty,
    help='Speculate: "ngram", or a small checkpoint of the same vocabulary.  [default: off]',
)
@click.option(
    "--draft-tokens",
    type=click.IntRange(1),
    default=4,
    show_default=True,
    help="Guesses per step.",
)
@click.option(
    "--draft-branches",
    type=click.IntRange(1),
    default=1,
    show_default=True,
    help="Alternatives in the place of each guess, checked in the same step.",
)
@click.option(
    "--prefix-cache/--no-prefix-cache",
    default=True,
    show_default=True,
    help="Compute what several prompts begin with once, and share its pages.",
)
@click.option("--stop", multiple=True, help="End a completion at this string; may be repeated.")
@click.option("--ignore-eos", is_flag=True, help="Go on past the model's end-of-text token.")
@dtype_option
@kv_dtype_option
@page_size_option
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
    draft_branches: int,
    prefix_cache: bool,
    stop: tuple[str, ...],
    ignore_eos: bool,
    dtype: str | None,
    kv_dtype: str | None,
    page_size: int,
    num_pages: int | None,
    quiet: bool,
    **sampling: Any,
) -> None:
    """Complete prompts, all at once, out of one paged KV cache.

    Without sampling options tokens are chosen as the checkpoint's generation_config.json says.
    """
    texts = _read_prompts(prompts, prompt_file)
    asked = {name: value for name, value in sampling.items() if value is not None}
    try:
        SamplingParams(**asked).validate()
    except ValueError as error:
        raise click.UsageError(str(error)) from None
    if num_beams and (asked or num_samples > 1 or draft or stop):
        raise click.UsageError(
            "--num-beams does not go with sampling options, --num-samples, --draft or --stop"
        )
    if not num_beams and (length_penalty, early_stopping) != (1.0, "false"):
        raise click.UsageError("--length-penalty and --early-stopping need --num-beams")
    if not draft and (draft_tokens, draft_branches) != (4, 1):
        raise click.UsageError("--draft-tokens and --draft-branches need --draft")
    log = Output(stderr=True, quiet=quiet)
    checkpoint = load_checkpoint(model, dtype, log)
    options: GenerateOptions = {
        "tokenizer": checkpoint.tokenizer,
        "max_new_tokens": max_new_tokens,
        "stop_token_ids": () if ignore_eos else checkpoint.stop_token_ids,
        "page_size": page_size,
        "num_pages": num_pages,
        "kv_dtype": kv_dtype,
        "prefix_cache": prefix_cache,
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
        asked = asked or checkpoint.generation_config.sampling
        seeds = [(seed + i * num_samples) % 2**32 for i in range(len(texts))]
        options["sampling"] = [SamplingParams(seed=one, **asked) for one in seeds]
        options["num_samples"] = num_samples
        options["draft"] = _drafter(draft, draft_tokens, draft_branches, dtype)
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
            f"{running.stats().num_pages} ({running.stats().enough_pages} are enough in any case)"
        )


def _drafter(
    draft: str | None, num_tokens: int, branches: int, dtype: str | None
) -> NGram | DraftModel | None:
    if draft is None:
        return None
    if draft == "ngram":
        return NGram(num_tokens=num_tokens, branches=branches)
    model = load(draft, dtype=dtype_here(dtype)).model
    return DraftModel(model=model, num_tokens=num_tokens, branches=branches)


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
        raise click.UsageError(
            f"prompt {empty[0] + 1} is empty: a model needs something to start from"
        )
    return texts
