"""Compiles for GPUs on a machine without any, and reads what ptxas says of the kernels.

XLA compiles for a described device (`gpu_targets/`). That needs jax's CUDA plugin and the wheels
with ptxas and NVVM, but neither a GPU nor a driver:

    pip install --no-deps jax-cuda13-plugin jax-cuda13-pjrt nvidia-cuda-nvcc nvidia-nvvm

One process compiles for one target, with settings made before jax starts. So a test module has a
function `program(name)` that returns what to compile, `(function, arguments)` (a jitted function
or a plain one, and arguments as `jax.ShapeDtypeStruct`s), and calls `compile_programs` with names,
which runs this file.
"""

from __future__ import annotations

import collections
import importlib
import importlib.util
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path

HERE = Path(__file__).parent
TARGETS = {  # what `gpu_targets/` describes, and the version of its architecture
    "h200": (9, 0), "a100": (8, 0), "rtx4090": (8, 9), "b200": (10, 0), "rtx5090": (12, 0),
}  # fmt: skip
OURS = ("JAX_PLATFORMS", "XLA_FLAGS")  # settings of the tests that do not hold for a GPU


def why_not() -> str | None:
    """The reason why nothing can be compiled here, or None."""
    if not importlib.util.find_spec("jax_cuda13_plugin"):
        return "compiling for a GPU needs jax's CUDA plugin: the wheel jax-cuda13-plugin is missing"
    if not any(Path(folder, "nvidia/cu13/bin/ptxas").exists() for folder in sys.path):
        return "compiling for a GPU needs ptxas: the wheel nvidia-cuda-nvcc is missing"
    return None


def compile_programs(
    module: str, names: list[str], target: str = "h200", timeout: float = 280
) -> dict[str, dict]:
    """Compiles the named programs of a test module, for a target, in a process of its own.

    Returns:
        By name: `kernels`, a list of dicts with `name`, `registers`, `spills` (bytes), `shared`
        (bytes of shared memory, the most of kernels of that name; jax 0.10 does not tell: 0) and
        `aligned` (bytes of which TMA's boxes in shared memory begin at multiples, or None where
        there are none); a kernel that an earlier program has too is not listed again. Of the whole
        program `temp` and `alias`, in bytes, `shapes` of all arrays ("2,3"), and `scopes`, the
        functions that something compiled was made by, of which `looped` are inside a loop, and
        `launches` says how many kernels of a loop's body each of those made.
    """
    with tempfile.TemporaryDirectory() as dump:
        settings = dict(
            JAX_SKIP_CUDA_CONSTRAINTS_CHECK="1",  # (the libraries it looks for do not matter here)
            MOSAIC_GPU_DUMP_TO=dump,
            MOSAIC_GPU_DUMP_PTX="1",
            MOSAIC_GPU_DUMP_PTXAS="1",
            TF_CPP_MIN_LOG_LEVEL="3",
            PYTHONPATH=os.pathsep.join([str(HERE), str(HERE.parent)]),
        )
        env = {k: v for k, v in os.environ.items() if k not in OURS} | settings
        done = subprocess.run(
            [sys.executable, __file__, target, module, *names],
            env=env, capture_output=True, text=True, timeout=timeout, check=False,
        )  # fmt: skip
    if done.returncode:
        raise RuntimeError(f"compiling {names} for {target} failed:\n{done.stderr[-6000:]}")
    return dict(json.loads(line) for line in done.stdout.splitlines())


def _read_dump(folder: Path) -> list[dict]:
    """Reads, and removes, what Mosaic GPU has written about the kernels compiled since."""
    # Numbers behind names do not tell which belong together: only what is lowered has the former,
    # and what an earlier program has too is not compiled again.
    shared: dict[str, int] = {}  # (jax 0.10 writes none)
    for path in folder.glob("*.resources.txt"):
        name = _kernel_name(path)
        size = int(re.search(r"smem_scratch_bytes=(\d+)", path.read_text())[1])
        shared[name] = max(size, shared.get(name, 0))
    kernels = []
    for path in sorted(folder.glob("*.ptxas")):
        said, name = path.read_text(), _kernel_name(path)
        spilled = re.findall(r"(\d+) bytes spill (?:stores|loads)", said)
        kernels.append(
            dict(
                name=name,
                registers=max(int(n) for n in re.findall(r"Used (\d+) registers", said)),
                spills=sum(map(int, spilled)),
                shared=shared[name] if shared else 0,
                aligned=box_alignment(path.with_suffix(".ptx").read_text()),
            )
        )
    for path in folder.iterdir():
        path.unlink()
    return kernels


_ANY = 1 << 20  # as a multiple: nothing was found yet that is none of it
_BOXES = (  # loads and stores
    r"cp\.async\.bulk\.tensor\S+\.shared::\w+\.global\S*\s+\[(%\w+)\]",
    r"cp\.async\.bulk\.tensor\S+\.global\.shared\S*\s+\[[^\]]*\],\s*\[(%\w+)\]",
)


def box_alignment(ptx: str) -> int | None:
    """The largest power of 2 that all shared addresses of TMA's tensor copies are multiples of.

    That is, as far as constants in their arithmetic tell. (Shared memory itself begins at one of
    1024.) The hardware asks for 128, and neither interpreter nor compiler looks.
    """
    written: dict[str, list[tuple[str, list[str]]]] = {}
    line = r"^\s*(?:@!?%\w+\s+)?([a-z][\w.]*)\s+(%\w+), (.*);"  # (with a predicate or without)
    for op, register, operands in re.findall(line, ptx, re.M):
        written.setdefault(register, []).append((op.split(".")[0], operands.split(", ")))
    multiple = dict.fromkeys(written, _ANY)

    def of(operand: str) -> int:
        if re.fullmatch(r"-?\d+", operand):
            return int(operand) & -int(operand) or _ANY
        return 1024 if "shmem" in operand else multiple.get(operand, 1)

    def result(op: str, operands: list[str]) -> int:
        found = [of(x) for x in operands]
        match op:
            case "mov" | "cvt":
                return found[0]
            case "add" | "sub" | "or" | "xor" | "min" | "max" | "selp":
                return min(found[:2])
            case "mul":
                return min(found[0] * found[1], _ANY)
            case "mad":
                return min(found[0] * found[1], found[2])
            case "shl" if operands[1].isdigit():
                return min(found[0] << int(operands[1]), _ANY)
            case "and":
                return max(found)
        return 1

    changed = True
    while changed:  # (registers of loops are written more than once)
        changed = False
        for register, ways in written.items():
            least = min(multiple[register], *(result(*way) for way in ways))
            changed |= least != multiple[register]
            multiple[register] = least
    return min((of(x) for pattern in _BOXES for x in re.findall(pattern, ptx)), default=None)


def _kernel_name(path: Path) -> str:
    """Of a kernel whose file is named `name_3.ptxas`."""
    return re.sub(r"_\d+$", "", path.name.split(".")[0])


def _functions(paths: Iterable[str]) -> list[str]:
    """Names of the functions (jitted ones, kernels) on the ways to operations."""
    return sorted({name for path in paths for name in re.findall(r"\w+", path)})


def _launches(text: str) -> dict[str, int]:
    """By function, how many fusions and calls in the bodies of loops it made."""
    made = re.findall(r' (?:fusion|custom-call)\(.*op_name="[^"]*while/body([^"]*)"', text)
    return collections.Counter(name for path in made for name in _functions([path]))


def _main(target: str, module: str, *names: str) -> None:
    import jax
    from jax.experimental import topologies

    if target != "h200":  # without a device Mosaic GPU takes it to be one of these
        from jax.experimental.mosaic.gpu import utils

        utils._infer_arch = lambda: TARGETS[target]
    topology = topologies.get_topology_desc(
        platform="cuda",
        topology_name=target,
        topology="1x1x1",
        target_config=(HERE / "gpu_targets" / f"{target}.txtpb").read_text(),
    )
    mesh = topologies.make_mesh(topology, (1,), ("x",))
    jax.sharding.set_mesh(mesh)  # the choice of an implementation asks the mesh
    everywhere = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    program = importlib.import_module(module).program
    for name in names:
        function, arguments = program(name)
        arguments = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=everywhere), arguments
        )
        function = function if hasattr(function, "lower") else jax.jit(function)
        compiled = function.lower(*arguments).compile()
        memory, text = compiled.memory_analysis(), compiled.as_text()
        paths = set(re.findall(r'op_name="([^"]+)"', text))
        facts = dict(
            shapes=sorted(set(re.findall(r"\b[a-z]+\d+\[([\d,]+)\]", text))),
            scopes=_functions(paths),
            looped=_functions(p.split("while/body", 1)[1] for p in paths if "while/body" in p),
            launches=_launches(text),
            kernels=_read_dump(Path(os.environ["MOSAIC_GPU_DUMP_TO"])),
            temp=memory.temp_size_in_bytes,
            alias=memory.alias_size_in_bytes,
        )
        print(json.dumps([name, facts]), flush=True)


if __name__ == "__main__":
    _main(*sys.argv[1:])
