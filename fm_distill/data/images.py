"""One image onto its canvas: decoded with Pillow, shrunk to fit, aspect ratio kept."""

import io
import warnings

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageOps, UnidentifiedImageError

from fm_distill.config import CanvasConfig

Pixels = UInt8[np.ndarray, "height width 3"]


class CorruptImage(Exception):
    """Bytes that are not a complete image."""


def decode(data: bytes | np.ndarray) -> Image.Image:
    """An RGB image from encoded bytes or from an array of pixels.

    EXIF rotation is applied; greyscale, palette and 16-bit images become 8-bit RGB; transparent
    pixels are laid on white. Raises `CorruptImage`.
    """
    try:
        # Pillow only warns of some broken or huge files; here they count as corrupt.
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            image = Image.open(io.BytesIO(data)) if isinstance(data, bytes) else _wrap(data)
            image.load()
            return _to_rgb(ImageOps.exif_transpose(image))
    except UnidentifiedImageError:
        raise CorruptImage("no known image format") from None
    except Exception as error:
        # Pillow's decoders raise OSError, SyntaxError, ValueError, struct.error and more.
        raise CorruptImage(f"{type(error).__name__}: {error}") from None


def _wrap(pixels: np.ndarray) -> Image.Image:
    return Image.fromarray(pixels[..., 0] if pixels.shape[-1:] == (1,) else pixels)


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):
        # 16-bit greyscale; convert() would clip all above 255 to white.
        pixels = np.asarray(image).astype(np.int64)
        return Image.fromarray((pixels >> 8).clip(0, 255).astype(np.uint8)).convert("RGB")
    if image.mode == "F":
        raise ValueError("floating-point images have no known range")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")


def shrink(image: Image.Image, canvas: CanvasConfig) -> Pixels:
    """The image at the size at which it lies on the canvas: shrunk, never enlarged.

    Antialiased (Pillow's bilinear), since this stands for the stored size of a data set; the views
    sample from it without antialiasing, as the recipe does from stored images.
    """
    width, height = image.size
    side = min(width, height) if canvas.fit == "short" else max(width, height)
    scale = min(1.0, canvas.size / side, canvas.side / max(width, height))
    if scale < 1:
        new_size = max(1, round(width * scale)), max(1, round(height * scale))
        image = image.resize(new_size, Image.Resampling.BILINEAR)
    return np.asarray(image)


def on_canvas(pixels: Pixels, side: int) -> UInt8[np.ndarray, "side side 3"]:
    """`pixels` in the top left corner of a black square."""
    canvas = np.zeros((side, side, 3), np.uint8)
    canvas[: pixels.shape[0], : pixels.shape[1]] = pixels
    return canvas
