"""Generate: a list of prompts in, completions out; the token loop runs inside one ``jax.jit``.

`generate` and `stream` share two compiled functions: one allocates the pool and runs all prompts
in chunks, one decodes until every row has ended (or for so many steps, when streaming). Shapes are
rounded up to buckets, and lengths, sampling parameters and stop tokens are data, so another call
in the same buckets compiles nothing.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Unpack

import jax
import jax.numpy as jnp
import numpy as np
from tokenizers import Tokenizer

from paxattn.decode_step import DecodeState, Status, decode, prefill
from paxattn.page_table import init_page_table, release
from paxattn.requests import GenerateOptions, Prompt, Sizes, prepare_requests
from paxattn.sampling import LogitsProcessor, RowSampling
from paxattn.text import TextStream

_STOP_STRING_BLOCK = 16  # steps between the host's looks for stop strings in `generate`
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


@partial(jax.jit, static_argnames=("sizes", "logits_processor"))
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
        model, state, packed, prompt_lens, chunk=sizes.chunk, logits_processor=logits_processor
    )


@partial(jax.jit, donate_argnames=("state",), static_argnames=("logits_processor",))
def _continue(
    model: Any,
    state: DecodeState,
    max_steps: jax.Array,
    *,
    logits_processor: LogitsProcessor | None,
) -> DecodeState:
    """Decode for up to ``max_steps``; the table and the pages are donated."""
    return decode(model, state, max_steps, logits_processor=logits_processor)


@partial(jax.jit, donate_argnames=("state",))
def _stop(state: DecodeState, mask: jax.Array) -> DecodeState:
    """End rows from the host side."""
    mask = mask & (state.status == Status.RUNNING)
    return dataclasses.replace(
        state,
        table=release(state.table, mask),
        status=jnp.where(mask, jnp.int32(Status.STOP), state.status),
    )


class _Reader:
    """Turns a state's new tokens into deltas, and finds stop strings."""

    def __init__(
        self, prompts: Sequence[Sequence[int]], tokenizer: Tokenizer | None, stop: Sequence[str]
    ) -> None:
        self.texts = [
            None if tokenizer is None else TextStream(tokenizer, stop, prompt) for prompt in prompts
        ]
        self.read = [0] * len(prompts)
        self.finished = [False] * len(prompts)

    def met_stop_string(self) -> bool:
        """Whether any text met one, so that its row must be ended on the device."""
        return any(text is not None and text.stopped for text in self.texts)

    def deltas(self, state: DecodeState) -> list[Delta]:
        """What is new since the last call."""
        status, counts, tokens, logprobs = jax.device_get(
            (state.status, state.num_generated, state.tokens, state.logprobs)
        )
        news = []
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
        return news


class Stream(Iterator[Delta]):
    """A generation in progress: iterate for `Delta`, in prompt order within a look.

    Nothing runs until the first ``next``. Closing or dropping it ends the generation.

    Attributes:
        prompts: the prompts' token ids.
    """

    def __init__(
        self, model: Any, prompts: Sequence[Prompt], block: int, options: GenerateOptions
    ) -> None:
        """See `stream`."""
        if block < 1:
            raise ValueError(f"{block=} must be at least 1 step")
        self._model, self._block = model, block
        self._requests = prepare_requests(model, prompts, **options)
        self._hook = options.get("logits_processor")
        self.prompts = self._requests.prompts
        self._reader = _Reader(self.prompts, options.get("tokenizer"), options.get("stop", ()))
        self._state: DecodeState | None = None
        self._news = self._run()

    def __next__(self) -> Delta:
        """The next piece of news."""
        return next(self._news)

    def _run(self) -> Iterator[Delta]:
        """Run the prompts, then ``block`` steps at a time."""
        requests, reader = self._requests, self._reader
        if not self.prompts:
            return
        state = _start(
            self._model,
            requests.packed,
            requests.prompt_lens,
            requests.max_new_tokens,
            requests.stop_ids,
            requests.sampling,
            sizes=requests.sizes,
            logits_processor=self._hook,
        )
        while True:
            self._state = state
            yield from reader.deltas(state)
            if all(reader.finished):
                return
            if reader.met_stop_string():
                ended = np.zeros(requests.prompt_lens.shape, bool)
                ended[: len(reader.finished)] = reader.finished
                state = _stop(state, ended)
            state = _continue(
                self._model, state, np.int32(self._block), logits_processor=self._hook
            )

    def stats(self) -> PoolStats:
        """How the pool was used so far."""
        sizes, state = self._requests.sizes, self._state
        if state is None:
            peak = steps = bytes_per_page = 0
            pages = tokens = rows = 0.0
        else:
            peak, steps = int(state.peak_pages), int(state.num_steps)
            bytes_per_page = state.cache.bytes_per_page
            pages, tokens = float(state.page_steps), float(state.token_steps)
            rows = float(state.row_steps)
        return PoolStats(
            page_size=sizes.page_size,
            num_pages=sizes.num_pages,
            peak_pages=peak,
            bytes_per_page=bytes_per_page,
            num_steps=steps,
            utilization=tokens / max(1.0, pages * sizes.page_size),
            naive_utilization=tokens / max(1.0, rows * self._model.config.max_positions),
        )


def stream(
    model: Any, prompts: Sequence[Prompt], *, block: int = 1, **options: Unpack[GenerateOptions]
) -> Stream:
    """Generate, handing over tokens and text as they come.

    The same compiled step as `generate`; the host looks after every ``block`` decode steps.

    Args:
        model: a `paxattn.models.Decoder`, or any `decode_step.LanguageModel` with a ``config`` that
            has ``vocab_size`` and ``max_positions``.
        prompts: texts (with ``tokenizer=``) or sequences of token ids.
        block: decode steps between looks, at least 1.
        **options: see `GenerateOptions`.

    Returns:
        An iterator of `Delta`; the last one of each prompt has a finish reason.

    Raises:
        ValueError: a request is malformed; names it, the figures and the remedy.
    """
    return Stream(model, prompts, block, options)


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
    block = _STOP_STRING_BLOCK if options.get("stop") else _NO_LIMIT
    news = Stream(model, prompts, block, options)
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
