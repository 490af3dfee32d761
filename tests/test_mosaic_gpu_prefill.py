"""The prefill kernel for GPUs in Pallas' interpreter, and the plain functions around it."""

import dataclasses
import functools

import attention_cases as cases
import gpu_interpreter
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_cases import Case
from gpu_interpreter import check, interpreted

from paxattn.attention.mosaic_gpu import (
    common,
    prefill_config,
    prefill_tiles,
    prefill_work,
    support,
)
from paxattn.attention.mosaic_gpu.prefill_config import TILE, Config

run = functools.partial(gpu_interpreter.run, short=0)


@pytest.fixture(autouse=True)
def _clean():
    with jax.numpy_dtype_promotion("strict"):
        yield
    gpu_interpreter.reset()


BF16, F16 = dict(dtype="bfloat16"), dict(dtype="float16")

CASES = (
    # (rows without tokens or queries, queries before their sequence's start, several items per CTA)
    Case(
        q_lens=(3, 70, 0, 9, 9), kv_lens=(10, 263, 40, 5, 0), **BF16, heads=(4, 2), layers=2,
        padding=5,
    ),
    # (the sequence ends at a page's start and end, and one token further)
    Case(q_lens=(1, 1, 1, 1), kv_lens=(1, 15, 16, 17), **F16, heads=(16, 1)),
    # (a group that does not divide a tile; a window that begins inside a page; a plain block)
    Case(q_lens=(50,), kv_lens=(450,), **BF16, heads=(3, 1), head_dim=128, window=290, page_size=8),
    Case(q_lens=(130,), kv_lens=(200,), **F16, heads=(1, 1), head_dim=80, window=40, page_size=128),
    Case(q_lens=(5,), kv_lens=(300,), **BF16, heads=(14, 2), causal=False, soft_cap=5.0),
    # (blocks of 64 tokens: half a page each)
    Case(q_lens=(40,), kv_lens=(170,), **BF16, heads=(2, 1), head_dim=256, page_size=128),
    Case(q_lens=(33,), kv_lens=(290,), **F16, heads=(2, 1), page_size=256, window=70),
    # quantised pages
    Case(
        q_lens=(3, 70, 0, 9), kv_lens=(10, 163, 40, 5), **BF16, page_dtype="int8", heads=(2, 1),
        layers=2, padding=5,
    ),
    pytest.param(
        Case(
            q_lens=(50,), kv_lens=(450,), **F16, page_dtype="float8_e4m3fn", heads=(3, 1),
            head_dim=128, window=290, soft_cap=50.0,
        ),
        marks=pytest.mark.slow,
    ),
)  # fmt: skip


@interpreted
@pytest.mark.parametrize("case", CASES, ids=str)
def test_matches_oracle_and_reads_no_poison(case):
    inputs = cases.make(case)
    check(inputs, run(cases.poison(inputs)), widened=True)


GRID = dict.fromkeys(
    dataclasses.replace(case, sinks=False)
    for case in gpu_interpreter.grid((*support.PAGE_SIZES, 256))
)


@interpreted
@pytest.mark.slow
@pytest.mark.parametrize("case", GRID, ids=str)
def test_whole_grid(case):
    inputs = cases.make(case)
    check(inputs, run(cases.poison(inputs), ctas=3), widened=True)


MIXED = Case(q_lens=(1, 40, 0, 20, 2), kv_lens=(30, 70, 9, 20, 90), **BF16, heads=(4, 1), padding=3)


@interpreted
def test_serves_the_chosen_rows_only():
    inputs = cases.poison(cases.make(MIXED))
    served = np.repeat([False, True, False, True, False, False], [*MIXED.q_lens, MIXED.padding])
    inputs.q[~served] = np.nan
    inputs.k_pages[inputs.block_tables[0, 0]] = np.nan  # of a row that is not chosen
    got = run(inputs, short=16, decode=False)
    check(cases.make(MIXED), got, served)


@interpreted
def test_no_row_is_chosen():
    o, lse = run(cases.make(MIXED), short=39, decode=False, cu_q_lens=np.zeros(6, np.int32))
    np.testing.assert_array_equal(o, 0.0)
    np.testing.assert_array_equal(lse, -np.inf)


SPLIT = (
    # (the last row has no third piece, and its first queries see nothing of the second)
    Case(q_lens=(3, 40, 0, 9), kv_lens=(10, 1700, 40, 540), **BF16, heads=(4, 1), sinks=True),
    # (queries before their sequence's start; a window that begins within the first piece)
    Case(q_lens=(40, 7), kv_lens=(1563, 5), **F16, heads=(2, 1), window=1100, page_size=256),
)


@interpreted
@pytest.mark.parametrize("case", SPLIT, ids=str)
def test_pieces_of_few_long_rows_are_merged(case):
    inputs = cases.make(case)
    check(inputs, run(cases.poison(inputs), split_over=8))


@interpreted
def test_a_window_that_is_not_positive_is_none():
    case = Case(q_lens=(20,), kv_lens=(90,), **BF16, heads=(2, 1))
    inputs = cases.make(case)
    check(inputs, run(inputs, sliding_window=jnp.int32(0)))


@interpreted
def test_a_missing_page_hides_what_follows():
    """A sentinel (or any other number that is no page) must leak nobody's KV."""
    case = Case(q_lens=(2, 2, 2), kv_lens=(60, 60, 60), **BF16, heads=(2, 1), causal=False)
    inputs = cases.make(case)
    inputs.block_tables[:, 1] = len(inputs.owned), -1, 2**31 - 1
    check(dataclasses.replace(inputs, kv_lens=np.full(3, 16, np.int32)), run(inputs))


@interpreted
def test_pages_behind_the_window_may_be_missing():
    inputs = cases.make(Case(q_lens=(20, 130), kv_lens=(150, 300), **BF16, heads=(2, 1), window=40))
    check(inputs, run(cases.poison(cases.leave_behind(inputs))))


@interpreted
def test_many_pages():
    inputs = cases.make(Case(q_lens=(20,), kv_lens=(90,), **BF16, heads=(2, 1), page_size=8))
    num_pages, old = 40_000, len(inputs.owned)
    moved = np.sort(np.random.default_rng(1).choice(np.arange(32_768, num_pages), old, False))

    def spread(pages):
        out = np.full((num_pages, *pages.shape[1:]), np.nan, pages.dtype)
        out[moved] = pages
        return out

    far = dataclasses.replace(
        inputs,
        block_tables=np.append(moved, num_pages).astype(np.int32)[inputs.block_tables],
        k_pages=spread(inputs.k_pages),
        v_pages=spread(inputs.v_pages),
    )
    check(far, run(far))


# The walk over a tile's blocks.


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(("page_size", "head_dim"), [(8, 64), (128, 256), (256, 128)])
def test_a_walk_visits_what_is_seen_and_masks_where_it_must(causal, page_size, head_dim):
    """Against brute force, for random tiles, with and without a window."""
    rng = np.random.default_rng(0)
    config = prefill_config.default_config(head_dim=head_dim)
    block = config.block_kv
    static = prefill_work.Static(
        group=3, num_kv_heads=1, head_dim=head_dim, page_size=page_size, num_pages=1,
        dtype=jnp.bfloat16, causal=causal, window=causal, soft_cap=None, config=config,
        interpret=True,
    )  # fmt: skip
    many = 300
    q_len = rng.integers(1, 400, many)
    kv_len = np.where(rng.random(many) < 0.2, q_len - 7, q_len + rng.integers(0, 900, many))
    kv_len = np.maximum(kv_len, 1)
    first_packed = rng.integers(0, -(-q_len * 3 // TILE)) * TILE
    last_packed = np.minimum(first_packed + TILE, q_len * 3) - 1
    stored = np.where(rng.random(many) < 0.1, np.maximum(kv_len // 2, 1), kv_len)
    history = kv_len - q_len
    begin = rng.choice([0, 0, 128, 384], many)
    window = rng.choice([0, -5, 1, 64, 200, 500], many)
    tiles = prefill_tiles.Tile(
        *(jnp.asarray(x, jnp.int32) for x in (
            0 * q_len, 0 * q_len, first_packed, history, history + last_packed // 3, stored, begin
        ))
    )  # fmt: skip
    walks = jax.vmap(lambda tile, w: prefill_work.walk_of(static, tile, w))(
        tiles, jax.vmap(common.reach)(jnp.asarray(window, jnp.int32))
    )
    steps = jnp.arange(24, dtype=jnp.int32)
    order = np.asarray(jax.vmap(lambda walk: walk.block(steps))(walks))
    start, blocks, _, num_plain = (np.asarray(x) for x in walks)
    for i in range(many):
        position = history[i] + np.arange(first_packed[i], last_packed[i] + 1) // 3
        token = np.arange(24 * block)
        seen = np.broadcast_to(token < stored[i], (len(position), len(token)))
        if causal:
            seen = seen & (token <= position[:, None])
            if window[i] > 0:
                seen = seen & (token > position[:, None] - window[i])
        seen = seen & (token >= begin[i])
        visited = order[i, : blocks[i]]
        assert sorted(visited) == list(range(blocks[i]))
        tokens = start[i] + visited[:, None] * block + np.arange(block)
        assert not np.delete(seen, tokens.ravel(), axis=1).any()
        assert seen[:, tokens[: num_plain[i]]].all()
        assert start[i] % static.copy == 0
        for reach in tokens:  # no block is read in vain, but where a row's pages have a hole
            assert seen[:, reach].any() or stored[i] < kv_len[i] or begin[i]


# Tiles.


def cut(q_lens, kv_lens, *, group=3, heads=2, chosen=None, tokens=None, window=None, **options):
    q_lens, kv_lens = np.asarray(q_lens), np.asarray(kv_lens)
    cu = jnp.asarray(np.cumsum([0, *q_lens]), jnp.int32)
    sizes = dict(
        causal=True, token_bytes=512, num_pages=1000, min_packed=1, page_size=16, group=group,
        num_kv_heads=heads, num_tokens=int(q_lens.sum()) if tokens is None else tokens,
    )  # fmt: skip
    tiles = jax.jit(functools.partial(prefill_tiles.cut, **(sizes | options)))(
        block_tables=jnp.zeros((len(q_lens), 3000 // 16), jnp.int32),
        kv_lens=jnp.asarray(kv_lens, jnp.int32),
        cu_q_lens=cu,
        chosen=jnp.ones(len(q_lens), bool) if chosen is None else jnp.asarray(chosen),
        window=window,
    )
    return tiles, cu


Q_LENS, KV_LENS = (200, 1, 0, 77, 43, 5), (900, 30, 10, 77, 0, 2900)


def test_every_chosen_query_is_in_one_tile_and_comes_back():
    chosen = np.array([True, False, True, True, True, True])
    tiles, cu = cut(Q_LENS, KV_LENS, chosen=chosen, tokens=330)
    live = chosen & (np.asarray(KV_LENS) > 0)
    assert tiles.count == sum(-(-n * 3 // TILE) for n in np.asarray(Q_LENS)[live])
    fields = np.asarray(tiles.fields)[: tiles.count]
    assert sorted(fields[:, 0]) == list(range(tiles.count))
    served = np.repeat([*live, False], [*Q_LENS, 330 - sum(Q_LENS)])
    np.testing.assert_array_equal(tiles.served, served)

    q = jnp.asarray(np.random.default_rng(0).standard_normal((330, 6, 4)), jnp.bfloat16)
    packed = prefill_tiles.pack_queries(q, tiles, cu, 2)
    o, lse = prefill_tiles.unpack(packed, packed[..., 0].astype(jnp.float32), tiles, 330)
    want = np.where(served[:, None, None], np.asarray(q, np.float32), 0)
    np.testing.assert_array_equal(np.asarray(o, np.float32), want)
    np.testing.assert_array_equal(lse, np.where(served[:, None], want[..., 0], -np.inf))


def test_tiles_run_longest_first_among_those_that_share_the_cache():
    tiles, _ = cut(Q_LENS, KV_LENS)
    assert tiles.heads_together == 2
    last = np.asarray(tiles.fields)[: tiles.count, 4]
    assert list(last) == sorted(last, reverse=True)
    # A window makes nearly all equal, and leaves them in their order.
    tiles, _ = cut(Q_LENS, KV_LENS, window=jnp.int32(1), group=128)
    assert list(np.asarray(tiles.fields)[: tiles.count, 0]) == list(range(tiles.count))
    # 32 MiB hold 1024 tokens: one head at a time, and row by row.
    tiles, _ = cut((200, 200, 200), (1100, 1030, 1200), token_bytes=2**15)
    assert tiles.heads_together == 1
    rows = np.asarray(tiles.fields)[: tiles.count, 1]
    assert list(rows) == sorted(rows)


@pytest.mark.parametrize("window", [None, 0, 1000])
def test_pieces_are_the_whole_of_a_tile_and_none_is_read_twice(window):
    rng = np.random.default_rng(0)
    for _ in range(20):
        q_lens = rng.integers(0, 60, 4)
        kv_lens = q_lens + rng.integers(0, 2900, 4) * (rng.random(4) < 0.7)
        given = dict(tokens=200, window=None if window is None else jnp.int32(window))
        whole, _ = cut(q_lens, kv_lens, **given)
        tiles, _ = cut(q_lens, kv_lens, split_over=132, **given)
        assert tiles.most_pieces == 2970 // 512
        assert tiles.count == tiles.pieces.sum() >= whole.count
        fields = np.asarray(tiles.fields)[: tiles.count]
        by_place = {field[0]: field for field in fields}
        for field in np.asarray(whole.fields)[: whole.count]:
            at = field[0] + np.arange(tiles.pieces[field[0]]) * len(tiles.pieces)
            found = np.array([by_place.pop(place) for place in at])
            np.testing.assert_array_equal(found[:, 1:5], np.tile(field[1:5], (len(at), 1)))
            begins, stops = found[:, 6], found[:, 5]
            np.testing.assert_array_equal(begins[1:], stops[:-1])
            assert begins[0] == field[6]
            assert stops[-1] == field[5]
            assert (begins % 128 == 0).all()
        assert not by_place
        lengths = np.minimum(fields[:, 5], fields[:, 4] + 1) - fields[:, 6]
        assert window or list(lengths) == sorted(lengths, reverse=True)


@pytest.mark.parametrize(
    ("tiles", "heads", "most", "expected"),
    [
        (1, 1, 32, 32),  # as many as there may be
        (7, 8, 4, 2),  # 56 items: 112 pieces run at the same time, 168 do not
        (16, 8, 8, 1),  # 128 items
        (1, 8, 32, 16),
    ],
)
def test_as_many_pieces_as_let_thread_blocks_end_together(tiles, heads, most, expected):
    tokens = jnp.full(tiles, 100_000, jnp.int32)
    piece = prefill_tiles._piece_tokens(tokens, most, heads, 132, 128)
    assert (-(-tokens // piece) == expected).all()


def test_no_pieces_where_a_full_batch_has_tiles_enough_or_rows_are_short():
    sizes = dict(group=4, num_kv_heads=8, num_ctas=132)
    assert prefill_tiles.max_pieces(num_tokens=512, stored=2**17, **sizes) == 2
    assert prefill_tiles.max_pieces(num_tokens=513, stored=2**17, **sizes) == 1
    assert prefill_tiles.max_pieces(num_tokens=32, stored=2**17, **sizes) == 32
    assert prefill_tiles.max_pieces(num_tokens=32, stored=1023, **sizes) == 1
    tiles, _ = cut(Q_LENS, KV_LENS)
    assert tiles.most_pieces == 1  # unless a row's result may depend on the batch


@pytest.mark.parametrize("min_packed", [1, 65])
def test_the_bound_on_tiles_holds_and_follows_the_queries(min_packed):
    rng = np.random.default_rng(0)
    for _ in range(200):
        rows, group = rng.integers(1, 40), int(rng.integers(1, 17))
        q_lens = rng.integers(0, 50, rows)
        tokens = int(q_lens.sum()) + 1
        chosen = q_lens * group >= min_packed
        bound = prefill_tiles.max_tiles(
            num_tokens=tokens, num_rows=int(rows), group=group, min_packed=min_packed
        )
        assert (-(-q_lens[chosen] * group // TILE)).sum() <= bound
        assert bound <= -(-tokens * group // TILE) + rows


@pytest.mark.parametrize(("ctas", "together"), [(1, 1), (5, 2), (7, 3), (132, 2)])
def test_the_deal_gives_every_item_to_one_cta(ctas, together):
    heads, tiles = 3, 11
    static = prefill_work.Static(
        group=1, num_kv_heads=heads, head_dim=64, page_size=16, num_pages=1, dtype=jnp.bfloat16,
        causal=True, window=False, soft_cap=None, config=Config(num_ctas=ctas), interpret=True,
    )  # fmt: skip
    fields = jnp.arange(tiles, dtype=jnp.int32)[:, None] + jnp.zeros((1, 7), jnp.int32)
    numbers = jnp.asarray([tiles, together, 0, 0], jnp.int32)
    dealt = []
    for cta in range(ctas):
        refs = prefill_work.Refs(jnp.int32(cta), *[None] * 4, fields, numbers, *[None] * 3)
        for nth in range(int(prefill_work.num_items(static, refs))):
            item = prefill_work.item_at(static, refs, jnp.int32(nth))
            dealt.append((int(item.head), int(item.tile.place)))
    assert sorted(dealt) == [(h, t) for h in range(heads) for t in range(tiles)]
