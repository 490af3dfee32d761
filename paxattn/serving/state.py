"""What a server knows, as one pytree: the requests, the rows that run some of them, the pool.

A request has a place from the moment it is put there until the host puts another one in its stead,
whether it waits, runs or has ended. All its tokens so far, prompt and generated, lie in one line of
`Requests.tokens`. A row only says which request it runs, and the page table how many of that
request's tokens are stored; what remains of the line is what there is to run. So prompts,
decoding, and the return of a request that had to give its pages back are one thing.

Memory: ``8 * Q * L`` bytes for Q places of L tokens (a token and a log-probability each), next to
``2 * layers * kv_heads * head_dim * itemsize`` bytes per token in the pool. Waiting requests hold
no pages, so places cost little. A step looks at the Q requests only for who is next, and reads and
writes of the lines only the tokens that it runs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from paxattn.decode_step import Status
from paxattn.page_table.pages import pages_for
from paxattn.pool import Pool, init_pool, release_rows
from paxattn.sampling import RowSampling, SamplingParams, row_sampling
from paxattn.serving.top_logprobs import TopLogprobs, no_top_logprobs
from paxattn.step import LanguageModel, PoolUse, new_cache, no_use, window_of

NEVER = 2**31 - 1  # tokens


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class Requests:
    """Q places for requests of up to L tokens, or one request: the same without the leading axis.

    Attributes:
        status: i32[Q], `Status`: ``RUNNING`` also while waiting (`ServeState.owners` tells who has
            a row), ``EMPTY`` where there never was a request, otherwise why it ended.
        priority: i32[Q], the highest go first.
        arrival: i32[Q], of equal priority the lowest go first; no two alike.
        prompt_len: i32[Q], at least 1.
        num_tokens: i32[Q], prompt and generated.
        max_new_tokens: i32[Q]; ``prompt_len + max_new_tokens`` is at most L.
        stop_ids: i32[Q, S], tokens that end the request, padded with -1.
        salt: i32[Q], only requests of the same salt share pages, see `prefix_cache.match`.
        top_logprobs: i32[Q], positive if the likeliest tokens are wanted too, see `TopLogprobs`.
        cached_tokens: i32[Q], tokens that pages held when it was first admitted; -1 before.
        sampling: parameters per request.
        tokens: i32[Q, L], the first ``num_tokens`` are valid.
        logprobs: f32[Q, L], of the generated ones.
    """

    status: jax.Array
    priority: jax.Array
    arrival: jax.Array
    prompt_len: jax.Array
    num_tokens: jax.Array
    max_new_tokens: jax.Array
    stop_ids: jax.Array
    salt: jax.Array
    top_logprobs: jax.Array
    cached_tokens: jax.Array
    sampling: RowSampling
    tokens: jax.Array
    logprobs: jax.Array


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class Policy:
    """What may be changed between steps, and compiles nothing.

    Attributes:
        token_budget: i32[], tokens run per step at most: fewer make steps shorter while prompts are
            being stored, more store them sooner. Taken as within R and `ServeState.step_tokens`.
        watermark: i32[], pages that must be left for the growth of running requests when another is
            admitted; more make preemption rarer.
        offload_from: i32[], a row of at least so many tokens that has to leave ends the loop, so
            that the host can move its pages, see `offload.HostPages`; `NEVER` at first.
    """

    token_budget: jax.Array
    watermark: jax.Array
    offload_from: jax.Array


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class ServeState:
    """A server's whole state (R rows, Q requests).

    Attributes:
        pool: the pages and who owns them.
        owners: i32[R], the request that each row runs; Q: none.
        requests: all there are.
        top: the likeliest tokens in the places of those latest generated, for who asked.
        policy: see `Policy`.
        use: how the pool was used.
        preemptions: i32[], times a running request had to give its pages back.
        leaving: i32[], the row that waits for the host to take its pages; R: none.
        away: i32[Q], tokens whose pages the host has; 0 for most.
        step_tokens: static, tokens that a step has room for.
        window: static, the model's, see `step.window_of`.
    """

    pool: Pool
    owners: jax.Array
    requests: Requests
    top: TopLogprobs
    policy: Policy
    use: PoolUse
    preemptions: jax.Array
    leaving: jax.Array
    away: jax.Array
    step_tokens: int = field(metadata={"static": True})
    window: int | None = field(metadata={"static": True})

    @property
    def capacity(self) -> int:
        """Places for requests, Q; as an owner: none."""
        return self.requests.status.shape[0]

    def most_pages(self, tokens: jax.Array | int) -> jax.Array:
        """Pages that a request of so many tokens comes to hold at once, at most."""
        return self._pages_at_once(tokens, self.step_tokens)

    def least_pages(self, tokens: jax.Array | int) -> jax.Array:
        """Pages without which a request of so many tokens cannot run, token by token."""
        return self._pages_at_once(tokens, 1)

    def _pages_at_once(self, tokens: jax.Array | int, step_tokens: int) -> jax.Array:
        """Pages that so many tokens come to hold at once, stored so many at a time."""
        size = self.pool.table.page_size
        pages = pages_for(jnp.asarray(tokens), size)
        if self.window is None:
            return pages
        seen = max(self.window, 2) - 1 + step_tokens  # the last one stored is kept in any case
        return jnp.minimum(pages, (seen + size - 2) // size + 1)

    def pages_behind(self, stored: jax.Array) -> jax.Array:
        """Pages of a row with so many stored tokens that its window has left behind."""
        if self.window is None:
            return jnp.zeros_like(stored)
        first = jnp.minimum(stored + 1 - self.window, stored - 1)  # see `leave_behind`
        return jnp.maximum(first, 0) // self.pool.table.page_size

    def released(self, rows: jax.Array, *, scrub: bool) -> Pool:
        """The pool without rows bool[R], whose full pages the prefix cache remembers."""
        tokens = self.requests.tokens
        return release_rows(self.pool, rows, scrub=scrub, tokens=tokens, lines=self.owners)


def init_serve(
    model: LanguageModel,
    *,
    num_pages: int,
    page_size: int,
    max_seqs: int,
    max_requests: int,
    max_tokens: int,
    step_tokens: int,
    max_stop_ids: int = 8,
    steps_per_read: int = 64,
    watermark: int | None = None,
    remember: bool = True,
    kv_dtype: DTypeLike | None = None,
) -> ServeState:
    """A server without requests.

    Args:
        model: see `step.LanguageModel`.
        num_pages: pages in the pool.
        page_size: tokens per page.
        max_seqs: R, requests that run at once.
        max_requests: Q, requests that run, wait or have ended unread.
        max_tokens: L, of a request, prompt and generated.
        step_tokens: tokens that a step has room for, at least ``max_seqs``; also the token budget.
        max_stop_ids: S, tokens that may end a request.
        steps_per_read: most steps after which `ServeState.top` is read.
        watermark: see `Policy`; a hundredth of the pages by default.
        remember: with a prefix cache.
        kv_dtype: of the pages; None: the model's own.

    Raises:
        ValueError: a size is not a positive integer, or too small for another.
    """
    sizes = {"max_requests": max_requests, "max_tokens": max_tokens, "max_stop_ids": max_stop_ids}
    for name, size in sizes.items():
        if size < 1:
            raise ValueError(f"{name}={size} must be at least 1")
    if step_tokens < max_seqs:
        raise ValueError(f"{step_tokens=} must be at least {max_seqs=}: a token for every row")
    if max_requests < max_seqs:
        raise ValueError(f"{max_requests=} must be at least {max_seqs=}: rows run requests")
    pool = init_pool(
        new_cache(model, num_pages=num_pages, page_size=page_size, dtype=kv_dtype),
        max_seqs=max_seqs,
        max_pages_per_seq=-(-max_tokens // page_size),
        remember=remember,
    )

    def zeros() -> jax.Array:  # each field its own array, or they could not all be donated
        return jnp.zeros((max_requests,), jnp.int32)

    requests = Requests(
        status=zeros(),
        priority=zeros(),
        arrival=zeros(),
        prompt_len=zeros(),
        num_tokens=zeros(),
        max_new_tokens=zeros(),
        stop_ids=jnp.full((max_requests, max_stop_ids), -1, jnp.int32),
        salt=zeros(),
        top_logprobs=zeros(),
        cached_tokens=zeros() - 1,
        sampling=row_sampling([], max_requests),
        tokens=jnp.zeros((max_requests, max_tokens), jnp.int32),
        logprobs=jnp.zeros((max_requests, max_tokens), jnp.float32),
    )
    watermark = num_pages // 100 if watermark is None else watermark
    return ServeState(
        pool=pool,
        owners=jnp.full((max_seqs,), max_requests, jnp.int32),
        requests=requests,
        top=no_top_logprobs(max_requests, steps_per_read),
        policy=Policy(
            token_budget=jnp.int32(step_tokens),
            watermark=jnp.int32(watermark),
            offload_from=jnp.int32(NEVER),
        ),
        use=no_use(),
        preemptions=jnp.zeros((), jnp.int32),
        leaving=jnp.int32(max_seqs),
        away=zeros(),
        step_tokens=step_tokens,
        window=window_of(model),
    )


def new_request(
    state: ServeState,
    prompt: Sequence[int],
    *,
    max_new_tokens: int,
    arrival: int = 0,
    sampling: SamplingParams = SamplingParams(),  # noqa: B008 (frozen)
    stop_ids: Sequence[int] = (),
    priority: int = 0,
    salt: int = 0,
    top_logprobs: int = 0,
) -> Requests:
    """One request, ready to be `put`; see `Requests`.

    Raises:
        TypeError: a sampling parameter is not a number.
        ValueError: a sampling parameter is out of range, or something does not fit the state's
            sizes.
    """
    longest, most = state.requests.tokens.shape[1], state.requests.stop_ids.shape[1]
    if not prompt:
        raise ValueError("the prompt has no tokens: a model needs at least one to start from")
    if max_new_tokens < 0 or len(prompt) + max_new_tokens > longest:
        raise ValueError(
            f"{max_new_tokens=} must be from 0 to {longest - len(prompt)}: this server's requests "
            f"have max_tokens={longest} in all, and the prompt has {len(prompt)}"
        )
    if len(stop_ids) > most:
        raise ValueError(f"{len(stop_ids)} tokens end the request: at most {most} (max_stop_ids)")
    line, ends = np.zeros(longest, np.int32), np.full(most, -1, np.int32)
    line[: len(prompt)], ends[: len(stop_ids)] = prompt, stop_ids
    return Requests(
        status=jnp.int32(Status.RUNNING if max_new_tokens else Status.LENGTH),
        priority=jnp.int32(priority),
        arrival=jnp.int32(arrival),
        prompt_len=jnp.int32(len(prompt)),
        num_tokens=jnp.int32(len(prompt)),
        max_new_tokens=jnp.int32(max_new_tokens),
        stop_ids=jnp.asarray(ends),
        salt=jnp.int32(salt),
        top_logprobs=jnp.int32(top_logprobs),
        cached_tokens=jnp.int32(-1),
        # By numpy: a device takes 200 us for each.
        sampling=jax.tree.map(lambda column: np.asarray(column)[0], row_sampling([sampling], 1)),
        tokens=jnp.asarray(line),
        logprobs=jnp.zeros((longest,), jnp.float32),
    )


def put(requests: Requests, place: jax.Array, request: Requests) -> Requests:
    """Put a request in a place i32[] whose request has ended (or `EMPTY`)."""
    return jax.tree.map(lambda all_, one: all_.at[place].set(one), requests, request)


def stop(state: ServeState, mask: jax.Array, *, scrub: bool = False) -> ServeState:
    """End requests bool[Q] from outside; those that have ended already stay as they are.

    Args:
        state: donate it to the enclosing jit.
        mask: bool[Q].
        scrub: static; zero the pages that nobody holds any more.
    """
    status = state.requests.status
    mask = mask & (status == Status.RUNNING)
    status = jnp.where(mask, jnp.int32(Status.STOP), status)
    rows = mask.at[state.owners].get(mode="fill", fill_value=False)
    return replace(
        state,
        pool=state.released(rows, scrub=scrub),
        owners=jnp.where(rows, state.capacity, state.owners),
        requests=replace(state.requests, status=status),
        leaving=jnp.where(
            rows.at[state.leaving].get(mode="fill", fill_value=False), rows.size, state.leaving
        ),
        away=jnp.where(mask, 0, state.away),
    )
