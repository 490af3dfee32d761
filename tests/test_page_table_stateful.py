"""Random sequences of allocator steps against a model that is plain Python.

The model keeps, per row, its tokens and its pages as objects, and counts holders by looking. Beside
the table runs a memory of slots: tokens are written at `slot_mapping`, copies run as ordered, and
every page on the free stack is poisoned after each step, so a row that could read a page that is
not its own shows it in its tokens.
"""

from __future__ import annotations

import os
from collections import Counter
from functools import partial
from itertools import count

import hypothesis.strategies as st
import jax
import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    rule,
    run_state_machine_as_test,
)

from paxattn import page_table as pt

# One set of shapes, so that every step compiles once.
NUM_PAGES, PAGE_SIZE, ROWS, WIDTH, TOKENS = 7, 3, 5, 4, 16
PAIRS, HOLDS = 3, 4

RESERVE = jax.jit(pt.reserve, static_argnames="max_new_pages", donate_argnums=0)
APPEND = jax.jit(pt.append, donate_argnums=0)
DISCARD = jax.jit(pt.discard, donate_argnums=0)
TRUNCATE = jax.jit(pt.truncate, donate_argnums=0)
RELEASE = jax.jit(pt.release, donate_argnums=0)
FORK = jax.jit(pt.fork, donate_argnums=0)
REORDER = jax.jit(pt.reorder, donate_argnums=0)
ADOPT = jax.jit(pt.adopt, donate_argnums=0)
RETAIN = jax.jit(pt.retain, donate_argnums=0)
DROP = jax.jit(pt.drop, donate_argnums=0)
SLOTS = jax.jit(partial(pt.slot_mapping, num_tokens=TOKENS))
UTILIZATION = jax.jit(pt.utilization)

# Small numbers often, so that most steps do something; some that no step can grant.
amounts = st.lists(
    st.one_of(st.integers(0, 4), st.integers(-2, WIDTH * PAGE_SIZE + 2), st.just(2**31 - 1)),
    min_size=ROWS,
    max_size=ROWS,
)
masks = st.lists(st.booleans(), min_size=ROWS, max_size=ROWS)
some_rows = st.lists(st.integers(-1, ROWS), min_size=ROWS, max_size=ROWS)
pairs = st.lists(st.integers(-1, ROWS), min_size=PAIRS, max_size=PAIRS)
picks = st.lists(st.integers(0, 99), min_size=HOLDS, max_size=HOLDS)
few_flags = st.lists(st.booleans(), min_size=HOLDS, max_size=HOLDS)


def i32(values):
    return np.asarray(values, np.int32)


def pages_for(tokens):
    return -(-tokens // PAGE_SIZE)


class Page:
    """A page of the model: its identity is all it has."""


class Allocator(RuleBasedStateMachine):
    steps = 0  # over all runs, to tell how many operations a test made

    @initialize()
    def start(self):
        self.table = pt.init_page_table(
            num_pages=NUM_PAGES, page_size=PAGE_SIZE, max_seqs=ROWS, max_pages_per_seq=WIDTH
        )
        self.memory = np.full(NUM_PAGES * PAGE_SIZE, -1)
        self.rows: list[list[Page | None]] = [[] for _ in range(ROWS)]
        self.tokens: list[list[int]] = [[] for _ in range(ROWS)]
        self.elsewhere: Counter[Page] = Counter()
        self.where: dict[Page, int] = {}  # physical page of each page of the model
        self.fresh = count()

    # The model's own counting.

    def holders(self):
        return Counter(page for row in self.rows for page in row if page) + self.elsewhere

    def num_free(self):
        return NUM_PAGES - len(self.holders())

    def bind(self, stack):
        """Learns which page the table took for each new one: it must have been free before."""
        blocks = np.asarray(self.table.block_tables)
        for r, row in enumerate(self.rows):
            for j, page in enumerate(row):
                if page and page not in self.where:
                    assert blocks[r, j] in stack, "a page taken was not free before the step"
                    self.where[page] = int(blocks[r, j])

    def free_stack(self):
        return set(np.asarray(self.table.free_pages)[: int(self.table.num_free)].tolist())

    # Steps.

    def reserve_model(self, new, bound):
        holders, left, ok, full = self.holders(), self.num_free(), [], False
        plans = []
        for r, n in enumerate(new):
            row, length = self.rows[r], len(self.tokens[r])
            if n < 0 or length + n > WIDTH * PAGE_SIZE:
                ok.append(False)
                continue
            first, needed = length // PAGE_SIZE, pages_for(length + n) if n else 0
            missing = max(0, needed - len(row))
            if missing > bound:
                ok.append(False)
                continue
            copies = [
                j
                for j in range(first, min(needed, len(row)))
                if holders[row[j]] > 1 and (j == first or j >= needed - bound)
            ]
            wants = missing + len(copies)
            full |= wants > left
            ok.append(not wants or not full)
            if wants and not full:
                left -= wants
                plans.append((r, missing, copies))
        ordered = []
        for r, missing, copies in plans:
            for j in copies:
                new_page = Page()
                ordered.append((self.rows[r][j], new_page))
                self.rows[r][j] = new_page
            self.rows[r] += [Page() for _ in range(missing)]
        return ok, ordered

    @rule(new=amounts, bound=st.sampled_from([1, 2]), write=st.sampled_from([True, True, False]))
    def reserve(self, new, bound, write):
        stack = self.free_stack()
        ok, ordered = self.reserve_model(new, bound)
        self.table, got, copies = RESERVE(self.table, i32(new), max_new_pages=bound)
        assert np.asarray(got).tolist() == ok
        self.bind(stack)
        src, dst, n = np.asarray(copies.src), np.asarray(copies.dst), int(copies.count)
        assert sorted(zip(src[:n].tolist(), dst[:n].tolist(), strict=True)) == sorted(
            (self.where[old], self.where[new]) for old, new in ordered
        )
        assert (src[n:] == NUM_PAGES).all()
        assert (dst[n:] == NUM_PAGES).all()
        memory = self.memory.reshape(NUM_PAGES, PAGE_SIZE)
        memory[dst[:n]] = memory[src[:n]]
        if write:
            self.write([n if fine else 0 for n, fine in zip(new, ok, strict=True)])

    def write(self, lens):
        """Writes and appends, as a decode step does; some rows may have more room than asked."""
        slots = np.asarray(SLOTS(self.table, i32(lens)))
        assert len(set(slots.tolist())) == TOKENS
        told = [[next(self.fresh) for _ in range(max(0, n))] for n in lens]
        packed = [token for tokens in told for token in tokens][:TOKENS]
        used = slots[: len(packed)]
        assert (slots[len(packed) :] >= self.memory.size).all()
        if sum(map(len, told)) > TOKENS:  # did not fit in the packed step: nothing is appended
            return
        assert (used < self.memory.size).all()
        self.memory[used] = packed
        self.table, ok = APPEND(self.table, i32(lens))
        assert np.asarray(ok).all()
        for r, tokens in enumerate(told):
            self.tokens[r] += tokens

    @rule(lens=amounts)
    def append(self, lens):
        holders = self.holders()
        ok = []
        for r, n in enumerate(lens):
            row, length = self.rows[r], len(self.tokens[r])
            first = length // PAGE_SIZE
            fine = 0 < n <= len(row) * PAGE_SIZE - length and holders[row[first]] == 1
            ok.append(fine or n == 0)
        slots = np.asarray(
            SLOTS(self.table, i32([n if f else 0 for n, f in zip(lens, ok, strict=True)]))
        )
        self.table, got = APPEND(self.table, i32(lens))
        assert np.asarray(got).tolist() == ok
        t = 0
        for r, n in enumerate(lens):
            for _ in range(n if ok[r] else 0):
                token = next(self.fresh)
                if t < TOKENS and slots[t] < self.memory.size:
                    self.memory[slots[t]] = token
                    self.tokens[r].append(token)
                else:  # appended without a write: whatever lies there is the row's
                    self.tokens[r].append(None)
                t += 1

    @rule(lens=amounts)
    def truncate(self, lens):
        ok = [
            0 <= n <= len(tokens) and (n == 0 or row[pages_for(n) - 1] is not None)
            for n, tokens, row in zip(lens, self.tokens, self.rows, strict=True)
        ]
        self.table, got = TRUNCATE(self.table, i32(lens))
        assert np.asarray(got).tolist() == ok
        for r, n in enumerate(lens):
            if ok[r]:
                del self.tokens[r][n:]
                del self.rows[r][pages_for(n) :]

    @rule(starts=amounts)
    def discard(self, starts):
        self.table = DISCARD(self.table, i32(starts))
        for row, tokens, start in zip(self.rows, self.tokens, starts, strict=True):
            for j in range(max(0, min(start, len(tokens) - 1)) // PAGE_SIZE):
                row[j] = None

    @rule(mask=masks)
    def release(self, mask):
        self.table = RELEASE(self.table, np.asarray(mask))
        for r in np.flatnonzero(mask):
            self.rows[r], self.tokens[r] = [], []

    @rule(src=pairs, dst=pairs)
    def fork(self, src, dst):
        rows = [list(row) for row in self.rows]
        tokens = [list(row) for row in self.tokens]
        claimed, ok = set(), []
        for s, d in zip(src, dst, strict=True):
            fine = 0 <= s < ROWS and 0 <= d < ROWS and s != d and not rows[d] and d not in claimed
            ok.append(fine)
            if fine:
                claimed.add(d)
                self.tokens[d] = list(tokens[s])
                self.rows[d] = rows[s][: pages_for(len(tokens[s]))]
        self.table, got = FORK(self.table, i32(src), i32(dst))
        assert np.asarray(got).tolist() == ok

    @rule(parents=some_rows, mask=masks)
    def reorder(self, parents, mask):
        rows, tokens = list(self.rows), list(self.tokens)
        for r, (parent, moves) in enumerate(zip(parents, mask, strict=True)):
            if moves and 0 <= parent < ROWS:
                self.tokens[r] = list(tokens[parent])
                self.rows[r] = rows[parent][: pages_for(len(tokens[parent]))]
        self.table = REORDER(self.table, i32(parents), np.asarray(mask))

    @rule(
        row=st.integers(-1, ROWS),
        source=st.integers(0, ROWS - 1),
        num_tokens=st.integers(-1, WIDTH * PAGE_SIZE + 1),
        stray=st.sampled_from([None, None, None, -1, NUM_PAGES, "free"]),
    )
    def adopt(self, row, source, num_tokens, stray):
        """Takes a row's full pages, as a prefix cache would, now and then with a bad one."""
        shared = self.rows[source][: len(self.tokens[source]) // PAGE_SIZE]
        pages = [NUM_PAGES if page is None else self.where[page] for page in shared]
        stack = self.free_stack()
        if stray == "free":
            stray = min(stack) if stack else -1
        if stray is not None:
            pages.insert(0, stray)
        padded = (pages + [NUM_PAGES] * WIDTH)[:WIDTH]
        used = pages_for(max(0, num_tokens))
        ok = (
            0 <= row < ROWS
            and not self.rows[row]
            and 0 <= num_tokens <= WIDTH * PAGE_SIZE
            and (stray is None or used == 0)
            and used <= len(pages)
            and NUM_PAGES not in pages[:used]
        )
        self.table, got = ADOPT(self.table, np.int32(row), i32(padded), np.int32(num_tokens))
        assert bool(got) == ok
        if ok:
            self.rows[row] = shared[:used]
            self.tokens[row] = self.tokens[source][:num_tokens]

    @rule(picks=picks, mask=few_flags, stray=st.sampled_from([-1, NUM_PAGES, 2**31 - 1, "free"]))
    def retain(self, picks, mask, stray):
        held = sorted(self.holders(), key=self.where.get)
        chosen = [held[i % len(held)] if held and i < 80 else None for i in picks]
        stack = self.free_stack()
        stray = (min(stack) if stack else -1) if stray == "free" else stray
        pages = [stray if page is None else self.where[page] for page in chosen]
        self.table = RETAIN(self.table, i32(pages), np.asarray(mask))
        for page, wanted in zip(chosen, mask, strict=True):
            if page is not None and wanted:
                self.elsewhere[page] += 1

    @rule(picks=picks, mask=few_flags)
    def drop(self, picks, mask):
        """Gives up holds taken by retain, several of one page in one call among them."""
        holds = sorted(self.elsewhere.elements(), key=self.where.get)
        pages = []
        for i, wanted in zip(picks, mask, strict=True):
            page = holds.pop(i % len(holds)) if holds and wanted and i < 90 else None
            pages.append(NUM_PAGES if page is None else self.where[page])
            if page is not None:
                self.elsewhere[page] -= 1
        self.elsewhere = +self.elsewhere
        self.table = DROP(self.table, i32(pages), np.asarray(mask))

    @rule(mask=few_flags)
    def drop_free(self, mask):
        """Pages that are free already are not freed again."""
        stack = sorted(self.free_stack())
        pages = ([*stack, NUM_PAGES, -1] * HOLDS)[:HOLDS]
        self.table = DROP(self.table, i32(pages), np.asarray(mask))

    # What must hold after every step.

    @invariant()
    def agrees(self):
        Allocator.steps += 1
        holders = self.holders()
        for page in [page for page in self.where if page not in holders]:
            del self.where[page]
        elsewhere = np.zeros(NUM_PAGES, int)
        for page, times in self.elsewhere.items():
            elsewhere[self.where[page]] = times
        pt.check_invariants(self.table, elsewhere)
        table = jax.device_get(self.table)
        assert table.num_free == self.num_free()
        assert table.kv_lens.tolist() == [len(tokens) for tokens in self.tokens]
        for r, row in enumerate(self.rows):
            entries = [self.where[page] if page else NUM_PAGES for page in row]
            assert table.block_tables[r].tolist() == entries + [NUM_PAGES] * (WIDTH - len(row))
        for page, number in self.where.items():
            assert table.ref_counts[number] == holders[page]

    @invariant()
    def tokens_are_intact(self):
        memory = self.memory.reshape(NUM_PAGES, PAGE_SIZE)
        memory[sorted(self.free_stack())] = -1
        for row, tokens in zip(self.rows, self.tokens, strict=True):
            gone = row.count(None) * PAGE_SIZE
            stored = memory[[self.where[page] for page in row if page]].reshape(-1)
            stored, tokens = stored[: len(tokens) - gone], tokens[gone:]
            wanted = [s if t is None else t for s, t in zip(stored, tokens, strict=True)]
            assert stored.tolist() == wanted

    @invariant()
    def utilization_is_exact(self):
        used = jax.device_get(UTILIZATION(self.table))
        in_rows = {page for row in self.rows for page in row if page}
        slots = {
            (page, i)
            for row, tokens in zip(self.rows, self.tokens, strict=True)
            for j, page in enumerate(row)
            for i in range(min(PAGE_SIZE, max(0, len(tokens) - j * PAGE_SIZE)))
            if page
        }
        stored = sum(map(len, self.tokens))
        stored -= sum(row.count(None) for row in self.rows) * PAGE_SIZE
        assert used.num_pages == NUM_PAGES
        assert used.pages_held == len(self.holders())
        assert used.pages_in_rows == len(in_rows)
        assert used.tokens_stored == stored
        assert used.tokens_shared == stored - len(slots)
        assert used.fraction == pytest.approx(
            len(slots) / (len(in_rows) * PAGE_SIZE) if in_rows else 1
        )


def run(examples, steps, derandomize):
    Allocator.steps = 0
    with jax.numpy_dtype_promotion("strict"):
        run_state_machine_as_test(
            Allocator,
            settings=settings(
                max_examples=examples,
                stateful_step_count=steps,
                derandomize=derandomize,
                database=None,
                deadline=None,
                phases=[Phase.generate, Phase.shrink],
                suppress_health_check=list(HealthCheck),
            ),
        )
    return Allocator.steps


def test_allocator_agrees_with_the_model():
    assert run(examples=42, steps=60, derandomize=True) > 2000


@pytest.mark.slow
@pytest.mark.timeout(0)
def test_allocator_agrees_with_the_model_for_long():
    """PAXATTN_EXAMPLES sets how many runs of 200 steps are made."""
    examples = int(os.environ.get("PAXATTN_EXAMPLES", "1000"))
    assert run(examples=examples, steps=200, derandomize=False) > 50 * examples
