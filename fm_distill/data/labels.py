"""The labels of a whole split, for what has to count them before the training begins."""

import dataclasses

import grain
import numpy as np
from jaxtyping import Int64

from fm_distill.data.feeding import read_ahead
from fm_distill.data.sources import Digits, Files, Raw, Source
from fm_distill.errors import UserError
from fm_distill.system.console import progress

Labels = Int64[np.ndarray, " examples"]


@dataclasses.dataclass(frozen=True)
class Selected:
    """Some examples of a split, with their labels."""

    source: Source
    examples: Int64[np.ndarray, " examples"]
    labels: Labels
    identity: str
    classes: int | None
    class_names: tuple[str, ...] | None

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int) -> Raw:
        return self.source[int(self.examples[index])]


def known_labels(source: Source) -> Labels | None:
    """The labels of a source that has them in memory; None where its images would be read."""
    if isinstance(source, Digits | Files | Selected) and source.labels is not None:
        return np.asarray(source.labels, np.int64)
    return None


@dataclasses.dataclass(frozen=True)
class _Reading:
    """The labels of a source, one at a time."""

    source: Source

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> np.int64:
        return np.int64(self.source[index].label)


def refuse_unlabelled(source: Source) -> None:
    """Raises `UserError` where the examples of `source` have no labels, for an objective on them.

    For a source whose labels are read with its images, the first example is checked.
    """
    if source.classes is None:
        missing = "no labels"
    else:
        labels = known_labels(source)
        if labels is None:
            labels = np.array([source[0].label])
        unlabelled = np.flatnonzero(labels < 0)
        if not unlabelled.size:
            return
        missing = f"none for example {unlabelled[0]}"
    raise UserError(
        f"the objective needs the label of each training image, and {source.identity} has "
        f"{missing}; use labelled images, or terms that read only the teacher "
        "(objective.target=teacher)"
    )


def every_class(source: Source, wanted: str) -> Labels:
    """The label of each example, read if need be, where each class has one.

    Raises `UserError` where it has none, or an image no label; `wanted` is the option in need.
    """
    classes = source.classes
    if classes is None:
        raise UserError(
            f"{wanted} needs the labels of the training images, and {source.identity} has none; "
            "leave it out, or use labelled images"
        )
    labels = known_labels(source)
    if labels is None:
        items = read_ahead(grain.MapDataset.source(_Reading(source)), 0)
        labels = np.fromiter(progress(items, "reading labels", "images", len(source)), np.int64)
    invalid = np.flatnonzero((labels < 0) | (labels >= classes))
    if invalid.size:
        raise UserError(
            f"{wanted} needs the label of each training image, and {source.identity}[{invalid[0]}] "
            f"has {labels[invalid[0]]}; expected 0 to {classes - 1}: fix the data, or leave it out"
        )
    missing = np.flatnonzero(np.bincount(labels, minlength=classes) == 0)
    if missing.size:
        class_names = source.class_names
        name = f" ({class_names[missing[0]]})" if class_names else ""
        raise UserError(
            f"{wanted} needs examples of each class, and {source.identity} has none of "
            f"{missing.size} of {classes} classes, the first of them {missing[0]}{name}; leave it "
            "out, or use data with all classes"
        )
    return labels
