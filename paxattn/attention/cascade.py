"""Attention in two parts: once per group over what its rows share, then over what is each row's.

Both parts are ordinary ragged calls of whatever implementation serves the batch, so a kernel needs
nothing new. In the first every group is one sequence: its queries follow each other, and see all of
the shared tokens (so the call is not causal). In the second the rows have their own pages only. The
results are merged by log-sum-exp. Sinks go into the second, which is never empty where a token sees
anything (it sees itself), and so count once.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from paxattn.attention.merge import merge
from paxattn.page_table.pages import varying_like
from paxattn.shared_prefix import SharedPrefix

Run = Callable[..., tuple[jax.Array, jax.Array]]


def attend_shared(
    run: Run,
    q: jax.Array,
    k_pages: jax.Array,
    v_pages: jax.Array,
    *,
    shared: SharedPrefix,
    block_tables: jax.Array,
    kv_lens: jax.Array,
    cu_q_lens: jax.Array,
    sliding_window: jax.Array | None,
    sinks: jax.Array | None,
    max_q_len: int,
    causal: bool,
    ancestors: jax.Array | None = None,
    **options: Any,
) -> tuple[jax.Array, jax.Array]:
    """Runs an implementation in two parts where that pays, else in one.

    A window that hides anything at all from any row rules sharing out, layer by layer.

    Args:
        run: the implementation.
        q: [T, Hq, D].
        k_pages: as `run` takes them.
        v_pages: same.
        shared: from `shared_prefix.find_shared_prefix`, for these tables and lengths.
        block_tables: i32[R, M].
        kv_lens: i32[R].
        cu_q_lens: i32[R + 1].
        sliding_window: i32[] (not positive: none), or None.
        sinks: f32[Hq] or None.
        max_q_len: static bound of the rows' query counts.
        causal: of the rows' own part.
        ancestors: u32[T] or None: among the new tokens, which are all in the rows' own part.
        **options: what else `run` takes.

    Returns:
        o [T, Hq, D] in q's dtype, lse f32[T, Hq].
    """
    pays, tables, lens = shared.pays, shared.rest_tables, shared.rest_kv_lens
    if sliding_window is not None:
        pays &= (sliding_window <= 0) | (sliding_window >= jnp.max(kv_lens))
        tables, lens = jnp.where(pays, tables, block_tables), jnp.where(pays, lens, kv_lens)
    own = {} if ancestors is None else {"ancestors": ancestors}
    o, lse = run(
        q, k_pages, v_pages, block_tables=tables, kv_lens=lens, cu_q_lens=cu_q_lens,
        sliding_window=sliding_window, sinks=sinks, max_q_len=max_q_len, causal=causal, **own,
        **options,
    )  # fmt: skip

    def with_prefix(o: jax.Array, lse: jax.Array) -> tuple[jax.Array, jax.Array]:
        shared_o, shared_lse = run(
            q, k_pages, v_pages, block_tables=shared.group_tables, kv_lens=shared.group_kv_lens,
            cu_q_lens=shared.group_cu_q_lens, sliding_window=None, sinks=None,
            max_q_len=q.shape[0], causal=False, **options,
        )  # fmt: skip
        # Tokens of rows that are no members lie among the others, and must see nothing of this.
        shared_lse = jnp.where(shared.members[:, None], shared_lse, -jnp.inf)
        return merge(jnp.stack([o, shared_o]), jnp.stack([lse, shared_lse]))

    everything = jax.tree.leaves((q, k_pages, v_pages, shared, o, lse))
    o, lse = (varying_like(x, *everything) for x in (o, lse))
    return lax.cond(pays, with_prefix, lambda o, lse: (o, lse), o, lse)
