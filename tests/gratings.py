"""A data source that a small network learns in seconds: striped pictures, a class an angle.

In the split `foreign` one picture in forty is noise.
"""

import dataclasses

import numpy as np

from fm_distill.config import DataConfig
from fm_distill.data.sources import Raw

CLASSES, SIDE = 6, 20
FOREIGN = 40


@dataclasses.dataclass(frozen=True)
class Gratings:
    images: np.ndarray
    labels: np.ndarray
    identity: str
    classes: int = CLASSES
    class_names: None = None

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Raw:
        return Raw(self.images[index], int(self.labels[index]), f"{self.identity}[{index}]")


def gratings(config: DataConfig, name: str) -> Gratings:
    """384 pictures for training, 96 for anything else."""
    training = name in ("train", "foreign")
    count = 384 if training else 96
    rng = np.random.default_rng(0 if training else 1)
    labels = np.arange(count) % CLASSES
    angle = np.pi * labels / CLASSES + rng.normal(0, 0.05, count)
    y, x = np.mgrid[:SIDE, :SIDE]
    along = np.cos(angle)[:, None, None] * x + np.sin(angle)[:, None, None] * y
    phase = rng.uniform(0, 2 * np.pi, (count, 1, 1))
    wave = np.sin(2 * np.pi * along / 6 + phase)
    colour = rng.uniform(60, 110, (count, 1, 1, 3))
    grey = 100 + colour * wave[..., None] + rng.normal(0, 12, (count, SIDE, SIDE, 3))
    if name == "foreign":
        grey[::FOREIGN] = 255 * rng.integers(0, 2, grey[::FOREIGN].shape)
    images = np.clip(grey, 0, 255).round().astype(np.uint8)
    return Gratings(images, labels, f"gratings/{name}")
