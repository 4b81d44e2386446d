"""Accelerators by the names that people use: what a device can do, and how the compiler knows it.

A name is a kind of chip and a number: of TensorCores for v2, v3, v4 and v5p, of chips for v5e and
v6e. On v2 and v3 a JAX device is one core, half of a chip; on the others a chip.
"""

import dataclasses
import math
from typing import Any

from fm_distill.errors import UserError

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
    """One JAX device of a kind of chip."""

    peak_flops: float  # a second, in bfloat16
    int8_speed: int  # of products of eight bits, over that
    bandwidth: float  # of its HBM, bytes a second
    memory_bytes: int  # that the compiler lets a program have
    counted: int  # what the number in a name counts, a device
    # Devices -> how the chips are arranged, in the compiler's words.
    grids: dict[int, str]
    # For the compiler, where it would not take the arrangement of real machines by itself.
    options: dict[str, Any] = dataclasses.field(default_factory=dict)


_SQUARES = {4: "2x2", 16: "4x4", 32: "4x8", 64: "8x8", 128: "8x16", 256: "16x16"}
_CUBES = {4: "2x2x1", 8: "2x2x2", 16: "2x2x4", 32: "2x4x4", 64: "4x4x4", 128: "4x4x8"}
_CORES = {2 * chips: grid for chips, grid in _SQUARES.items()}

# Peak and bandwidth a chip: Jouppi et al. 2020 (v2 46 TFLOP/s and 700 GB/s, v3 123 and 900);
# Google's Cloud TPU documentation (v4 275 and 1,200, v5e 197 and 819, v5p 459 and 2,765, v6e 918
# and 1,640; in eight bits v4 275, v5e 394, v5p 918, v6e 1,836, v2 and v3 none). Memory: what the
# compiler itself calls available when a program needs more.
CHIPS: dict[str, Chip] = {
    "v2": Chip(46e12 / 2, 1, 700e9 / 2, int(7.48 * GIB), 1, _CORES),
    "v3": Chip(123e12 / 2, 1, 900e9 / 2, int(15.48 * GIB), 1, _CORES),
    "v4": Chip(275e12, 1, 1200e9, int(30.75 * GIB), 2, _CUBES, {"chip_config_name": "megacore"}),
    "v5e": Chip(197e12, 2, 819e9, int(15.75 * GIB), 1, {1: "1x1", 8: "2x4"} | _SQUARES),
    "v5p": Chip(459e12, 2, 2765e9, int(95.73 * GIB), 2, _CUBES),
    "v6e": Chip(918e12, 2, 1640e9, int(31.24 * GIB), 1, {1: "1x1", 8: "2x4"} | _SQUARES),
}
# Chips of one host: the compiler would take two hosts for eight of them.
_ONE_HOST = {"1x1": (1, 1, 1), "2x2": (2, 2, 1), "2x4": (2, 4, 1)}


@dataclasses.dataclass(frozen=True)
class Topology:
    """Devices to plan for."""

    name: str
    devices: int
    chip: Chip | None  # None for simulated devices on a CPU
    # Arguments of `jax.experimental.topologies.get_topology_desc`; None on a CPU.
    compiler: dict[str, Any] | None


def known_topologies() -> list[str]:
    """All names but those of CPUs, of which any number goes."""
    return [
        f"{kind}-{devices * chip.counted}"
        for kind, chip in CHIPS.items()
        for devices in sorted(chip.grids)
    ]


def topology(name: str) -> Topology:
    """`v3-8`, `v5e-8`, `cpu:8`, ... Raises `UserError` that lists the known ones."""
    kind, _, count = name.lower().partition(":")
    if kind == "cpu" and count.isdigit() and int(count) > 0:
        return Topology(name, int(count), None, None)
    kind, _, count = name.lower().partition("-")
    chip = CHIPS.get(kind)
    devices = int(count) / chip.counted if chip and count.isdigit() else math.nan
    if chip is None or devices not in chip.grids:
        raise UserError(
            f"--topology {name} is not known; expected one of {', '.join(known_topologies())}, or "
            "cpu:N for N simulated devices"
        )
    grid = chip.grids[int(devices)]
    options = dict(chip.options)
    if kind in ("v5e", "v6e") and grid in _ONE_HOST:
        options["chips_per_host_bounds"] = _ONE_HOST[grid]
    compiler = {"platform": "tpu", "topology_name": f"{kind}:{grid}"} | options
    return Topology(name.lower(), int(devices), chip, compiler)
