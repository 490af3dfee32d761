"""Generate: a list of prompts in, completions out; the token loop runs inside one ``jax.jit``.

`generate` and `stream` share two compiled functions (`loops`): one allocates the pool and stores
all prompts in chunks, one decodes until every row has ended (or for so many steps, when
streaming). Shapes are rounded up to buckets, and lengths, sampling parameters and stop tokens are
data, so another call in the same buckets compiles nothing.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Generator, Iterator, Sequence
from typing import Any, Unpack

import jax
import numpy as np

from paxattn import loops
from paxattn.decode_step import DecodeState, Status
from paxattn.generate_beams import generate_beams
from paxattn.requests import GenerateOptions, Prompt, Requests, positive, prepare_requests
from paxattn.results import (
    Delta,
    Generation,
    PoolStats,
    Reading,
    completion,
    new_text,
    no_stats,
)
from paxattn.speculative import SpeculativeState

_STEPS_PER_READ = 16  # in `generate` with stop strings: the host looks for those
_NO_LIMIT = 2**30


class _Reader:
    """Turns a state's new tokens into deltas, finds stop strings, and keeps the pool's figures."""

    def __init__(self, model: Any, requests: Requests) -> None:
        texts = [
            new_text(requests, prompt)
            for prompt in requests.prompts
            for _ in range(requests.sizes.group)
        ]
        self.readings = [Reading(i, text) for i, text in enumerate(texts)]
        self.max_positions = model.config.max_positions
        self.stats = no_stats(requests)

    def deltas(self, state: DecodeState | SpeculativeState) -> tuple[list[Delta], np.ndarray]:
        """What is new since the last call, and which rows bool[R] a stop string must end now."""
        # For what failed on the device, such as too large a pool: `device_get` alone may wait for
        # ever for it (seen on CPUs with jax 0.10 and 0.12).
        jax.block_until_ready(state)
        if isinstance(state, SpeculativeState):
            drafted, accepted = jax.device_get((state.drafted, state.accepted))
            guesses = {"drafted": int(drafted), "accepted": int(accepted)}
            self.stats = dataclasses.replace(self.stats, **guesses)
            state = state.decode
        status, counts, tokens, logprobs = jax.device_get(
            (state.status, state.num_generated, state.tokens, state.logprobs)
        )
        self.stats = self.stats.after(
            state.use,
            bytes_per_page=state.pool.cache.bytes_per_page,
            max_positions=self.max_positions,
        )
        news: list[Delta] = []
        ended = np.zeros(status.shape, bool)
        for i, reading in enumerate(self.readings):
            if reading.finished:
                continue
            span = slice(reading.read, int(counts[i]))
            new = tokens[i, span].tolist(), logprobs[i, span].tolist()
            delta, ended[i] = reading.take(*new, Status(status[i]))
            if delta is not None:
                news.append(delta)
        return news, ended


def _run(
    model: Any, requests: Requests, reader: _Reader, steps_per_read: int
) -> Generator[Delta, None, None]:
    """Run the prompts, then so many steps at a time.

    The state lives here and nowhere else; a pool that was lent goes back at the end, in any case.
    """
    if not requests.prompts:
        return
    taken = requests.take_pool()
    state: DecodeState | SpeculativeState | None = None
    try:
        state = loops.start(
            model,
            requests.draft,
            taken,
            requests.packed,
            requests.prompt_lens,
            requests.max_new_tokens,
            requests.stop_ids,
            requests.sampling,
            sizes=requests.sizes,
            scrub=requests.scrub,
        )
        while True:
            news, ended = reader.deltas(state)
            if ended.any():
                state = loops.stop_rows(state, ended, scrub=requests.scrub)
            yield from news
            if all(reading.finished for reading in reader.readings):
                return
            state = loops.go_on(
                model,
                requests.draft,
                state,
                np.int32(steps_per_read),
                logits_processor=requests.logits_processor,
                scrub=requests.scrub,
            )
    finally:
        if requests.kept is not None:
            state = state.decode if isinstance(state, SpeculativeState) else state
            pool = taken if state is None else state.pool
            requests.kept.put_back(pool, scrub=requests.scrub)


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
        steps_per_read = min(positive("steps_per_read", steps_per_read), _NO_LIMIT)
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
        model: a `paxattn.models.Decoder`, or any `step.LanguageModel` with a ``config`` that
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
    model: Any,
    prompts: Sequence[Prompt],
    *,
    num_beams: int | None = None,
    length_penalty: float = 1.0,
    early_stopping: bool | str = False,
    num_return_sequences: int = 1,
    **options: Unpack[GenerateOptions],
) -> Generation:
    """Complete several prompts at once out of one paged KV cache.

    Prompts are run in chunks, then all rows decode together in one ``lax.while_loop``; pages are
    reserved as sequences grow and go back to the pool when they end. A request for which no page
    is left ends with ``"out_of_pages"`` and keeps what it generated; the others are untouched.

    Args:
        model: as for `stream`.
        prompts: texts (with ``tokenizer=``) or sequences of token ids.
        num_beams: search with so many beams instead of sampling: the search of Hugging Face
            transformers, see `paxattn.beam`. ``sampling``, ``num_samples``, ``draft`` and ``stop``
            do not go with it.
        length_penalty: a beam's score is the sum of its log-probabilities over ``tokens **
            length_penalty``.
        early_stopping: False, True or "never": when a search ends, see `beam.EarlyStopping`.
        num_return_sequences: beams returned per prompt, best first.
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
    if num_beams is not None:
        return generate_beams(
            model,
            prompts,
            options,
            num_beams=num_beams,
            length_penalty=length_penalty,
            early_stopping=early_stopping,
            num_return_sequences=num_return_sequences,
        )
    if (length_penalty, early_stopping, num_return_sequences) != (1.0, False, 1):
        raise ValueError(
            f"{length_penalty=}, {early_stopping=}, {num_return_sequences=}: beam search has "
            "these, pass num_beams= too (samples of a prompt: num_samples=)"
        )
    # Without stop strings the host has nothing to look for before all rows have ended.
    news = Stream(model, prompts, _STEPS_PER_READ if options.get("stop") else _NO_LIMIT, options)
    rows = [prompt for prompt in news.prompts for _ in range(options.get("num_samples", 1))]
    deltas: list[list[Delta]] = [[] for _ in rows]
    for delta in news:
        deltas[delta.index].append(delta)
    completions = [completion(prompt, own) for prompt, own in zip(rows, deltas, strict=True)]
    return Generation(completions=completions, stats=news.stats())
