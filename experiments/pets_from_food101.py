"""Out of domain: the pets' teacher, distilled on photographs of food (`transfer`).

Command:  fm-distill train experiments/pets_from_food101.py --data.data-dir TFDS_DIR \\
              --teacher.weights BiT-R152x2-pet.npz
          (`data.transfer`'s own `data_dir` is TFDS's default place; set it in the file)
Source:   Beyer et al. 2021 (arXiv 2106.05237), section 3.8 and figure 6.
Expected: about 30 % (paper), where pets themselves give 90 %. Not measured here.
"""

import dataclasses
import pathlib

from fm_distill import load_experiment
from fm_distill.config import ScheduleConfig, TransferConfig

pets = load_experiment(pathlib.Path(__file__).with_name("pets.py"))

config = dataclasses.replace(
    pets,
    name="pets_from_food101",
    data=dataclasses.replace(
        pets.data,
        transfer=(
            # For a mixture, name the pets among them.
            TransferConfig(source="tfds", name="food101", split="train[:90%]", examples=68_175),
        ),
    ),
    schedule=ScheduleConfig(total_epochs=100.0, warmup_steps=1500),
)
