"""The mesh, and where each array lies on it: batches over all devices, large arrays over `fsdp`."""

import dataclasses
from collections.abc import Sequence

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import PyTree

from fm_distill.config import Config, MeshConfig
from fm_distill.errors import UserError

BATCH_AXES = ("data", "fsdp")
# Below this many numbers, gathering an array costs more than replicating it.
FSDP_SMALLEST = 2**14


@dataclasses.dataclass(frozen=True)
class Layout:
    """The shardings that the programs use."""

    mesh: Mesh

    @property
    def platform(self) -> str:
        """`cpu`, `gpu` or `tpu`."""
        return str(self.mesh.devices.flat[0].platform)

    @property
    def replicated(self) -> NamedSharding:
        return NamedSharding(self.mesh, PartitionSpec())

    @property
    def batch(self) -> NamedSharding:
        """First axis over all devices."""
        return NamedSharding(self.mesh, PartitionSpec(BATCH_AXES))

    @property
    def ids(self) -> NamedSharding:
        """(steps, batch): second axis over all devices."""
        return NamedSharding(self.mesh, PartitionSpec(None, BATCH_AXES))

    def spread(self, rows: PyTree) -> PyTree:
        """This process's rows of a batch, as its part of the global arrays."""
        return jax.tree.map(lambda x: jax.make_array_from_process_local_data(self.batch, x), rows)

    def variables(self, tree: PyTree) -> PyTree:
        """For each array (or its shape): its largest axis that `fsdp` divides, else replicated."""
        return jax.tree.map(self._place, tree)

    def _place(self, leaf: jax.Array | jax.ShapeDtypeStruct) -> NamedSharding:
        parts = self.mesh.shape["fsdp"]
        divisible = [i for i, n in enumerate(leaf.shape) if n % parts == 0]
        if parts == 1 or not divisible or np.prod(leaf.shape) < FSDP_SMALLEST:
            return self.replicated
        axis = max(divisible, key=lambda i: leaf.shape[i])
        spec = [None] * len(leaf.shape)
        spec[axis] = "fsdp"  # type: ignore[call-overload]
        return NamedSharding(self.mesh, PartitionSpec(*spec))


def on_devices(tree: PyTree, shardings: PyTree) -> PyTree:
    """`tree`, which every process has in full, laid out over the devices of all of them."""
    return jax.device_put(jax.tree.map(np.asarray, tree), shardings)


def make_layout(config: MeshConfig, devices: Sequence[jax.Device] | None = None) -> Layout:
    """The mesh of `config` over `devices`, or over all that there are.

    Raises `UserError` where the devices cannot be arranged so.
    """
    devices = jax.devices() if devices is None else devices
    fsdp, data = config.fsdp, config.data
    if data == "auto":
        if len(devices) % fsdp:
            raise UserError(f"mesh.fsdp={fsdp} does not divide the {len(devices)} devices")
        data = len(devices) // fsdp
    count = data * fsdp
    if count > len(devices):
        raise UserError(
            f"mesh.data={data} x mesh.fsdp={fsdp} needs {count} devices; there are {len(devices)}"
        )
    # Auto axes: Flax's layers leave the sharding of their outputs to the compiler.
    mesh = jax.make_mesh(
        (data, fsdp), BATCH_AXES, axis_types=(AxisType.Auto,) * 2, devices=devices[:count]
    )
    return Layout(mesh)


def check_batch_size(config: Config, layout: Layout) -> None:
    """Raises `UserError` where the devices do not divide the batch, or its parts."""
    batch_size, count = config.batch_size, layout.mesh.size
    shape = ", ".join(f"{axis}={size}" for axis, size in layout.mesh.shape.items())
    for option, parts in (
        ("", 1),
        (" times memory.accumulate={}", config.memory.accumulate),
        (" times memory.teacher_parts={}", config.memory.teacher_parts),
    ):
        divisor = count * parts
        if batch_size % divisor:
            lower = batch_size // divisor * divisor
            suggestion = f"{lower} or {lower + divisor}" if lower else str(divisor)
            raise UserError(
                f"batch_size={batch_size} is not divisible by the {count} devices of the mesh "
                f"({shape}){option.format(parts)}; use {suggestion}"
            )
