"""Generate: a list of prompts in, completions out; the token loop runs inside one ``jax.jit``.

`generate` and `stream` share two compiled functions: one allocates the pool and runs all prompts
in chunks, one decodes until every row has ended (or for so many steps, when streaming). Shapes are
rounded up to buckets, and lengths, sampling parameters and stop tokens are data, so another call
in the same buckets compiles nothing.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Unpack

import jax
import jax.numpy as jnp
import numpy as np

from paxattn.decode_step import DecodeState, Status, decode, prefill, release_rows
from paxattn.page_table import init_page_table
from paxattn.requests import (
    GenerateOptions,
    Prompt,
    Requests,
    Sizes,
    integer,
    prepare_requests,
)
from paxattn.sampling import LogitsProcessor, RowSampling
from paxattn.text import TextStream

_STEPS_PER_READ = 16  # in `generate` with stop strings: the host looks for those
_NO_LIMIT = 2**30


@dataclass(frozen=True, kw_only=True)
class Delta:
    """News of one request from `stream`.

    Attributes:
        index: which prompt.
        tokens: token ids since the last delta.
        logprobs: their log-probabilities under the model.
        text: text since the last delta ("" without a tokenizer).
        finish_reason: None while running; "stop" (a stop token or string), "length"
            (``max_new_tokens``) or "out_of_pages".
    """

    index: int
    tokens: list[int]
    logprobs: list[float]
    text: str
    finish_reason: str | None


@dataclass(frozen=True, kw_only=True)
class Completion:
    """One finished request.

    Attributes:
        prompt_tokens: the prompt's token ids.
        tokens: generated token ids, a final stop token included.
        logprobs: one per generated token.
        text: the generated text, special tokens and stop strings left out ("" without a
            tokenizer).
        finish_reason: see `Delta`.
    """

    prompt_tokens: list[int]
    tokens: list[int]
    logprobs: list[float]
    text: str
    finish_reason: str


@dataclass(frozen=True, kw_only=True)
class PoolStats:
    """How the pool was used.

    Attributes:
        page_size: tokens per page.
        num_pages: pages in the pool.
        peak_pages: most pages held at once.
        bytes_per_page: bytes of K and V per page.
        num_steps: steps run, prefill chunks included.
        utilization: fraction of the held slots that held tokens, averaged over the steps.
        naive_utilization: the same had each running request reserved ``max_positions`` slots.
    """

    page_size: int
    num_pages: int
    peak_pages: int
    bytes_per_page: int
    num_steps: int
    utilization: float
    naive_utilization: float


@dataclass(frozen=True, kw_only=True)
class Generation:
    """What `generate` returns: one completion per prompt, in order, and the pool's use."""

    completions: list[Completion]
    stats: PoolStats


@partial(jax.jit, static_argnames=("sizes", "logits_processor", "scrub"))
def _start(
    model: Any,
    packed: jax.Array,
    prompt_lens: jax.Array,
    max_new_tokens: jax.Array,
    stop_ids: jax.Array,
    sampling: RowSampling,
    *,
    sizes: Sizes,
    logits_processor: LogitsProcessor | None,
    scrub: bool,
) -> DecodeState:
    """Allocate the pool and run the prompts."""
    num_rows = prompt_lens.shape[0]
    wanted = jnp.where(max_new_tokens > 0, jnp.int32(Status.RUNNING), jnp.int32(Status.LENGTH))
    # A prompt larger than the pool takes nothing from the others.
    too_long = -(-prompt_lens // sizes.page_size) > sizes.num_pages
    wanted = jnp.where(too_long, jnp.int32(Status.OUT_OF_PAGES), wanted)
    zero, nothing = jnp.zeros((), jnp.int32), jnp.zeros((), jnp.float32)
    state = DecodeState(
        table=init_page_table(
            num_pages=sizes.num_pages,
            page_size=sizes.page_size,
            max_seqs=num_rows,
            max_pages_per_seq=sizes.max_pages_per_seq,
        ),
        cache=model.init_cache(num_pages=sizes.num_pages, page_size=sizes.page_size),
        status=jnp.where(prompt_lens > 0, wanted, jnp.int32(Status.EMPTY)),
        last_token=jnp.zeros(num_rows, jnp.int32),
        num_generated=jnp.zeros(num_rows, jnp.int32),
        max_new_tokens=max_new_tokens,
        stop_ids=stop_ids,
        sampling=sampling,
        seen=jnp.zeros((num_rows, model.config.vocab_size), bool),
        tokens=jnp.zeros((num_rows, sizes.capacity), jnp.int32),
        logprobs=jnp.zeros((num_rows, sizes.capacity), jnp.float32),
        num_steps=zero,
        peak_pages=zero,
        page_steps=nothing,
        token_steps=nothing,
        row_steps=nothing,
    )
    return prefill(
        model,
        state,
        packed,
        prompt_lens,
        chunk=sizes.chunk,
        logits_processor=logits_processor,
        scrub=scrub,
    )


@partial(jax.jit, donate_argnames=("state",), static_argnames=("logits_processor", "scrub"))
def _continue(
    model: Any,
    state: DecodeState,
    max_steps: jax.Array,
    *,
    logits_processor: LogitsProcessor | None,
    scrub: bool,
) -> DecodeState:
    """Decode for up to ``max_steps``; the table and the pages are donated."""
    return decode(model, state, max_steps, logits_processor=logits_processor, scrub=scrub)


@partial(jax.jit, donate_argnames=("state",), static_argnames=("scrub",))
def _stop(state: DecodeState, mask: jax.Array, *, scrub: bool) -> DecodeState:
    """End rows from the host side."""
    table, cache = release_rows(state.table, state.cache, mask, scrub=scrub)
    return dataclasses.replace(
        state,
        table=table,
        cache=cache,
        status=jnp.where(mask, jnp.int32(Status.STOP), state.status),
    )


class _Reader:
    """Turns a state's new tokens into deltas, finds stop strings, and keeps the pool's figures."""

    def __init__(self, model: Any, requests: Requests) -> None:
        self.texts = [
            None if requests.tokenizer is None else TextStream(requests.tokenizer, requests.stop, p)
            for p in requests.prompts
        ]
        self.read = [0] * len(self.texts)
        self.finished = [False] * len(self.texts)
        self.max_positions = model.config.max_positions
        self.stats = PoolStats(
            page_size=requests.sizes.page_size,
            num_pages=requests.sizes.num_pages,
            peak_pages=0,
            bytes_per_page=0,
            num_steps=0,
            utilization=0.0,
            naive_utilization=0.0,
        )

    def deltas(self, state: DecodeState) -> tuple[list[Delta], np.ndarray]:
        """What is new since the last call, and which rows bool[R] a stop string must end now."""
        status, counts, tokens, logprobs, figures = jax.device_get(
            (
                state.status,
                state.num_generated,
                state.tokens,
                state.logprobs,
                (
                    state.peak_pages,
                    state.num_steps,
                    state.page_steps,
                    state.token_steps,
                    state.row_steps,
                ),
            )
        )
        peak, steps, page_steps, token_steps, row_steps = (figure.item() for figure in figures)
        self.stats = dataclasses.replace(
            self.stats,
            peak_pages=peak,
            bytes_per_page=state.cache.bytes_per_page,
            num_steps=steps,
            utilization=token_steps / max(1.0, page_steps * self.stats.page_size),
            naive_utilization=token_steps / max(1.0, row_steps * self.max_positions),
        )
        news, ended = [], np.zeros(status.shape, bool)
        for i, text in enumerate(self.texts):
            if self.finished[i]:
                continue
            span = slice(self.read[i], int(counts[i]))
            reason = Status(status[i])
            new = tokens[i, span].tolist()
            piece, used = "", len(new)
            if text is not None:
                piece, used = text.push(new, final=reason != Status.RUNNING)
                if text.stopped:
                    ended[i] = reason == Status.RUNNING
                    reason = Status.STOP
            new = new[:used]
            self.finished[i] = reason != Status.RUNNING
            self.read[i] = span.stop
            if new or self.finished[i]:
                news.append(
                    Delta(
                        index=i,
                        tokens=new,
                        logprobs=logprobs[i, span].tolist()[:used],
                        text=piece,
                        finish_reason=reason.name.lower() if self.finished[i] else None,
                    )
                )
        return news, ended


def _run(
    model: Any, requests: Requests, reader: _Reader, steps_per_read: int
) -> Generator[Delta, None, None]:
    """Run the prompts, then so many steps at a time. The state lives here and nowhere else."""
    if not requests.prompts:
        return
    loop = {"logits_processor": requests.logits_processor, "scrub": requests.scrub}
    state = _start(
        model,
        requests.packed,
        requests.prompt_lens,
        requests.max_new_tokens,
        requests.stop_ids,
        requests.sampling,
        sizes=requests.sizes,
        **loop,
    )
    while True:
        news, ended = reader.deltas(state)
        if ended.any():
            state = _stop(state, ended, scrub=requests.scrub)
        yield from news
        if all(reader.finished):
            return
        state = _continue(model, state, np.int32(steps_per_read), **loop)


class Stream(Iterator[Delta]):
    """A generation in progress: iterate for `Delta`, in prompt order within a read.

    Nothing runs until the first ``next``. The pool is freed when the stream is exhausted, closed
    (by `close`, or by leaving a ``with`` block) or dropped.

    Attributes:
        prompts: the prompts' token ids.
    """

    def __init__(
        self, model: Any, prompts: Sequence[Prompt], steps_per_read: int, options: GenerateOptions
    ) -> None:
        """See `stream`."""
        if integer("steps_per_read", steps_per_read) < 1:
            raise ValueError(f"{steps_per_read=} must be at least 1")
        requests = prepare_requests(model, prompts, **options)
        self.prompts = requests.prompts
        self._reader = _Reader(model, requests)
        self._news = _run(model, requests, self._reader, steps_per_read)

    def __next__(self) -> Delta:
        """The next piece of news."""
        return next(self._news)

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the generation and free its pool; iterating stops."""
        self._news.close()

    def stats(self) -> PoolStats:
        """How the pool was used so far, also after the end."""
        return self._reader.stats


def stream(
    model: Any,
    prompts: Sequence[Prompt],
    *,
    steps_per_read: int = 1,
    **options: Unpack[GenerateOptions],
) -> Stream:
    """Generate, handing over tokens and text as they come.

    The same compiled step as `generate`, for so many steps at a time.

    Args:
        model: a `paxattn.models.Decoder`, or any `decode_step.LanguageModel` with a ``config`` that
            has ``vocab_size`` and ``max_positions``.
        prompts: texts (with ``tokenizer=``) or sequences of token ids.
        steps_per_read: decode steps between two reads of what they gave, at least 1.
        **options: see `GenerateOptions`.

    Returns:
        An iterator of `Delta`; the last one of each prompt has a finish reason.

    Raises:
        TypeError: an argument has a wrong type.
        ValueError: a request is malformed; names it, the figures and the remedy.
    """
    return Stream(model, prompts, steps_per_read, options)


def generate(
    model: Any, prompts: Sequence[Prompt], **options: Unpack[GenerateOptions]
) -> Generation:
    """Complete several prompts at once out of one paged KV cache.

    Prompts are run in chunks, then all rows decode together in one ``lax.while_loop``; pages are
    reserved as sequences grow and go back to the pool when they end. A request for which no page
    is left ends with ``"out_of_pages"`` and keeps what it generated; the others are untouched.

    Args:
        model: as for `stream`.
        prompts: texts (with ``tokenizer=``) or sequences of token ids.
        **options: see `GenerateOptions`.

    Raises:
        TypeError: an argument has a wrong type.
        ValueError: a request is malformed; names it, the figures and the remedy.

    Example:
        >>> checkpoint = paxattn.load(paxattn.bundled())
        >>> out = paxattn.generate(
        ...     checkpoint.model,
        ...     ["def read_config(path):", "class Stack:"],
        ...     tokenizer=checkpoint.tokenizer,
        ...     stop_token_ids=checkpoint.stop_token_ids,
        ...     max_new_tokens=64,
        ... )
        >>> print(out.completions[0].text)
    """
    # Without stop strings the host has nothing to look for before all rows have ended.
    news = Stream(model, prompts, _STEPS_PER_READ if options.get("stop") else _NO_LIMIT, options)
    deltas: list[list[Delta]] = [[] for _ in news.prompts]
    for delta in news:
        deltas[delta.index].append(delta)
    completions = [
        Completion(
            prompt_tokens=prompt,
            tokens=[token for delta in own for token in delta.tokens],
            logprobs=[logprob for delta in own for logprob in delta.logprobs],
            text="".join(delta.text for delta in own),
            finish_reason=own[-1].finish_reason or "",
        )
        for prompt, own in zip(news.prompts, deltas, strict=True)
    ]
    return Generation(completions=completions, stats=news.stats())
