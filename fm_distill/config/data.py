"""What is seen: data sets, canvases, views."""

import dataclasses
from typing import Literal


@dataclasses.dataclass(frozen=True, kw_only=True)
class SplitConfig:
    """One of the splits `train`, `validation` and `test`, as the data set itself names it."""

    # The data set's own name, e.g. `train[:90%]`; for folders, the sub-folder.
    name: str
    # For what is computed before the data are there; checked against them.
    examples: int | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class TransferConfig:
    """Images to distil on that need not show the teacher's classes; their labels are not used."""

    # As in `DataConfig`; `examples` as in `SplitConfig`.
    source: str
    name: str = ""
    data_dir: str = ""
    split: str = "train"
    examples: int | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class CanvasConfig:
    """The fixed uint8 square on which each image lies, in its own aspect ratio."""

    # Pixels of the side that `fit` names. Images are shrunk to it, never enlarged.
    size: int
    # Which side of an image becomes `size`: `short` keeps more pixels, `long` needs less memory.
    fit: Literal["short", "long"] = "short"
    # With `short`, the canvas is `size * max_aspect` wide and high; longer images shrink to fit.
    max_aspect: float = 1.5

    @property
    def side(self) -> int:
        """Height and width of the canvas in pixels."""
        return self.size if self.fit == "long" else round(self.size * self.max_aspect)


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig:
    """The transfer set, and how it reaches the devices."""

    # A key of `data.sources.SOURCES`: `tfds`, `class_folders`, `images` or `digits`.
    source: str
    # Name of the TFDS data set, e.g. `oxford_flowers102`; unused by the other sources.
    name: str = ""
    # Where the data lie: TFDS's `data_dir`, or the folder of images.
    data_dir: str = ""
    # What is trained on.
    train: SplitConfig
    # What is distilled on instead: other images, or a mixture with the own set named among them.
    transfer: tuple[TransferConfig, ...] = ()
    # What is evaluated while training.
    validation: SplitConfig | None = None
    # What a complete run is judged on.
    test: SplitConfig | None = None
    # Number of classes of the labels; None takes it from the data, or from the teacher.
    classes: int | None = None
    # On what the images lie in memory.
    canvas: CanvasConfig
    # `resident`: decoded canvases in device memory; `streaming`: read as they are needed.
    feeding: Literal["auto", "resident", "streaming"] = "auto"
    # `auto` takes `resident` where the canvases need at most this share of the memory.
    resident_share: float = 0.25
    # Reader processes of `streaming`; 0 reads in threads of this process.
    workers: int = 0
    # A corrupt image stops the run, or is skipped and counted.
    corrupt: Literal["stop", "skip"] = "stop"


@dataclasses.dataclass(frozen=True, kw_only=True)
class ViewConfig:
    """What is drawn for each image of each step, and the central view of evaluation."""

    # Law of the crop: see `views.CROPS`.
    crop: str = "tensorflow"
    # Smallest and largest share of the image's area that a crop covers.
    crop_area: tuple[float, float] = (0.05, 1.0)
    # Smallest and largest width / height of a crop.
    crop_aspect: tuple[float, float] = (0.75, 1.33)
    # Probability of a mirrored view.
    flip_probability: float = 0.5
    # One mixup coefficient a batch (the recipe), one an example, or no mixup.
    mixup: Literal["batch", "example", "none"] = "batch"
    # The coefficient is Beta(alpha, alpha), folded to max(a, 1 - a) unless `mixup_fold` is off.
    mixup_alpha: float = 1.0
    mixup_fold: bool = True
    # Example i is mixed with example i - 1 (the recipe), or with a random partner.
    mixup_partner: Literal["roll", "permutation"] = "roll"
    # Evaluation: side of the central crop over the image's short side (0.8 is 128 of 160).
    central_fraction: float = 0.875
