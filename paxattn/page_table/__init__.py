"""Who owns which page: the page table and its steps, pure functions that run inside `jax.jit`.

A row of the table is a sequence (`R` = `max_seqs` rows). Its tokens lie in pages of `page_size`
(`P`) tokens; `block_tables[r]` lists row r's pages in order, contiguous from entry 0, and every
entry past them is the sentinel `num_pages` (`N`): never -1, which JAX would wrap round to the last
page. A row may hold more pages than its `kv_lens[r]` tokens fill (reserved, not yet appended), and
of one that was told to `discard` its beginning the first entries are the sentinel too; the page
with its last token it always has.

Pages are shared by counting holders in `ref_counts`, and the free ones wait on a stack, of which
the first `num_free` entries of `free_pages` are valid. A page is on the stack or held, never both
and never neither.

Every step takes a table and returns the next one. Nothing raises for what the data asks: what
cannot be done is reported per row (`ok`), and that row is left exactly as it was. Only mistakes
visible while tracing (shapes, dtypes, static sizes) raise. The steps donate nothing; jit them with
`donate_argnums=0` and XLA updates the table in place.

Costs: `reserve` and `append` are O(rows); `fork`, `reorder`, `truncate`, `discard` and `release`
are O(rows x max_pages_per_seq), and next to nothing when there is nothing to do. No step costs in
proportion to the pool. Under `vmap` results are the same, but branches that skip work become
selects, so these costs are promised only without it.
"""

from paxattn.page_table.report import InvariantError, Utilization, check_invariants, utilization
from paxattn.page_table.sharing import adopt, drop, fork, reorder, retain
from paxattn.page_table.slots import slot_mapping, token_rows
from paxattn.page_table.state import PageCopies, PageTable, init_page_table
from paxattn.page_table.steps import append, discard, release, reserve, truncate

__all__ = [
    "InvariantError",
    "PageCopies",
    "PageTable",
    "Utilization",
    "adopt",
    "append",
    "check_invariants",
    "discard",
    "drop",
    "fork",
    "init_page_table",
    "release",
    "reorder",
    "reserve",
    "retain",
    "slot_mapping",
    "token_rows",
    "truncate",
    "utilization",
]
