"""Function matching in JAX: distillation with a patient and consistent teacher.

    config = load_experiment("experiments/digits.py")
    result = train(config, "runs/digits")
    figures = evaluate("runs/digits", split="test")
    predictions = predict("runs/digits", ["photo.jpg"])
    student = open_run("runs/digits").student
    card = export("runs/digits", "digits.safetensors")
    figures = plan(config, "v3-8")
    table = sweep(config, {"seed": (0, 1, 2)}, "runs/digits_sweep")
    page = report(["runs/digits"], "digits.html")

The fields of `Config` are in `fm_distill.config`. Wrong input raises `UserError`.
"""

from fm_distill.config import Config
from fm_distill.evaluation.inference import evaluate, predict
from fm_distill.exporting.export import export
from fm_distill.planning.plan import plan
from fm_distill.reports.report import report
from fm_distill.runs.open_run import open_run
from fm_distill.training.experiment import load_experiment
from fm_distill.training.sweep import sweep
from fm_distill.training.train import train

__all__ = [
    "Config",
    "evaluate",
    "export",
    "load_experiment",
    "open_run",
    "plan",
    "predict",
    "report",
    "sweep",
    "train",
]
