"""BatchNorm's statistics recomputed on the views that a student is evaluated on.

Training keeps the moments of mixed crops, whose objects are larger and whose contrast is lower than
those of central crops. Source: Wu and Johnson 2021 (arXiv 2105.07576), sections 3 and 5.
"""

import dataclasses
import functools
from collections.abc import Iterable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from fm_distill.data.batch import Batch
from fm_distill.models import Variables
from fm_distill.networks.branch import Branch, render_central_views
from fm_distill.system.sharding import Layout
from fm_distill.views.rendering import CentralCrop


def batch_moments(
    student: Branch, variables: Variables, images: Float[Array, "batch height width 3"]
) -> PyTree:
    """The moments of the batch, as the statistics that BatchNorm keeps.

    A step keeps m of the old ones: from zeros comes (1 - m) x and from ones m + (1 - m) x.
    """

    def after(value: float) -> PyTree:
        statistics = jax.tree.map(lambda x: jnp.full_like(x, value), variables.statistics)
        replaced_variables = dataclasses.replace(variables, statistics=statistics)
        return student.network.apply(replaced_variables, images, train=True).statistics

    return jax.tree.map(
        lambda from_zeros, from_ones: from_zeros / (1 - (from_ones - from_zeros)),
        after(0.0),
        after(1.0),
    )


def with_central_statistics(
    student: Branch,
    variables: Variables,
    batches: Iterable[Batch],
    crop: CentralCrop,
    layout: Layout,
) -> Variables:
    """`variables` with the means over `batches` of the moments of their central crops.

    `batches` are this process's rows, with the examples in a random order: sorted by class, the
    moments of a batch were those of one class.
    """

    @functools.partial(jax.jit, out_shardings=layout.replicated)
    def of_batch(variables: Variables, batch: Batch) -> PyTree:
        views = render_central_views(batch, (student,), crop)
        return batch_moments(student, variables, views[student.input_spec])

    total, count = None, 0
    for batch in batches:
        moments = of_batch(variables, layout.spread(batch))
        total = moments if total is None else jax.tree.map(jnp.add, total, moments)
        count += 1
    mean = jax.tree.map(lambda x: x / count, total)
    statistics = jax.device_put(mean, layout.variables(mean))
    return dataclasses.replace(variables, statistics=statistics)
