"""`paxattn serve`."""

from __future__ import annotations

import signal
import socket
from functools import partial
from pathlib import Path
from typing import Any

import click
import jax

from paxattn.cli.common import (
    dtype_option,
    kv_dtype_option,
    load_checkpoint,
    model_option,
    not_empty,
    page_size_option,
)
from paxattn.cli.plan import Bytes
from paxattn.display import Output, working
from paxattn.models import Checkpoint, bundled
from paxattn.serving import Engine

_ON_A_CPU = 2**30  # bytes of pages, where nobody says how much memory there is
_OF_A_DEVICE = 0.85  # of the memory that the weights leave; the rest is for what steps need


@click.command(
    epilog="""\b
    Examples:
      paxattn serve
      paxattn serve --model Qwen/Qwen3-0.6B --port 8080 --max-seqs 64
      paxattn serve --model DIR --name my-model --memory 20GiB --host 0.0.0.0
    """
)
@model_option
@click.option(
    "--name", callback=not_empty, help="The model's, for clients.  [default: the directory's]"
)
@click.option("--host", default="127.0.0.1", show_default=True, help="0.0.0.0 for all networks.")
@click.option(
    "--port",
    type=click.IntRange(0, 65535),
    default=8000,
    show_default=True,
    help="0 takes a free one.",
)
@click.option(
    "--max-seqs",
    type=click.IntRange(1),
    default=16,
    show_default=True,
    help="Requests that run at once.",
)
@click.option(
    "--max-requests",
    type=click.IntRange(1),
    default=256,
    show_default=True,
    help="Requests that run or wait; beyond, clients are told to try again later.",
)
@click.option(
    "--max-tokens",
    type=click.IntRange(2),
    help="Of a request, prompt and completion.  [default: the model's positions]",
)
@click.option(
    "--step-tokens",
    type=click.IntRange(1),
    default=256,
    show_default=True,
    help="Tokens per device step: what decoding leaves of them stores prompts.",
)
@click.option(
    "--memory", type=Bytes(), help="For pages, such as 4GiB.  [default: what the weights leave]"
)
@click.option("--num-pages", type=click.IntRange(1), help="Instead of --memory.")
@page_size_option
@click.option(
    "--prefix-cache/--no-prefix-cache",
    default=True,
    show_default=True,
    help="Start prompts from what earlier requests computed.",
)
@click.option(
    "--chat-template",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="A jinja file.  [default: the checkpoint's]",
)
@click.option(
    "--scheduling-policy",
    type=click.Choice(["fcfs", "priority"]),
    default="fcfs",
    show_default=True,
    help="Who comes first goes first; or requests say their priority, the lowest first.",
)
@click.option(
    "--max-body", type=Bytes(), default="4MiB", show_default=True, help="Bytes of a request."
)
@click.option(
    "--grace",
    type=click.IntRange(0),
    default=60,
    show_default=True,
    help="Seconds that running requests have to end after SIGTERM or Ctrl-C.",
)
@dtype_option
@kv_dtype_option
def serve(
    model: str | None,
    name: str | None,
    host: str,
    port: int,
    max_tokens: int | None,
    memory: int | None,
    num_pages: int | None,
    page_size: int,
    chat_template: Path | None,
    scheduling_policy: str,
    max_body: int,
    grace: int,
    dtype: str | None,
    kv_dtype: str | None,
    **sizes: Any,
) -> None:
    """Serve a model over HTTP by the OpenAI API; needs paxattn[serve].

    POST /v1/completions and /v1/chat/completions, whole or as server-sent events; GET /v1/models,
    /health and /metrics (for Prometheus).
    """
    try:
        from paxattn.server import Server, create_app, read_chat_template
    except ImportError as error:
        raise click.ClickException(
            f"no module {error.name}: pip install 'paxattn[serve]'"
        ) from None
    if memory is not None and num_pages is not None:
        raise click.UsageError("--memory and --num-pages both tell the pages: pass one of them")
    log = Output(stderr=True, highlight=False)
    with _bound(host, port) as sock:
        checkpoint = load_checkpoint(model, dtype, log)
        template = read_chat_template(checkpoint.directory, chat_template)
        engine = Engine(
            checkpoint.model,
            num_pages=num_pages
            or _num_pages(checkpoint, memory, page_size, kv_dtype, max_tokens, sizes),
            page_size=page_size,
            kv_dtype=kv_dtype,
            max_tokens=max_tokens,
            tokenizer=checkpoint.tokenizer,
            max_stop_ids=8 + len(checkpoint.stop_token_ids),  # a request's own, and those
            **sizes,
        )
        app = create_app(
            engine,
            name=name or (model or bundled().name).rstrip("/"),
            stop_token_ids=checkpoint.stop_token_ids,
            chat_template=template,
            priorities=scheduling_policy == "priority",
            max_body_bytes=max_body,
        )
        with working(log, "compiling"):
            engine.warm_up()
        server = Server(app, grace=grace)
        sock.listen(server.config.backlog)  # from here on clients are heard
        url = _url(host, sock.getsockname()[1])
        log.print(
            f"serving at {url}, {engine.num_pages} pages of {page_size} tokens", soft_wrap=True
        )
        # uvicorn handles both signals, and raises them again when all is done.
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: None)
        server.run(sockets=[sock])


def _bound(host: str, port: int) -> socket.socket:
    """A socket that listens to nobody yet: a port that is taken is known before all the work."""
    try:
        family, kind, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        sock = socket.socket(family, kind)
        try:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            sock.bind(address)
        except OSError:
            sock.close()
            raise
    except (OSError, UnicodeError) as error:
        why = getattr(error, "strerror", None) or error
        raise click.ClickException(f"cannot serve at {host}:{port}: {why}") from None
    return sock


def _url(host: str, port: int) -> str:
    """For clients; an IPv6 address has colons itself."""
    return f"http://[{host}]:{port}/v1" if ":" in host else f"http://{host}:{port}/v1"


def _num_pages(
    checkpoint: Checkpoint,
    memory: int | None,
    page_size: int,
    kv_dtype: str | None,
    max_tokens: int | None,
    sizes: dict[str, Any],
) -> int:
    """Pages that fit the memory; never more than the running requests can fill."""
    longest = checkpoint.config.max_positions if max_tokens is None else max_tokens
    if memory is None:
        stats = jax.devices()[0].memory_stats() or {}
        left = stats.get("bytes_limit", 0) - stats.get("bytes_in_use", 0)
        memory = int(_OF_A_DEVICE * left) if left > 0 else _ON_A_CPU
    init = partial(checkpoint.model.init_cache, num_pages=1, page_size=page_size, dtype=kv_dtype)
    page_bytes = jax.eval_shape(init).bytes_per_page
    enough = sizes["max_seqs"] * -(-longest // page_size)
    pages = min(memory // page_bytes, enough)
    if pages < 1:
        raise click.ClickException(
            f"{memory} bytes hold no page of {page_size} tokens and {page_bytes} bytes: raise "
            "--memory"
        )
    return pages
