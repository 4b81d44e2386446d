"""Writes `tests/data/timm_logits.json`: what timm's models answer, with weights by formula.

Needs timm and PyTorch, which are not dependencies, and nothing else of this repository's:
`PYTHONPATH=tests python tools/make_timm_expectations.py tests/data/timm_logits.json`. The file
has the parameters of each model with 1000 classes, and the logits of each case for two pictures,
computed in float64, so that timm's rounding is not in them.
"""

import json
import pathlib
import sys
from typing import Any

import timm
import torch
from timm_formula import CASES, CLASSES, COUNTED, Case, pictures, tensor_of


def parameters(name: str) -> int:
    """With a head of 1000 classes."""
    with torch.device("meta"):
        model = timm.create_model(name, num_classes=1000)
    return sum(x.numel() for x in model.parameters())


def logits(case: Case) -> list[list[float]]:
    """Of the formula's weights, at the case's resolution."""
    transformer = case.model.startswith(("vit", "deit"))
    # Resamples the positions.
    arguments = {"dynamic_img_size": True} if transformer else {}
    model = timm.create_model(case.model, num_classes=CLASSES, **arguments).eval()
    model.load_state_dict(
        {
            name: tensor
            if name.endswith("num_batches_tracked")
            else torch.from_numpy(tensor_of(name, tuple(tensor.shape)))
            for name, tensor in model.state_dict().items()
        }
    )
    with torch.no_grad():
        images = torch.from_numpy(pictures(case.resolution)).double().permute(0, 3, 1, 2)
        found = model.double()(images)
    return [[round(x, 7) for x in row] for row in found.tolist()]


def main() -> None:
    """The one argument is the file."""
    found: dict[str, Any] = {"timm": timm.__version__, "parameters": {}, "logits": {}}
    for name in COUNTED:
        found["parameters"][name] = parameters(name)
    for case in CASES:
        found["logits"][case.key] = logits(case)
        print(case.key, found["logits"][case.key], flush=True)
    text = json.dumps(found, indent=1)
    pathlib.Path(sys.argv[1]).write_text(text + "\n")


if __name__ == "__main__":
    main()
