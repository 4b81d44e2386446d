"""The splits of a run, opened."""

import dataclasses

import numpy as np

from fm_distill.config import Config, SplitConfig
from fm_distill.config.choices import check_choice
from fm_distill.config.objective import BY_CLASS
from fm_distill.config.resolved import DataFacts
from fm_distill.config.steps import transfer_examples
from fm_distill.data.labels import every_class, known_labels
from fm_distill.data.sources import Source, open_source
from fm_distill.data.target_images import open_targets
from fm_distill.data.transfer import open_own, open_training
from fm_distill.errors import UserError


@dataclasses.dataclass(frozen=True)
class Data:
    """The opened splits of a run."""

    train: Source
    validation: Source | None
    test: Source | None
    # Training examples of each class; None where they are not known.
    class_counts: tuple[int, ...] | None = None
    # SHA-256 of the target images of `views.fourier`; None where there are none.
    target_images: str | None = None

    @property
    def final(self) -> tuple[str, Source]:
        """The split that a complete run is evaluated on."""
        for name, source in (("test", self.test), ("validation", self.validation)):
            if source is not None:
                return name, source
        return "train", self.train

    @property
    def facts(self) -> DataFacts:
        """What the run depends on of its training data."""
        train = self.train
        return DataFacts(train.identity, len(train), self.class_counts, self.target_images)


def open_data(config: Config) -> tuple[Data, list[str]]:
    """All splits that the experiment names, and notes on them. Raises `UserError`."""

    def opened(split: SplitConfig | None) -> Source | None:
        return None if split is None else open_source(config.data, split.name)

    data = config.data
    train = open_training(data)
    warnings = []
    if (configured := transfer_examples(data)) is not None and configured != len(train):
        option = "data.transfer.examples" if data.transfer else "data.train.examples"
        warnings.append(
            f"WARNING: {option} is {configured:,}, but {train.identity} has {len(train):,}; the "
            "run's length follows the data"
        )
    counts = class_counts(config, train)
    if data.long_tail is not None and counts:
        warnings.append(
            f"data.long_tail={data.long_tail:g} leaves {len(train):,} examples: {max(counts):,} of "
            f"the largest class, {min(counts):,} of the smallest"
        )
    targets = open_targets(config.views.fourier)
    digest = None if targets is None else targets.digest
    return Data(train, opened(data.validation), opened(data.test), counts, digest), warnings


def class_counts(config: Config, train: Source) -> tuple[int, ...] | None:
    """The examples of each class of the training split. Raises `UserError` where a class has none.

    None where no weights need them and all images would have to be read.
    """
    kind = config.objective.example_weights.kind
    if kind in BY_CLASS:
        labels = every_class(train, f"objective.example_weights.kind={kind}")
    elif (available_labels := known_labels(train)) is not None and train.classes:
        labels = available_labels
    else:
        return None
    return tuple(map(int, np.bincount(labels, minlength=train.classes or 0)))


def open_named(config: Config, split: str) -> Source:
    """`split` of the own data set, as the run sees it. Raises `UserError`."""
    split_config = split_of(config, split)
    return (
        open_own(config.data) if split == "train" else open_source(config.data, split_config.name)
    )


def split_of(config: Config, split: str) -> SplitConfig:
    """The data set's own name of `split`; raises `UserError` where the experiment has none."""
    splits: dict[str, SplitConfig | None] = {
        "train": config.data.train,
        "validation": config.data.validation,
        "test": config.data.test,
    }
    check_choice("split", split, splits)
    split_config = splits[split]
    if split_config is None:
        available = ", ".join(name for name, value in splits.items() if value)
        raise UserError(f"this experiment has no {split} split; it has {available}")
    return split_config
