"""From a Flax module to a `Network`, and the check of a config that families share."""

import dataclasses
from collections.abc import Callable, Mapping

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import core, traverse_util
from jaxtyping import Array, PRNGKeyArray, PyTree

from fm_distill.config import NetworkConfig
from fm_distill.models.contract import HEAD, Images, Network, Output, Variables, select_features
from fm_distill.models.inner_channels import InnerChannels
from fm_distill.models.integers import integer_kernels
from fm_distill.models.layers import PORTABLE, Kernel, identity
from fm_distill.models.quantisation import RANGES, Quantised
from fm_distill.models.quantisation_plan import plan_of


def make_network(
    module: nn.Module,
    frozen_module: nn.Module,
    fold: Callable[[Kernel], Kernel],
    config: NetworkConfig,
    classes: int,
    dtype: jnp.dtype,
    inner_channels: tuple[InnerChannels, ...] = (),
) -> Network:
    """The pure functions of `module`: `(images, train) -> logits, features`.

    `frozen_module` reads kernels that `fold` has prepared in float32, stored in `dtype`.
    `inner_channels` are those of the blocks, at the width that they have. Raises `ValueError` where
    `config` narrows a network that has none.
    """
    if config.block_widths and not inner_channels:
        raise ValueError(
            f"{config.model} has no blocks whose inner channels can be pruned; leave out "
            "block_widths and student.pruning.pattern=channels"
        )

    plan = plan_of(module, config)
    if plan:
        quantisation = config.quantisation
        module, frozen_module = (
            Quantised(x, plan, quantisation.activations, quantisation.range_percentile)
            for x in (module, frozen_module)
        )

    def init(key: PRNGKeyArray) -> Variables:
        images = jnp.zeros((1, config.resolution, config.resolution, 3), jnp.float32)
        tree = module.init(key, images, train=False)
        # A custom network may have no parameters.
        return Variables(tree.get("params", {}), tree.get("batch_stats", {}), tree.get(RANGES, {}))

    def applied(
        variables: Variables,
        images: Images,
        train: bool,
        observe: bool,
        features: tuple[str, ...],
    ) -> Output:
        mutable = (*(("batch_stats",) if train else ()), *((RANGES,) if observe else ()))
        logits, selected_features, updates = _run(
            module, _tree(variables), images, train, mutable, features
        )
        statistics = updates.get("batch_stats", {}) if train else variables.statistics
        return Output(
            logits, selected_features, statistics, updates[RANGES] if observe else variables.ranges
        )

    def apply(
        variables: Variables, images: Images, *, train: bool, features: tuple[str, ...] = ()
    ) -> Output:
        return applied(variables, images, train, False, features)

    def apply_observing(
        variables: Variables, images: Images, *, train: bool, features: tuple[str, ...] = ()
    ) -> Output:
        return applied(variables, images, train, True, features)

    def freeze(variables: Variables) -> Variables:
        return dataclasses.replace(variables, params=_fold(variables.params, fold, dtype))

    def freeze_integer(variables: Variables) -> Variables:
        params = integer_kernels(variables.params, dict(plan), fold)
        return dataclasses.replace(variables, params=_fold(params, fold, dtype))

    def apply_frozen(
        frozen: Variables, images: Images, *, features: tuple[str, ...] = ()
    ) -> Output:
        logits, selected_features, _ = _run(
            frozen_module, _tree(frozen), images, False, (), features
        )
        return Output(logits, selected_features, frozen.statistics, frozen.ranges)

    def apply_portable(frozen: Variables, images: Images) -> Array:
        def called(scope: core.Scope) -> Array:
            return frozen_module.clone(parent=scope)(images, train=False)[0]

        return core.apply(called, flags={PORTABLE: True})(_tree(frozen))

    def feature_shapes(modules: bool = False) -> dict[str, tuple[int, ...]]:
        def features(key: PRNGKeyArray) -> list[Array]:
            images = jnp.zeros((2, config.resolution, config.resolution, 3), jnp.float32)
            (_, named_features), tree = module.init_with_output(
                key, images, train=False, capture_intermediates=modules
            )
            available = named_features | _outputs(
                tree.get("intermediates", {}), excluded=named_features
            )
            names.extend(available)  # JAX sorts the keys of a dict
            return [*available.values()]

        names: list[str] = []
        shapes = jax.eval_shape(features, jax.random.key(0))
        return {name: x.shape for name, x in zip(names, shapes, strict=True)}

    quantised_activations = config.quantisation.activations != "none"
    return Network(
        classes,
        init,
        apply,
        freeze,
        apply_frozen,
        feature_shapes,
        apply_portable,
        apply_observing if quantised_activations else None,
        freeze_integer if quantised_activations else None,
        tuple(path for path, _ in plan),
        inner_channels,
        fold is identity,
    )


def _tree(variables: Variables) -> dict[str, PyTree]:
    """As Flax wants them."""
    return {
        "params": variables.params,
        "batch_stats": variables.statistics,
        RANGES: variables.ranges,
    }


def _run(
    module: nn.Module,
    tree: PyTree,
    images: Images,
    train: bool,
    mutable: tuple[str, ...],
    features: tuple[str, ...],
) -> tuple[Array, dict[str, Array], PyTree]:
    """Logits, the requested features, and what is mutable. A module's path is a feature too."""

    def requested(called: nn.Module, method: str) -> bool:
        return method == "__call__" and "/".join(called.path) in features

    if not features:
        (logits, _), updates = module.apply(tree, images, train=train, mutable=mutable)
        return logits, {}, updates
    (logits, named_features), updates = module.apply(
        tree,
        images,
        train=train,
        mutable=[*mutable, "intermediates"],
        capture_intermediates=requested,
    )
    available = _outputs(updates.get("intermediates", {}), excluded=named_features) | named_features
    return logits, select_features(available, features), updates


def _outputs(intermediates: PyTree, excluded: Mapping[str, Array]) -> dict[str, Array]:
    """What each module returned when it was last called, by its path: maps and vectors."""
    calls = traverse_util.flatten_dict(intermediates)
    outputs = {"/".join(path[:-1]): values[-1] for path, values in calls.items()}
    return {
        path: x
        for path, x in outputs.items()
        if path
        and path not in excluded
        and isinstance(x, jax.Array)
        and x.ndim in (2, 4)
        and x.size
    }


def _fold(params: PyTree, fold: Callable[[Kernel], Kernel], dtype: jnp.dtype) -> PyTree:
    """Every kernel but the head's, folded in float32 and stored in the compute type.

    Those of integers stay as they are.
    """

    def leaf_of(path: tuple, leaf: Array) -> Array:
        *modules, name = jax.tree_util.keystr(path, simple=True, separator="/").split("/")
        if name != "kernel" or modules[0] == HEAD or leaf.dtype == jnp.int8:
            return leaf
        return fold(leaf).astype(dtype)

    return jax.tree_util.tree_map_with_path(leaf_of, params)


def check_resolution(config: NetworkConfig, stride: int) -> None:
    """The network's last feature map has at least one pixel."""
    if config.resolution < stride:
        raise ValueError(f"resolution {config.resolution} is below the network's stride {stride}")
