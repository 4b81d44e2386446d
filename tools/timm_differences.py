"""The table of how far the logits of ResNet, ConvNeXt, ViT, DeiT and DINOv2 are from timm's.

    PYTHONPATH=tests python tools/timm_differences.py

Of the cases in `tests/data/timm_logits.json`: the largest difference over the largest logit, with
weights by formula, timm in float64 and ours in float32. Needs the extra `test`, and no timm.
"""

import jax
import jax.numpy as jnp
from test_vision_families import (
    FLOAT32,
    RECORDED,
    config_of,
    formula_variables,
    relative_difference,
)
from timm_formula import CASES, CLASSES, pictures

from fm_distill.models import build_network


def main() -> None:
    print(f"| model and pixels | difference to timm {RECORDED['timm']} |\n|---|---|")
    for case in CASES:
        network = build_network(config_of(case), CLASSES, FLOAT32)
        images = jnp.asarray(pictures(case.resolution))
        output = jax.jit(network.apply_frozen)(network.freeze(formula_variables(case)), images)
        difference = relative_difference(output.logits, RECORDED["logits"][case.key])
        print(f"| {case.model}, {case.resolution} | {difference:.1e} |", flush=True)


if __name__ == "__main__":
    main()
