"""Function matching on a flat folder of unlabelled images, with ImageNet's EfficientNet-Lite0.

Command:  fm-distill train experiments/unlabelled.py --data.data-dir FOLDER
          with FOLDER/IMAGE, in sub-folders or not; without the hub, add
          --teacher.weights tf_efficientnet_lite0.in1k.safetensors
Source:   the recipe of Beyer et al. 2021 (arXiv 2106.05237), shrunk as `flowers102_small.py`;
          timm's `tf_efficientnet_lite0.in1k` as it is, with ImageNet's 1,000 classes.
Expected: not measured; the student knows what the images show, not all of ImageNet.
"""

import dataclasses
import pathlib

from fm_distill import load_experiment
from fm_distill.config import (
    CanvasConfig,
    DataConfig,
    NetworkConfig,
    SplitConfig,
    StudentConfig,
    TeacherConfig,
)

flowers = load_experiment(pathlib.Path(__file__).with_name("flowers102_small.py"))

config = dataclasses.replace(
    flowers,
    name="unlabelled",
    data=DataConfig(
        source="images",
        # The folder itself, without a sub-folder for each split.
        train=SplitConfig(name="."),
        classes=1000,
        class_names="imagenet",
        canvas=CanvasConfig(size=160),
    ),
    student=StudentConfig(model="mobilenet_v3_small", resolution=128),
    teacher=TeacherConfig(
        weights="hf://timm/tf_efficientnet_lite0.in1k",
        network=NetworkConfig(model="efficientnet_lite0", resolution=128),
    ),
)
