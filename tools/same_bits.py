"""Whether two runs, or two exported students, are the same in every bit.

    python tools/same_bits.py runs/before runs/after
    python tools/same_bits.py before.safetensors after.safetensors

Of two workdirs: the newest checkpoint (student with its batch statistics, moving average,
optimizer, step) and `metrics.jsonl` without the times. Reads no config, so that one of the
workdirs may be another version's. Exit code: 0 the same, 1 different, 2 wrong input.
"""

import json
import logging
import pathlib
import sys
import warnings
from typing import Any

import jax
import numpy as np
from orbax.checkpoint import v1 as ocp
from safetensors import SafetensorError
from safetensors.numpy import load_file

from fm_distill.errors import EXIT_WRONG_INPUT, UserError
from fm_distill.runs.integrity import integrity_errors, newest_step

TIMES = {"data_wait", "images_per_second"}
SHOWN = 10  # differences of one part
Arrays = dict[str, np.ndarray]
Line = dict[str, Any]


def main(arguments: list[str]) -> int:
    if len(arguments) != 2:
        raise UserError(f"expected two workdirs or two .safetensors files, got {arguments}")
    a, b = map(pathlib.Path, arguments)
    for path in (a, b):
        if not path.exists():
            raise UserError(f"{path} does not exist; give a workdir or an exported .safetensors")
    if a.is_dir() != b.is_dir():
        raise UserError(f"{a} and {b} are a workdir and a file; give two of a kind")
    if not a.is_dir():
        ours, theirs = tensors(a), tensors(b)
        return int(report("tensors", array_differences(ours, theirs), len(ours)))
    left, right = checkpoint_parts(a), checkpoint_parts(b)
    different = False
    for part in sorted(left.keys() | right.keys()):
        ours, theirs = left.get(part, {}), right.get(part, {})
        different |= report(part, array_differences(ours, theirs), len(ours))
    lines = metrics_lines(a), metrics_lines(b)
    different |= report("metrics.jsonl", line_differences(*lines), len(lines[0]))
    return int(different)


def report(part: str, differences: list[str], count: int) -> bool:
    """Prints what differs in a part of `count` entries; whether anything does."""
    print(f"{part}: {len(differences)} differ" if differences else f"{part}: {count} the same")
    for line in differences[:SHOWN]:
        print(f"  {line}")
    if len(differences) > SHOWN:
        print(f"  and {len(differences) - SHOWN} more")
    return bool(differences)


def checkpoint_parts(workdir: pathlib.Path) -> dict[str, Arrays]:
    """Arrays of the newest checkpoint by part (student, ema, ...) and path in it."""
    checkpoints = (workdir / "checkpoints").absolute()
    step = newest_step(checkpoints)
    if not step:
        raise UserError(f"{workdir} has no checkpoint; give the workdir of a run")
    if wrong := integrity_errors(checkpoints / str(step)):
        raise UserError(f"the checkpoint {checkpoints / str(step)} is damaged: {wrong[0]}")
    # One device, whatever mesh it was written from.
    one = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    shapes = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=one),
        dict(ocp.checkpointables_metadata(checkpoints / str(step)).metadata),
    )
    found = ocp.load_checkpointables(checkpoints / str(step), shapes)
    return {part: by_path(tree) for part, tree in found.items()}


def by_path(tree: Any) -> Arrays:
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): np.asarray(leaf)
        for path, leaf in leaves
    }


def tensors(path: pathlib.Path) -> Arrays:
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path} is not a safetensors file: {error}") from None


def metrics_lines(workdir: pathlib.Path) -> list[Line]:
    """What was logged, without what depends on the clock."""
    path = workdir / "metrics.jsonl"
    try:
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        return [{k: v for k, v in line.items() if k not in TIMES} for line in lines]
    except (OSError, ValueError, AttributeError) as error:
        raise UserError(f"{path} cannot be read: {error}") from None


def array_differences(a: Arrays, b: Arrays) -> list[str]:
    found = [f"{name} is in one only" for name in sorted(a.keys() ^ b.keys())]
    for name in sorted(a.keys() & b.keys()):
        left, right = a[name], b[name]
        if (left.shape, left.dtype) != (right.shape, right.dtype):
            found.append(f"{name}: {left.dtype}{left.shape} against {right.dtype}{right.shape}")
        elif left.tobytes() != right.tobytes():
            largest = np.abs(np.float64(left) - np.float64(right)).max()
            found.append(f"{name}: by up to {largest:.3g}")
    return found


def line_differences(a: list[Line], b: list[Line]) -> list[str]:
    found = [f"{len(a)} lines against {len(b)}"] if len(a) != len(b) else []
    for left, right in zip(a, b, strict=False):
        for name in sorted(left.keys() | right.keys()):
            values = left.get(name, "nothing"), right.get(name, "nothing")
            if values[0] != values[1]:
                place = f"step {left.get('step')}, {left.get('split')}, {name}"
                found.append(f"{place}: {values[0]} against {values[1]}")
    return found


if __name__ == "__main__":
    warnings.filterwarnings("ignore", module="orbax.*")
    logging.getLogger("absl").setLevel(logging.ERROR)
    try:
        sys.exit(main(sys.argv[1:]))
    except UserError as error:
        print(error, file=sys.stderr)
        sys.exit(EXIT_WRONG_INPUT)
