"""What a student is distilled on: the own training split, other images, or a mixture of sets.

Source: Beyer et al. 2021, section 3.8 (out-of-domain data).
"""

import dataclasses

from fm_distill.config import DataConfig
from fm_distill.data.long_tail import long_tailed
from fm_distill.data.sources import UNLABELLED, Raw, Source, open_source


@dataclasses.dataclass(frozen=True)
class Joined:
    """Sets one after the other, as images without labels; the classes are those of the own set."""

    parts: tuple[Source, ...]
    classes: int | None
    class_names: tuple[str, ...] | None

    @property
    def identity(self) -> str:
        return " + ".join(part.identity for part in self.parts)

    def __len__(self) -> int:
        return sum(len(part) for part in self.parts)

    def __getitem__(self, index: int) -> Raw:
        for part in self.parts:
            if index < len(part):
                return part[index]._replace(label=UNLABELLED)
            index -= len(part)
        raise IndexError(index)


def open_own(config: DataConfig) -> Source:
    """The own training split, thinned where `long_tail` says so. Raises `UserError`."""
    own_source = open_source(config, config.train.name)
    return own_source if config.long_tail is None else long_tailed(own_source, config.long_tail)


def open_training(config: DataConfig) -> Source:
    """What is trained on: the own training split, or what `transfer` names. Raises `UserError`."""
    own_source = open_own(config)
    if not config.transfer:
        return own_source
    parts = tuple(
        open_source(
            dataclasses.replace(
                config, source=x.source, name=x.name, data_dir=x.data_dir, classes=None
            ),
            x.split,
        )
        for x in config.transfer
    )
    return Joined(parts, own_source.classes, own_source.class_names)
