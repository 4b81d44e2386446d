"""`fm-distill demo`: the page's server over HTTP, the command in a process, a real browser."""

import base64
import http.client
import io
import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import threading

import jax
import numpy as np
import pytest
from conftest import ROOT, command_environment
from PIL import Image

from fm_distill.cli.main import main
from fm_distill.errors import UserError
from fm_distill.evaluation.demo import judged, judges
from fm_distill.evaluation.demo_server import PAGE, make_server
from fm_distill.evaluation.inference import predict
from fm_distill.exporting.export import export
from fm_distill.exporting.function import central_squares
from fm_distill.runs.open_run import open_run
from fm_distill.runs.student import canvases_of

# A Chromium, where it is not on the path by one of these names.
CHROMIUM = os.environ.get("CHROMIUM") or next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)


def photo() -> bytes:
    pixels = np.random.default_rng(0).integers(0, 256, (33, 50, 3), np.uint8)
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "PNG")
    return out.getvalue()


@pytest.fixture(scope="module")
def networks(trained):
    return judges(trained / "run")


@pytest.fixture(scope="module")
def port(networks):
    with make_server(networks, 0) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        assert server.server_address[0] == "127.0.0.1"
        yield server.server_address[1]
        server.shutdown()
        thread.join()


def asked(port, method, path, body=None, **headers):
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=120)
    try:
        connection.request(method, path, body, headers)
        response = connection.getresponse()
        return response.status, response.read(), response.headers
    finally:
        connection.close()


def test_student_and_teacher_judge_an_image_as_predict_does(trained, port, tmp_path):
    (tmp_path / "photo.png").write_bytes(photo())
    status, body, _ = asked(port, "POST", "/judge", photo())
    assert status == 200
    found = {x["name"]: x for x in json.loads(body)}
    assert [*found] == ["student", "teacher"]
    for name, workdir in (("student", "run"), ("teacher", "run/teacher")):
        (expected,) = predict(trained / workdir, [tmp_path / "photo.png"])
        names, probabilities = zip(*found[name]["classes"], strict=True)
        assert names == expected.classes
        np.testing.assert_allclose(probabilities, expected.probabilities, atol=1e-6)
        assert found[name]["milliseconds"] > 0
    student = open_run(trained / "run").student
    canvases, sizes = canvases_of([student.prepare(photo())], student.canvas.side, 1)
    seen = central_squares(canvases, sizes, student.central_crop, student.network.resolution)[0]
    data = base64.b64decode(found["student"]["view"].removeprefix("data:image/png;base64,"))
    np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(data))), seen)


def test_a_second_image_compiles_nothing(networks, caplog):
    first = judged(networks[0], photo())
    # The command keeps the libraries quiet, perhaps before this in the same process.
    with jax.log_compiles(), caplog.at_level(logging.WARNING, "jax"):
        again = judged(networks[0], photo())
        assert "Compiling" not in caplog.text and again.classes == first.classes
        jax.jit(lambda x: x + 17)(1.0)
        assert "Compiling" in caplog.text


def test_the_page_needs_no_other_machine(port):
    status, body, headers = asked(port, "GET", "/")
    assert status == 200 and body == PAGE.read_bytes()
    assert b"http:" not in body and b"https:" not in body and b"src=" not in body
    assert "default-src 'none'" in headers["Content-Security-Policy"]


@pytest.mark.parametrize(
    ("method", "path", "body", "headers", "status", "message"),
    [
        ("POST", "/judge", b"no image", {}, 400, "not an image that can be read: no known"),
        ("POST", "/judge", photo()[:-60], {}, 400, "not an image that can be read"),
        ("POST", "/judge", b"", {}, 413, "expected an image of up to 64 MiB"),
        ("POST", "/judge", None, {"Content-Length": str(2**40)}, 413, "up to 64 MiB"),
        ("POST", "/other", b"x", {}, 404, "not found"),
        ("GET", "/../etc/passwd", None, {}, 404, "not found"),
        ("GET", "/", None, {"Host": "example.org"}, 403, "served to 127.0.0.1 only"),
        ("POST", "/judge", None, {"Content-Length": "9" * 5000}, 413, "up to 64 MiB"),
        (
            "POST",
            "/judge",
            photo(),
            {"Origin": "https://example.org"},
            403,
            "served to 127.0.0.1 only",
        ),
        ("GET", "/", None, {"Host": "[broken"}, 403, "served to 127.0.0.1 only"),
        ("POST", "/judge", photo(), {"Host": "example.org:80"}, 403, "served to 127.0.0.1 only"),
    ],
)
def test_what_is_refused(port, method, path, body, headers, status, message):
    found, answer, _ = asked(port, method, path, body, **headers)
    assert found == status and message in json.loads(answer)["error"]
    assert asked(port, "GET", "/")[0] == 200


def test_an_export_is_shown_beside_the_teacher_of_its_run(trained, tmp_path):
    run = shutil.copytree(trained / "run", tmp_path / "run")
    export(run, run / "student.stablehlo")
    assert [x.name for x in judges(run / "student.stablehlo")] == ["student", "teacher"]
    shutil.move(run / "student.stablehlo", tmp_path)
    alone = judges(tmp_path / "student.stablehlo")
    assert alone[0].name == "student" and alone[0].description.startswith("bit, 16 px, by XLA")


def test_the_command_refuses(trained, capsys, tmp_path):
    export(trained / "run", tmp_path / "student.safetensors")
    for arguments, message in (
        ((tmp_path / "student.safetensors",), "holds weights only; give the run"),
        ((tmp_path / "nowhere",), "not the workdir of a run"),
        ((trained / "run", "--port", "70000"), "port 70000 of 127.0.0.1 cannot be used"),
        ((trained / "run", "--seed", "5"), "was trained with another config"),
        ((trained / "run", "--teacher.workdir", tmp_path), "not the workdir of a run"),
    ):
        with pytest.raises(SystemExit) as exit_:
            main(["demo", *map(str, arguments)])
        error = capsys.readouterr().err
        assert exit_.value.code == 2 and message in error and "Traceback" not in error


def test_a_port_that_is_taken(networks, port):
    with pytest.raises(UserError, match=f"port {port} of 127.0.0.1 cannot be used"):
        make_server(networks, port)
    with pytest.raises(UserError, match="port 70000 of"):
        make_server(networks, 70000)


def test_the_command_serves_until_it_is_interrupted(trained):
    command = [sys.executable, "-m", "fm_distill", "demo", str(trained / "run"), "--port", "0"]
    with subprocess.Popen(
        command, env=command_environment(), cwd=ROOT, stdout=subprocess.PIPE, text=True
    ) as process:
        url = process.stdout.readline().strip()
        port = int(url.removeprefix("http://127.0.0.1:").removesuffix("/"))
        assert asked(port, "POST", "/judge", photo())[0] == 200
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 0


@pytest.mark.skipif(CHROMIUM is None, reason="needs a Chromium: CHROMIUM=PATH, or on the path")
def test_a_browser_shows_both_networks(port, tmp_path):
    playwright = pytest.importorskip(
        "playwright.sync_api", reason="needs a browser's driver: pip install playwright"
    )
    (tmp_path / "photo.png").write_bytes(photo())
    (tmp_path / "text.png").write_text("no image")
    requests = []
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page()
        page.on("request", lambda x: requests.append(x.url))
        page.on("pageerror", lambda x: pytest.fail(str(x)))
        page.goto(f"http://127.0.0.1:{port}/")
        # As if the file were dropped.
        transfer = page.evaluate_handle(
            """bytes => {
              const transfer = new DataTransfer();
              transfer.items.add(new File([new Uint8Array(bytes)], "dropped.png"));
              return transfer;
            }""",
            [*photo()],
        )
        page.dispatch_event("#drop", "drop", {"dataTransfer": transfer})
        page.wait_for_selector("article img >> nth=1")
        first = page.text_content("article")
        assert "dropped.png" in first and "student" in first and "teacher" in first
        views = page.eval_on_selector_all("img", "all => all.map(x => x.naturalWidth)")
        assert len(views) == 2 and min(views) > 0
        page.set_input_files("#files", [tmp_path / "photo.png", tmp_path / "text.png"])
        page.wait_for_selector("article .error")
        assert "not an image that can be read" in page.text_content("article .error")
        assert page.locator("article").count() == 3 and page.locator("img").count() == 4
        browser.close()
    local = (f"http://127.0.0.1:{port}/", "data:", "blob:")
    assert all(x.startswith(local) for x in requests) and len(requests) > 3
