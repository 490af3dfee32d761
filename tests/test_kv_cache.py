"""The cache: slots, drops, copies, scrubbing, sizes, and that nothing copies the pool."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from paxattn import kv_cache, page_table
from paxattn.kv_cache import KVCache, init_kv_cache
from paxattn.page_table import PageCopies

L, N, H, P, D = 2, 6, 3, 4, 8
T = 5


def filled(value=0.0):
    cache = init_kv_cache(
        num_layers=L, num_pages=N, page_size=P, num_kv_heads=H, head_dim=D, dtype=jnp.float32
    )
    return KVCache(k_pages=cache.k_pages + value, v_pages=cache.v_pages - value)


def new_tokens(seed=0):
    rng = np.random.default_rng(seed)
    return (jnp.asarray(rng.normal(size=(T, H, D)), jnp.float32) for _ in range(2))


def test_write_puts_tokens_at_their_slots_and_nowhere_else():
    k, v = new_tokens()
    slots = jnp.array([1, N * P, 23, -1, 8], jnp.int32)
    cache = jax.jit(kv_cache.write)(filled(7.0), jnp.int32(1), slots, k, v)
    expected_k, expected_v = np.full((L, N, H, P, D), 7.0), np.full((L, N, H, P, D), -7.0)
    for token in (0, 2, 4):
        page, offset = divmod(int(slots[token]), P)
        expected_k[1, page, :, offset] = k[token]
        expected_v[1, page, :, offset] = v[token]
    np.testing.assert_array_equal(cache.k_pages, expected_k.astype(np.float32))
    np.testing.assert_array_equal(cache.v_pages, expected_v.astype(np.float32))


def test_write_casts_and_names_wrong_shapes():
    k, v = new_tokens()
    half = init_kv_cache(
        num_layers=1, num_pages=2, page_size=P, num_kv_heads=H, head_dim=D, dtype=jnp.float16
    )
    slots = jnp.arange(T, dtype=jnp.int32)
    assert kv_cache.write(half, 0, slots, k, v).v_pages.dtype == jnp.float16
    with pytest.raises(ValueError, match=r"v.shape=\(5, 3, 7\) must be \(5, 3, 8\)"):
        kv_cache.write(half, 0, slots, k, v[..., :7])


def test_worked_example_of_the_docstring():
    table = page_table.init_page_table(num_pages=6, page_size=4, max_seqs=1, max_pages_per_seq=3)
    table = page_table.PageTable(
        block_tables=jnp.array([[2, 0, 6]], jnp.int32),
        kv_lens=jnp.array([6], jnp.int32),
        ref_counts=jnp.array([1, 0, 1, 0, 0, 0], jnp.int32),
        free_pages=jnp.array([1, 3, 4, 5, 5, 5], jnp.int32),
        num_free=jnp.int32(4),
        page_size=table.page_size,
    )
    page_table.check_invariants(table)
    assert page_table.slot_mapping(table, jnp.array([1], jnp.int32), 1).tolist() == [2]
    cache = jax.eval_shape(
        lambda: init_kv_cache(num_layers=2, num_pages=6, page_size=4, num_kv_heads=3, head_dim=8)
    )
    assert (cache.bytes_per_page, cache.bytes_per_token) == (768, 192)


def test_copy_pages_copies_the_first_count_in_all_layers():
    rng = np.random.default_rng(1)
    k = rng.normal(size=(L, N, H, P, D)).astype(np.float32)
    cache = KVCache(k_pages=jnp.asarray(k), v_pages=jnp.asarray(-k))
    copies = PageCopies(
        src=jnp.array([4, 2, 1], jnp.int32),
        dst=jnp.array([0, 3, 5], jnp.int32),
        count=jnp.int32(2),
    )
    out = jax.jit(kv_cache.copy_pages)(cache, copies)
    expected = k.copy()
    expected[:, 0], expected[:, 3] = k[:, 4], k[:, 2]
    np.testing.assert_array_equal(out.k_pages, expected)
    np.testing.assert_array_equal(out.v_pages, -expected)


def test_scrub_zeroes_what_a_release_gave_back():
    table = page_table.init_page_table(num_pages=N, page_size=P, max_seqs=2, max_pages_per_seq=3)
    lens = jnp.array([5, 9], jnp.int32)
    table, ok, _ = page_table.reserve(table, lens, max_new_pages=3)
    table, _ = page_table.append(table, lens)
    assert ok.all()
    own = set(np.asarray(table.block_tables[1, :3]).tolist())
    freed = page_table.release(table, jnp.array([False, True]))
    cache = jax.jit(kv_cache.scrub)(filled(3.0), freed.free_pages, table.num_free, freed.num_free)
    for page in range(N):
        expected = 0.0 if page in own else 3.0
        assert (np.asarray(cache.k_pages[:, page]) == expected).all()
        assert (np.asarray(cache.v_pages[:, page]) == -expected).all()


def test_scrub_skips_ids_out_of_range():
    cache = kv_cache.scrub(filled(3.0), jnp.array([-1, N, 2], jnp.int32), 0, 99)
    zeroed = [page for page in range(N) if not np.asarray(cache.k_pages[:, page]).any()]
    assert zeroed == [2]


def before_jax(*version):
    return tuple(map(int, jax.__version__.split(".")[:2])) < version


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float16, jnp.bfloat16])
def test_donated_steps_change_the_pool_in_place(dtype):
    if dtype == jnp.bfloat16 and before_jax(0, 11) and jax.default_backend() == "cpu":
        pytest.skip("XLA's CPU backend of jax 0.10 widens bf16 scatters; see kv_cache.write")
    pool = jax.eval_shape(
        lambda: init_kv_cache(
            num_layers=4, num_pages=4096, page_size=16, num_kv_heads=2, head_dim=32, dtype=dtype
        )
    )
    pool_bytes = pool.bytes_per_page * pool.num_pages

    def step(cache, copies, slots, k, v):
        cache = kv_cache.copy_pages(cache, copies)

        def layer(cache, i):
            return kv_cache.write(cache, i, slots, k, v), None

        return jax.lax.scan(layer, cache, jnp.arange(4, dtype=jnp.int32))[0]

    ids = jax.ShapeDtypeStruct((T,), jnp.int32)
    copies = PageCopies(src=ids, dst=ids, count=jax.ShapeDtypeStruct((), jnp.int32))
    new = jax.ShapeDtypeStruct((T, 2, 32), dtype)
    compiled = jax.jit(step, donate_argnums=0).lower(pool, copies, ids, new, new).compile()
    memory = compiled.memory_analysis()
    assert memory.alias_size_in_bytes >= pool_bytes
    assert memory.temp_size_in_bytes < pool_bytes / 50


@pytest.mark.parametrize("name", ["num_layers", "num_pages", "page_size", "num_kv_heads"])
@pytest.mark.parametrize("value", [0, -3, 2.0, True])
def test_sizes_must_be_positive_integers(name, value):
    sizes = {"num_layers": L, "num_pages": N, "page_size": P, "num_kv_heads": H, "head_dim": D}
    with pytest.raises(ValueError, match=f"{name}={value!r} must be a positive integer"):
        init_kv_cache(**{**sizes, name: value})


def test_dtype_must_be_floating():
    with pytest.raises(ValueError, match="dtype=int32 must be floating point"):
        init_kv_cache(
            num_layers=L, num_pages=N, page_size=P, num_kv_heads=H, head_dim=D, dtype=jnp.int32
        )
