"""The host's side of a server: takes requests, runs blocks of device steps, hands tokens over."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from functools import partial
from typing import Any, Unpack

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from tokenizers import Tokenizer

from paxattn.quantized import page_dtype_name
from paxattn.requests import Prompt, integer
from paxattn.results import Completion, Delta, completion
from paxattn.sampling import LogitsProcessor
from paxattn.serving.offload import HostPages
from paxattn.serving.options import Prepared, RequestOptions, check_names, prepare_request
from paxattn.serving.pace import Pace
from paxattn.serving.places import Places
from paxattn.serving.placing import placed, settled
from paxattn.serving.snapshot import load_state, save_state
from paxattn.serving.state import ServeState, init_serve, new_request, put, stop
from paxattn.serving.stats import EngineStats, Meter, counters, engine_stats
from paxattn.serving.step import serve
from paxattn.serving.top_logprobs import latest
from paxattn.step import check_model

_serve = jax.jit(serve, donate_argnames="state", static_argnames=("logits_processor", "scrub"))
_put = jax.jit(put, donate_argnames="requests")
_stop = jax.jit(stop, donate_argnames="state", static_argnames="scrub")


class QueueFull(RuntimeError):
    """Every place for a request is taken; nothing is lost: `Engine.step`, and ask again."""


@partial(jax.jit, static_argnames="count")
def _news(
    state: ServeState, read: jax.Array, *, count: int
) -> tuple[tuple[jax.Array, ...], dict[str, jax.Array]]:
    """Of each request how it stands, and what it generated after ``read`` i32[Q] tokens; counts."""
    requests = state.requests
    start = requests.prompt_len + read
    place = start[:, None] + jnp.arange(count, dtype=jnp.int32)
    lines = jnp.arange(start.size)[:, None]
    tokens, logprobs = (
        field.at[lines, place].get(mode="fill", fill_value=0)
        for field in (requests.tokens, requests.logprobs)
    )
    news = requests.status, requests.num_tokens - start, tokens, logprobs, requests.cached_tokens
    return news, counters(state)


class Engine:
    """Continuous batching: requests of unequal length share a pool of pages and a device loop.

    Requests are admitted when pages allow, their prompts stored in chunks next to those that
    decode; when no page is left the last in rank waits for another turn. Its tokens are those that
    `generate` gives for it alone in any case. Not for use by several threads at once: `AsyncEngine`
    serves many.

    Example:
        >>> engine = paxattn.Engine(model, num_pages=1024, tokenizer=tokenizer)
        >>> index = engine.add_request("def read_config(path):", max_new_tokens=64)
        >>> while engine.num_unfinished:
        ...     for delta in engine.step():
        ...         print(delta.index, delta.text)

    Attributes:
        model: the model.
        tokenizer: as given.
        num_pages: pages in the pool.
        page_size: tokens per page.
        max_requests: requests that run or wait, at most.
        max_tokens: most tokens of a request, prompt and generated.
        max_stop_ids: most tokens that may end one request.
        longest: the same, or less if the pool has not pages for so many.
    """

    def __init__(
        self,
        model: Any,
        *,
        num_pages: int,
        page_size: int = 16,
        kv_dtype: DTypeLike | None = None,
        max_seqs: int = 16,
        max_requests: int = 128,
        max_tokens: int | None = None,
        step_tokens: int = 256,
        max_stop_ids: int = 8,
        watermark: int | None = None,
        offload_from: int | None = None,
        steps_per_read: int = 64,
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
            kv_dtype: of the pages, as for `generate`.
            max_seqs: requests that run at once.
            max_requests: requests that run or wait, at most.
            max_tokens: most tokens of a request, prompt and generated; the model's positions by
                default. Every place for a request takes 8 bytes for each of them.
            step_tokens: tokens per device step, at least ``max_seqs``: what those that decode
                leave of them stores prompts.
            max_stop_ids: most tokens that may end one request.
            watermark: pages left for growth when a request is admitted; a hundredth by default.
            offload_from: a request of at least so many tokens that has to make way has its pages
                moved to the host's memory, and back, instead of storing its tokens anew; None: none
                has. `serving.pays_from` measures from where on that takes less time.
            steps_per_read: most device steps in `step`, between two readings; fewer where so many
                would take longer than 100 ms.
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
        init = partial(
            init_serve,
            num_pages=num_pages,
            page_size=page_size,
            kv_dtype=page_dtype_name(kv_dtype),
            max_seqs=max_seqs,
            max_requests=max_requests,
            max_tokens=self.max_tokens,
            step_tokens=step_tokens,
            max_stop_ids=max_stop_ids,
            steps_per_read=steps_per_read,
            watermark=watermark,
            remember=prefix_cache,
        )
        self._state = placed(init, model)
        fits = int(self._state.least_pages(self.max_tokens - 1)) <= num_pages
        self.longest = self.max_tokens if fits else num_pages * page_size + 1
        if offload_from is not None:
            if integer("offload_from", offload_from) < 1:
                raise ValueError(f"{offload_from=} must be at least 1 token")
            policy = replace(self._state.policy, offload_from=jnp.int32(offload_from))
            self._state = settled(replace(self._state, policy=policy), model)
        self._host_pages = HostPages()
        self.model, self.tokenizer = model, tokenizer
        self.num_pages, self.page_size, self.max_requests = num_pages, page_size, max_requests
        self.max_stop_ids = max_stop_ids
        self._most_steps, self._pace, self._meter = steps_per_read, Pace(steps_per_read), Meter()
        self._logits_processor, self._scrub = logits_processor, scrub
        self._places = Places(max_requests)
        self._next_index = 0
        self._pending: list[Delta] = []  # news for a later `step`

    @property
    def num_unfinished(self) -> int:
        """Requests whose end was not handed over yet."""
        return len(self._places) + sum(delta.finish_reason is not None for delta in self._pending)

    @property
    def state(self) -> ServeState:
        """Everything on the device, to look at; the next call that changes it takes it away."""
        return self._state

    @property
    def stats(self) -> EngineStats:
        """How things stand; it looks at every page, so not for every step."""
        return engine_stats(self._state, self._meter)

    def warm_up(self) -> None:
        """Compile everything now, before there are requests: the first would wait for it.

        Raises:
            RuntimeError: there are requests.
        """
        if self.num_unfinished:
            raise RuntimeError(f"{self.num_unfinished} requests are not finished: warm_up() first")
        ended = new_request(self._state, [0], max_new_tokens=0)
        requests = _put(self._state.requests, np.int32(0), ended)
        state = replace(self._state, requests=requests)
        self._state = _stop(state, np.zeros(self.max_requests, bool), scrub=self._scrub)
        self._run(0)
        self._read_top(self._places.read())
        _ = self.stats

    def add_request(self, prompt: Prompt, **options: Unpack[RequestOptions]) -> int:
        """Let a request wait for its turn.

        Args:
            prompt: text (with a tokenizer) or token ids.
            **options: see `RequestOptions`.

        Returns:
            The request's number, ascending from 0: `Delta.index`. Those of further samples follow.

        Raises:
            QueueFull: not enough places are free.
            TypeError: an argument has a wrong type.
            ValueError: the request is malformed, or could not fit were it alone.
        """
        return self.submit(self.prepare([prompt], **options))

    def prepare(
        self, prompts: Sequence[Prompt], **options: Unpack[RequestOptions]
    ) -> list[Prepared]:
        """Check and tokenize requests, without touching the queue: any thread may do this.

        Args:
            prompts: texts (with a tokenizer) or sequences of token ids.
            **options: of every one of them, see `RequestOptions`.

        Raises:
            TypeError: an argument has a wrong type.
            ValueError: a request is malformed, or could not fit were it alone.
        """
        if isinstance(prompts, str):
            raise TypeError(f"prompts must be a list of prompts, not one string: {prompts[:40]!r}")
        check_names(options)
        return [
            prepare_request(
                self._state,
                prompt,
                f"prompt {i}" if len(prompts) > 1 else "the prompt",
                vocab_size=self.model.config.vocab_size,
                tokenizer=self.tokenizer,
                **options,
            )
            for i, prompt in enumerate(prompts)
        ]

    def submit(self, prepared: Sequence[Prepared]) -> int:
        """Let requests wait for their turn: all of them or, if places are missing, none.

        Args:
            prepared: from `prepare`.

        Returns:
            The number of the first; the others follow, sample after sample, prompt after prompt.

        Raises:
            QueueFull: not enough places are free.
        """
        needed, free = sum(len(one.samples) for one in prepared), self._places.free
        if needed > free:
            raise QueueFull(
                f"{needed} places needed, {free} of {self.max_requests} free: step() until requests"
                " end, or make the engine with more max_requests"
            )
        first = self._next_index
        for one in prepared:
            for request in one.samples:
                index, self._next_index = self._next_index, self._next_index + 1
                place = self._places.enter(index, one, self.tokenizer)
                request = replace(request, arrival=jnp.int32(index))
                requests = _put(self._state.requests, np.int32(place), request)
                self._state = replace(self._state, requests=requests)
        return first

    def step(self) -> list[Delta]:
        """Run a block of device steps, fewer if everything ends before.

        Returns:
            What is new, in the order of the requests; the last of each has a finish reason.
        """
        news, self._pending = self._pending, []
        if not self._places:
            return news
        storing, began = self._places.storing, time.perf_counter()
        found, device = self._run(self._pace.steps(storing))
        now = time.perf_counter()
        new, ended = self._places.take(*found, meter=self._meter, now=now)
        self._stop(ended)
        ran = self._meter.block(began, now, sum(len(delta.tokens) for delta in new), device)
        self._pace.took(storing, ran, now - began)
        return sorted([*news, *new], key=lambda delta: delta.index)

    def _run(self, steps: int) -> tuple[tuple[Any, ...], dict[str, np.ndarray]]:
        """Run a block, and read what is new; see `Places.take`."""
        self._state = _serve(
            self.model,
            self._host_pages.between_blocks(self._state, scrub=self._scrub),
            np.int32(steps),
            logits_processor=self._logits_processor,
            scrub=self._scrub,
        )
        read = self._places.read()
        news, device = jax.device_get(_news(self._state, read, count=self._most_steps))
        return (*news, self._read_top(read) if self._places.want_top else None), device

    def _read_top(self, read: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return jax.device_get(latest(self._state.top, read, count=self._most_steps))

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
        mask = self._places.leave(index, self._meter)
        self._stop(mask)
        if mask.any():
            end = Delta(index=index, tokens=[], logprobs=[], text="", finish_reason="abort")
            self._pending.append(end)
        return bool(mask.any())

    def drain(self) -> list[Delta]:
        """`step` until every request has ended; all the news."""
        news = []
        while self.num_unfinished:
            news += self.step()
        return news

    def save(self, path: str | os.PathLike) -> None:
        """Write everything to a file, from which another process can go on: see `restore`.

        Args:
            path: of the file, which is replaced when the new one is whole.

        Raises:
            OSError: it cannot be written.
        """
        host = {
            "next_index": self._next_index,
            "places": self._places.saved(),
            "pending": [asdict(delta) for delta in self._pending],
        }
        save_state(path, self.model, self._state, host)

    def restore(self, path: str | os.PathLike) -> list[Delta]:
        """Go on where an engine was when it was saved; what it would have said then comes next.

        This engine must be without requests, and made with the same sizes, model, tokenizer and
        logits processor; the last two are taken on trust. The file has the requests and their
        pages. How they are served is up to this engine (``watermark``, ``offload_from``,
        ``steps_per_read``), and its `stats` count from here on.

        Args:
            path: of a file that `save` wrote.

        Returns:
            What had been handed over of the requests that had not ended: one delta for each, an
            empty one for those of which nothing had been.

        Raises:
            RuntimeError: there are requests.
            SnapshotError: the file is missing, damaged, or of an engine with other sizes or another
                model.
        """
        if self.num_unfinished:
            raise RuntimeError(f"{self.num_unfinished} requests are not finished: restore() first")
        state, host = load_state(path, self.model, self._state)
        self._state = settled(state, self.model)
        self._meter = Meter(device_last=jax.device_get(counters(self._state)))
        self._next_index = host["next_index"]
        self._pending = [Delta(**delta) for delta in host["pending"]]
        return self._places.resume(host["places"], self._state.requests, self.tokenizer)

    def generate(
        self, prompts: Sequence[Prompt], **options: Unpack[RequestOptions]
    ) -> list[Completion]:
        """Complete any number of prompts, next to the requests that there are already.

        Args:
            prompts: texts (with a tokenizer) or sequences of token ids.
            **options: of every one of them, see `RequestOptions`.

        Returns:
            The completions, in the order of the prompts; of each prompt ``num_samples``.

        Raises:
            TypeError: an argument has a wrong type.
            ValueError: a request is malformed, or could not fit were it alone; none was run then.
        """
        left = self.prepare(prompts, **options)[::-1]
        mine: dict[int, tuple[list[int], list[Delta]]] = {}
        others: list[Delta] = []
        unfinished = 0
        while left or unfinished:
            while left and len(left[-1].samples) <= self._places.free:
                one = left.pop()
                first = self.submit([one])
                mine |= {first + j: (one.prompt, []) for j in range(len(one.samples))}
                unfinished += len(one.samples)
            for delta in self.step():
                if delta.index in mine:
                    mine[delta.index][1].append(delta)
                    unfinished -= delta.finish_reason is not None
                else:
                    others.append(delta)
        self._pending = others + self._pending
        return [completion(prompt, deltas) for prompt, deltas in mine.values()]
