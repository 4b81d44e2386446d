"""Rows of `metric_table` for what networks cost; see `networks.cost`."""

from collections.abc import Mapping
from typing import Any

from fm_distill.runs.metric import Metric, Place, Unit, at_path


def _cost(
    name: str, path: tuple[str, ...], label: str, unit: Unit, meaning: str
) -> tuple[Metric, Metric]:
    """Of the student, which a sweep shows too, and of the teacher."""
    place: Place = "cost" if len(path) == 1 else "measured"

    def of(network: str, places: set[Place]) -> Metric:
        metric_path = ("cost", network, *path)
        return Metric(
            f"{network}_{name}",
            metric_path,
            f"{network} {label}",
            unit,
            False,
            meaning,
            frozenset(places),
        )

    return of("student", {place, "sweep"}), of("teacher", {place})


def _measured() -> tuple[tuple[Metric, Metric], ...]:
    """Latency and memory, of a batch of one and of a full one."""
    metrics = []
    for key, batch in (("one", "batch 1"), ("batch", "full batch")):
        suffix = f"of a forward pass of {'one image' if key == 'one' else 'batch_size images'}"
        metrics += [
            _cost(f"latency_{key}_ms", (key, "median_ms"), f"latency at {batch}", "ms",
                  f"Median {suffix}, views not included."),
            _cost(f"latency_{key}_p95_ms", (key, "p95_ms"), f"latency p95 at {batch}", "ms",
                  f"95th percentile {suffix}, views not included."),
            _cost(f"activation_{key}_bytes", (key, "activation_bytes"), f"activations at {batch}",
                  "bytes", f"XLA's temporary memory {suffix}, without weights and images."),
        ]  # fmt: skip
    return tuple(metrics)


FLOPS_CONVENTION = (
    "FLOPs: 2 per multiply-add, as XLA counts the forward pass of one image, padding left out"
)
COSTS = (
    _cost("parameters", ("parameters",), "parameters", "parameters",
          "Trained parameters of the network; of several teachers, of all together."),
    _cost("flops", ("flops",), "FLOPs", "FLOP",
          "Of one image's forward pass: 2 per multiply-add, as XLA counts, padding left out."),
    *_measured(),
)  # fmt: skip


def costs_text(figures: Mapping[str, Any]) -> list[str]:
    """Lines: the costs of student and teacher side by side; `-` where one is not known."""
    costs = [(pair, [metric.of(figures) for metric in pair]) for pair in COSTS]
    rows = [(pair, values) for pair, values in costs if any(x is not None for x in values)]
    if not rows:
        return []
    lines = [f"  {'':<28}{'student':>14}{'teacher':>14}"]
    for pair, values in rows:
        texts = ("-" if x is None else m.text(x) for m, x in zip(pair, values, strict=True))
        label = pair[0].label.removeprefix("student ")
        lines.append(f"  {label:<28}" + "".join(f"{x:>14}" for x in texts))
    device = at_path(figures, ("cost", "device"))
    size = at_path(figures, ("cost", "student", "batch", "batch_size"))
    measured = [f"  on {device}; a full batch is {size:,} images"] if device else []
    return [*lines, f"  {FLOPS_CONVENTION}", *measured]
