"""Function matching in JAX: distillation with a patient and consistent teacher.

    config = load_experiment("experiments/digits.py")
    result = train(config, "runs/digits")
    figures = evaluate("runs/digits", split="test")
    predictions = predict("runs/digits", ["photo.jpg"])
    student = open_run("runs/digits").student

The fields of `Config` are in `fm_distill.config`. Wrong input raises `UserError`.
"""

from fm_distill.config import Config
from fm_distill.experiment import load_experiment
from fm_distill.inference import evaluate, predict
from fm_distill.run import open_run
from fm_distill.train import train

__all__ = ["Config", "evaluate", "load_experiment", "open_run", "predict", "train"]
