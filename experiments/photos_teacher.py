"""A teacher for one's own photos: EfficientNet-Lite0 from ImageNet, fine-tuned at 128 pixels.

Command:  fm-distill train experiments/photos_teacher.py --data.data-dir FOLDER
          with FOLDER/train/CLASS/IMAGE and FOLDER/test/CLASS/IMAGE
          (`--student.weights FILE.safetensors` takes a copy of the weights instead of the hub's)
Source:   `flowers102_teacher.py` on class folders.
Expected: depends on the photos; 87 to 88 % on Flowers-102 (LOG.md).
"""

import dataclasses
import pathlib

from fm_distill import load_experiment

here = pathlib.Path(__file__)
flowers = load_experiment(here.with_name("flowers102_teacher.py"))
own_images = load_experiment(here.with_name("own_images_teacher.py"))

config = dataclasses.replace(flowers, name="photos_teacher", data=own_images.data)
