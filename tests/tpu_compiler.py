"""Compiles for TPUs on a machine without one, and reads what XLA says of the programs.

That needs libtpu, which knows every generation, and neither a TPU nor anything else of Google's:

    pip install --no-deps libtpu

One process compiles for all of them, with settings made before jax starts. So a test module has a
function `program(name)` that returns what to compile, `(function, arguments)` (a jitted function
or a plain one, and arguments as `jax.ShapeDtypeStruct`s), and calls `compile_programs` with names,
which runs this file.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
TOPOLOGIES = {"v5e": "v5e:2x2", "v6e": "v6e:2x2", "v5p": "v5p:2x2x1", "tpu7x": "tpu7x:2x2x1"}
# Without these libtpu looks for a TPU, in the network too, and lets no second process look.
SETTINGS = dict(
    TPU_SKIP_MDS_QUERY="1",
    TPU_ACCELERATOR_TYPE="v5litepod-4",
    TPU_WORKER_HOSTNAMES="localhost",
    TPU_LOG_DIR="disabled",
    ALLOW_MULTIPLE_LIBTPU_LOAD="1",
    JAX_PLATFORMS="cpu",
    TF_CPP_MIN_LOG_LEVEL="3",
)


def why_not() -> str | None:
    """The reason why nothing can be compiled here, or None."""
    if not importlib.util.find_spec("libtpu"):
        return "compiling for a TPU needs its compiler: the wheel libtpu is missing"
    return None


def compile_programs(
    module: str, names: list[str], generations: list[str], timeout: float = 280
) -> dict[tuple[str, str], dict]:
    """Compiles the named programs of a test module, for each generation, in a process of its own.

    Returns:
        By (name, generation): of the whole program `temp` and `alias`, in bytes, `shapes` of all
        arrays ("2,3"), the names of its Pallas `kernels`, and `scopes`, the functions that
        something compiled was made by, of which `looped` are inside a loop.
    """
    env = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"} | SETTINGS
    env["PYTHONPATH"] = os.pathsep.join([str(HERE), str(HERE.parent), *sys.path])
    done = subprocess.run(
        [sys.executable, __file__, module, ",".join(generations), *names],
        env=env, capture_output=True, text=True, timeout=timeout, check=False,
    )  # fmt: skip
    if done.returncode:
        raise RuntimeError(f"compiling {names} failed:\n{done.stderr[-6000:]}")
    lines = (json.loads(line) for line in done.stdout.splitlines() if line.startswith("["))
    return {(name, generation): facts for name, generation, facts in lines}


def compile_one(function, arguments, generation, options=None):
    """Compiles in this process, which `SETTINGS` must have been made for."""
    import jax
    import numpy as np
    from jax.experimental import topologies

    topology = topologies.get_topology_desc(platform="tpu", topology_name=TOPOLOGIES[generation])
    mesh = jax.sharding.Mesh(np.array([topology.devices[0]]), ("x",))
    everywhere = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    arguments = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=everywhere), arguments
    )
    function = function if hasattr(function, "lower") else jax.jit(function)
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):  # tells the target
        return function.lower(*arguments).compile(options)


def _words(paths) -> list[str]:
    return sorted({word for path in paths for word in re.findall(r"\w+", path)})


def _main(module: str, generations: str, *names: str) -> None:
    program = importlib.import_module(module).program
    for name in names:
        for generation in generations.split(","):
            compiled = compile_one(*program(name), generation)
            memory, text = compiled.memory_analysis(), compiled.as_text()
            paths = set(re.findall(r'op_name="([^"]+)"', text))
            calls = [line for line in text.splitlines() if '"tpu_custom_call"' in line]
            facts = dict(
                shapes=sorted(set(re.findall(r"\b[a-z]+\d+\[([\d,]+)\]", text))),
                scopes=_words(paths),
                looped=_words(p.split("while/body", 1)[1] for p in paths if "while/body" in p),
                kernels=[re.search(r"%([a-z_]+)[\w.]* =", line)[1] for line in calls],
                temp=memory.temp_size_in_bytes,
                alias=memory.alias_size_in_bytes,
            )
            print(json.dumps([name, generation, facts]), flush=True)


if __name__ == "__main__":
    _main(*sys.argv[1:])
