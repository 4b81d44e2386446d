"""A look at the teacher on the training view, before hours are spent on learning from it."""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PRNGKeyArray

from fm_distill.config import Config
from fm_distill.data.batch import Batch
from fm_distill.data.feeding import Reader
from fm_distill.data.order import example_ids
from fm_distill.models import Variables
from fm_distill.networks.branch import Branch
from fm_distill.system.sharding import Layout
from fm_distill.views.draws import draw, mix
from fm_distill.views.rendering import render

EXAMPLES = 512
# Mean total variation between the teacher's outputs and their mean, below which they say nothing.
CONSTANT = 0.01


def check_teacher(
    config: Config, teacher: Branch, frozen: Variables, reader: Reader, layout: Layout
) -> list[str]:
    """Warnings about a teacher that cannot teach: no better than chance, or almost constant.

    Runs it on the first batches of the run, as the student will see them.
    """
    classes = teacher.network.classes
    batches = max(1, round(EXAMPLES / config.batch_size))

    def render_views(
        frozen: Variables, batch: Batch, key: PRNGKeyArray
    ) -> tuple[jax.Array, jax.Array]:
        drawn = draw(key, batch.sizes, config.views)
        images = render(drawn, batch.canvases, teacher.input_spec)
        probabilities = jax.nn.softmax(teacher.network.apply_frozen(frozen, images).logits)
        # Of a mixture, the label of its larger part; -1 stays unlabelled.
        mixed = mix(drawn, jax.nn.one_hot(batch.labels, classes))
        label = jnp.where((batch.labels >= 0).all(), mixed.argmax(-1), -1)
        return probabilities, label

    compiled = jax.jit(render_views, out_shardings=layout.replicated)
    seen = []
    for step in range(batches):
        positions = np.arange(step * config.batch_size, (step + 1) * config.batch_size)
        ids = example_ids(config.seed, positions, len(reader))
        read = [reader[i] for i in ids.tolist()]
        host = Batch(*(np.stack([x[name] for x in read]) for name in ("canvas", "size", "label")))
        batch = jax.device_put(host, layout.batch)
        key = jax.random.fold_in(jax.random.key(config.seed), step)
        seen.append(jax.device_get(compiled(frozen, batch, key)))
    probabilities = np.concatenate([p for p, _ in seen])
    labels = np.concatenate([label for _, label in seen])
    return teacher_warnings(probabilities, labels)


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
            f"WARNING: the teacher says almost the same of every image (mean total variation "
            f"{variation:.4f}): are its weights, head and input_range right?"
        )
    known = labels >= 0
    if known.any():
        accuracy = (probabilities.argmax(axis=1) == labels)[known].mean()
        chance = 1 / classes
        deviation = (chance * (1 - chance) / known.sum()) ** 0.5
        if accuracy <= chance + 2 * deviation:
            warnings.append(
                f"WARNING: the teacher is no better than chance on the training view: "
                f"{accuracy:.1%} of {known.sum()} images, chance is {chance:.1%}; are its class "
                "order, weights and input_range those of this data set?"
            )
    return warnings
