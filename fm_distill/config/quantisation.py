"""Which numbers of a network are integers of few bits, in training and in its files.

At eight bits every layer is quantised, first and last ones too (Jacob et al. 2018, arXiv
1712.05877); below, those two keep eight bits (Esser et al. 2020, arXiv 1902.08153, section 3).
"""

import dataclasses
from typing import Annotated, Literal

from fm_distill.config.bounds import Bounds


@dataclasses.dataclass(frozen=True, kw_only=True)
class QuantisationConfig:
    """Precision of weights and activations: those of a phone's or server's integer arithmetic."""

    weights: Literal["none", "int8", "int4"] = "none"
    (
        "Precision of the kernels, with a scale for each output channel; `int4` only makes files "
        "smaller, as few runtimes compute with it."
    )
    activations: Literal["none", "int8"] = "none"
    (
        "Precision of what each convolution and dense layer reads, with a range that follows the "
        "training batches (a teacher's: the first ones); needs quantised weights."
    )
    first_layer: Literal["int8", "none"] = "int8"
    (
        "Precision of the first layer's weights and, where activations are quantised at all, of "
        "its input: `int8`, also where other weights are `int4`, or `none`."
    )
    head: Literal["int8", "none"] = "int8"
    """Precision of the classifier, as for `first_layer`."""
    float_layers: tuple[str, ...] = ()
    """Paths of further layers that stay in floats (mixed precision)."""
    range_percentile: Annotated[float, Bounds(above=50, most=100)] = 100.0
    (
        "A range of activations ends at this percentile of what was seen in a batch, and begins "
        "at its complement: below 100, outliers are clipped and the steps between integers are "
        "finer."
    )

    @property
    def quantised(self) -> bool:
        """Whether anything is."""
        return self.weights != "none" or self.activations != "none"
