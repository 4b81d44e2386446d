"""Teachers that are not networks of this package: any function from images to logits.

`(images: float32 NumPy array, (batch, resolution, resolution, 3)) -> logits (batch, classes)`, at
the resolution and input range of `teacher.network`. Only `fm-distill record` calls them.
"""

import hashlib
from collections.abc import Callable
from typing import Any

import numpy as np
from jaxtyping import Float32

from fm_distill.config import NetworkConfig
from fm_distill.errors import UserError
from fm_distill.system.references import load_reference

Images = Float32[np.ndarray, "batch resolution resolution 3"]
# Images to logits, checked in each batch.
TeacherFunction = Callable[[Images], Float32[np.ndarray, "batch classes"]]

PROBES = 2  # images that a function is tried with
# Largest difference of two calls with the same images, relative to the largest logit.
SAME = 1e-3


def load_function(
    reference: str, network: NetworkConfig, option: str
) -> tuple[TeacherFunction, int, str]:
    """The function, its number of classes, and a fingerprint: of its code, not of its weights.

    It is called twice with the same images. Raises `UserError` where a call fails, or the second
    returns other logits.
    """
    loaded = load_reference(reference, f"{option}.function")
    if not callable(loaded.value):
        raise UserError(
            f"{option}.function={reference} is a {type(loaded.value).__name__}; expected a "
            "function from images to logits"
        )
    images = probes(network)
    first = logits_of(loaded.value, images, reference)
    second = logits_of(loaded.value, images, reference)
    if first.shape != second.shape or np.abs(first - second).max() > SAME * np.abs(first).max():
        raise UserError(
            f"{reference} returns different logits when it is called again with the same images "
            f"(by up to {np.abs(first - second).max():.3g}): put it into evaluation mode, without "
            "dropout"
        )
    code = hashlib.sha256(f"{loaded.sha256} {reference.rpartition(':')[2]}".encode()).hexdigest()
    classes = int(first.shape[1])

    def checked(images: Images) -> Float32[np.ndarray, "batch classes"]:
        return logits_of(loaded.value, images, reference, classes)

    return checked, classes, code


def probes(network: NetworkConfig) -> Images:
    """Images of noise, the same everywhere."""
    bits = np.random.Philox(key=7).random_raw(PROBES * network.resolution**2 * 3)
    noise = (bits >> np.uint64(40)).astype(np.float32) / np.float32(2**24)
    return noise.reshape(PROBES, network.resolution, network.resolution, 3)


def logits_of(
    function: Callable[[Images], Any], images: Images, reference: str, classes: int | None = None
) -> Float32[np.ndarray, "batch classes"]:
    """The logits of a batch. Raises `UserError` where the function fails or they cannot be that."""
    try:
        logits = np.asarray(function(images))
    except UserError:
        raise
    except Exception as error:
        raise UserError(
            f"{reference} failed for images of shape {images.shape}: {type(error).__name__}: "
            f"{error}"
        ) from error
    expected = f"({len(images)}, {'classes' if classes is None else classes})"
    if logits.ndim != 2 or len(logits) != len(images) or classes not in (None, logits.shape[1]):
        raise UserError(
            f"{reference} returned an array of shape {logits.shape} for {len(images)} images; "
            f"expected logits of shape {expected}"
        )
    if not np.issubdtype(logits.dtype, np.floating):
        raise UserError(
            f"{reference} returned {logits.dtype}; expected logits in floating point numbers, not "
            "classes"
        )
    if not np.isfinite(logits).all():
        raise UserError(f"{reference} returned numbers that are not finite")
    return logits.astype(np.float32)
