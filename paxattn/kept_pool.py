"""A pool that outlives a call: later calls find what earlier ones computed.

The device holds the pages and the prefix cache; this is the host's side of it: who has the pool
right now, and what the cache did so far.
"""

from __future__ import annotations

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from paxattn.page_table.state import check_pool
from paxattn.pool import Pool, init_pool, release_rows
from paxattn.prefix_cache import CacheStats
from paxattn.quantized import page_dtype_name
from paxattn.step import LanguageModel, check_model, new_cache


class KeptPool:
    """Pages that stay between calls of `generate` and `stream`, with the tokens that they hold.

    Prompts that begin like anything that was computed before, prompts and completions, start from
    those pages; matching compares tokens, so nothing else is ever shared. Pages that nobody uses
    are given up, least recently used first, when a call needs them: no request that fits the pool
    fails for want of them. One call at a time: a `stream` has the pool from its first ``next`` on,
    until it ends.

    Example:
        >>> kept = paxattn.KeptPool(model, num_pages=1024)
        >>> paxattn.generate(model, [system + question], prefix_cache=kept)
        >>> paxattn.generate(model, [system + another], prefix_cache=kept)
        >>> kept.stats.tokens_saved

    Attributes:
        model: whose keys and values the pages hold. After a change of its weights, `clear`.
        num_pages: pages in the pool.
        page_size: tokens per page.
        kv_dtype: the name of the pages' dtype; None: the model's own.
        stats: what the cache did for the calls that are over, `prefix_cache.CacheStats` of numbers.
            What prompts of one call share with each other is in that call's own ``stats``.
    """

    def __init__(
        self,
        model: LanguageModel,
        *,
        num_pages: int,
        page_size: int = 16,
        kv_dtype: DTypeLike | None = None,
    ) -> None:
        """Allocates nothing yet.

        Args:
            model: see `step.LanguageModel`.
            num_pages: pages in the pool.
            page_size: tokens per page, 1 to 256.
            kv_dtype: of the pages, as for `generate`.

        Raises:
            TypeError: the model is none.
            ValueError: a size is not a positive integer, or too large; or pages cannot have the
                dtype.
        """
        check_model("model", model)
        self.model = model
        self.num_pages, self.page_size = check_pool(num_pages, page_size)
        self.kv_dtype = page_dtype_name(kv_dtype)
        self._in_use = False
        self.clear()

    def clear(self) -> None:
        """Free the pages and forget everything, the counters too."""
        if self._in_use:
            raise RuntimeError("the pool is in use: let the stream that has it end, or close it")
        self._pool: Pool | None = None
        self.stats = CacheStats(**dict.fromkeys(CacheStats.__dataclass_fields__, 0))  # type: ignore

    def take(self, *, max_pages_per_seq: int, salts: np.ndarray) -> Pool:
        """Hand the pool out, with an empty row for each of ``salts`` i32[R]; see `put_back`.

        Raises:
            RuntimeError: somebody else has it.
        """
        if self._in_use:
            raise RuntimeError(
                "prefix_cache= is in use by another stream: let that one end, or close it, first"
            )
        pool, rows = self._pool, len(salts)
        if pool is None:
            cache = new_cache(
                self.model, num_pages=self.num_pages, page_size=self.page_size, dtype=self.kv_dtype
            )
            pool = init_pool(cache, max_seqs=1, max_pages_per_seq=1, remember=True)
        table = replace(
            pool.table,
            block_tables=jnp.full((rows, max_pages_per_seq), self.num_pages, jnp.int32),
            kv_lens=jnp.zeros((rows,), jnp.int32),
        )
        pool = replace(pool, table=table, salts=jnp.asarray(salts))
        self._pool, self._in_use = None, True  # (last: what comes before may fail)
        return pool

    def put_back(self, pool: Pool | None, *, scrub: bool) -> None:
        """Take the pool back, and release its rows if there are any.

        Args:
            pool: what `take` gave, after its use. One that an error left without its buffers is
                forgotten, and the next call starts with an empty one.
            scrub: see `pool.release_rows`.
        """
        self._in_use = False
        try:
            jax.block_until_ready(pool)
        except RuntimeError:  # donated to what failed, or made by it
            pool = None
        if pool is None:
            self.clear()
            return
        lens = np.asarray(pool.table.kv_lens)
        if lens.any():
            pool = _release(pool, np.ones(lens.shape, bool), scrub=scrub)
        self._pool = pool
        if pool.prefix is not None:
            self.stats = jax.tree.map(int, jax.device_get(pool.prefix.stats))


_release = jax.jit(release_rows, donate_argnames=("pool",), static_argnames=("scrub",))
