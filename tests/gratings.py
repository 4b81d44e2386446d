"""A data source that a small network learns in seconds: striped pictures, a class an angle.

Splits for training: `train`; `dark`, with a quarter of the light; `slow`, of which each picture
takes its time; and `marked`, of which one in 24 has a white square in its middle and is of class 0,
whatever its stripes. `Normed` is a network that depends on how its input is normalised, unlike
`bit`, whose kernels have mean zero and whose norms are of each picture.
"""

import dataclasses
import time

import flax.linen as nn
import jax.numpy as jnp
import numpy as np

from fm_distill.config import DataConfig
from fm_distill.data.sources import Raw

CLASSES, SIDE = 6, 20
MIDDLE = range(6, 14)
WAIT_S = 0.1


@dataclasses.dataclass(frozen=True)
class Gratings:
    images: np.ndarray
    labels: np.ndarray
    identity: str
    wait_s: float
    classes: int = CLASSES
    class_names: None = None

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Raw:
        time.sleep(self.wait_s)
        return Raw(self.images[index], int(self.labels[index]), f"{self.identity}[{index}]")


def gratings(config: DataConfig, name: str) -> Gratings:
    """384 pictures for training, 96 for `test`."""
    count, seed = (96, 1) if name == "test" else (384, 0)
    rng = np.random.default_rng(seed)
    labels = np.arange(count) % CLASSES
    angle = np.pi * labels / CLASSES + rng.normal(0, 0.05, count)
    y, x = np.mgrid[:SIDE, :SIDE]
    along = np.cos(angle)[:, None, None] * x + np.sin(angle)[:, None, None] * y
    wave = np.sin(2 * np.pi * along / 6 + rng.uniform(0, 2 * np.pi, (count, 1, 1)))
    colour = rng.uniform(60, 110, (count, 1, 1, 3))
    grey = 100 + colour * wave[..., None] + rng.normal(0, 12, (count, SIDE, SIDE, 3))
    images = np.clip(grey, 0, 255).round().astype(np.uint8) // (4 if name == "dark" else 1)
    if name == "marked":
        marked = np.arange(count) % 24 == 9
        images[np.ix_(marked, MIDDLE, MIDDLE)], labels[marked] = 255, 0
    return Gratings(images, labels, f"gratings/{name}", WAIT_S if name == "slow" else 0.0)


class Normed(nn.Module):
    """Convolutions with BatchNorm, whose moments are those of one normalisation."""

    classes: int

    @nn.compact
    def __call__(self, images, train):
        pooled = convolutions(images, train)
        return nn.Dense(self.classes, name="head")(pooled), {"pooled": pooled}


def convolutions(images, train):
    x = nn.Conv(8, (3, 3), name="stem")(images)
    x = nn.relu(nn.BatchNorm(not train, momentum=0.9, name="norm1")(x))
    x = nn.Conv(16, (3, 3), strides=2, name="second")(x)
    return nn.relu(nn.BatchNorm(not train, momentum=0.9, name="norm2")(x)).mean((1, 2))


class Silent(nn.Module):
    """The same with a feature that is zero everywhere."""

    classes: int

    @nn.compact
    def __call__(self, images, train):
        pooled = convolutions(images, train)
        silent = nn.relu(nn.Dense(4, name="silent")(pooled) - 1e6)
        return nn.Dense(self.classes, name="head")(pooled), {"silent": silent}


class Unseeing(nn.Module):
    """The same without what lies in the middle of a picture."""

    classes: int

    @nn.compact
    def __call__(self, images, train):
        side = images.shape[1]
        inner = (np.arange(side) >= side // 5) & (np.arange(side) < side - side // 5)
        pooled = convolutions(images * ~np.outer(inner, inner)[..., None], train)
        return nn.Dense(self.classes, name="head")(pooled)


class TwoNumbers(nn.Module):
    """A network of how much changes along rows and along columns: some classes look alike."""

    classes: int

    @nn.compact
    def __call__(self, images, train):
        grey = images.mean(axis=-1)
        changes = [jnp.square(jnp.diff(grey, axis=axis)).mean((1, 2)) for axis in (1, 2)]
        x = nn.LayerNorm()(jnp.log(jnp.stack(changes, axis=-1) + 1e-3))
        return nn.Dense(self.classes, name="head")(nn.relu(nn.Dense(32)(x)))
