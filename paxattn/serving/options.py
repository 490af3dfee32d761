"""What a caller asks of an `Engine`, checked and made ready for the device."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypedDict

from tokenizers import Tokenizer

from paxattn.requests import Prompt, check_salt, integer, stop_strings, stop_tokens, tokenize
from paxattn.sampling import SamplingParams
from paxattn.serving.state import Requests, ServeState, new_request


class RequestOptions(TypedDict, total=False):
    """Options of one request.

    Attributes:
        max_new_tokens: 128 by default.
        sampling: greedy by default.
        stop_token_ids: tokens that end the request, such as the checkpoint's eos ids.
        stop: strings that end it and are left out of its text; needs the engine's tokenizer.
        priority: any int32, 0 by default; the highest go first.
        salt: any int32, 0 by default; only requests of the same salt share pages.
    """

    max_new_tokens: int
    sampling: SamplingParams
    stop_token_ids: Sequence[int]
    stop: Sequence[str] | None
    priority: int
    salt: int


def prepare_request(
    state: ServeState,
    prompt: Prompt,
    *,
    vocab_size: int,
    tokenizer: Tokenizer | None,
    max_new_tokens: int = 128,
    sampling: SamplingParams = SamplingParams(),  # noqa: B008 (frozen)
    stop_token_ids: Sequence[int] = (),
    stop: Sequence[str] | None = None,
    priority: int = 0,
    salt: int = 0,
) -> tuple[list[int], Requests, Sequence[str]]:
    """Check a request: the prompt's tokens, what goes to the device, and the stop strings.

    Its ``arrival`` is for whoever puts it in a place to set.

    Raises:
        TypeError: an argument has a wrong type.
        ValueError: the request is malformed, or could not fit were it alone.
    """
    table = state.pool.table
    (ids,) = tokenize([prompt], tokenizer, vocab_size)
    new = integer("max_new_tokens", max_new_tokens)
    if not -(2**31) <= integer("priority", priority) < 2**31:
        raise ValueError(f"{priority=} must be an int32: from -2**31 to 2**31 - 1")
    request = new_request(
        state,
        ids,
        max_new_tokens=new,
        sampling=sampling,
        stop_ids=stop_tokens(stop_token_ids, vocab_size),
        priority=int(priority),
        salt=check_salt(salt, "the request"),
    )
    needed = -(-(len(ids) + new - 1) // table.page_size)  # the last token is never stored
    if needed > table.num_pages:
        raise ValueError(
            f"a prompt of {len(ids)} tokens and {max_new_tokens=} need {needed} pages, the pool "
            f"has {table.num_pages}: shorten the one, lower the other, or raise num_pages"
        )
    return ids, request, stop_strings(stop, tokenizer)
