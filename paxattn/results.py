"""What `generate` and `stream` hand over."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import jax

from paxattn.decode_step import Status
from paxattn.requests import Requests
from paxattn.step import PoolUse
from paxattn.text import TextStream


@dataclass(frozen=True, kw_only=True)
class Delta:
    """News of one request from `stream`.

    Attributes:
        index: which completion: ``prompt * num_samples + sample``.
        tokens: token ids since the last delta.
        logprobs: their log-probabilities under the model.
        text: text since the last delta ("" without a tokenizer).
        finish_reason: None while running; "stop" (a stop token or string), "length"
            (``max_new_tokens``), "out_of_pages" or, of an `Engine`, "abort".
        top_logprobs: for each token, if an `Engine` was asked for them, the likeliest tokens and
            their log-probabilities, the likeliest first.
        cached_tokens: of an `Engine`: tokens of the prompt that pages held already.
    """

    index: int
    tokens: list[int]
    logprobs: list[float]
    text: str
    finish_reason: str | None
    top_logprobs: list[list[tuple[int, float]]] = field(default_factory=list)
    cached_tokens: int | None = None


@dataclass(frozen=True, kw_only=True)
class Completion:
    """One finished request.

    Attributes:
        prompt_tokens: the prompt's token ids.
        tokens: generated token ids, a final stop token (or those of a stop string) included.
        logprobs: one per generated token.
        text: the generated text, special tokens and stop strings left out ("" without a
            tokenizer).
        finish_reason: see `Delta`.
        score: of a beam search, sum of the log-probabilities over ``tokens ** length_penalty``;
            None otherwise.
        top_logprobs: see `Delta`.
        cached_tokens: see `Delta`.
    """

    prompt_tokens: list[int]
    tokens: list[int]
    logprobs: list[float]
    text: str
    finish_reason: str
    score: float | None = None
    top_logprobs: list[list[tuple[int, float]]] = field(default_factory=list)
    cached_tokens: int | None = None


class Reading:
    """What was read so far of one completion that the device is still writing.

    Attributes:
        read: generated tokens read.
        finished: whether there will be no more news.
    """

    def __init__(self, index: int, text: TextStream | None) -> None:
        """Begin to read.

        Args:
            index: of the deltas.
            text: turns tokens into text and finds stop strings; None: no text.
        """
        self.read, self.finished = 0, False
        self._index, self._text = index, text

    def take(
        self, tokens: list[int], logprobs: list[float], status: Status
    ) -> tuple[Delta | None, bool]:
        """Take what is new since the last call.

        Args:
            tokens: new tokens.
            logprobs: one for each.
            status: the request's, after them.

        Returns:
            The news, if there is any; and whether a stop string ended the completion, so that the
            device must be told.
        """
        self.read += len(tokens)
        piece, ended = "", False
        if self._text is not None:
            piece, used = self._text.push(tokens, final=status != Status.RUNNING)
            tokens = tokens[:used]
            if self._text.stopped:
                ended, status = status == Status.RUNNING, Status.STOP
        self.finished = status != Status.RUNNING
        if not tokens and not self.finished:
            return None, ended
        delta = Delta(
            index=self._index,
            tokens=tokens,
            logprobs=logprobs[: len(tokens)],
            text=piece,
            finish_reason=status.name.lower() if self.finished else None,
        )
        return delta, ended


def completion(prompt: list[int], deltas: Sequence[Delta]) -> Completion:
    """All of one request's news, put together."""
    return Completion(
        prompt_tokens=prompt,
        tokens=[token for delta in deltas for token in delta.tokens],
        logprobs=[logprob for delta in deltas for logprob in delta.logprobs],
        text="".join(delta.text for delta in deltas),
        finish_reason=deltas[-1].finish_reason or "",
        top_logprobs=[top for delta in deltas for top in delta.top_logprobs],
        cached_tokens=deltas[0].cached_tokens,
    )


@dataclass(frozen=True, kw_only=True)
class PoolStats:
    """How the pool was used.

    Attributes:
        page_size: tokens per page.
        num_pages: pages in the pool.
        enough_pages: with so many, no request of the call can run out of pages.
        peak_pages: most pages held at once.
        bytes_per_page: bytes of K and V per page.
        num_steps: steps run, prefill chunks included.
        utilization: fraction of the held slots that held tokens, averaged over the steps.
        naive_utilization: the same had each running request reserved ``max_positions`` slots.
        prompt_tokens: tokens of the prompts.
        cached_tokens: how many of them were not computed, because pages held them already.
        drafted: tokens guessed (speculative decoding).
        accepted: guesses kept.

    Pages held include those that only a `KeptPool` remembers. Rows that share pages count the
    tokens in them once each, so sharing can lift utilization above 1.
    """

    page_size: int
    num_pages: int
    enough_pages: int
    peak_pages: int = 0
    bytes_per_page: int = 0
    num_steps: int = 0
    utilization: float = 0.0
    naive_utilization: float = 0.0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    drafted: int = 0
    accepted: int = 0

    def after(self, use: PoolUse, *, bytes_per_page: int, max_positions: int) -> PoolStats:
        """The same pool's figures at a later time; ``use`` lies on the device."""
        use = jax.device_get(use)
        token_steps = use.token_steps.item()
        return replace(
            self,
            peak_pages=use.peak_pages.item(),
            bytes_per_page=bytes_per_page,
            num_steps=use.num_steps.item(),
            cached_tokens=use.cached_tokens.item(),
            utilization=token_steps / max(1.0, use.page_steps.item() * self.page_size),
            naive_utilization=token_steps / max(1.0, use.row_steps.item() * max_positions),
        )


@dataclass(frozen=True, kw_only=True)
class Generation:
    """What `generate` returns.

    Attributes:
        completions: of the first prompt, then of the second, and so on: `num_samples` or
            `num_return_sequences` of each.
        stats: how the pool was used.
    """

    completions: list[Completion]
    stats: PoolStats


def new_text(requests: Requests, prompt: list[int]) -> TextStream | None:
    """What turns a completion's tokens into text, if there is a tokenizer."""
    if requests.tokenizer is None:
        return None
    return TextStream(requests.tokenizer, requests.stop, prompt)


def no_stats(requests: Requests) -> PoolStats:
    """Before the first step."""
    return PoolStats(
        page_size=requests.sizes.page_size,
        num_pages=requests.sizes.num_pages,
        enough_pages=requests.enough_pages,
        prompt_tokens=sum(map(len, requests.prompts)),
    )
