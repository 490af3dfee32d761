"""Random steps of page table and prefix cache together, against a model that is plain Python.

Tokens are 0 or 1, so that prefixes collide often, and the index has one bucket, so that all hashes
do. The model knows pages as objects and the cache as a tree of them. Beside the table runs a memory
of slots that stands for keys and values: each slot is written with a number for the token *and all
tokens before it in its sequence*, so a row that shares a page computed after other tokens shows it.
Free pages are poisoned after each step.
"""

from __future__ import annotations

import os
from collections import Counter
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

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
from paxattn import prefix_cache as pc

# One set of shapes, so that every step compiles once.
NUM_PAGES, PAGE_SIZE, ROWS, WIDTH = 10, 3, 4, 4
MOST, TOKENS, PAIRS = WIDTH * PAGE_SIZE, 24, 2

BOTH = {"donate_argnums": (0, 1)}
MATCH = jax.jit(pc.match)
ADMIT = jax.jit(pc.admit, **BOTH)
INSERT = jax.jit(pc.insert, **BOTH)
INSERT_ROWS = jax.jit(pc.insert_rows, **BOTH)
RESERVE = jax.jit(pc.reserve, static_argnames="max_new_pages", **BOTH)
EVICT = jax.jit(pc.evict, **BOTH)
CLEAR = jax.jit(pc.clear, **BOTH)
LOOK_CLEAR, LOOK_RESERVE = jax.jit(pc.clear), jax.jit(pt.reserve, static_argnames="max_new_pages")
APPEND = jax.jit(pt.append, donate_argnums=0)
TRUNCATE = jax.jit(pt.truncate, donate_argnums=0)
RELEASE = jax.jit(pt.release, donate_argnums=0)
FORK = jax.jit(pt.fork, donate_argnums=0)
REORDER = jax.jit(pt.reorder, donate_argnums=0)
RETAIN = jax.jit(pt.retain, donate_argnums=0)
DROP = jax.jit(pt.drop, donate_argnums=0)
SLOTS = jax.jit(partial(pt.slot_mapping, num_tokens=TOKENS))

amounts = st.lists(
    st.one_of(st.integers(0, 4), st.integers(-1, MOST + 1)), min_size=ROWS, max_size=ROWS
)
masks = st.lists(st.booleans(), min_size=ROWS, max_size=ROWS)
some_rows = st.lists(st.integers(-1, ROWS), min_size=ROWS, max_size=ROWS)
pairs = st.lists(st.integers(-1, ROWS), min_size=PAIRS, max_size=PAIRS)
# Mostly zeros: more of the same beginnings.
text = st.lists(st.sampled_from([0, 0, 1]), max_size=MOST)
salts = st.sampled_from([0, 0, 7])
# What rows write, often the same, so that several rows compute the same pages.
bits = st.one_of(st.just(0), st.just(0), st.integers(0, 2**TOKENS - 1))


def i32(values):
    return np.asarray(values, np.int32)


def padded(tokens):
    return i32((list(tokens) + [5] * MOST)[:MOST])


def pages_for(tokens):
    return -(-tokens // PAGE_SIZE)


def common(a, b):
    """How many tokens agree from the first on."""
    return next(
        (i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(map(len, (a, b)))
    )


class Page:
    """A page of the model: its identity is all it has."""


@dataclass
class Node:
    """What the model's cache knows of a page."""

    parent: Page | None
    salt: int
    tokens: tuple[int, ...]
    depth: int
    used: int


class Sharing(RuleBasedStateMachine):
    steps = 0  # over all runs, to tell how many operations a test made
    seen: ClassVar = Counter()  # that the interesting things happen

    @initialize()
    def start(self):
        self.table = pt.init_page_table(
            num_pages=NUM_PAGES, page_size=PAGE_SIZE, max_seqs=ROWS, max_pages_per_seq=WIDTH
        )
        self.cache = pc.init_prefix_cache(num_pages=NUM_PAGES, page_size=PAGE_SIZE, num_buckets=1)
        self.memory = np.full(NUM_PAGES * PAGE_SIZE, -1)
        self.numbers: dict[tuple[int, ...], int] = {}
        self.rows: list[list[Page]] = [[] for _ in range(ROWS)]
        self.tokens: list[list[int]] = [[] for _ in range(ROWS)]
        self.salts = [0] * ROWS
        self.others: Counter[Page] = Counter()  # holders that are neither rows nor the cache
        self.where: dict[Page, int] = {}  # physical page of each page of the model
        self.nodes: dict[Page, Node] = {}
        self.clock = 0
        self.counts = Counter()

    # The model's own counting.

    def holders(self):
        return (
            Counter(page for row in self.rows for page in row)
            + Counter(list(self.nodes))
            + self.others
        )

    def num_free(self):
        return NUM_PAGES - len(self.holders())

    def free_stack(self):
        return set(np.asarray(self.table.free_pages)[: int(self.table.num_free)].tolist())

    def page_at(self, number):
        return next(page for page, place in self.where.items() if place == number)

    def children(self, parent, salt):
        return [p for p, n in self.nodes.items() if n.parent is parent and n.salt == salt]

    def run_of(self, tokens, salt):
        """Cached pages that hold the beginning of the tokens."""
        pages, parent = [], None
        for i in range(len(tokens) // PAGE_SIZE):
            wanted = tuple(tokens[i * PAGE_SIZE : (i + 1) * PAGE_SIZE])
            parent = next(
                (p for p in self.children(parent, salt) if self.nodes[p].tokens == wanted), None
            )
            if parent is None:
                break
            pages.append(parent)
        return pages

    def best(self, tokens, salt):
        """Full pages and tokens that a match must find, and the pages allowed after those."""
        full = self.run_of(tokens, salt)[: max(0, len(tokens) - 1) // PAGE_SIZE]
        rest = tokens[len(full) * PAGE_SIZE : -1][:PAGE_SIZE]
        after = self.children(full[-1] if full else None, salt)
        most = max((common(self.nodes[p].tokens, rest) for p in after), default=0)
        last = [p for p in after if most and common(self.nodes[p].tokens, rest) == most]
        return full, len(full) * PAGE_SIZE + most, last

    def use(self, pages):
        self.clock += 1
        for page in pages:
            self.nodes[page].used = self.clock

    def leaves_that_can_go(self, holders):
        parents = {node.parent for node in self.nodes.values()}
        return [p for p in self.nodes if p not in parents and holders[p] == 1]

    def evict_model(self, count):
        """One page after the other, looking anew each time."""
        gone = 0
        while gone < count and (leaves := self.leaves_that_can_go(self.holders())):
            age = {p: (self.nodes[p].used, -self.nodes[p].depth, self.where[p]) for p in leaves}
            del self.nodes[min(leaves, key=age.get)]
            gone += 1
        self.counts["pages_evicted"] += gone
        return gone

    def can_go(self):
        holders = self.holders()

        def free(page):
            below = [p for p, node in self.nodes.items() if node.parent is page]
            return holders[page] == 1 and all(map(free, below))

        return sum(map(free, list(self.nodes)))

    # Growth.

    def wants(self, new, bound):
        """Per row: None if impossible, or the number of missing pages and the entries to copy."""
        holders, plans = self.holders(), []
        for r, n in enumerate(new):
            row, length = self.rows[r], len(self.tokens[r])
            first, needed = length // PAGE_SIZE, pages_for(length + n) if n > 0 else 0
            missing = max(0, needed - len(row))
            if n < 0 or length + n > MOST or missing > bound:
                plans.append(None)
                continue
            written = range(first, min(needed, len(row)))
            plans.append((missing, [j for j in written if holders[row[j]] > 1]))
        return plans

    def totals(self, plans, owned=()):
        """Pages wanted up to each row; `owned` pages need no copy."""
        total, totals = 0, []
        for r, plan in enumerate(plans):
            if plan:
                total += plan[0] + sum(self.rows[r][j] not in owned for j in plan[1])
            totals.append(total)
        return totals

    def need_none(self, plans, owned=()):
        """Whether each row needs no page."""
        return [
            not plan or (not plan[0] and all(self.rows[r][j] in owned for j in plan[1]))
            for r, plan in enumerate(plans)
        ]

    def make_room_model(self, plans):
        holders, free = self.holders(), self.num_free()
        totals = self.totals(plans)
        if totals[-1] <= free:
            return
        fit = [total <= free + self.can_go() for total in totals]
        served = [fine or alone for fine, alone in zip(fit, self.need_none(plans), strict=True)]
        alone = sum(holders[p] == 1 for p in self.nodes)
        shared = [p for p in self.nodes if holders[p] == 2]
        cleared = [
            total <= free + alone or none
            for total, none in zip(
                self.totals(plans, shared), self.need_none(plans, shared), strict=True
            )
        ]
        if any(c and not s for c, s in zip(cleared, served, strict=True)):
            self.seen["cleared for a row"] += 1
            self.counts["pages_evicted"] += len(self.nodes)
            self.nodes.clear()
            return
        wanted = max([t for t, s in zip(totals, fit, strict=True) if s], default=0) - free
        self.seen["evicted for a row"] += self.evict_model(max(0, wanted))

    def reserve_model(self, new, bound):
        self.make_room_model(self.wants(new, bound))
        plans, left, ok, full, ordered = self.wants(new, bound), self.num_free(), [], False, []
        grants = []
        for r, plan in enumerate(plans):
            wants = plan and plan[0] + len(plan[1])
            full |= bool(wants) and wants > left
            ok.append(plan is not None and (not wants or not full))
            if ok[-1] and wants:
                left -= wants
                grants.append((r, *plan))
        for r, missing, copies in grants:
            for j in copies:
                own = Page()
                ordered.append((self.rows[r][j], own))
                self.rows[r][j] = own
            self.rows[r] += [Page() for _ in range(missing)]
        failed = [plan is not None and not fine for plan, fine in zip(plans, ok, strict=True)]
        return ok, failed, ordered

    @rule(new=amounts, bound=st.sampled_from([1, 4]), values=bits)
    def reserve_and_write(self, new, bound, values):
        # What would be possible without a cache: never less than with it.
        _, bare = LOOK_CLEAR(self.cache, self.table)
        _, fine, _ = LOOK_RESERVE(bare, i32(new), max_new_pages=bound)
        old_memory = self.memory.reshape(NUM_PAGES, PAGE_SIZE).copy()
        ok, failed, ordered = self.reserve_model(new, bound)
        assert not (np.asarray(fine) & failed).any(), "a row failed because of the cache"
        self.cache, self.table, got, copies = RESERVE(
            self.cache, self.table, i32(new), max_new_pages=bound
        )
        assert np.asarray(got).tolist() == ok
        blocks = np.asarray(self.table.block_tables)
        for r, row in enumerate(self.rows):
            for j, page in enumerate(row):
                self.where.setdefault(page, int(blocks[r, j]))
        src, dst, n = np.asarray(copies.src), np.asarray(copies.dst), int(copies.count)
        assert sorted(zip(src[:n].tolist(), dst[:n].tolist(), strict=True)) == sorted(
            (self.where[old], self.where[own]) for old, own in ordered
        )
        self.memory.reshape(NUM_PAGES, PAGE_SIZE)[dst[:n]] = old_memory[src[:n]]
        self.seen["copies"] += n
        lens = [n if fine else 0 for n, fine in zip(new, ok, strict=True)]
        if sum(lens) <= TOKENS:
            self.write(lens, [values >> i & 1 for i in range(sum(lens))])

    def write(self, lens, values):
        slots = np.asarray(SLOTS(self.table, i32(lens)))
        holders, t = self.holders(), 0
        for r, n in enumerate(lens):
            for _ in range(n):
                page = self.rows[r][len(self.tokens[r]) // PAGE_SIZE]
                assert slots[t] // PAGE_SIZE == self.where[page]
                assert holders[page] == 1, "a page is written while shared"
                self.tokens[r].append(values[t])
                self.memory[slots[t]] = self.number(self.tokens[r])
                t += 1
        assert (slots[t:] >= self.memory.size).all()
        self.table, ok = APPEND(self.table, i32(lens))
        assert np.asarray(ok).all()

    def number(self, tokens):
        return self.numbers.setdefault(tuple(tokens), len(self.numbers))

    # The cache.

    def a_prompt(self, pick, tail):
        """Tokens of a cached page with all before it, or of a row, and some more; or only those."""
        sources = [*self.nodes, *range(ROWS)]
        source = sources[pick % len(sources)] if pick < 60 else None
        known = []
        if isinstance(source, int):
            known = self.tokens[source]
        elif source is not None:
            page = source
            while page is not None:
                known = [*self.nodes[page].tokens, *known]
                page = self.nodes[page].parent
        return (list(known) + tail)[:MOST]

    def checked(self, pages, num_full, num_tokens, tokens, salt):
        """The pages of the model that a match found, after checking that it is the best one."""
        full, most, last = self.best(tokens, salt)
        assert num_tokens == most
        assert num_full == len(full)
        found = [self.page_at(p) for p in pages if p < NUM_PAGES]
        assert found[: len(full)] == full
        assert len(found) == pages_for(most)
        assert set(found[len(full) :]) <= set(last)
        self.seen["partial hits"] += bool(last)
        self.seen["full pages found"] += num_full
        return found

    @rule(pick=st.integers(0, 99), tail=text, salt=salts)
    def match(self, pick, tail, salt):
        tokens = self.a_prompt(pick, tail)
        found = jax.device_get(MATCH(self.cache, self.table, padded(tokens), len(tokens), salt))
        self.checked(found.pages.tolist(), found.num_full, found.num_tokens, tokens, salt)

    @rule(row=st.integers(-1, ROWS), pick=st.integers(0, 99), tail=text, salt=salts)
    def admit(self, row, pick, tail, salt):
        self.admit_row(row, self.a_prompt(pick, tail), salt)

    def admit_row(self, row, tokens, salt):
        self.cache, self.table, done = ADMIT(
            self.cache, self.table, row, padded(tokens), len(tokens), salt
        )
        if not 0 <= row < ROWS or self.rows[row]:
            assert done == 0
            self.clock += 1
            return
        pages = np.asarray(self.table.block_tables)[row].tolist()
        found = self.checked(pages, (int(done)) // PAGE_SIZE, int(done), tokens, salt)
        self.rows[row], self.tokens[row], self.salts[row] = found, tokens[: int(done)], salt
        self.use(found)
        self.counts.update(
            lookups=1, hits=int(done > 0), tokens_asked=len(tokens), tokens_saved=int(done)
        )

    def insert_model(self, row, salt):
        tokens = self.tokens[row]
        full = len(tokens) // PAGE_SIZE
        path = self.run_of(tokens, salt)
        self.seen["insert after a duplicate"] += any(
            a is not b for a, b in zip(path, self.rows[row], strict=False)
        ) and full > len(path)
        for i in range(len(path), full):
            page = self.rows[row][i]
            if page in self.nodes:
                self.seen["cached as something else"] += 1
                break
            content = tuple(tokens[i * PAGE_SIZE : (i + 1) * PAGE_SIZE])
            self.nodes[page] = Node(path[-1] if path else None, salt, content, i + 1, 0)
            path.append(page)
            self.counts["pages_inserted"] += 1
        self.use(path)

    @rule(
        row=st.integers(0, ROWS - 1),
        zeros=st.integers(0, MOST),
        tail=text,
        look=st.booleans(),
        then=st.sampled_from(["release", "release", "keep", "insert with another salt"]),
    )
    def request(self, row, zeros, tail, look, then):
        """A whole life in one step, or rows would seldom get far enough: with `look` it starts on
        what is cached, without it computes the same again. Texts often begin with many zeros."""
        tokens = ([0] * zeros + tail)[:MOST]
        alone = [r == row for r in range(ROWS)]
        self.release(alone)
        if look:
            self.admit_row(row, tokens, 0)
        else:
            self.salts[row] = 0
        rest = tokens[len(self.tokens[row]) :]
        values = sum(bit << i for i, bit in enumerate(rest))
        self.reserve_and_write([len(rest) * one for one in alone], 4, values)
        self.insert(row, None)
        if then == "insert with another salt":
            self.insert(row, 7)
        elif then == "release":
            self.release(alone)

    @rule(row=st.integers(-1, ROWS), salt=st.sampled_from([None, None, None, 7]))
    def insert(self, row, salt):
        inside = 0 <= row < ROWS
        salt = (self.salts[row] if inside else 0) if salt is None else salt
        tokens = self.tokens[row] if inside else []
        self.cache, self.table = INSERT(self.cache, self.table, row, padded(tokens), salt)
        if inside:
            self.insert_model(row, salt)
        else:
            self.clock += 1

    @rule(mask=masks, release=st.booleans())
    def insert_rows(self, mask, release):
        tokens = i32([padded(row) for row in self.tokens])
        self.cache, self.table = INSERT_ROWS(
            self.cache, self.table, np.asarray(mask), tokens, i32(self.salts)
        )
        for row in np.flatnonzero(mask):
            self.insert_model(row, self.salts[row])
        if release:
            self.release(mask)

    @rule(count=st.integers(-1, 4))
    def evict(self, count):
        held = {page for row in self.rows for page in row} | set(self.others)
        for page in held & self.nodes.keys():
            above = self.nodes[page].parent
            while above is not None and above not in held:
                self.seen["held by descendants"] += 1
                above = self.nodes[above].parent
        self.cache, self.table, freed = EVICT(self.cache, self.table, count)
        assert freed == self.evict_model(count)

    @rule(sure=st.sampled_from([False, False, False, True]))
    def clear(self, sure):
        if sure:
            self.cache, self.table = CLEAR(self.cache, self.table)
            self.nodes.clear()

    # Steps of the table.

    @rule(lens=amounts)
    def truncate(self, lens):
        ok = [0 <= n <= len(tokens) for n, tokens in zip(lens, self.tokens, strict=True)]
        self.table, got = TRUNCATE(self.table, i32(lens))
        assert np.asarray(got).tolist() == ok
        for r, n in enumerate(lens):
            if ok[r]:
                del self.tokens[r][n:]
                del self.rows[r][pages_for(n) :]

    @rule(mask=masks)
    def release(self, mask):
        self.table = RELEASE(self.table, np.asarray(mask))
        for r in np.flatnonzero(mask):
            self.rows[r], self.tokens[r] = [], []

    @rule(src=pairs, dst=pairs)
    def fork(self, src, dst):
        rows, tokens, forks = list(self.rows), list(self.tokens), {}
        for s, d in zip(src, dst, strict=True):
            if 0 <= s < ROWS and 0 <= d < ROWS and s != d and not rows[d] and d not in forks:
                forks[d] = s
        self.table, _ = FORK(self.table, i32(src), i32(dst))
        for d, s in forks.items():
            self.become(d, rows[s], tokens[s], self.salts[s])

    @rule(parents=some_rows, mask=masks)
    def reorder(self, parents, mask):
        old = list(zip(self.rows, self.tokens, self.salts, strict=True))
        self.table = REORDER(self.table, i32(parents), np.asarray(mask))
        for r, (parent, moves) in enumerate(zip(parents, mask, strict=True)):
            if moves and 0 <= parent < ROWS:
                self.become(r, *old[parent])

    def become(self, row, pages, tokens, salt):
        self.rows[row], self.tokens[row] = pages[: pages_for(len(tokens))], list(tokens)
        if tokens:
            self.salts[row] = salt

    @rule(pick=st.integers(0, 99))
    def retain(self, pick):
        """Somebody else takes a hold of a page with tokens in it."""
        pages = {
            p
            for row, t in zip(self.rows, self.tokens, strict=True)
            for p in row[: pages_for(len(t))]
        }
        pages = sorted(pages | set(self.nodes), key=self.where.get)
        if pages and sum(self.others.values()) < 2:
            page = pages[pick % len(pages)]
            self.others[page] += 1
            self.table = RETAIN(self.table, i32([self.where[page]]), np.asarray([True]))

    @rule()
    def drop(self):
        for page in list(self.others.elements())[:1]:
            self.others = self.others - Counter([page])
            self.table = DROP(self.table, i32([self.where[page]]), np.asarray([True]))

    # What must hold after every step.

    @invariant()
    def agrees(self):
        Sharing.steps += 1
        holders = self.holders()
        for page in [page for page in self.where if page not in holders]:
            del self.where[page]
        elsewhere = np.asarray(pc.held(self.cache)).copy()
        for page, times in self.others.items():
            elsewhere[self.where[page]] += times
        pt.check_invariants(self.table, elsewhere)
        pc.check_cache(self.cache)
        table, cache = jax.device_get((self.table, self.cache))
        assert table.num_free == self.num_free()
        assert table.kv_lens.tolist() == [len(tokens) for tokens in self.tokens]
        for r, row in enumerate(self.rows):
            entries = [self.where[page] for page in row]
            assert table.block_tables[r].tolist() == entries + [NUM_PAGES] * (WIDTH - len(row))
        assert sorted(np.flatnonzero(cache.depths)) == sorted(self.where[p] for p in self.nodes)
        for page, node in self.nodes.items():
            at = self.where[page]
            parent = NUM_PAGES if node.parent is None else self.where[node.parent]
            assert cache.tokens[at].tolist() == list(node.tokens)
            assert (cache.parents[at], cache.salts[at]) == (parent, node.salt)
            assert (cache.depths[at], cache.last_used[at]) == (node.depth, node.used)
        assert {name: int(x) for name, x in vars(cache.stats).items()} == {
            name: self.counts[name] for name in vars(cache.stats)
        }

    @invariant()
    def contents_are_intact(self):
        memory = self.memory.reshape(NUM_PAGES, PAGE_SIZE)
        memory[sorted(self.free_stack())] = -1
        for row, tokens in zip(self.rows, self.tokens, strict=True):
            stored = memory[[self.where[page] for page in row]].reshape(-1)[: len(tokens)]
            assert stored.tolist() == [self.number(tokens[: i + 1]) for i in range(len(tokens))]
        for page, node in self.nodes.items():
            known, up = list(node.tokens), node.parent
            while up is not None:
                known, up = [*self.nodes[up].tokens, *known], self.nodes[up].parent
            first = len(known) - PAGE_SIZE
            numbers = [self.number(known[: first + i + 1]) for i in range(PAGE_SIZE)]
            assert memory[self.where[page]].tolist() == numbers


def run(examples, steps, derandomize):
    Sharing.steps = 0
    Sharing.seen.clear()
    with jax.numpy_dtype_promotion("strict"):
        run_state_machine_as_test(
            Sharing,
            settings=settings(
                max_examples=examples,
                stateful_step_count=steps,
                derandomize=derandomize,
                deadline=None,
                database=None,
                suppress_health_check=list(HealthCheck),
                phases=[Phase.generate, Phase.shrink],
            ),
        )
    return Sharing.steps


def test_cache_agrees_with_the_model():
    assert run(examples=22, steps=60, derandomize=True) > 1200
    for what in (
        "full pages found",
        "partial hits",
        "copies",
        "evicted for a row",
        "insert after a duplicate",
        "cached as something else",
        "held by descendants",
    ):
        assert Sharing.seen[what] > 0, Sharing.seen


@pytest.mark.slow
@pytest.mark.timeout(0)
def test_cache_agrees_with_the_model_for_long():
    """PAXATTN_EXAMPLES sets how many runs of 200 steps are made."""
    examples = int(os.environ.get("PAXATTN_EXAMPLES", "1000"))
    assert run(examples=examples, steps=200, derandomize=False) > 100 * examples
    if examples >= 100:
        for what in ("insert after a duplicate", "cached as something else", "cleared for a row"):
            assert Sharing.seen[what] > 0, Sharing.seen
