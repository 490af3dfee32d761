"""Who has asked, as the host knows them: their places on the device and what was read of them."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import numpy as np
from tokenizers import Tokenizer

from paxattn.decode_step import Status
from paxattn.results import Delta, Reading
from paxattn.serving.options import Prepared
from paxattn.serving.state import Requests
from paxattn.serving.stats import Meter
from paxattn.text import TextStream


@dataclass(kw_only=True)
class Asked:
    """A request in its place.

    Attributes:
        index: its number for the user.
        reading: what was read of it.
        stop: strings that end it.
        prompt_len: tokens.
        top_logprobs: how many of the likeliest tokens it is told.
        time: when it came, or when the last of its tokens were handed over.
    """

    index: int
    reading: Reading
    stop: Sequence[str]
    prompt_len: int
    top_logprobs: int
    time: float


def _asked(
    index: int,
    prompt: list[int],
    stop: Sequence[str],
    top_logprobs: int,
    tokenizer: Tokenizer | None,
) -> Asked:
    """A request of which nothing was read."""
    text = None if tokenizer is None else TextStream(tokenizer, stop, prompt)
    return Asked(
        index=index,
        reading=Reading(index, text),
        stop=stop,
        prompt_len=len(prompt),
        top_logprobs=top_logprobs,
        time=time.perf_counter(),
    )


class Places:
    """Places for requests, as many as `Requests` has on the device, and who has them."""

    def __init__(self, count: int) -> None:
        """``count``: Q."""
        self._all: list[Asked | None] = [None] * count

    def __iter__(self) -> Iterator[tuple[int, Asked]]:
        """Places that are taken, and by whom."""
        return ((i, asked) for i, asked in enumerate(self._all) if asked is not None)

    def __len__(self) -> int:
        """How many are taken."""
        return len(self._all) - self.free

    @property
    def free(self) -> int:
        """How many are not."""
        return self._all.count(None)

    def enter(self, index: int, prepared: Prepared, tokenizer: Tokenizer | None) -> int:
        """Take a free place for one of the samples; which one."""
        place = self._all.index(None)
        asked = _asked(index, prepared.prompt, prepared.stop, prepared.top_logprobs, tokenizer)
        asked.time = prepared.time
        self._all[place] = asked
        return place

    def saved(self) -> list[tuple[int, int, list[str]] | None]:
        """By place the request's number, how many tokens were read, and its stop strings."""
        return [
            None if asked is None else (asked.index, asked.reading.read, list(asked.stop))
            for asked in self._all
        ]

    def resume(
        self, saved: list[Any], requests: Requests, tokenizer: Tokenizer | None
    ) -> list[Delta]:
        """Take places as they were `saved`, their requests being on the device; what was read."""
        lens, tops, *lines = jax.device_get(
            (requests.prompt_len, requests.top_logprobs, requests.tokens, requests.logprobs)
        )
        told: list[Delta] = []
        for place, one in enumerate(saved):
            if one is None:
                continue
            index, read, stop = one
            start = int(lens[place])
            prompt = lines[0][place, :start].tolist()
            asked = _asked(index, prompt, stop, int(tops[place]), tokenizer)
            tokens, logprobs = (line[place, start : start + read].tolist() for line in lines)
            delta, _ = asked.reading.take(tokens, logprobs, Status.RUNNING)
            told.append(
                delta or Delta(index=index, tokens=[], logprobs=[], text="", finish_reason=None)
            )
            self._all[place] = asked
        return sorted(told, key=lambda delta: delta.index)

    @property
    def want_top(self) -> bool:
        """Whether one of them is told the likeliest tokens."""
        return any(asked.top_logprobs for _, asked in self)

    @property
    def storing(self) -> bool:
        """Whether one of them has not begun to generate."""
        return any(not asked.reading.read for _, asked in self)

    def read(self) -> np.ndarray:
        """How many generated tokens were read, i32[Q]."""
        read = [0 if asked is None else asked.reading.read for asked in self._all]
        return np.array(read, np.int32)

    def leave(self, index: int, meter: Meter) -> np.ndarray:
        """Give up the place of the request of this number; bool[Q], where it was."""
        mask = np.array([asked is not None and asked.index == index for asked in self._all])
        for place in np.flatnonzero(mask):
            self._all[place] = None
            meter.finished["abort"] += 1
        return mask

    def take(
        self,
        status: np.ndarray,
        counts: np.ndarray,
        tokens: np.ndarray,
        logprobs: np.ndarray,
        cached_tokens: np.ndarray,
        top: tuple[np.ndarray, np.ndarray] | None,
        *,
        meter: Meter,
        now: float,
    ) -> tuple[list[Delta], np.ndarray]:
        """Turn what was read from the device into news; who has ended leaves.

        Args:
            status: i32[Q].
            counts: i32[Q], tokens that are new.
            tokens: i32[Q, most], the first ``counts`` are new.
            logprobs: f32[Q, most], of them.
            cached_tokens: i32[Q].
            top: the likeliest tokens in their places, if anybody wants them, i32[Q, most, MOST]
                and f32[Q, most, MOST].
            meter: counts them.
            now: when they were read.

        Returns:
            The news; and bool[Q], which requests a stop string ended, so that the device must be
            told.
        """
        news: list[Delta] = []
        ended = np.zeros(status.shape, bool)
        for place, asked in self:
            reading, first, count = asked.reading, not asked.reading.read, int(counts[place])
            new = tokens[place, :count].tolist(), logprobs[place, :count].tolist()
            delta, ended[place] = reading.take(*new, Status(status[place]))
            if delta is not None:
                delta = replace(delta, cached_tokens=max(0, int(cached_tokens[place])))
                if asked.top_logprobs and top is not None:
                    count, most = len(delta.tokens), asked.top_logprobs
                    ids, values = (field[place, :count, :most].tolist() for field in top)
                    pairs = [list(zip(*one, strict=True)) for one in zip(ids, values, strict=True)]
                    delta = replace(delta, top_logprobs=pairs)
                news.append(delta)
            if count:
                meter.handed_over(count, now - asked.time, first=first)
                meter.prompts += asked.prompt_len if first else 0
                asked.time = now
            if reading.finished:
                self._all[place] = None
                meter.finished[news[-1].finish_reason or ""] += 1
        return news, ended
