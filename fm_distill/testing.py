"""Checks of custom parts: what the tests of this project ask of each line of its tables.

Each raises `AssertionError` with what is wrong. For instance, in a test file:

    from fm_distill.testing import check_distance
    from my_parts import huber

    def test_huber():
        check_distance(huber)
"""

from collections.abc import Callable
from multiprocessing.reduction import ForkingPickler

import jax
import jax.numpy as jnp
import numpy as np
import optax

from fm_distill.config import NetworkConfig, OptimizerConfig, ViewConfig
from fm_distill.data.sources import Source
from fm_distill.models import Network
from fm_distill.objectives.distances import Distance
from fm_distill.views.crops import Crop


def check_distance(distance: Distance) -> None:
    """One finite float32 number per example, of that example alone, least where both agree.

    Its gradient moves a student that disagrees.
    """
    rng = np.random.Generator(np.random.Philox(1))
    student_logits, teacher_logits = jnp.asarray(rng.normal(0, 3, (2, 5, 7)), jnp.float32)
    distances = distance(student_logits, teacher_logits, 2.0)
    assert distances.shape == (5,), f"expected one number per example, (5,); got {distances.shape}"
    assert distances.dtype == jnp.float32, f"expected float32, got {distances.dtype}"
    assert jnp.isfinite(distances).all(), "a distance is not finite"
    single_distance = distance(student_logits[2:3], teacher_logits[2:3], 2.0)
    assert jnp.allclose(distances[2], single_distance[0], rtol=1e-5), (
        "an example's distance depends on other examples"
    )
    assert distance(teacher_logits, teacher_logits, 2.0).sum() <= distances.sum() + 1e-5, (
        "the teacher's distance to itself is larger than that of another function"
    )
    gradient = jax.grad(lambda logits: distance(logits, teacher_logits, 2.0).sum())
    assert jnp.isfinite(gradient(student_logits)).all(), "the gradient is not finite"
    assert jnp.abs(gradient(student_logits)).max(-1).all(), (
        "the gradient is zero where the two disagree"
    )
    assert jnp.isfinite(gradient(teacher_logits)).all(), (
        "the gradient is not finite where the two agree"
    )


def check_crop(crop: Crop) -> None:
    """Boxes inside of each image, the same for the same key."""
    sizes = jnp.array([[40, 40], [30, 60], [90, 31], [1, 1]] * 50, jnp.int32)
    boxes = crop(jax.random.key(1), sizes, ViewConfig(), ViewConfig().crop_area[0])
    assert boxes.shape == (200, 4), f"expected boxes of shape (200, 4), got {boxes.shape}"
    start, length = boxes[:, :2], boxes[:, 2:]
    assert (start >= 0).all() and (length > 0).all(), "a box begins outside or is empty"
    assert (start + length <= sizes + 1e-4).all(), "a box ends outside of its image"
    repeated_boxes = crop(jax.random.key(1), sizes, ViewConfig(), ViewConfig().crop_area[0])
    assert (boxes == repeated_boxes).all(), "the same key draws different boxes"


def check_network(
    build: Callable[[NetworkConfig, int, jnp.dtype], Network], config: NetworkConfig
) -> None:
    """Float32 logits, examples that do not see each other, and a gradient to each parameter."""
    network = build(config, 5, jnp.dtype("float32"))
    assert network.classes == 5, f"expected 5 classes, got {network.classes}"
    variables = network.init(jax.random.key(1))
    leaves = zip(
        jax.tree.leaves(variables), jax.tree.leaves(network.init(jax.random.key(1))), strict=True
    )
    assert all((a == b).all() for a, b in leaves), "the same key makes different parameters"
    shape = 3, config.resolution, config.resolution, 3
    images = jax.random.normal(jax.random.key(2), shape)
    logits = network.apply(variables, images, train=False).logits
    assert logits.shape == (3, 5), f"expected logits of shape (3, 5), got {logits.shape}"
    assert logits.dtype == jnp.float32, f"expected float32 logits, got {logits.dtype}"
    single_logits = network.apply(variables, images[1:2], train=False).logits
    assert jnp.allclose(single_logits, logits[1:2], atol=1e-4), (
        "in evaluation an example's logits depend on other examples"
    )
    frozen_logits = network.apply_frozen(network.freeze(variables), images).logits
    assert jnp.allclose(frozen_logits, logits, atol=1e-4), (
        "when frozen, the network computes a different function"
    )

    # A head of zeros would hide the gradient of all that is before it.
    params = jax.tree.map(
        lambda value: value + 0.1 * jax.random.normal(jax.random.key(3), value.shape),
        variables.params,
    )
    perturbed = type(variables)(params, variables.statistics)

    def loss(params: object) -> jax.Array:
        output = network.apply(type(perturbed)(params, perturbed.statistics), images, train=True)
        return jnp.square(output.logits).sum()

    gradients = jax.tree_util.tree_leaves_with_path(jax.grad(loss)(params))
    without_gradient = [
        jax.tree_util.keystr(path) for path, gradient in gradients if not (gradient != 0).any()
    ]
    assert not without_gradient, f"no gradient reaches {', '.join(without_gradient)}"


def check_source(source: Source) -> None:
    """Random access that gives the same twice, labels in range; can be sent to a process."""
    assert len(source) > 0, "the source is empty"
    ForkingPickler.dumps(source)  # as reader processes get it
    for index in {0, len(source) // 2, len(source) - 1}:
        example, example_again = source[index], source[index]
        assert np.array_equal(example.image, example_again.image), (
            f"example {index} is not the same when it is read again"
        )
        assert example.label == example_again.label, (
            f"example {index} has another label when it is read again"
        )
        classes = source.classes or 0
        assert -1 <= example.label < max(classes, 0) or (classes == 0 and example.label == -1), (
            f"example {index} has the label {example.label}; expected -1, or 0 to {classes - 1}"
        )
    assert source.identity, "the source has no identity, by which a run recognises its data"


def check_optimizer(make: Callable[[OptimizerConfig], optax.GradientTransformation]) -> None:
    """A direction of descent: small steps against it find the bottom of a parabola."""
    optimizer = make(OptimizerConfig(learning_rate=0.1))
    params = {"kernel": jnp.array([3.0, -2.0])}
    state = optimizer.init(params)
    for _ in range(200):
        gradient = jax.tree.map(lambda value: 2 * value, params)
        update, state = optimizer.update(gradient, state, params)
        params = jax.tree.map(lambda value, change: value - 0.03 * change, params, update)
    assert jnp.abs(params["kernel"]).max() < 0.5, f"after 200 steps it stands at {params['kernel']}"
