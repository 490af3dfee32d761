"""Where a server's state lies: where its model does, and it stays there.

`jax.jit` compiles anew where arguments lie elsewhere than before. On a mesh, the heads of the pages
are split over the axes that split the weights, if that comes out even, and everything else is
replicated.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any, cast

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from paxattn.serving.state import ServeState


def placed(init: Callable[[Any], ServeState], model: Any) -> ServeState:
    """The state that ``init(model)`` makes, where it is to be: no device ever holds it all."""
    mesh = _mesh(model)
    if mesh is None:
        return settled(init(model), model)
    shardings = _shardings(jax.eval_shape(init, model), *mesh)
    return jax.jit(init, out_shardings=shardings)(model)


def settled(state: ServeState, model: Any) -> ServeState:
    """The state, committed to where it is to be."""
    mesh = _mesh(model)
    if mesh is not None:
        return jax.device_put(state, _shardings(state, *mesh))
    arrays = [leaf for leaf in jax.tree.leaves(model) if isinstance(leaf, jax.Array)]
    devices = {device for array in arrays for device in array.devices()}
    return jax.device_put(state, devices.pop()) if len(devices) == 1 else state


def _mesh(model: Any) -> tuple[Mesh, tuple[str, ...]] | None:
    """The mesh that the model lies on, and those of its axes that split an array of it."""
    leaves = [leaf.sharding for leaf in jax.tree.leaves(model) if isinstance(leaf, jax.Array)]
    named = [one for one in leaves if isinstance(one, NamedSharding) and one.mesh.size > 1]
    if not named:
        return None
    parts = {part for one in named for part in one.spec}
    used = {axis for part in parts for axis in (part if isinstance(part, tuple) else (part,))}
    mesh = cast(Mesh, named[0].mesh)
    return mesh, tuple(axis for axis in mesh.axis_names if axis in used)


def _shardings(state: ServeState, mesh: Mesh, axes: tuple[str, ...]) -> ServeState:
    """A sharding for each of the state's arrays."""
    cache, devices = state.pool.cache, math.prod(mesh.shape[axis] for axis in axes)
    # Heads that lie side by side stay together, and all devices have as many.
    even = cache.k_pages.shape[2] % devices == 0 and not cache.spare_heads
    split = NamedSharding(mesh, PartitionSpec(None, None, axes if even else None))
    everywhere = NamedSharding(mesh, PartitionSpec())
    shardings = jax.tree.map(lambda _: everywhere, state)
    cache = jax.tree.map(lambda _: split, state.pool.cache)
    return replace(shardings, pool=replace(shardings.pool, cache=cache))
