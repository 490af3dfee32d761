"""What all implementations by kernels refuse alike: gradients, and some uses of `shard_map`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax


def launch(
    name: str,
    kernels: Callable[..., tuple[jax.Array, jax.Array]],
    q: jax.Array,
    k_pages: jax.Array,
    v_pages: jax.Array,
    sinks: jax.Array | None,
) -> tuple[jax.Array, jax.Array]:
    """Runs `kernels(q, k_pages, v_pages, sinks)`.

    Args:
        name: the implementation's.
        kernels: what runs.
        q: [T, Hq, D].
        k_pages: as the implementation takes them.
        v_pages: same.
        sinks: f32[Hq] or None.

    Returns:
        o [T, Hq, D] in q's dtype, lse f32[T, Hq].

    Raises:
        NotImplementedError: a gradient is asked for, or the caller is a `shard_map` that checks
            over which axes values vary, which Pallas cannot tell of a kernel's results.
    """
    if any(jax.typeof(x).manual_axis_type.varying for x in (q, k_pages, v_pages)):
        raise NotImplementedError(
            f"{name} runs inside a jax.shard_map only with check_vma=False (Pallas cannot tell "
            "over which mesh axes a kernel's results vary); implementation='reference' needs none"
        )

    @jax.custom_jvp
    def attend(q: Any, k_pages: Any, v_pages: Any, sinks: Any) -> Any:
        return kernels(q, k_pages, v_pages, sinks)

    @attend.defjvp
    def _(primals: Any, tangents: Any) -> Any:
        raise NotImplementedError(f"{name} has no gradient: use implementation='reference'")

    return attend(q, k_pages, v_pages, sinks)
