"""A server's state in one file, from which another process goes on where this one was.

A safetensors file: the arrays of a `ServeState`, named by their places in the pytree (of the pages
only those that somebody holds), and in the header, as JSON, what must be the same where the file is
read (sizes, the model's weights by a checksum) and what the host has to say. The policy is not in
it: how requests are served is up to the server that serves them.
"""

from __future__ import annotations

import json
import os
import zlib
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from paxattn.kv_cache import KVCache
from paxattn.prefix_cache.chains import mix
from paxattn.serving.state import ServeState

_FORMAT = "paxattn server 2"


class SnapshotError(ValueError):
    """A file that this server cannot go on from; says why."""


def save_state(path: str | os.PathLike, model: Any, state: ServeState, host: Any) -> None:
    """Write a state to a file, which appears when it is whole.

    Takes host memory for the pages that are held and for one layer of all pages.

    Args:
        path: of the file; an earlier one is replaced.
        model: whose keys and values the pages hold.
        state: stays as it is.
        host: whatever the host must know to go on, for JSON.

    Raises:
        OSError: the file cannot be written.
    """
    # Pages that the host has are not saved: their tokens will be stored anew.
    arrays = _arrays(replace(state, away=jnp.zeros_like(state.away)))
    held = np.flatnonzero(np.asarray(state.pool.table.ref_counts))
    for name, pages in _pages(state.pool.cache).items():
        # Layer by layer: on the device there may be no room for a second pool.
        layers = [np.asarray(pages[layer])[held] for layer in range(pages.shape[0])]
        arrays[name] = _plain(np.stack(layers))
    about = {"format": _FORMAT, "same": _same(model, state), "host": host}
    about["checksum"] = _content_checksum(arrays, host)
    target = Path(path)
    part = target.with_name(f"{target.name}.part")
    part.touch()  # (an OSError here says more than one of safetensors)
    save_file(arrays, part, {"about": json.dumps(about)})
    with part.open("rb") as file:
        os.fsync(file.fileno())
    part.replace(target)


def load_state(path: str | os.PathLike, model: Any, state: ServeState) -> tuple[ServeState, Any]:
    """Read a state from a file.

    Args:
        path: of a file that `save_state` wrote.
        model: with the weights of the one that it was saved with.
        state: one of the same sizes, from `init_serve`; its pages are donated, and its policy
            holds from here on.

    Returns:
        The state, and what the host had to say.

    Raises:
        SnapshotError: no such file, not one of these, damaged, or of another model or other sizes.
            The given state is as it was then.
    """
    try:
        with safe_open(path, framework="np") as file:
            about = json.loads((file.metadata() or {}).get("about", "{}"))
            if about.get("format") != _FORMAT:
                raise SnapshotError(f"{path}: not the state of a server that this version saved")
            _check_same(path, about["same"], _same(model, state))
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            if about["checksum"] != _content_checksum(arrays, about["host"]):
                raise SnapshotError(f"{path}: damaged: its checksum is not that of what it holds")
    except (SafetensorError, OSError, ValueError) as error:
        if isinstance(error, SnapshotError):
            raise
        raise SnapshotError(f"{path}: missing or damaged: {error}") from None
    held = np.flatnonzero(arrays[".pool.table.ref_counts"])
    cache: dict[str, Any] = {
        name.rsplit(".", 1)[1]: _filled(pages, held, arrays.pop(name))
        for name, pages in _pages(state.pool.cache).items()
    }
    state = replace(state, pool=replace(state.pool, cache=replace(state.pool.cache, **cache)))
    leaves, tree = jax.tree_util.tree_flatten_with_path(state)
    restored = [
        jnp.asarray(arrays[jax.tree_util.keystr(place)].view(leaf.dtype))
        if jax.tree_util.keystr(place) in arrays
        else leaf
        for place, leaf in leaves
    ]
    return jax.tree.unflatten(tree, restored), about["host"]


def _pages(cache: KVCache) -> dict[str, jax.Array]:
    """The arrays of which the held pages are saved, by name."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(cache)
    return {f".pool.cache{jax.tree_util.keystr(place)}": pages for place, pages in leaves}


def _arrays(state: ServeState) -> dict[str, np.ndarray]:
    """All other arrays, by their place in the pytree."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(state)
    named = {jax.tree_util.keystr(place): leaf for place, leaf in leaves}
    # What was likeliest besides is read by now.
    others = (*_pages(state.pool.cache), ".top.", ".policy.")
    rest = {name: leaf for name, leaf in named.items() if not name.startswith(others)}
    return {name: _plain(array) for name, array in jax.device_get(rest).items()}


def _plain(array: np.ndarray) -> np.ndarray:
    """The array in a dtype that NumPy has; small floats become integers of their size."""
    array = np.ascontiguousarray(array).reshape(np.shape(array))
    return array.view(f"u{array.dtype.itemsize}") if array.dtype.kind == "V" else array


@partial(jax.jit, donate_argnums=0)
def _set_layer(pages: jax.Array, layer: jax.Array, new: jax.Array) -> jax.Array:
    return lax.dynamic_update_index_in_dim(pages, new, layer, axis=0)


def _filled(pages: jax.Array, held: np.ndarray, saved: np.ndarray) -> jax.Array:
    """The pool's pages, those held as they were saved and zeros in the others."""
    for layer, own in enumerate(saved.view(pages.dtype)):
        whole = np.zeros(pages.shape[1:], pages.dtype)
        whole[held] = own
        pages = _set_layer(pages, np.int32(layer), whole)
    return pages


def _same(model: Any, state: ServeState) -> dict[str, Any]:
    """What a file and the server that reads it must have in common."""
    requests, cache = state.requests, state.pool.cache
    return {
        "num_pages": cache.num_pages,
        "page_size": cache.page_size,
        "max_seqs": state.owners.size,
        "max_requests": state.capacity,
        "max_tokens": requests.tokens.shape[1],
        "max_stop_ids": requests.stop_ids.shape[1],
        "step_tokens": state.step_tokens,
        "prefix_cache": state.pool.prefix is not None,
        "layers": cache.num_layers,
        "kv_heads": cache.num_kv_heads,
        "head_dim": cache.head_dim,
        "heads_per_row": cache.heads_per_row,
        "dtype": cache.k_pages.dtype.name,
        "window": state.window,
        "weights": f"{int(_weights_checksum(model)):08x}",
    }


def _check_same(path: str | os.PathLike, saved: dict[str, Any], here: dict[str, Any]) -> None:
    differ = [
        f"{name}={saved.get(name)} there, {value} here"
        for name, value in here.items()
        if saved.get(name) != value
    ]
    if differ:
        raise SnapshotError(
            f"{path}: was saved with other sizes or weights: {'; '.join(differ)}. Load it with the"
            " same sizes, and the same weights in the same dtype"
        )


def _content_checksum(arrays: dict[str, np.ndarray], host: Any) -> int:
    """Of what a file holds, against what disks and copies do to it."""
    total = zlib.crc32(json.dumps(host, sort_keys=True).encode())
    for name, array in sorted(arrays.items()):
        total = zlib.crc32(np.ascontiguousarray(array).data, zlib.crc32(name.encode(), total))
    return total


@jax.jit
def _weights_checksum(model: Any) -> jax.Array:
    """A sum over the bits of all weights, u32[], however they are stored."""
    total = jnp.zeros((), jnp.uint32)
    for leaf in jax.tree.leaves(model):
        if not jnp.issubdtype(leaf.dtype, jnp.number):
            continue  # the state of a random generator
        bits = lax.bitcast_convert_type(leaf, jnp.dtype(f"u{leaf.dtype.itemsize}"))
        total += jnp.sum(mix(bits.astype(jnp.uint32)), dtype=jnp.uint32)
    return total
