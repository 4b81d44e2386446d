"""One shard: the rows of consecutive steps, as a folder of zarr arrays.

Inner chunks are steps, each with a CRC-32C of its bytes: with a checksum of the index alone, a
flipped bit would be read silently. A shard is written once and completely.
"""

import asyncio
import dataclasses
import hashlib
import pathlib
import shutil
from typing import Any

import numpy as np
import tensorstore as ts
from jaxtyping import Int32, UInt64

from fm_distill.array_tree import array_tree
from fm_distill.errors import TrainingFailed
from fm_distill.recordings.rows import FEATURE, TargetRows, feature_name


@array_tree
@dataclasses.dataclass(frozen=True)
class RecordedSteps:
    """What a recording holds of some consecutive steps."""

    rows: TargetRows
    examples: Int32[np.ndarray, "steps batch"]
    views: UInt64[np.ndarray, "steps batch"]

    @property
    def arrays(self) -> dict[str, np.ndarray]:
        """All arrays by name, each with steps first."""
        contents: dict[str, Any] = {
            **self.rows.arrays,
            "examples": self.examples,
            "views": self.views,
        }
        return contents

    @property
    def steps(self) -> int:
        return int(self.examples.shape[0])


def shard_name(start: int, stop: int) -> str:
    return f"steps-{start:08d}-{stop:08d}"


def write_shard(folder: pathlib.Path, steps: RecordedSteps) -> dict[str, str]:
    """Writes `folder`, whatever was there; returns the SHA-256 of each of its files.

    All of it or nothing: of a shard that was lost there is a line in a manifest already, with
    which half a folder would count as complete. Raises `OSError` where the disk does not take it.
    """
    temporary = folder.with_name("arriving")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        asyncio.run(_write(temporary, steps.arrays))
    except ValueError as error:  # TensorStore's, with the cause in its text
        raise OSError(f"{folder}: {_short(error)}") from error
    shutil.rmtree(folder, ignore_errors=True)
    temporary.rename(folder)
    return digests_of(folder)


def read_shard(
    folder: pathlib.Path,
    first: int = 0,
    last: int | None = None,
    taps: tuple[str, ...] = (),
) -> RecordedSteps:
    """The steps `first` to `last` of a shard, each checked against its checksum.

    Of the features those of `taps`. Raises `TrainingFailed` where a file is damaged or missing.
    """
    try:
        arrays = asyncio.run(_read(folder, slice(first, last), taps))
    except (ValueError, OSError, KeyError) as error:
        raise TrainingFailed(
            f"the shard {folder} of the recording is damaged: {_short(error)}; restore it from a "
            "copy, or remove it and run `fm-distill record` again"
        ) from None
    for name, array in arrays.items():
        if np.issubdtype(array.dtype, np.floating) and not np.isfinite(array).all():
            raise TrainingFailed(
                f"the shard {folder} of the recording is damaged: {name} holds numbers that are "
                "not finite; remove it and run `fm-distill record` again"
            )
    examples, views = arrays.pop("examples"), arrays.pop("views")
    features = {x: arrays.pop(feature_name(x)) for x in taps}
    return RecordedSteps(TargetRows(**arrays, features=features), examples, views)


def digests_of(folder: pathlib.Path) -> dict[str, str]:
    """The SHA-256 of each file below `folder`."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


async def _write(folder: pathlib.Path, arrays: dict[str, np.ndarray]) -> None:
    for name, array in arrays.items():
        metadata = {
            "shape": array.shape,
            "data_type": array.dtype.name,
            "fill_value": "NaN" if np.issubdtype(array.dtype, np.floating) else 0,
            "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": array.shape}},
            "codecs": [
                {
                    "name": "sharding_indexed",
                    "configuration": {
                        "chunk_shape": (1, *array.shape[1:]),
                        "codecs": [{"name": "bytes"}, {"name": "crc32c"}],
                        "index_codecs": [{"name": "bytes"}, {"name": "crc32c"}],
                    },
                }
            ],
        }
        spec = _spec(folder / name) | {"metadata": metadata, "store_data_equal_to_fill_value": True}
        store = await ts.open(spec, create=True, delete_existing=True)
        await store.write(array)


async def _read(folder: pathlib.Path, steps: slice, taps: tuple[str, ...]) -> dict[str, np.ndarray]:
    names = [x.name for x in folder.iterdir() if x.is_dir() and not x.name.startswith(FEATURE)]
    names += map(feature_name, taps)
    stores = await asyncio.gather(*(ts.open(_spec(folder / x), open=True) for x in names))
    arrays = await asyncio.gather(*(store[steps].read() for store in stores))
    return dict(zip(names, arrays, strict=True))


def _spec(path: pathlib.Path) -> dict[str, Any]:
    return {"driver": "zarr3", "kvstore": {"driver": "file", "path": str(path)}}


def _short(error: Exception) -> str:
    """TensorStore's message without its source locations."""
    return str(error).partition(" [source locations")[0]
