"""What is seen: data sets, canvases, views."""

import dataclasses
from typing import Annotated, Literal

from fm_distill.config.bounds import Bounds, Positive, PositiveInt, Share


@dataclasses.dataclass(frozen=True, kw_only=True)
class SplitConfig:
    """One of the splits `train`, `validation` and `test`, as the data set itself names it."""

    name: str
    """The data set's own name of the split, e.g. `train[:90%]`; for folders, the sub-folder."""
    examples: PositiveInt | None = None
    (
        "Number of examples of the split, for what is computed before the data are there; checked "
        "against them, after `data.long_tail`."
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class TransferConfig:
    """Images to distil on that need not show the teacher's classes; their labels are not used."""

    source: str
    """Where these images come from: `tfds`, `class_folders`, `images` or `digits`."""
    name: str = ""
    """Name of the TFDS data set of these images; unused by the other sources."""
    data_dir: str = ""
    """Where these images are: TFDS's `data_dir`, or their folder."""
    split: str = "train"
    """The split of these images, as their data set names it; for folders, the sub-folder."""
    examples: PositiveInt | None = None
    """Number of these images, for what is computed before they are there; checked against them."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class CanvasConfig:
    """The fixed uint8 square on which each image lies, in its own aspect ratio."""

    size: PositiveInt
    """Size in pixels of the side that `fit` selects. Images are shrunk to it, never enlarged."""
    fit: Literal["short", "long"] = "short"
    (
        "Which side of an image becomes `size` pixels: `short` keeps more of them, `long` needs "
        "less memory."
    )
    max_aspect: Annotated[float, Bounds(least=1)] = 1.5
    """With `fit=short`, the canvas is `size * max_aspect` wide and high; longer images shrink."""

    @property
    def side(self) -> int:
        """Height and width of the canvas in pixels."""
        return self.size if self.fit == "long" else round(self.size * self.max_aspect)


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig:
    """The data set with its splits, and how it reaches the devices."""

    source: str
    (
        "Where the images come from: `tfds`, `class_folders`, `images` (no labels) or `digits`; or "
        "a custom source as FILE.py:NAME."
    )
    name: str = ""
    """Name of the TFDS data set, e.g. `oxford_flowers102`; unused by the other sources."""
    data_dir: str = ""
    """Where the data are: TFDS's `data_dir`, or the folder of images."""
    train: SplitConfig
    """The split that is trained on."""
    transfer: tuple[TransferConfig, ...] = ()
    (
        "What is distilled on instead of `train`: other images, or a mixture that lists this data "
        "set too."
    )
    long_tail: Annotated[float, Bounds(least=1)] | None = None
    (
        "Imbalance factor of a long tail to which `train` is thinned: examples of the largest "
        "class over those of the smallest; they fall exponentially with the index of the class. "
        "None: as it is."
    )
    validation: SplitConfig | None = None
    """The split that is evaluated while training; None for no such evaluation."""
    test: SplitConfig | None = None
    """The split that a complete run is evaluated on; None takes validation, or else train."""
    classes: Annotated[int, Bounds(least=2)] | None = None
    """Number of classes of the labels; None takes it from the data, or from the teacher."""
    class_names: str | None = None
    (
        "Names of the classes where the images have no labels: a text file with one name per "
        "line, or `imagenet` for the 1,000 of ILSVRC 2012 in their usual order."
    )
    canvas: CanvasConfig
    feeding: Literal["auto", "resident", "streaming"] = "auto"
    (
        "How images reach the devices: `resident` keeps decoded canvases in their memory, "
        "`streaming` reads them as they are needed, `auto` chooses by size."
    )
    resident_share: Share = 0.25
    """Largest share of the memory that canvases may need for `feeding=auto` to keep them there."""
    workers: Annotated[int, Bounds(least=0, most=512)] = 0
    """Reader processes of streaming; 0 reads in threads of this process."""
    corrupt: Literal["stop", "skip"] = "stop"
    """Whether a corrupt image stops the run, or is skipped and counted."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class FourierConfig:
    """Fourier domain adaptation: training views with the low frequencies of target images."""

    folder: str | None = None
    """Folder of the target images, including its sub-folders; None: views stay as they are."""
    beta: Annotated[float, Bounds(above=0, most=0.5)] = 0.01
    (
        "Half the width of the square of low frequencies whose amplitudes are replaced by the "
        "target's, as a fraction of each network's resolution, rounded down to pixels; 0 pixels "
        "are the mean of each channel alone."
    )
    probability: Annotated[float, Bounds(above=0, most=1)] = 1.0
    """Probability that a view is adapted."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ViewConfig:
    """What is drawn for each image of each step, and the central view of evaluation."""

    crop: str = "tensorflow"
    (
        "Distribution of the random crop: `tensorflow` (Inception's), `torchvision` or `whole`; or "
        "a custom one as FILE.py:NAME."
    )
    crop_area: tuple[float, float] = (0.05, 1.0)
    """Smallest and largest share of the image's area that a crop covers."""
    smallest_area_points: tuple[tuple[int, float], ...] = ()
    (
        "Schedule of the smallest area of a crop: pairs of a step and an area, linear in between, "
        "e.g. [[0,0.5],[9000,0.05]]."
    )
    crop_aspect: tuple[float, float] = (0.75, 1.33)
    """Smallest and largest width / height of a crop."""
    resolution_points: tuple[tuple[int, float], ...] = ()
    (
        "Schedule of the resolution of crops: pairs of a step and pixels a side, linear in "
        "between, to which crops are reduced before they are enlarged for each network; a "
        "network of no more pixels than that sees them as they are."
    )
    flip_probability: Share = 0.5
    """Probability that a view is mirrored."""
    mixup: Literal["batch", "example", "none"] = "batch"
    """Mixup: one coefficient per batch (the recipe), one per example, or none."""
    mixup_alpha: Positive = 1.0
    """The mixup coefficient is drawn from Beta(alpha, alpha)."""
    mixup_strength_points: tuple[tuple[int, float], ...] = ()
    (
        "Over the run: pairs of a step and the strength of mixup there, from 0 (the example "
        "alone) to 1 (as drawn), linear in between."
    )
    mixup_fold: bool = True
    """Whether a mixup coefficient a becomes max(a, 1 - a)."""
    mixup_partner: Literal["roll", "permutation"] = "roll"
    ("Which example i is mixed with: `roll` takes i - 1 (the recipe), `permutation` a random one.")
    fourier: FourierConfig = FourierConfig()
    period_steps: PositiveInt | None = None
    (
        "Steps after which order and views repeat, so that each image has a limited number of "
        "different views; None: never, or where the recording of the teacher ends."
    )
    central_fraction: Annotated[float, Bounds(least=0.01, most=1)] = 0.875
    """Evaluation: side of the central crop over the image's short side (0.8 is 128 of 160)."""
    central_resize: Literal["bilinear", "area"] = "bilinear"
    (
        "Evaluation: how the image is resized; `area` takes the mean of the pixels that a new one "
        "covers, as the released evaluation does."
    )
