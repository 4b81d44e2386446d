"""Function matching in JAX: distillation with a patient and consistent teacher.

    config = load_experiment("experiments/digits.py")
    result = train(config, "runs/digits")
    figures = evaluate("runs/digits", split="test")
    predictions = predict("runs/digits", ["photo.jpg"])
    student = open_run("runs/digits").student
    card = export("runs/digits", "digits.safetensors")
    student = load_student("digits.safetensors")
    figures = plan(config, "v3-8")
    figures = profile(config, "runs/digits")
    table = sweep(config, {"seed": (0, 1, 2)}, "runs/digits_sweep")
    page = report(["runs/digits"], "digits.html")
    causes = diagnose("runs/digits").causes
    with trusted_code(): figures = evaluate("downloads/run_with_code_inside")

The fields of `Config` are in `fm_distill.config`. Wrong input raises `UserError`. The names are
imported when they are first used, so that `fm_distill.config` comes without JAX.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fm_distill.config import Config
    from fm_distill.diagnosis.diagnose import diagnose
    from fm_distill.errors import UserError
    from fm_distill.evaluation.inference import evaluate, predict
    from fm_distill.exporting.export import export
    from fm_distill.exporting.load_student import load_student
    from fm_distill.planning.plan import plan
    from fm_distill.preparation.experiment import load_experiment
    from fm_distill.reports.report import report
    from fm_distill.reports.sweep import sweep
    from fm_distill.runs.open_run import open_run
    from fm_distill.system.foreign_code import trusted_code
    from fm_distill.training.profile import profile
    from fm_distill.training.train import train

__all__ = [
    "Config",
    "UserError",
    "diagnose",
    "evaluate",
    "export",
    "load_experiment",
    "load_student",
    "open_run",
    "plan",
    "predict",
    "profile",
    "report",
    "sweep",
    "train",
    "trusted_code",
]

_MODULES = {
    "Config": "fm_distill.config",
    "UserError": "fm_distill.errors",
    "diagnose": "fm_distill.diagnosis.diagnose",
    "evaluate": "fm_distill.evaluation.inference",
    "export": "fm_distill.exporting.export",
    "load_student": "fm_distill.exporting.load_student",
    "load_experiment": "fm_distill.preparation.experiment",
    "open_run": "fm_distill.runs.open_run",
    "plan": "fm_distill.planning.plan",
    "predict": "fm_distill.evaluation.inference",
    "profile": "fm_distill.training.profile",
    "report": "fm_distill.reports.report",
    "sweep": "fm_distill.reports.sweep",
    "train": "fm_distill.training.train",
    "trusted_code": "fm_distill.system.foreign_code",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return vars(importlib.import_module(_MODULES[name]))[name]


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
