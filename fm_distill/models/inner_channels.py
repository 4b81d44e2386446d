"""Channels inside of a block that nothing outside of it reads: a network can have fewer."""

import dataclasses

from fm_distill.config import NetworkConfig

# An array by its path, `params/block1_unit01/a/kernel`, and the axis that runs over the channels:
# -1 of a kernel that makes them, -2 of one that reads them.
ChannelAxis = tuple[str, int]


@dataclasses.dataclass(frozen=True)
class InnerChannels:
    """Those of one block."""

    block: str  # the module
    width: int
    # Channels that stay or go together: those of a group of its GroupNorms.
    together: int
    # Arrays over the same channels, for each place in the block that has `width` channels.
    places: tuple[tuple[ChannelAxis, ...], ...]


def channel_axes(
    block: str,
    makes: tuple[str, ...],
    norms: tuple[str, ...],
    reads: tuple[str, ...],
    biases: tuple[str, ...] = (),
    batch_norm: bool = False,
) -> tuple[ChannelAxis, ...]:
    """Of the layers of `block` that make, normalise and read the same channels.

    `biases` are the layers of `makes` with a bias. Norms of a `batch_norm` have statistics.
    """
    leaves = [("params", "scale"), ("params", "bias")]
    leaves += [("statistics", "mean"), ("statistics", "var")] if batch_norm else []
    return (
        *((f"params/{block}/{x}/kernel", -1) for x in makes),
        *((f"params/{block}/{x}/bias", -1) for x in biases),
        *(
            (f"{collection}/{block}/{norm}/{leaf}", -1)
            for norm in norms
            for collection, leaf in leaves
        ),
        *((f"params/{block}/{x}/kernel", -2) for x in reads),
    )


def narrowed(blocks: tuple[InnerChannels, ...], config: NetworkConfig) -> tuple[InnerChannels, ...]:
    """`blocks` as published, with the widths of `config` where it has any.

    Raises `ValueError` where these are not such a network's.
    """
    widths = config.block_widths
    if not widths:
        return blocks
    if len(widths) != len(blocks):
        raise ValueError(
            f"block_widths has {len(widths)} numbers, and {config.model} as configured has "
            f"{len(blocks)} blocks with inner channels: give one for each, or none"
        )
    for block, width in zip(blocks, widths, strict=True):
        if width % block.together:
            raise ValueError(
                f"block_widths has {width} channels for {block.block}, whose GroupNorm has groups "
                f"of {block.together}; use a multiple of that"
            )
    return tuple(
        dataclasses.replace(block, width=width) for block, width in zip(blocks, widths, strict=True)
    )
