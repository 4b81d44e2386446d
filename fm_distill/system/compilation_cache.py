"""Compiled programs are kept in the workdir, so that a resumed run does not compile again."""

import contextlib
import hashlib
import os
import pathlib
import platform

import jax

from fm_distill.system.processes import first_process

# Least recently used ones go first beyond this.
MOST_BYTES = 2 * 2**30


# A program that compiles faster than this is not kept.
SHORTEST_S = 0.3


def use_compilation_cache(workdir: pathlib.Path) -> str:
    """Turns JAX's persistent compilation cache on, and says where it is.

    A place that the user gave by `JAX_COMPILATION_CACHE_DIR` stays. A teacher that is trained first
    shares that of `workdir`.
    """
    if cache_dir := os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        return f"compiled programs: {cache_dir} (set by JAX_COMPILATION_CACHE_DIR)"
    folder = workdir / COMPILED / _machine()
    with contextlib.suppress(OSError):  # a workdir that cannot be written is refused elsewhere
        if first_process():
            _drop_half_written(folder)
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_compilation_cache_max_size", MOST_BYTES)
    # Its caches for GPUs put the folder's path into the key: no copy would ever be found again.
    jax.config.update("jax_persistent_cache_enable_xla_caches", "none")
    jax.config.update("jax_persistent_cache_min_compile_time_secs", SHORTEST_S)
    return f"compiled programs: {folder}, at most {MOST_BYTES / 2**30:g} GiB"


def _machine() -> str:
    """Code for one processor may crash another, so each kind has a folder of its own."""
    flags = platform.machine()
    with contextlib.suppress(OSError):
        lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
        flags += next((x for x in lines if x.startswith(("flags", "Features"))), "")
    return f"{platform.machine()}-{hashlib.sha256(flags.encode()).hexdigest()[:12]}"


def _drop_half_written(folder: pathlib.Path) -> None:
    """JAX writes the time of an entry after the entry: without it, a kill came between."""
    for entry in folder.glob("*-cache"):
        atime_file = entry.with_name(entry.name.removesuffix("-cache") + "-atime")
        if not atime_file.exists() or atime_file.stat().st_size != 8:
            entry.unlink()
            atime_file.unlink(missing_ok=True)


# Where compiled programs are kept, unless the user has a place of his own for them.
COMPILED = "compiled"
