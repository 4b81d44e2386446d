"""Who sees it: student and teachers."""

import dataclasses
from typing import Literal

InputRange = Literal["auto", "minus_one_one", "zero_one", "imagenet"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class NetworkConfig:
    """A network and the picture that it wants to see."""

    # A key of `models.MODELS`.
    model: str
    # Height and width of its input in pixels.
    resolution: int
    # Of its input; `auto`: as its weights were trained, else as the model's published ones were.
    input_range: InputRange = "auto"
    # Units a block, of the model `bit`; the named members of the family fix this and the next four.
    depths: tuple[int, ...] = ()
    # Multiplies the 64 channels of the root.
    width: float = 1.0
    # `imagenet`: 7x7 and a pool, together stride 4; `small`: 3x3 with stride 1.
    stem: Literal["imagenet", "small"] = "imagenet"
    # GroupNorm with weight standardisation, or BatchNorm without.
    norm: Literal["group", "batch"] = "group"
    # Groups of the GroupNorm; has to divide the root's channels.
    groups: int = 32
    # Of BiT. Zero as in its files and timm, or minus infinity as in the released trainer; `auto`:
    # by the naming of the weights, zero without.
    root_pool_padding: Literal["auto", "zero", "minus_infinity"] = "auto"


@dataclasses.dataclass(frozen=True, kw_only=True)
class StudentConfig(NetworkConfig):
    """The network that is trained."""

    # What it starts from, as `teacher.weights`, with a new head for other classes; None: scratch.
    weights: str | None = None
    # BatchNorm keeps the statistics of its weights: for fine-tuning where a batch says little.
    keep_statistics: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class TeacherConfig:
    """Where the frozen teacher comes from: weights, or a run."""

    # A file, `hf://OWNER/REPO`, a SavedModel, or a run's workdir: see the README's table.
    weights: str | None = None
    # The network in `weights`, where they do not say it themselves.
    network: NetworkConfig | None = None
    # An experiment file: the teacher is trained first.
    experiment: str | None = None
    # The teacher's run; None is `WORKDIR/teacher`. Alone, it names a complete run.
    workdir: str | None = None
