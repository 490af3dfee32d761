"""One step of a server, and many: admit, make way, run, sample, end."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax

from paxattn.decode_step import Status, take_in
from paxattn.page_table import release, token_rows
from paxattn.page_table.pages import when
from paxattn.penalties import count_tokens
from paxattn.pool import Pool, leave_behind, remember_rows, with_table
from paxattn.sampling import LogitsProcessor, row_sampling, sample
from paxattn.serving import top_logprobs
from paxattn.serving.schedule import admit, make_way, of_rows, to_bring_back, tokens_left
from paxattn.serving.state import ServeState
from paxattn.step import LanguageModel, logits_of, run_tokens


def serve_step(
    model: LanguageModel,
    state: ServeState,
    *,
    logits_processor: LogitsProcessor | None = None,
    scrub: bool = False,
) -> ServeState:
    """Run the next tokens of the requests whose turn it is, prompts and decoding in one batch.

    A request's tokens are those that `generate` gives for it alone: sampling draws from its seed
    and the token's place only, whatever the company, the chunks and the interruptions.

    Args:
        model: see `LanguageModel`.
        state: donate it to the enclosing jit.
        logits_processor: see `sampling.sample`; one for all requests.
        scrub: static; zero the pages that requests give back before anyone can take them.
    """
    state, q_lens = make_way(admit(state), scrub=scrub)
    complete = (q_lens > 0) & (q_lens == tokens_left(state))
    pool, hidden = run_step(model, state, q_lens)
    state = replace(state, pool=pool)

    requests = state.requests
    owned = jax.tree.map(lambda field: field.at[state.owners].get(mode="clip"), requests.sampling)
    # Where nothing is to be sampled, nothing special is.
    owned = jax.tree.map(partial(jnp.where, complete), owned, row_sampling([], complete.size))
    num_tokens = of_rows(state, requests.num_tokens)
    num_generated = num_tokens - of_rows(state, requests.prompt_len)
    logits = logits_of(model, hidden)

    def counts() -> jax.Array:
        lines = requests.tokens.at[state.owners].get(mode="clip")
        return count_tokens(lines, num_tokens - num_generated, num_tokens, logits.shape[-1])

    token, logprob = sample(logits, owned, num_generated, counts, logits_processor)
    asked = complete & (of_rows(state, requests.top_logprobs) > 0)
    whose = jnp.where(asked, state.owners, state.capacity)
    state = replace(state, top=top_logprobs.note(state.top, logits, whose, num_generated))
    stored = (q_lens > 1) | (complete & (num_generated == 0))
    return record(state, token, logprob, complete, stored, scrub=scrub)


def run_step(model: LanguageModel, state: ServeState, q_lens: jax.Array) -> tuple[Pool, jax.Array]:
    """Run ``q_lens`` i32[R] tokens; the pool, and hidden states ``[R, hidden]`` of the last ones.

    When every row runs one token at most, as it mostly is, nothing is computed for the rest of
    ``step_tokens``: that would be most of the work.
    """
    ends = jnp.cumsum(q_lens, dtype=jnp.int32)

    def run(pool: Pool, _: jax.Array, *, num_tokens: int, max_q_len: int) -> tuple[Pool, jax.Array]:
        rows, offsets, _ = token_rows(q_lens, num_tokens)
        place = pool.table.kv_lens.at[rows].get(mode="fill", fill_value=0) + offsets
        owner = state.owners.at[rows].get(mode="fill", fill_value=state.capacity)
        tokens = state.requests.tokens.at[owner, place].get(mode="fill", fill_value=0)
        pool, hidden = run_tokens(model, pool, tokens, q_lens, live=q_lens > 0, max_q_len=max_q_len)
        return pool, hidden[jnp.maximum(ends - 1, 0)]

    num_rows = state.owners.size
    wide = partial(run, num_tokens=state.step_tokens, max_q_len=state.step_tokens)
    narrow = partial(run, num_tokens=num_rows, max_q_len=1)
    some = jnp.any(q_lens > 1)
    hidden = jax.eval_shape(narrow, state.pool, ends)[1]
    pool, hidden = when(some, wide, state.pool, jnp.zeros(hidden.shape, hidden.dtype))
    return when(~some, narrow, pool, hidden)


def record(
    state: ServeState,
    token: jax.Array,
    logprob: jax.Array,
    complete: jax.Array,
    stored: jax.Array,
    *,
    scrub: bool,
) -> ServeState:
    """Take down the new tokens i32[R] of ``complete`` rows, and end the requests that are through.

    The prefix cache learns what a row holds whenever it ``stored`` bool[R] part of its prompt, so
    that others can begin with it while it runs, and again when the request ends.
    """
    requests = state.requests
    num_tokens = of_rows(state, requests.num_tokens)
    num_generated = num_tokens - of_rows(state, requests.prompt_len)
    _, status = take_in(
        token[:, None],
        complete.astype(jnp.int32),
        num_generated=num_generated,
        max_new_tokens=of_rows(state, requests.max_new_tokens),
        stop_ids=requests.stop_ids.at[state.owners].get(mode="fill", fill_value=-1),
    )
    status = jnp.where(complete, status, jnp.int32(Status.RUNNING))
    owners = jnp.where(complete, state.owners, state.capacity)
    ended = status != Status.RUNNING
    pool = remember_rows(state.pool, ended | stored, requests.tokens, state.owners)
    pool = with_table(pool, release(pool.table, ended), scrub=scrub)
    pool = leave_behind(pool, state.window, scrub=scrub)
    # Always: but now lines are written after they were read, in place.
    owners = jnp.where(pool.table.num_free >= 0, owners, state.capacity)
    return replace(
        state,
        pool=pool,
        owners=jnp.where(ended, state.capacity, state.owners),
        requests=replace(
            requests,
            status=requests.status.at[owners].set(status, mode="drop"),
            num_tokens=requests.num_tokens.at[owners].add(1, mode="drop"),
            tokens=requests.tokens.at[owners, num_tokens].set(token, mode="drop"),
            logprobs=requests.logprobs.at[owners, num_tokens].set(logprob, mode="drop"),
        ),
        use=state.use.after(state.pool.table, state.window),
    )


def serve(
    model: LanguageModel,
    state: ServeState,
    steps: jax.Array,
    *,
    logits_processor: LogitsProcessor | None = None,
    scrub: bool = False,
) -> ServeState:
    """Run ``steps`` i32[] steps, or fewer if all requests have ended; nothing waits for the host.

    If pages are to move to the host's memory or back (`Policy.offload_from`), the loop ends there.

    Args:
        model: see `LanguageModel`.
        state: donate it to the enclosing jit.
        steps: as data.
        logits_processor: see `sampling.sample`.
        scrub: see `serve_step`.
    """
    before = state.use.num_steps

    def more(state: ServeState) -> jax.Array:
        left = jnp.any(state.requests.status == Status.RUNNING)
        moves = (state.leaving < state.owners.size) | (to_bring_back(state) < state.capacity)
        ran = state.use.num_steps - before  # right even where the counter has wrapped round
        return left & ~moves & (ran < steps)

    def body(state: ServeState) -> ServeState:
        return serve_step(model, state, logits_processor=logits_processor, scrub=scrub)

    return lax.while_loop(more, body, state)
