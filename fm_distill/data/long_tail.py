"""A training split thinned to a long tail: few classes with many examples, many with few."""

import numpy as np
from jaxtyping import Int64

from fm_distill.data.labels import Selected, every_class
from fm_distill.data.sources import Source


def tail_counts(
    counts: Int64[np.ndarray, " classes"], factor: float
) -> Int64[np.ndarray, " classes"]:
    """How many examples of each class stay, of `counts` that there are.

    n_c = n_max * factor^(-c / (C - 1)), rounded down, at least 1, for class c of C: an exponential
    whose first class has `factor` times the examples of the last. Source: Cui et al. 2019 (arXiv
    1901.05555, section 5.1) and Cao et al. 2019 (LDAM-DRW, imbalance_cifar.py), of equal classes.
    Here n_max is the size of the largest class, and a class that has fewer than n_c keeps what it
    has.
    """
    exponents = np.arange(len(counts)) / (len(counts) - 1)
    # Divided, so that a factor that divides n_max leaves exactly the quotient.
    target_counts = np.floor(counts.max() / np.float64(factor) ** exponents).astype(np.int64)
    return np.minimum(np.maximum(target_counts, 1), counts)


def long_tailed(source: Source, factor: float) -> Source:
    """The first examples of each class, in the order of the split. Raises `UserError`.

    A class without examples, or images without labels, are refused.
    """
    labels = every_class(source, f"data.long_tail={factor:g}")
    counts = np.bincount(labels)
    order = np.argsort(labels, kind="stable")
    starts = np.cumsum(counts) - counts
    kept_examples = [
        order[start : start + count]
        for start, count in zip(starts, tail_counts(counts, factor), strict=True)
    ]
    examples = np.sort(np.concatenate(kept_examples))
    return Selected(
        source,
        examples,
        labels[examples],
        f"{source.identity} with a long tail of {factor!r}",
        source.classes,
        source.class_names,
    )
