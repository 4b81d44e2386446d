"""The published ViTs by timm's names. Source: timm/models/vision_transformer.py and deit.py."""

import dataclasses

# Channels, blocks, heads.
SIZES = {
    "tiny": (192, 12, 3),
    "wee": (256, 14, 4),
    "little": (320, 14, 5),
    "small": (384, 12, 6),
    "medium": (512, 12, 8),
    "betwixt": (640, 12, 10),
    "base": (768, 12, 12),
    "large": (1024, 24, 16),
}


@dataclasses.dataclass(frozen=True)
class Design:
    """A whole network but for its head."""

    channels: int
    depth: int
    heads: int
    patch: int
    # Of the weights: the positions have its grid.
    resolution: int
    class_token: bool = True
    distilled: bool = False
    registers: int = 0
    # Whether only patches have positions (timm: no_embed_class).
    bare_prefix: bool = False
    # Where the layer scale starts; None: there is none.
    layer_scale: float | None = None
    # Whether the head reads the mean of the patches instead of the class token.
    mean_pooled: bool = False
    mlp_ratio: float = 4.0

    @property
    def tokens(self) -> tuple[tuple[str, int], ...]:
        """What stands before the patches: timm's name of the parameter, and how many tokens."""
        counts = (
            ("cls_token", int(self.class_token)),
            ("dist_token", int(self.distilled)),
            ("reg_token", self.registers),
        )
        return tuple((name, count) for name, count in counts if count)

    @property
    def prefix(self) -> int:
        """How many tokens stand before the patches."""
        return sum(count for _, count in self.tokens)


def _mean_pooled(size: str, registers: int, mlp_ratio: float = 4.0) -> Design:
    """Small ViTs by timm's author, which have registers and no class token."""
    return Design(
        *SIZES[size],
        patch=16,
        resolution=256,
        class_token=False,
        registers=registers,
        bare_prefix=True,
        layer_scale=1e-5,
        mean_pooled=True,
        mlp_ratio=mlp_ratio,
    )


def _dinov2(size: str, registers: int = 0) -> Design:
    return Design(
        *SIZES[size],
        patch=14,
        resolution=518,
        registers=registers,
        bare_prefix=registers > 0,
        layer_scale=1e-5,
    )


# Those that are fed [-1, 1].
AUGREG = {
    "vit_tiny_patch16_224": Design(*SIZES["tiny"], 16, 224),
    "vit_tiny_patch16_384": Design(*SIZES["tiny"], 16, 384),
    "vit_small_patch16_224": Design(*SIZES["small"], 16, 224),
    "vit_small_patch16_384": Design(*SIZES["small"], 16, 384),
    "vit_base_patch16_224": Design(*SIZES["base"], 16, 224),
    "vit_base_patch16_384": Design(*SIZES["base"], 16, 384),
    "vit_large_patch14_224": Design(*SIZES["large"], 14, 224),
    "vit_large_patch16_224": Design(*SIZES["large"], 16, 224),
    "vit_large_patch16_384": Design(*SIZES["large"], 16, 384),
    "vit_wee_patch16_reg1_gap_256": _mean_pooled("wee", 1, mlp_ratio=5.0),
    "vit_little_patch16_reg4_gap_256": _mean_pooled("little", 4, mlp_ratio=5.6),
    "vit_medium_patch16_reg4_gap_256": _mean_pooled("medium", 4),
    "vit_betwixt_patch16_reg4_gap_256": _mean_pooled("betwixt", 4),
}

# Those that are fed ImageNet's mean and deviation: DeiT and DINOv2.
FACEBOOK = {
    "deit_tiny_patch16_224": Design(*SIZES["tiny"], 16, 224),
    "deit_small_patch16_224": Design(*SIZES["small"], 16, 224),
    "deit_base_patch16_224": Design(*SIZES["base"], 16, 224),
    "deit_base_patch16_384": Design(*SIZES["base"], 16, 384),
    "deit_tiny_distilled_patch16_224": Design(*SIZES["tiny"], 16, 224, distilled=True),
    "deit_small_distilled_patch16_224": Design(*SIZES["small"], 16, 224, distilled=True),
    "deit_base_distilled_patch16_224": Design(*SIZES["base"], 16, 224, distilled=True),
    "deit_base_distilled_patch16_384": Design(*SIZES["base"], 16, 384, distilled=True),
    "vit_small_patch14_dinov2": _dinov2("small"),
    "vit_base_patch14_dinov2": _dinov2("base"),
    "vit_large_patch14_dinov2": _dinov2("large"),
    "vit_small_patch14_reg4_dinov2": _dinov2("small", 4),
    "vit_base_patch14_reg4_dinov2": _dinov2("base", 4),
    "vit_large_patch14_reg4_dinov2": _dinov2("large", 4),
}
