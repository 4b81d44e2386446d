"""The variables of a TensorFlow SavedModel. The only file that imports TensorFlow."""

import pathlib
import re
from typing import Any

import numpy as np

from fm_distill.errors import UserError
from fm_distill.weights.structure import BIT_NAME

GRAPH = "_CHECKPOINTABLE_OBJECT_GRAPH"
# What training leaves beside the weights.
BOOKKEEPING = re.compile(
    r"(.*/)?(\.OPTIMIZER_SLOT|_?optimizer|save_counter|keras_api/metrics)(/.*)?"
)


def read_saved_model(folder: pathlib.Path) -> dict[str, np.ndarray]:
    """The variables of the SavedModel in `folder`, without an optimizer's.

    By their names in the graph where those are BiT's, else by their places in the checkpoint. The
    graph itself is not run, nor is any code in it. Raises `UserError`.
    """
    if not (folder / "variables" / "variables.index").is_file():
        raise UserError(
            f"{folder} is a SavedModel without variables (variables/variables.index); expected one "
            "that was saved from a Keras model or a tf.Module, with its folder `variables`"
        )
    try:
        import tensorflow as tf
    except ImportError:
        raise UserError(
            f"{folder} is a TensorFlow SavedModel, which only TensorFlow can read: "
            "pip install -e '.[prepare]', or convert it elsewhere to a BiT .npz"
        ) from None
    try:
        reader = tf.train.load_checkpoint(str(folder / "variables" / "variables"))
        keys = [key for key in reader.get_variable_to_shape_map() if key != GRAPH]
        tensors = {key: reader.get_tensor(key) for key in keys if not BOOKKEEPING.fullmatch(key)}
        names = _names(reader)
    # TensorFlow's reader translates some of its own errors into Python's.
    except (tf.errors.OpError, ValueError, OSError, RuntimeError, IndexError) as error:
        reason = str(error).splitlines()[0][:300]
        raise UserError(
            f"the variables of {folder} cannot be read ({reason}): copy or download it again"
        ) from None
    # Keras 3 lists every variable twice.
    unique = {
        key: tensor for key, tensor in tensors.items() if not key.startswith("_all_variables/")
    }
    tensors = {
        key: tensor
        for key, tensor in (unique or tensors).items()
        if tensor.ndim > 0 and tensor.dtype.kind == "f"
    }
    if not tensors:
        raise UserError(f"{folder} is a SavedModel without variables that could be weights")
    tensors_by_name = {names.get(key, key): tensor for key, tensor in tensors.items()}
    has_bit_names = len(tensors_by_name) == len(tensors) and any(
        BIT_NAME.search(name) for name in tensors_by_name
    )
    return tensors_by_name if has_bit_names else tensors


def _names(reader: Any) -> dict[str, str]:
    """The name that each variable had in its graph, by its key in the checkpoint."""
    from tensorflow.core.protobuf.trackable_object_graph_pb2 import TrackableObjectGraph

    if GRAPH not in reader.get_variable_to_shape_map():
        return {}  # a checkpoint of TensorFlow 1: its keys are the names
    graph = TrackableObjectGraph.FromString(reader.get_tensor(GRAPH))
    return {
        attribute.checkpoint_key: attribute.full_name
        for node in graph.nodes
        for attribute in node.attributes
        if attribute.full_name
    }
