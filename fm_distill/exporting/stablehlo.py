"""A function as a `.stablehlo` file: StableHLO of `jax.export`, read back without this package.

A zip archive of `function.jax_export`, what `jax.export.deserialize` takes, and `card.json`.
"""

import functools
import pathlib
import zipfile
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax import export

from fm_distill.errors import UserError
from fm_distill.exporting.function import BatchSize, Function, Runtime
from fm_distill.exporting.operations import operations_in
from fm_distill.system.files import DAMAGED_ARCHIVE

SUFFIX = ".stablehlo"
FUNCTION = "function.jax_export"
CARD = "card.json"
# JAX lowers for a named platform; for several, each convolution once for each of them. A TPU's form
# is the plain one, with no call into a library, so where it runs is not checked.
PLATFORM = "tpu"
ANYWHERE = export.DisabledSafetyCheck.platform()


def to_stablehlo(function: Function, resolution: int, batch: BatchSize, model: str) -> bytes:
    """`function`, serialised. Raises `UserError` where the network `model` cannot be converted."""
    batch_size = export.symbolic_shape("batch")[0] if batch == "dynamic" else batch
    pixels = jax.ShapeDtypeStruct((batch_size, resolution, resolution, 3), np.uint8)
    try:
        return _serialised(function, pixels)
    except Exception as error:  # of many kinds, by the operation
        raise UserError(
            f"{model} cannot be converted to StableHLO: {_failing(function, pixels)}: "
            f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
        ) from error


def _serialised(function: Callable[..., Any], *inputs: jax.ShapeDtypeStruct) -> bytes:
    disabled_checks = (ANYWHERE,)
    exported = export.export(
        jax.jit(function), platforms=(PLATFORM,), disabled_checks=disabled_checks
    )
    return bytes(exported(*inputs).serialize())


def _failing(function: Function, pixels: jax.ShapeDtypeStruct) -> str:
    """The first operation that cannot be serialised by itself."""
    try:
        traced = jax.make_jaxpr(function)(pixels)
    except Exception:
        return "it cannot be traced"
    for operation in operations_in(traced.jaxpr):
        avals: list[Any] = [variable.aval for variable in operation.invars]
        inputs = [jax.ShapeDtypeStruct(aval.shape, aval.dtype) for aval in avals]
        bind = functools.partial(operation.primitive.bind, **operation.params)
        try:
            _serialised(bind, *inputs)
        except Exception:
            return f"the operation {operation.primitive.name}"
    return "its operations together"


def load_function(data: bytes, threads: int | None = None) -> Runtime:
    """The function that `to_stablehlo` serialised. Raises where `data` is something else.

    XLA's threads are those of its process: `threads` changes nothing.
    """
    call = jax.jit(export.deserialize(bytearray(data)).call)
    return Runtime(f"XLA of jax {jax.__version__}", lambda pixels: np.asarray(call(pixels)))


def write_archive(path: pathlib.Path, function: bytes, card: str) -> None:
    """The file: equal contents give equal bytes. Raises `OSError`."""
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in ((FUNCTION, function), (CARD, card.encode())):
            archive.writestr(zipfile.ZipInfo(name), data)


def read_archive(path: pathlib.Path) -> tuple[bytes, str]:
    """Function and card of a file. Raises `UserError` where it is another's, or damaged."""
    try:
        with zipfile.ZipFile(path) as archive:
            return archive.read(FUNCTION), archive.read(CARD).decode()
    except KeyError:
        raise UserError(
            f"{path} has no {FUNCTION} with a {CARD}; expected a file that `fm-distill export` "
            "wrote"
        ) from None
    except DAMAGED_ARCHIVE as error:
        raise UserError(
            f"{path} is not a {SUFFIX} file of `fm-distill export`, or was damaged ({error}); "
            "export it again"
        ) from None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error}") from None
