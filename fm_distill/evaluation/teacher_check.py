"""A check of the teacher on the training view, before hours are spent learning from it."""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from fm_distill.config import Config
from fm_distill.config.regime import regime_of
from fm_distill.data.batch import Batch
from fm_distill.data.feeding import Reader, stack
from fm_distill.data.order import example_ids
from fm_distill.models import Variables
from fm_distill.networks.branch import Branch, step_views, teacher_outputs_with_features
from fm_distill.objectives.features import pooled
from fm_distill.objectives.terms import features_of
from fm_distill.system.sharding import Layout
from fm_distill.views.draws import ViewRoot, mix

EXAMPLES = 512
# Mean total variation between the teacher's outputs and their mean, below which they are constant;
# of features, the mean distance to their mean over their mean length.
CONSTANT = 0.01


def check_teacher(
    config: Config,
    student: Branch,
    teacher: Branch,
    frozen: Variables,
    reader: Reader,
    layout: Layout,
    root: ViewRoot,
) -> list[str]:
    """Warnings about a teacher that cannot teach: no better than chance, or almost constant.

    Runs it on its views of the first steps of the run. Of one without a head, the features that
    the terms read are looked at.
    """
    classes = student.network.classes
    names = () if teacher.has_head else features_of(config.objective)[1]
    view_sampling = regime_of(config).views

    def outputs(
        frozen: Variables, batch: Batch, root: ViewRoot, step: Array
    ) -> tuple[list[Array], Array]:
        views = step_views(view_sampling, config.views, student, (teacher,), batch, root, step)
        logits, features = teacher_outputs_with_features(
            (teacher,), (frozen,), views.teachers, names
        )
        # Of a mixture, the label of its larger part; -1 stays unlabelled.
        mixed = mix(views.draw, jax.nn.one_hot(batch.labels, classes))
        label = jnp.where((batch.labels >= 0).all(), mixed.argmax(-1), -1)
        return [*map(jax.nn.softmax, logits), *(pooled(features[x]) for x in names)], label

    compiled = jax.jit(outputs, out_shardings=layout.replicated)
    rows = []
    for step in range(max(1, round(EXAMPLES / config.batch_size))):
        positions = np.arange(step * config.batch_size, (step + 1) * config.batch_size)
        ids = example_ids(config.seed, positions, len(reader))
        batch = jax.device_put(stack([reader[i] for i in ids.tolist()]), layout.batch)
        rows.append(jax.device_get(compiled(frozen, batch, root, jnp.int32(step))))
    arrays = [np.concatenate(x) for x in zip(*(x for x, _ in rows), strict=True)]
    if teacher.has_head:
        return teacher_warnings(arrays[0], np.concatenate([x for _, x in rows]))
    pairs = zip(names, arrays, strict=True)
    return [warning for name, x in pairs for warning in feature_warnings(name, x)]


def feature_warnings(name: str, features: np.ndarray) -> list[str]:
    """Warnings about the teacher's feature called `name`, (examples, channels)."""
    if not np.isfinite(features).all():
        return [
            f"WARNING: the teacher's {name} has values that are not finite on the training view"
        ]
    deviation, norm = (
        np.linalg.norm(x, axis=1).mean() for x in (features - features.mean(axis=0), features)
    )
    if deviation > CONSTANT * norm:
        return []
    return [
        f"WARNING: the teacher's {name} hardly differs between images (by {deviation:.2g}, with a "
        f"norm of {norm:.2g}): are its weights and input_range right?"
    ]


def teacher_warnings(probabilities: np.ndarray, labels: np.ndarray) -> list[str]:
    """Warnings about outputs (examples, classes) for `labels` (-1 where unknown)."""
    warnings = []
    classes = probabilities.shape[1]
    if not np.isfinite(probabilities).all():
        return ["WARNING: the teacher's outputs are not finite numbers on the training view"]
    mean = probabilities.mean(axis=0)
    variation = np.abs(probabilities - mean).sum(axis=1).mean() / 2
    if variation < CONSTANT:
        warnings.append(
            f"WARNING: the teacher's outputs hardly differ between images (mean total variation "
            f"{variation:.4f}): are its weights, head and input_range right?"
        )
    labelled = labels >= 0
    if labelled.any():
        accuracy = (probabilities.argmax(axis=1) == labels)[labelled].mean()
        chance = 1 / classes
        deviation = (chance * (1 - chance) / labelled.sum()) ** 0.5
        if accuracy <= chance + 2 * deviation:
            warnings.append(
                f"WARNING: the teacher is no better than chance on the training view: "
                f"{accuracy:.1%} of {labelled.sum()} images, chance is {chance:.1%}; are its class "
                "order, weights and input_range those of this data set?"
            )
    return warnings
