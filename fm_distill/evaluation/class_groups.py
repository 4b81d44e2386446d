"""Head, middle and tail: thirds of the classes by their training examples, and their accuracies."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

GROUPS = ("head", "middle", "tail")
# The largest class has at least so many times the examples of the smallest, or there is no tail.
LONG_TAIL = 2

# The group of each class, an index into `GROUPS`.
Groups = Int[np.ndarray, " classes"]


def groups_of(class_counts: Sequence[int] | None) -> Groups | None:
    """The third of the classes to which each belongs, by falling number of training examples.

    Ties are broken by the index of the class; where C is no multiple of three, the first groups
    have a class more. None where `class_counts` are not known, or nearly the same.
    """
    if class_counts is None or max(class_counts) < LONG_TAIL * min(class_counts):
        return None
    counts = np.asarray(class_counts)
    groups = np.empty(len(counts), np.int32)
    order = np.argsort(-counts, kind="stable")
    for group, classes in enumerate(np.array_split(order, len(GROUPS))):
        groups[classes] = group
    return groups


def sums_of_groups(
    groups: Groups,
    logits: Float[Array, "batch classes"],
    labels: Int[Array, " batch"],
    mask: Bool[Array, " batch"],
) -> dict[str, Int[Array, " groups"]]:
    """Labelled and rightly classified examples of each group, of those that the mask keeps."""
    labelled = mask & (labels >= 0)
    group = jnp.asarray(groups)[jnp.maximum(labels, 0)]
    in_group = jax.nn.one_hot(group, len(GROUPS), dtype=jnp.int32) * labelled[:, None]
    correct = jnp.argmax(logits, -1) == labels
    return {"labelled": in_group.sum(0), "top1": (in_group * correct[:, None]).sum(0)}


def accuracies(sums: dict[str, Float[np.ndarray, " groups"]]) -> dict[str, float | None]:
    """`head_top1`, `middle_top1`, `tail_top1`: the share of a group's examples that are right.

    None where no example of the group is in the split.
    """
    pairs = zip(GROUPS, sums["top1"], sums["labelled"], strict=True)
    return {
        f"{name}_top1": float(correct / count) if count else None for name, correct, count in pairs
    }
