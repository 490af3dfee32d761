"""Settings that must be made before jax starts."""

import atexit
import itertools
import os
import shutil
import tempfile
from importlib.metadata import version

# Pallas' GPU interpreter runs every thread of a thread block as a task of the CPU client's pool,
# and they wait for each other: with as many workers as a small machine has cores, some never start.
os.environ.setdefault("NPROC", "16")

# Nearly all of a test's time is compilation, and nearly all of that is LLVM polishing kernels that
# run once, on a few hundred numbers. XLA's own passes, which decide what is fused and what is
# updated in place, all run; `XLA_FLAGS= pytest` compiles as users do.
if "XLA_FLAGS" not in os.environ:
    flags = ["--xla_backend_optimization_level=0", "--xla_cpu_parallel_codegen_split_count=1"]
    if version("jaxlib").startswith("0.10."):
        flags.append("--xla_cpu_use_fusion_emitters=false")  # later versions have no other emitter
    os.environ["XLA_FLAGS"] = " ".join(flags)

# What takes very long to compile (to store it takes a fourteenth of that) is compiled once for all
# processes: those of pytest-xdist, which begin with this environment, and those that tests start,
# which leave the user's own cache alone.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    cache = tempfile.mkdtemp(prefix="paxattn-tests-")
    atexit.register(shutil.rmtree, cache, ignore_errors=True)
    os.environ["JAX_COMPILATION_CACHE_DIR"] = cache
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "3")


_slow_tests = itertools.count(1)


def pytest_runtest_teardown(item):
    """Forgets compiled programs now and then in the long grids.

    A test's programs map memory some ninety times, and Linux lets a process do so 65,530 times.
    """
    if item.get_closest_marker("slow") and next(_slow_tests) % 200 == 0:
        import jax

        jax.clear_caches()
