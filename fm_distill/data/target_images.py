"""The target images of Fourier domain adaptation, as the amplitudes that views take from them."""

import dataclasses
import hashlib
import pathlib

import numpy as np
from PIL import Image

from fm_distill.config import Config
from fm_distill.config.data import FourierConfig
from fm_distill.config.resolved import ResolvedRun
from fm_distill.data.images import CorruptImage, decode
from fm_distill.data.sources import SUFFIXES, image_paths
from fm_distill.errors import UserError
from fm_distill.system.sharding import Layout, on_devices
from fm_distill.views.draws import ViewRoot, run_keys
from fm_distill.views.fourier import Amplitudes, Spectra, square_rows, square_start


@dataclasses.dataclass(frozen=True)
class TargetImages:
    """The images of a folder."""

    folder: pathlib.Path
    paths: tuple[pathlib.Path, ...]
    digest: str  # SHA-256 of their contents in order, wherever they lie


def open_targets(fourier: FourierConfig) -> TargetImages | None:
    """The target images; None where there are none. Raises `UserError`."""
    if fourier.folder is None:
        return None
    folder = pathlib.Path(fourier.folder)
    if not fourier.folder or not folder.is_dir():
        raise UserError(
            f"views.fourier.folder is {fourier.folder!r}, which does not exist; give the folder "
            "of the target images"
        )
    paths = tuple(image_paths(folder))
    if not paths:
        raise UserError(
            f"views.fourier.folder {folder} holds no images; expected files that end in "
            f"{', '.join(SUFFIXES)}"
        )
    digest = hashlib.sha256()
    for path in paths:
        digest.update(hashlib.sha256(_bytes(path)).digest())
    return TargetImages(folder, paths, digest.hexdigest())


def spectra_on_devices(config: Config, resolved: ResolvedRun, layout: Layout) -> Spectra | None:
    """What the views of the run need of its target images, on all devices; None without any.

    Raises `UserError` where they are not here, cannot be read, or are others than the run's.
    """
    targets = open_targets(config.views.fourier)
    if targets is None:
        return None
    if targets.digest != resolved.target_images:
        raise UserError(
            f"views.fourier.folder {targets.folder} holds different images from those of the run; "
            "give the folder that the run used"
        )
    sides = {x.resolution for x in (resolved.student, *resolved.teachers)}
    return on_devices(spectra(targets, config.views.fourier.beta, sides), layout.replicated)


def view_root(config: Config, resolved: ResolvedRun, layout: Layout) -> ViewRoot:
    """What the views of the run come from, beside its images. Raises `UserError`."""
    root = run_keys(config.seed).draws
    return dataclasses.replace(root, spectra=spectra_on_devices(config, resolved, layout))


def spectra(targets: TargetImages, beta: float, sides: set[int]) -> Spectra:
    """The low amplitudes of `targets` for images of each of `sides`. Raises `UserError`.

    Each image is squeezed into the square first, as the authors do.
    """
    amplitudes: dict[int, list[Amplitudes]] = {side: [] for side in sorted(sides)}
    for path in targets.paths:
        try:
            image = decode(_bytes(path))
        except CorruptImage as error:
            raise UserError(
                f"{path} is not a complete image ({error}); remove it from views.fourier.folder"
            ) from None
        for side, rows in amplitudes.items():
            rows.append(low_amplitudes(image, beta, side).astype(np.float32))
    return {side: np.stack(rows) for side, rows in amplitudes.items()}


def low_amplitudes(image: Image.Image, beta: float, side: int) -> np.ndarray:
    """float64 (rows, rows, 3), the lowest frequency in the middle."""
    pixels = np.asarray(image.resize((side, side), Image.Resampling.BILINEAR), np.float64)
    amplitudes = np.fft.fftshift(np.abs(np.fft.fft2(pixels, axes=(0, 1))), axes=(0, 1))
    rows = square_rows(beta, side)
    start = square_start(rows, side)
    return amplitudes[start : start + rows, start : start + rows]


def spectra_note(spectra: Spectra | None) -> list[str]:
    """What of the views comes from the target images."""
    if spectra is None:
        return []
    count = len(next(iter(spectra.values())))
    squares = ", ".join(f"{x.shape[1]} x {x.shape[1]} at {side} px" for side, x in spectra.items())
    return [
        f"views.fourier: the lowest frequencies ({squares}) have the amplitudes of {count:,} "
        "target images"
    ]


def _bytes(path: pathlib.Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise UserError(f"the target image {path} cannot be read: {error}") from None
