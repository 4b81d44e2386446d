"""Weights and pictures from a formula, for timm's models and ours: functions of timm's names.

Imports neither of them, so that the tool that asks timm can use it too.
"""

import zlib
from typing import NamedTuple

import numpy as np

CLASSES = 6

# Models of ours that have timm's names; their published sizes are recorded.
COUNTED = (
    *("resnet18", "resnet34", "resnet50", "resnet50d", "resnet101"),
    *(
        f"vit_{size}_patch16_{resolution}"
        for size in ("tiny", "small", "base", "large")
        for resolution in (224, 384)
    ),
    "vit_large_patch14_224",
    "vit_wee_patch16_reg1_gap_256",
    *(f"vit_{size}_patch16_reg4_gap_256" for size in ("little", "medium", "betwixt")),
    *(
        f"deit_{size}{distilled}_patch16_224"
        for size in ("tiny", "small", "base")
        for distilled in ("", "_distilled")
    ),
    *("deit_base_patch16_384", "deit_base_distilled_patch16_384"),
    *(
        f"convnext{version}_{size}"
        for size in ("atto", "femto", "pico", "nano", "tiny", "small", "base", "large")
        for version in ("", "v2")
    ),
    *(
        f"vit_{size}_patch14{registers}_dinov2"
        for size in ("small", "base", "large")
        for registers in ("", "_reg4")
    ),
)


class Case(NamedTuple):
    """One model of timm's at one resolution."""

    model: str
    resolution: int

    @property
    def key(self) -> str:
        return f"{self.model}_at_{self.resolution}"


CASES = (
    Case("resnet18", 64),
    Case("resnet50", 64),
    # Odd pictures inside: 91, 46, 23, 12, 6, 3.
    Case("resnet50d", 91),
    Case("vit_tiny_patch16_224", 224),
    # Positions for 6x6 patches from 14x14, and for 4x4 from 37x37.
    Case("vit_tiny_patch16_224", 96),
    Case("deit_tiny_distilled_patch16_224", 96),
    Case("vit_small_patch14_dinov2", 56),
    Case("vit_small_patch14_reg4_dinov2", 56),
    # From 16x16 to 20x20.
    Case("vit_wee_patch16_reg1_gap_256", 320),
    Case("vit_little_patch16_reg4_gap_256", 64),
    Case("convnext_atto", 64),
    Case("convnext_tiny", 64),
    # Of 103 pixels the last three, and of 25 the last one, are in no patch.
    Case("convnextv2_atto", 103),
    Case("convnextv2_tiny", 64),
)


def tensor_of(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """The tensor that timm calls `name`."""
    z = np.random.default_rng(zlib.crc32(name.encode())).standard_normal(shape)
    leaf = name.split(".")[-1]
    if leaf == "weight" and len(shape) > 1:
        z = z * np.sqrt(1.0 / np.prod(shape[1:]))
    elif leaf == "weight":
        z = 1 + 0.1 * z
    elif leaf == "running_var":
        z = np.exp(0.3 * z)
    elif leaf == "gamma":
        z = 0.5 + 0.1 * z
    elif leaf in ("bias", "running_mean"):
        z = 0.1 * z
    else:
        # Tokens and positions.
        z = 0.5 * z
    return z.astype(np.float32)


def pictures(resolution: int) -> np.ndarray:
    """Two pictures, of noise and of coloured waves: rows, columns and channels differ."""
    rng = np.random.default_rng(2106_05237)
    noise = rng.uniform(-1, 1, (resolution, resolution, 3))
    y, x = np.mgrid[:resolution, :resolution][..., None] / resolution
    waves = np.sin(3 * x + 2 * np.arange(3)) * np.cos(7 * y + np.arange(3)) + 0.1 * noise
    return np.stack([noise, waves]).astype(np.float32)
