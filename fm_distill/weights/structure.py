"""Variables of a foreign BiT graph, matched with the original names: by their names, else by order.

By order: graphs list their variables in the order of creation or of the original names. Within one
shape both agree: blocks, units and parts rise, and the only kernel that is as large as another of
its unit, block 1's projection, stands before it. Gamma and beta, which have one shape too, are told
apart by their values, for all norms at once.
"""

import re
from collections import defaultdict

import numpy as np

from fm_distill.errors import UserError

PREFIX = "resnet/"
HEAD_KERNEL, HEAD_BIAS = "resnet/head/conv2d/kernel", "resnet/head/conv2d/bias"
# The end of a variable's name in a graph of BiT, whatever encloses it.
BIT_NAME = re.compile(
    r"(?:^|/)(root_block/standardized_conv2d(?:_\d+)?/kernel"
    r"|block\d+/unit\d+/[abc](?:/proj)?/standardized_conv2d(?:_\d+)?/kernel"
    r"|block\d+/unit\d+/[abc]/group_norm(?:_\d+)?/(?:gamma|beta)"
    r"|group_norm/(?:gamma|beta)|head/conv2d/(?:kernel|bias))(?::0)?$"
)
# A list of variables in a checkpoint: `variables/12/.ATTRIBUTES/VARIABLE_VALUE`.
IN_A_LIST = re.compile(r"(.*?)/?(\d+)(?:/\.ATTRIBUTES/VARIABLE_VALUE)?")
# Of all norms, this share must have a larger mean of gamma than of beta.
CERTAIN = 0.9


def as_original(
    path: str, tensors: dict[str, np.ndarray], shapes: dict[str, tuple[int, ...]]
) -> tuple[dict[str, np.ndarray], str]:
    """`tensors` under the original names, and how they were matched.

    `shapes` are those of all tensors but the head's, by original name. Raises `UserError` where
    the graph does not tell which is which.
    """
    head, tensors = _without_head(path, tensors, shapes)
    bit_names = {name: match[1] for name in tensors if (match := BIT_NAME.search(name))}
    if bit_names:
        number_suffix = re.compile(r"(standardized_conv2d|group_norm)_\d+")
        renamed = {
            PREFIX + number_suffix.sub(r"\1", bit_names[name])
            if name in bit_names
            else name: tensor
            for name, tensor in tensors.items()
        }
        if len(renamed) < len(tensors):
            raise UserError(f"{path} has several variables of the same name")
        return renamed | head, "variables matched by their names"
    return _by_order(path, tensors, shapes) | head, (
        "variables matched by order and shape, which was not verified on a file of this kind: "
        "check the teacher's accuracy"
    )


def _without_head(
    path: str, tensors: dict[str, np.ndarray], shapes: dict[str, tuple[int, ...]]
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """The head by its original names, from a dense layer or a convolution; and what is left."""
    feature_channels = shapes["resnet/group_norm/gamma"][0]
    kernels = {
        name: tensor
        for name, tensor in tensors.items()
        if (tensor.ndim == 2 and tensor.shape[0] == feature_channels)
        or (tensor.shape[:3] == (1, 1, feature_channels) and tensor.shape not in shapes.values())
        or name.endswith(HEAD_KERNEL.removeprefix(PREFIX))
    }
    if len(kernels) != 1:
        raise UserError(
            f"{path} has {len(kernels)} variables that could be the head's kernel "
            f"({feature_channels} x classes): {', '.join(kernels) or 'none'}; expected one, for a "
            "BiT of the width in the network's config"
        )
    kernel_name, kernel = next(iter(kernels.items()))
    classes = kernel.shape[-1]
    vectors = [name for name, tensor in tensors.items() if tensor.shape == (classes,)]
    head_biases = [
        name
        for name in vectors
        if not BIT_NAME.search(name) or name.endswith(HEAD_BIAS.removeprefix(PREFIX))
    ]
    if len(head_biases) != 1:
        raise UserError(
            f"{path} has {len(head_biases)} variables that could be the bias of the head of "
            f"{classes} classes ({', '.join(head_biases[:5]) or 'none'}); expected one: convert "
            "the file to a BiT .npz in the original naming"
        )
    remaining = {
        name: x for name, x in tensors.items() if name not in (kernel_name, head_biases[0])
    }
    kernel = kernel.reshape(1, 1, feature_channels, classes)
    return {HEAD_KERNEL: kernel, HEAD_BIAS: tensors[head_biases[0]]}, remaining


def _by_order(
    path: str, tensors: dict[str, np.ndarray], shapes: dict[str, tuple[int, ...]]
) -> dict[str, np.ndarray]:
    matches = {name: IN_A_LIST.fullmatch(name) for name in tensors}
    list_names = {match[1] if match else None for match in matches.values()}
    if list_names == {None} or len(list_names) != 1:
        raise UserError(
            f"{path}: its variables neither have BiT's names nor form one list whose order could "
            f"be used: {', '.join(sorted(tensors)[:5])}; convert the file to a BiT .npz in the "
            "original naming"
        )
    tensors_by_shape: dict[tuple[int, ...], list[np.ndarray]] = defaultdict(list)
    for name in sorted(tensors, key=lambda name: int(IN_A_LIST.fullmatch(name)[2])):  # type: ignore[index]
        tensors_by_shape[tensors[name].shape].append(tensors[name])
    names_by_shape: dict[tuple[int, ...], list[str]] = defaultdict(list)
    for name in sorted(shapes):
        names_by_shape[shapes[name]].append(name)
    differences = [
        f"{shape}: {len(tensors_by_shape[shape])} variables, expected {len(names_by_shape[shape])}"
        for shape in sorted({*tensors_by_shape, *names_by_shape})
        if len(tensors_by_shape[shape]) != len(names_by_shape[shape])
    ]
    if differences:
        raise UserError(
            f"{path} does not hold this BiT; its variables differ in number by shape:\n  "
            + "\n  ".join(differences[:20] + ["..."] * (len(differences) > 20))
        )
    matched: dict[str, np.ndarray] = {}
    for shape, names in names_by_shape.items():
        if len(shape) == 4:
            matched |= dict(zip(names, tensors_by_shape[shape], strict=True))
    return matched | _norms(path, tensors_by_shape, names_by_shape)


def _norms(
    path: str,
    found: dict[tuple[int, ...], list[np.ndarray]],
    wanted: dict[tuple[int, ...], list[str]],
) -> dict[str, np.ndarray]:
    """Gamma, beta, gamma, ..., or beta first, or all gammas first: where gammas are larger."""
    arrangements: list[dict[str, np.ndarray]] = [{}, {}, {}]
    for shape, names in wanted.items():
        if len(shape) != 1:
            continue
        arrays = found[shape]
        norms = [name.removesuffix("gamma") for name in names if name.endswith("gamma")]
        for i, norm in enumerate(norms):
            interleaved = arrays[2 * i], arrays[2 * i + 1]
            separate = arrays[i], arrays[len(norms) + i]
            for k, (gamma, beta) in enumerate((interleaved, interleaved[::-1], separate)):
                arrangements[k] |= {f"{norm}gamma": gamma, f"{norm}beta": beta}

    def share(norms: dict[str, np.ndarray]) -> float:
        norm_names = [name.removesuffix("gamma") for name in norms if name.endswith("gamma")]
        gamma_is_larger = [norms[f"{x}gamma"].mean() > norms[f"{x}beta"].mean() for x in norm_names]
        return float(np.mean(gamma_is_larger))

    best, second_best, _ = sorted(map(share, arrangements), reverse=True)
    if best < CERTAIN or best == second_best:
        raise UserError(
            f"{path}: gamma and beta of its norms cannot be told apart by their values; convert "
            "the file to a BiT .npz in the original naming"
        )
    return max(arrangements, key=share)
