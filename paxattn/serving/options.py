"""What a caller asks of an `Engine`, checked and made ready for the device."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TypedDict

import jax.numpy as jnp
from tokenizers import Tokenizer

from paxattn.requests import Prompt, check_salt, integer, prompt_ids, stop_strings, stop_tokens
from paxattn.sampling import SamplingParams
from paxattn.serving.state import Requests, ServeState, new_request
from paxattn.serving.top_logprobs import MOST


class RequestOptions(TypedDict, total=False):
    """Options of one request.

    Attributes:
        max_new_tokens: 128 by default.
        sampling: greedy by default.
        num_samples: completions, 1 by default, each a request of its own, and the prompt computed
            once (with a prefix cache); sample j has the ``seed + j`` and is what a request with
            that seed would get.
        stop_token_ids: tokens that end the request, such as the checkpoint's eos ids.
        stop: strings that end it and are left out of its text; needs the engine's tokenizer.
        priority: any int32, 0 by default; the highest go first.
        salt: any int32, 0 by default; only requests of the same salt share pages.
        top_logprobs: so many of the likeliest tokens are told with each generated one, from 0, by
            default, to 20; see `Delta`.
    """

    max_new_tokens: int
    sampling: SamplingParams
    num_samples: int
    stop_token_ids: Sequence[int]
    stop: Sequence[str] | None
    priority: int
    salt: int
    top_logprobs: int


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """A prompt that was checked, for `Engine.submit`.

    Attributes:
        prompt: its token ids.
        samples: what goes to the device, one for each completion; the ``arrival`` is for whoever
            puts it in a place to set.
        stop: strings that end a completion.
        top_logprobs: see `RequestOptions`.
        time: when that was.
    """

    prompt: list[int]
    samples: list[Requests]
    stop: Sequence[str]
    top_logprobs: int
    time: float = field(default_factory=time.perf_counter)


def check_names(options: RequestOptions) -> None:
    """Refuse options that there are not.

    Raises:
        TypeError: it names the first of them.
    """
    known = RequestOptions.__annotations__
    for name in options:
        if name not in known:
            raise TypeError(f"no option {name!r} of a request: there are {', '.join(known)}")


def prepare_request(
    state: ServeState,
    prompt: Prompt,
    name: str,
    *,
    vocab_size: int,
    tokenizer: Tokenizer | None,
    max_new_tokens: int = 128,
    sampling: SamplingParams = SamplingParams(),  # noqa: B008 (frozen)
    num_samples: int = 1,
    stop_token_ids: Sequence[int] = (),
    stop: Sequence[str] | None = None,
    priority: int = 0,
    salt: int = 0,
    top_logprobs: int = 0,
) -> Prepared:
    """Check a request; of the state only its sizes are looked at.

    Raises:
        TypeError: an argument has a wrong type.
        ValueError: the request is malformed, or could not fit were it alone.
    """
    table = state.pool.table
    ids = prompt_ids(name, prompt, tokenizer, vocab_size)
    new = integer("max_new_tokens", max_new_tokens)
    if not -(2**31) <= integer("priority", priority) < 2**31:
        raise ValueError(f"{priority=} must be an int32: from -2**31 to 2**31 - 1")
    if not isinstance(sampling, SamplingParams):
        raise TypeError(f"{sampling=} must be a SamplingParams")
    if not 1 <= integer("num_samples", num_samples) <= state.capacity:
        raise ValueError(
            f"{num_samples=} must be at least 1, and at most {state.capacity} (max_requests)"
        )
    most = min(MOST, vocab_size)
    if not 0 <= integer("top_logprobs", top_logprobs) <= most:
        raise ValueError(f"{top_logprobs=} must be at least 0, and at most {most}")
    first = new_request(
        state,
        ids,
        max_new_tokens=new,
        sampling=sampling,
        stop_ids=stop_tokens(stop_token_ids, vocab_size),
        priority=int(priority),
        salt=check_salt(salt, "a request"),
        top_logprobs=int(top_logprobs),
    )
    needed = int(state.least_pages(len(ids) + new - 1))  # the last token is never stored
    if needed > table.num_pages:
        raise ValueError(
            f"{name} of {len(ids)} tokens and {max_new_tokens=} need {needed} pages, the pool "
            f"has {table.num_pages}: shorten the one, lower the other, or raise num_pages"
        )
    seeds = [(sampling.seed + j) % 2**32 for j in range(num_samples)]
    samples = [
        replace(first, sampling=replace(first.sampling, seed=jnp.uint32(seed))) for seed in seeds
    ]
    return Prepared(
        prompt=ids,
        samples=samples,
        stop=stop_strings(stop, tokenizer),
        top_logprobs=int(top_logprobs),
    )
