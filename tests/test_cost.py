"""What networks cost: counts against formulas, latency by a known clock, and where it is shown."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_cli import command
from tiny import NETWORK, resolved_run, tiny_config

from fm_distill import report
from fm_distill.config import NetworkConfig, with_options
from fm_distill.config.networks import FUNCTION
from fm_distill.models.convolutions import convolve, convolve_depthwise
from fm_distill.networks import cost
from fm_distill.networks.cost import CALLS, WARM_UP, Cost, cost_of, count_flops, run_cost
from fm_distill.runs.cost_metrics import COSTS, costs_text
from fm_distill.runs.workdir import Workdir
from fm_distill.weights.card import only_network

TINY = only_network(NETWORK)


def products(size: int, kernel: int, stride: int) -> int:
    """Of one axis, with kernel // 2 zeros around: those that are not with a zero of the padding."""
    inside = [
        at * stride - kernel // 2 + i
        for at in range(-(-size // stride))
        for i in range(kernel)
    ]  # fmt: skip
    return sum(0 <= x < size for x in inside)


@pytest.mark.parametrize("size", [4, 31])  # on a CPU, the smaller is written out as a product
@pytest.mark.parametrize(("kernel", "stride"), [(1, 1), (3, 1), (3, 2), (5, 1)])
def test_a_convolution_is_two_flops_a_product(size, kernel, stride):
    images = jax.ShapeDtypeStruct((2, size, size, 6), jnp.float32)
    weights = jax.ShapeDtypeStruct((kernel, kernel, 6, 10), jnp.float32)
    found = count_flops(lambda x, k: convolve(x, k, stride), images, weights)
    assert found == 2 * 2 * products(size, kernel, stride) ** 2 * 6 * 10
    depthwise = jax.ShapeDtypeStruct((kernel, kernel, 1, 6), jnp.float32)
    found = count_flops(lambda x, k: convolve_depthwise(x, k, stride), images, depthwise)
    assert found == 2 * 2 * products(size, kernel, stride) ** 2 * 6


def test_flops_are_counted_on_the_cpu_or_not_at_all(monkeypatch):
    """JAX counts nothing for the plugins of TPUs and GPUs, which may be alone here."""
    here, counted = jax.local_devices, []

    def local_devices(**options):
        counted.append(options)
        return here(**options)

    cost._counted.cache_clear()
    monkeypatch.setattr(cost.jax, "local_devices", local_devices)
    known = cost_of((TINY,), 10, "float32", None)
    assert counted == [{"backend": "cpu"}] and known.flops > 1e5

    def no_cpu(**options):
        raise RuntimeError("Unknown backend cpu")

    cost._counted.cache_clear()
    monkeypatch.setattr(cost.jax, "local_devices", no_cpu)
    assert cost_of((TINY,), 10, "float32", None) == dataclasses.replace(known, flops=None)
    cost._counted.cache_clear()  # other tests want the FLOPs


def test_a_published_network():
    """timm's benchmark table: 25.55 million parameters, 4.23 billion multiply-adds at 224 px."""
    network = NetworkConfig(model="bit_r50x1", resolution=224, input_range="minus_one_one")
    found = cost_of((network,), 1000, "float32", None)
    assert found.parameters == 25_549_352
    # XLA leaves out the products with the zeros of the padding: 6 % here.
    assert 0.92 * 2 * 4.23e9 < found.flops < 2 * 4.23e9
    assert found.one is None and found.batch is None


def test_latency_is_of_blocked_calls_after_the_warm_up(monkeypatch):
    """By a clock that makes the n-th call take n ms."""
    events, now = [], [0.0]

    def clock():
        events.append("clock")
        if len(events) % 3 == 0:  # the second of a call
            now[0] += 1e-3 * ((len(events) // 3 - 1) % (WARM_UP + CALLS) + 1)
        return now[0]

    wait = jax.block_until_ready
    monkeypatch.setattr(cost.time, "perf_counter", clock)
    monkeypatch.setattr(cost.jax, "block_until_ready", lambda x: events.append("wait") or wait(x))
    found = cost_of((TINY,), 10, "float32", 4)
    assert events == 2 * (WARM_UP + CALLS) * ["clock", "wait", "clock"]
    kept = np.arange(WARM_UP + 1, WARM_UP + CALLS + 1)
    for calls, size in ((found.one, 1), (found.batch, 4)):
        assert calls.batch_size == size
        assert calls.median_ms == pytest.approx(np.median(kept))
        assert calls.p95_ms == pytest.approx(np.quantile(kept, 0.95))
    # At least the float32 output of the first convolution is there at once.
    assert found.one.activation_bytes >= 4 * 16 * 16 * 8
    assert found.batch.activation_bytes > 2 * found.one.activation_bytes


def test_several_teachers_cost_what_they_cost_together():
    large = with_options(TINY, {"width": 0.25})
    parts = [cost_of((x,), 10, "float32", None) for x in (TINY, large)]
    assert parts[0].flops < parts[1].flops and parts[0].parameters < parts[1].parameters
    expected = Cost(sum(x.parameters for x in parts), sum(x.flops for x in parts))
    assert cost_of((TINY, large), 10, "float32", None) == expected


def test_of_a_function_nothing_is_known_and_a_dash_is_shown():
    function = dataclasses.replace(TINY, model=FUNCTION)
    found = run_cost(resolved_run(tiny_config(), (function,)), 2)
    assert found["teacher"] == dataclasses.asdict(Cost(None, None))
    text = costs_text({"cost": found})
    rows = {x[:30].strip(): x.rsplit("  ", 1) for x in text[1 : 1 + len(COSTS)]}
    assert [*rows] == [student.label.removeprefix("student ") for student, _ in COSTS]
    assert {x[-1].strip() for x in rows.values()} == {"-"}
    assert "1,810" in rows["parameters"][0] and "ms" in rows["latency p95 at full batch"][0]
    assert text[-1].endswith("a full batch is 2 images") and "CPU" in text[-1]


def test_evaluate_prints_and_measures_on_request(trained, capsys):
    run = trained / "run"
    stored = Workdir(run).read_evaluation()
    _, out, _ = command(capsys, "evaluate", run, "--cost", "--json")
    found = json.loads(out)
    for who in ("student", "teacher"):
        known, measured = stored["cost"][who], found["cost"][who]
        assert known["one"] is None and known["flops"] == measured["flops"] > 0
        assert measured["parameters"] == known["parameters"] == 1810
        for name, size in (("one", 1), ("batch", 16)):
            assert measured[name]["batch_size"] == size
            assert 0 < measured[name]["median_ms"] <= measured[name]["p95_ms"]
    assert stored["cost"]["device"] is None and found["cost"]["device"].endswith(", float32")
    assert found["retention_interval"] == stored["retention_interval"]
    _, out, _ = command(capsys, "evaluate", run)
    lines = [" ".join(x.split()) for x in out.splitlines()]
    assert "parameters 1,810 1,810" in lines and "latency" not in out
    flops = f"{found['cost']['student']['flops'] / 1e3:.2f} kFLOP"
    assert f"FLOPs {flops} {flops}" in lines and "2 per multiply-add" in lines[-1]
    low, high = (f"{100 * x:.2f} %" for x in stored["retention_interval"])
    assert any(x.startswith("accuracy kept") and f"({low} to {high})" in x.replace("95 %: ", "")
               for x in lines)  # fmt: skip


def test_a_report_knows_the_costs(trained, tmp_path):
    page = report([trained / "run"], tmp_path / "x.html", cost=True).read_text()
    for student, teacher in COSTS:
        for metric in (student, teacher):
            assert f"<tr><th>{metric.label}</th><td>" in page, metric.label
    assert "<th>measured on</th><td>CPU" in page and "2 per multiply-add" in page
    low, high = Workdir(trained / "run").read_evaluation()["retention_interval"]
    assert f"(95 %: {100 * low:.2f} % to {100 * high:.2f} %)</td>" in page
