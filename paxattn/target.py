"""The machine that the code is being built for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax


@dataclass(frozen=True, kw_only=True)
class Target:
    """What the code is being built for: "cuda" alone does not tell an A100 from an H200.

    Attributes:
        platform: "cpu", "gpu" or "tpu".
        device_kind: the maker's name of the device, e.g. "NVIDIA H200".
    """

    platform: str
    device_kind: str


def target_of(q: Any) -> Target:
    """Finds where the op will run: q's own device, else the mesh's, else the default.

    Args:
        q: an array, a tracer, a `jax.ShapeDtypeStruct`, or None. The mesh may be abstract.

    Returns:
        The target.
    """
    if isinstance(q, jax.Array) and not isinstance(q, jax.core.Tracer):
        return _describe(next(iter(q.devices())))
    sharding = getattr(q, "sharding", None)
    for mesh in (getattr(sharding, "mesh", None), jax.sharding.get_abstract_mesh()):
        device = getattr(getattr(mesh, "abstract_mesh", mesh), "abstract_device", None)
        if device is not None:
            return _describe(device)
    default = getattr(jax.config, "jax_default_device", None)
    if isinstance(default, str):
        default = jax.devices(default)[0]
    return _describe(jax.devices()[0] if default is None else default)


def _describe(device: Any) -> Target:
    platform = {"cuda": "gpu", "rocm": "gpu"}.get(device.platform, device.platform)
    return Target(platform=platform, device_kind=device.device_kind)
