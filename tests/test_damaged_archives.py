"""Small zip archives of each kind with one byte changed, whichever: a sentence or a repair."""

import json
import os

import numpy as np
import pytest

from fm_distill.errors import UserError
from fm_distill.exporting import litert_file, stablehlo
from fm_distill.networks.channel_scores import read_scores
from fm_distill.training.targets import _read
from fm_distill.weights.files import read

CARD = json.dumps({"class_names": ["a", "b"]})
ONE_TARGET = {"examples": 1}
IDENTITY = np.array(json.dumps(ONE_TARGET))
ARRAY = np.ones((1, 1, 2), np.float32)
# Of a byte: its lowest bit (encrypted), its fourth (deflated, where it was stored), and all.
CHANGES = (0x01, 0x08, 0xFF)

# What writes a file, and what reads it.
KINDS = {
    "stablehlo": (lambda x: stablehlo.write_archive(x, b"f", CARD), stablehlo.read_archive),
    "tflite": (lambda x: litert_file.write_model(x, b"f", CARD), litert_file.read_model),
    "targets": (
        lambda x: np.savez(x, targets=ARRAY, identity=IDENTITY),
        lambda x: _read(x, ONE_TARGET),
    ),
    "scores": (
        lambda x: np.savez(x, scores=np.zeros(0), places=np.array("[]")),
        lambda x: read_scores(x, ()),
    ),
    "weights": (lambda x: np.savez(x, a=ARRAY), lambda x: read(str(x))),
}


@pytest.mark.parametrize("kind", KINDS)
def test_any_changed_byte_of_an_archive_gets_a_sentence_at_most(tmp_path, kind):
    write, reader = KINDS[kind]
    path = tmp_path / "x.npz"
    write(path)
    whole = path.read_bytes()
    assert reader(path) is not None
    refused = 0
    with path.open("r+b", buffering=0) as file:
        for place, byte in enumerate(whole):
            for change in CHANGES:
                os.pwrite(file.fileno(), bytes([byte ^ change]), place)
                try:
                    refused += reader(path) is None
                except UserError as error:
                    assert "\n" not in str(error)
                    refused += 1
            os.pwrite(file.fileno(), bytes([byte]), place)
    assert path.read_bytes() == whole
    # Dates, versions and the like may be anything.
    assert refused > len(whole)
