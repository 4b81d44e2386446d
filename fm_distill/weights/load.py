"""Weight files: a BiT `.npz` in the original naming, into the variables of a network of ours."""

import hashlib
import os
import pathlib
import zipfile
import zlib

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from fm_distill.config import NetworkConfig
from fm_distill.errors import UserError
from fm_distill.models import Variables, build_network
from fm_distill.weights.names import bit_original, to_ours

HEAD_BIAS = "resnet/head/conv2d/bias"


def read_npz(path: str | os.PathLike[str]) -> dict[str, np.ndarray]:
    """The arrays of an `.npz`, by name. Pickled objects are refused, never loaded."""
    path = pathlib.Path(path)
    if not path.is_file():
        raise UserError(f"there is no weight file {path}")
    try:
        with np.load(path, allow_pickle=False) as archive:
            if not isinstance(archive, np.lib.npyio.NpzFile):
                raise UserError(f"{path} is one array, not an .npz of named arrays")
            return {name: archive[name] for name in archive.files}
    except (ValueError, OSError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        what = "holds pickled objects, which are never loaded" if "pickle" in str(error) else ""
        raise UserError(
            f"{path} {what or 'is not a whole .npz file'} ({error}); "
            "expected a BiT .npz in the original naming: copy or download it again"
        ) from None


def load_bit(path: str | os.PathLike[str], network: NetworkConfig) -> tuple[Variables, int]:
    """Variables and number of classes from a BiT `.npz` in the original naming.

    Raises `UserError` that lists missing, unexpected and mis-shaped tensors where the file holds
    another network, and names tensors that are not finite.
    """
    tensors = read_npz(path)
    if HEAD_BIAS not in tensors:
        raise UserError(
            f"{path} has no tensor {HEAD_BIAS}; expected a BiT .npz in the original naming, got "
            f"names like {', '.join(sorted(tensors)[:3]) or '(none)'}"
        )
    classes = tensors[HEAD_BIAS].size
    init = build_network(network, classes, jnp.dtype("float32")).init
    expected = jax.eval_shape(init, jax.random.key(0)).params
    names = bit_original(network, Variables(expected, {}))

    def place(path_: tuple, leaf: jax.ShapeDtypeStruct) -> jax.Array | None:
        stored = names["params/" + jax.tree_util.keystr(path_, simple=True, separator="/")]
        if stored.name not in tensors:
            problems.append(f"missing {stored.name}")
            return None
        tensor = tensors[stored.name]
        if tensor.shape != stored.shape:
            problems.append(f"{stored.name} is {tensor.shape}, expected {stored.shape}")
            return None
        if tensor.dtype.kind != "f" or not np.isfinite(tensor).all():
            problems.append(f"{stored.name} has values that are not finite numbers")
        return jnp.asarray(to_ours(tensor, stored, leaf.shape), jnp.float32)

    problems: list[str] = []
    params = jax.tree_util.tree_map_with_path(place, expected)
    problems += [
        f"unexpected {name}" for name in sorted(set(tensors) - {x.name for x in names.values()})
    ]
    if problems:
        shown = "\n  ".join(problems[:20] + ["..."] * (len(problems) > 20))
        raise UserError(
            f"{path} does not hold a {network.model}: {len(problems)} tensors differ; "
            f"check teacher.network.model\n  {shown}"
        )
    return Variables(params, {}), classes


def fingerprint(variables: PyTree) -> str:
    """SHA-256 of the names, shapes and bytes of all arrays: the identity of a teacher."""
    digest = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(variables):
        array = np.ascontiguousarray(jax.device_get(leaf))
        digest.update(f"{jax.tree_util.keystr(path)} {array.dtype} {array.shape}\n".encode())
        digest.update(array.tobytes())
    return digest.hexdigest()
