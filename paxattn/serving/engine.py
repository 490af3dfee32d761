"""The host's side of a server: takes requests, runs blocks of device steps, hands tokens over."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Unpack

import jax
import jax.numpy as jnp
import numpy as np
from tokenizers import Tokenizer

from paxattn.decode_step import Status
from paxattn.requests import Prompt, integer
from paxattn.results import Completion, Delta, Reading, completion
from paxattn.sampling import LogitsProcessor
from paxattn.serving.options import RequestOptions, prepare_request
from paxattn.serving.state import Requests, init_serve, put, stop
from paxattn.serving.stats import EngineStats, engine_stats
from paxattn.serving.step import serve
from paxattn.step import check_model
from paxattn.text import TextStream

_serve = jax.jit(serve, donate_argnames="state", static_argnames=("logits_processor", "scrub"))
_put = jax.jit(put, donate_argnames="requests")
_stop = jax.jit(stop, donate_argnames="state", static_argnames="scrub")


class QueueFull(RuntimeError):
    """Every place for a request is taken; nothing is lost: `Engine.step`, and ask again."""


@partial(jax.jit, static_argnames="count")
def _news(requests: Requests, read: jax.Array, *, count: int) -> tuple[jax.Array, ...]:
    """Status and length of each request, and what it generated after ``read`` i32[Q] tokens."""
    start = requests.prompt_len + read
    place = start[:, None] + jnp.arange(count, dtype=jnp.int32)
    lines = jnp.arange(start.size)[:, None]
    tokens, logprobs = (
        field.at[lines, place].get(mode="fill", fill_value=0)
        for field in (requests.tokens, requests.logprobs)
    )
    return requests.status, requests.num_tokens - start, tokens, logprobs


@dataclass(frozen=True, kw_only=True)
class _Asked:
    """A request that the device has: its number for the user, and what was read of it."""

    index: int
    reading: Reading


class Engine:
    """Continuous batching: requests of unequal length share a pool of pages and a device loop.

    Requests are admitted when pages allow, their prompts stored in chunks next to those that
    decode; when no page is left the last in rank waits for another turn. Its tokens are those that
    `generate` gives for it alone in any case. Not for use by several threads at once.

    Example:
        >>> engine = paxattn.Engine(model, num_pages=1024, tokenizer=tokenizer)
        >>> index = engine.add_request("def read_config(path):", max_new_tokens=64)
        >>> while engine.num_unfinished:
        ...     for delta in engine.step():
        ...         print(delta.index, delta.text)

    Attributes:
        model: the model.
        num_pages: pages in the pool.
        page_size: tokens per page.
        max_tokens: most tokens of a request, prompt and generated.
    """

    def __init__(
        self,
        model: Any,
        *,
        num_pages: int,
        page_size: int = 16,
        max_seqs: int = 16,
        max_requests: int = 128,
        max_tokens: int | None = None,
        step_tokens: int = 256,
        max_stop_ids: int = 8,
        watermark: int | None = None,
        steps_per_read: int = 16,
        prefix_cache: bool = True,
        tokenizer: Tokenizer | None = None,
        logits_processor: LogitsProcessor | None = None,
        scrub: bool = False,
    ) -> None:
        """Allocate the pool.

        Args:
            model: as for `generate`.
            num_pages: pages in the pool.
            page_size: tokens per page, 1 to 256.
            max_seqs: requests that run at once.
            max_requests: requests that run or wait, at most.
            max_tokens: most tokens of a request, prompt and generated; the model's positions by
                default. Every place for a request takes 8 bytes for each of them.
            step_tokens: tokens per device step, at least ``max_seqs``: what those that decode
                leave of them stores prompts.
            max_stop_ids: most tokens that may end one request.
            watermark: pages left for growth when a request is admitted; a hundredth by default.
            steps_per_read: device steps in `step`, between two readings.
            prefix_cache: whether requests start from what earlier ones computed.
            tokenizer: encodes text prompts and decodes completions.
            logits_processor: as for `generate`; one for all requests.
            scrub: as for `generate`.

        Raises:
            ValueError: a size is not a positive integer, or too small or large for another.
        """
        check_model("model", model)
        most = model.config.max_positions
        self.max_tokens = most if max_tokens is None else integer("max_tokens", max_tokens)
        if self.max_tokens > most:
            raise ValueError(f"{max_tokens=} is more than the model's {most} positions")
        if integer("steps_per_read", steps_per_read) < 1:
            raise ValueError(f"{steps_per_read=} must be at least 1")
        self._state = init_serve(
            model,
            num_pages=num_pages,
            page_size=page_size,
            max_seqs=max_seqs,
            max_requests=max_requests,
            max_tokens=self.max_tokens,
            step_tokens=step_tokens,
            max_stop_ids=max_stop_ids,
            watermark=watermark,
            remember=prefix_cache,
        )
        self.model, self.num_pages, self.page_size = model, num_pages, page_size
        self._steps = steps_per_read
        self._tokenizer = tokenizer
        self._logits_processor, self._scrub = logits_processor, scrub
        self._places: list[_Asked | None] = [None] * max_requests
        self._next_index = 0
        self._pending: list[Delta] = []  # news for a later `step`

    @property
    def num_unfinished(self) -> int:
        """Requests whose end was not handed over yet."""
        ended = sum(delta.finish_reason is not None for delta in self._pending)
        return ended + sum(asked is not None for asked in self._places)

    def add_request(self, prompt: Prompt, **options: Unpack[RequestOptions]) -> int:
        """Let a request wait for its turn.

        Args:
            prompt: text (with a tokenizer) or token ids.
            **options: see `RequestOptions`.

        Returns:
            The request's number, ascending from 0: `Delta.index`.

        Raises:
            QueueFull: every place is taken.
            TypeError: an argument has a wrong type.
            ValueError: the request is malformed, or could not fit were it alone.
        """
        return self._submit(*self._prepared(prompt, options))

    def _submit(self, ids: list[int], request: Requests, stops: Sequence[str]) -> int:
        """Put a request that was prepared in a place; see `add_request`."""
        if None not in self._places:
            raise QueueFull(
                f"all {len(self._places)} places are taken: step() until a request ends, or make "
                "the engine with more max_requests"
            )
        place = self._places.index(None)
        index, self._next_index = self._next_index, self._next_index + 1
        request = replace(request, arrival=jnp.int32(index))
        requests = _put(self._state.requests, np.int32(place), request)
        self._state = replace(self._state, requests=requests)
        text = None if self._tokenizer is None else TextStream(self._tokenizer, stops, ids)
        self._places[place] = _Asked(index=index, reading=Reading(index, text))
        return index

    def _prepared(
        self, prompt: Prompt, options: RequestOptions
    ) -> tuple[list[int], Requests, Sequence[str]]:
        """See `prepare_request`."""
        return prepare_request(
            self._state,
            prompt,
            vocab_size=self.model.config.vocab_size,
            tokenizer=self._tokenizer,
            **options,
        )

    def step(self) -> list[Delta]:
        """Run a block of device steps, fewer if everything ends before.

        Returns:
            What is new, in the order of the requests; the last of each has a finish reason.
        """
        news, self._pending = self._pending, []
        if not any(self._places):
            return news
        self._state = _serve(
            self.model,
            self._state,
            np.int32(self._steps),
            logits_processor=self._logits_processor,
            scrub=self._scrub,
        )
        return sorted([*news, *self._read()], key=lambda delta: delta.index)

    def _read(self) -> list[Delta]:
        """What is new on the device; gives up the places of requests that have ended."""
        read = [0 if asked is None else asked.reading.read for asked in self._places]
        status, counts, tokens, logprobs = jax.device_get(
            _news(self._state.requests, np.array(read, np.int32), count=self._steps)
        )
        news: list[Delta] = []
        ended = np.zeros(len(read), bool)
        for place, asked in enumerate(self._places):
            if asked is None:
                continue
            span = slice(0, int(counts[place]))
            new = tokens[place, span].tolist(), logprobs[place, span].tolist()
            delta, ended[place] = asked.reading.take(*new, Status(status[place]))
            if delta is not None:
                news.append(delta)
            if asked.reading.finished:
                self._places[place] = None
        self._stop(ended)
        return news

    def _stop(self, mask: np.ndarray) -> None:
        if mask.any():
            self._state = _stop(self._state, mask, scrub=self._scrub)

    def abort(self, index: int) -> bool:
        """End a request now; the next `step` says so, with the reason "abort".

        Args:
            index: the number that `add_request` gave.

        Returns:
            Whether it was still there to be ended.
        """
        mask = np.array([asked is not None and asked.index == index for asked in self._places])
        self._stop(mask)
        for place in np.flatnonzero(mask):
            self._places[place] = None
            end = Delta(index=index, tokens=[], logprobs=[], text="", finish_reason="abort")
            self._pending.append(end)
        return bool(mask.any())

    def generate(
        self, prompts: Sequence[Prompt], **options: Unpack[RequestOptions]
    ) -> list[Completion]:
        """Complete any number of prompts, next to the requests that there are already.

        Args:
            prompts: texts (with a tokenizer) or sequences of token ids.
            **options: of every one of them, see `RequestOptions`.

        Returns:
            The completions, in the order of the prompts.

        Raises:
            TypeError: an argument has a wrong type.
            ValueError: a request is malformed, or could not fit were it alone; none was run then.
        """
        ready = [self._prepared(prompt, options) for prompt in prompts]
        mine: dict[int, list[Delta]] = {}
        others: list[Delta] = []
        finished = 0
        while finished < len(ready):
            while len(mine) < len(ready) and None in self._places:
                mine[self._submit(*ready[len(mine)])] = []
            for delta in self.step():
                mine.get(delta.index, others).append(delta)
                finished += delta.index in mine and delta.finish_reason is not None
        self._pending = others + self._pending
        return [completion(ids, own) for (ids, *_), own in zip(ready, mine.values(), strict=True)]

    def stats(self) -> EngineStats:
        """How things stand."""
        return engine_stats(self._state)
