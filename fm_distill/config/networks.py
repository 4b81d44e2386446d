"""The networks: student and teachers."""

import dataclasses
from collections.abc import Mapping
from typing import Annotated, Literal, TypeVar

from frozendict import frozendict

from fm_distill.config.bounds import Bounds, PositiveInt, Seed
from fm_distill.config.pruning import PruningConfig
from fm_distill.config.quantisation import QuantisationConfig

# The model of a teacher that is not a network of ours.
FUNCTION = "function"
InputRange = Literal["auto", "minus_one_one", "zero_one", "imagenet", "adapt"]
OptionValue = bool | int | float | str | tuple[bool | int | float | str, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class NetworkConfig:
    """A network and the form of its input."""

    model: str
    (
        "The architecture: `bit` (described by its options), "
        "`bit_r50x1`, `bit_r50x3`, `bit_r101x1`, `bit_r101x3`, `bit_r152x2`, `bit_r152x4`, "
        "`efficientnet_lite0`, `efficientnet_lite1`, `efficientnet_lite2`, `efficientnet_lite3`, "
        "`efficientnet_lite4`, `mobilenet_v3_large`, `mobilenet_v3_small`, "
        "`mobilenet_v3_large_gn`, `mobilenet_v3_small_gn`, `resnet50v2`, `resnet18`, `resnet34`, "
        "`resnet50`, `resnet50d`, `resnet101`, `vit_tiny_patch16_224`, `vit_tiny_patch16_384`, "
        "`vit_small_patch16_224`, `vit_small_patch16_384`, `vit_base_patch16_224`, "
        "`vit_base_patch16_384`, `vit_large_patch16_224`, `vit_large_patch16_384`, "
        "`vit_large_patch14_224`, `vit_wee_patch16_reg1_gap_256`, "
        "`vit_little_patch16_reg4_gap_256`, `vit_medium_patch16_reg4_gap_256`, "
        "`vit_betwixt_patch16_reg4_gap_256`, `deit_tiny_patch16_224`, "
        "`deit_tiny_distilled_patch16_224`, `deit_small_patch16_224`, "
        "`deit_small_distilled_patch16_224`, `deit_base_patch16_224`, "
        "`deit_base_distilled_patch16_224`, `deit_base_patch16_384`, "
        "`deit_base_distilled_patch16_384`, `convnext_atto`, `convnextv2_atto`, `convnext_femto`, "
        "`convnextv2_femto`, `convnext_pico`, `convnextv2_pico`, `convnext_nano`, "
        "`convnextv2_nano`, `convnext_tiny`, `convnextv2_tiny`, `convnext_small`, "
        "`convnextv2_small`, `convnext_base`, `convnextv2_base`, `convnext_large`, "
        "`convnextv2_large`, `vit_small_patch14_dinov2`, `vit_small_patch14_reg4_dinov2`, "
        "`vit_base_patch14_dinov2`, `vit_base_patch14_reg4_dinov2`, `vit_large_patch14_dinov2` or "
        "`vit_large_patch14_reg4_dinov2`; for a teacher that is a function, `function`; "
        "or a custom network, as FILE.py:NAME or package.module:name."
    )
    resolution: PositiveInt
    """Height and width of the network's input in pixels."""
    input_range: InputRange = "auto"
    (
        "Normalisation of the input; `auto`: as the weights were trained, else as the model's "
        "published ones were; `adapt` (student only): by mean and deviation of each channel over "
        "the training images, computed once and stored with the run."
    )
    input_mean: tuple[float, ...] = ()
    (
        "With `input_range=adapt`, the mean of red, green and blue in grey levels, 0 to 255; "
        "empty: that of the weights' run, else of the training images."
    )
    input_deviation: tuple[float, ...] = ()
    ("With `input_range=adapt`, the standard deviations that go with `input_mean`, in grey levels.")
    input_rounding: Literal["none", "uint8"] = "none"
    (
        "Whether a resized image is rounded to whole grey levels before it is mixed and "
        "normalised, as by a pipeline that stores 8-bit images (`uint8`)."
    )
    options: Mapping[str, OptionValue] = frozendict()
    (
        "Settings that only this model has, each set as `--student.options.NAME VALUE`: of `bit` "
        "`depths` (e.g. 3 4 6 3), `width`, `stem`, `norm` and `groups`; of every BiT "
        "`root_pool_padding`; of a custom network the fields of its module."
    )
    block_widths: tuple[PositiveInt, ...] = ()
    (
        "Inner channels of each block (in a ViT, hidden units of each MLP), as `student.pruning` "
        "leaves them; empty: those of the weights, else as published."
    )
    quantisation: QuantisationConfig = QuantisationConfig()

    def __post_init__(self) -> None:
        # Lists of JSON and of the command line would not be equal to an experiment's tuples.
        values = {
            name: tuple(value) if isinstance(value, list) else value
            for name, value in self.options.items()
        }
        object.__setattr__(self, "options", frozendict(values))


@dataclasses.dataclass(frozen=True, kw_only=True)
class StudentConfig(NetworkConfig):
    """The network that is trained."""

    weights: str | None = None
    (
        "What the student starts from, in any form that `teacher.weights` takes, with a new head "
        "for other classes; None: from scratch."
    )
    seed: Seed | None = None
    (
        "Seed of the initial weights alone; None: the run's `seed`, which also draws the order and "
        "the views."
    )
    keep_statistics: bool = False
    (
        "Whether BatchNorm keeps the statistics of the student's weights: for fine-tuning where a "
        "batch is too small for statistics."
    )
    final_statistics: Literal["kept", "central"] = "kept"
    (
        "BatchNorm's statistics at the end of the run: those that training `kept`, of its mixed "
        "crops, or those of the `central` crops, as in evaluation, of up to 10,000 training "
        "images."
    )
    pruning: PruningConfig = PruningConfig()


@dataclasses.dataclass(frozen=True, kw_only=True)
class TeacherConfig:
    """Where a frozen teacher comes from: weights, or a run."""

    weights: str | None = None
    """The teacher's weights: a file, `hf://OWNER/REPO`, a SavedModel, or the workdir of a run."""
    network: NetworkConfig | None = None
    """The teacher's network, where its weights do not describe it."""
    classes: tuple[str, ...] = ()
    (
        "Which of the teacher's classes the student learns, in the student's order: names or "
        "numbers, or one text file with a name a line. The teacher's probabilities are "
        "renormalised over them. Empty: all."
    )
    experiment: str | None = None
    """An experiment file whose run becomes the teacher: it is trained first."""
    workdir: str | None = None
    """Workdir of the teacher's run; None is `WORKDIR/teacher`. Alone, it names a complete run."""
    function: str | None = None
    (
        "Any function from images to logits, as FILE.py:NAME or package.module:name, instead of "
        "weights; `fm-distill record` calls it, with images prepared as in `network` "
        '(model="function").'
    )
    recording: str | None = None
    (
        "The folder (or URL) of what `fm-distill record` recorded of all teachers: the student "
        "learns from it, and needs the teachers themselves only for evaluation."
    )
    quantisation: QuantisationConfig = QuantisationConfig()
    """Post-training quantisation of the teacher, calibrated on the run's training views."""
    least_agreement: Annotated[float, Bounds(least=0, most=1)] = 0.95
    (
        "Least top-1 agreement, on training views, of a teacher quantised by "
        "`teacher.quantisation` with the same teacher in floats; below it, the run is refused."
    )


Network = TypeVar("Network", NetworkConfig, StudentConfig)


def with_options(network: Network, options: Mapping[str, OptionValue]) -> Network:
    """`network` with these options of its model over those that it has."""
    return dataclasses.replace(network, options={**network.options, **options})


def with_quantisation(network: NetworkConfig, asked: QuantisationConfig) -> NetworkConfig:
    """`network`, quantised as is `asked` where that quantises anything."""
    return dataclasses.replace(network, quantisation=asked) if asked.quantised else network
