# %% [markdown]
# # Function matching on Colab
#
# A run of [fm-distill](https://arxiv.org/abs/2106.05237). Choose a TPU or a GPU as the runtime;
# then *Runtime, Run all* starts the run, and the same in a new runtime continues it, bit for bit.
# It trains on the runtime's own disk in short stretches and keeps a whole copy after each, in Drive
# or in a bucket: what is lost with a runtime is at most one stretch.
#
# Made by `tools/colab/make_notebook.py`, which fills in the next cell.

# %% tags=["parameters"]
NAME = "digits"  # of the run, which lies in WORK/runs/NAME
EXPERIMENT = "digits.py"
OPTIONS: list[str] = []  # of `fm-distill train`
KEEP = "/content/drive/MyDrive/fm-distill"  # a folder of Drive, or a URL such as gs://bucket/runs
STRETCH = 0.5  # hours from one copy to the next
HOURS = 11.0  # from the first cell to the end of the last stretch
PACKAGE = ""  # for pip; "installed": the image has it; empty: the archive in this notebook
WORK = "/content/fm-distill"

# %%
import base64
import importlib.metadata
import os
import pathlib
import subprocess
import sys
import tempfile
import time

STARTED = time.monotonic()
FILES = pathlib.Path(WORK, "experiments")
RUN = pathlib.Path(WORK, "runs", NAME)
FILES.mkdir(parents=True, exist_ok=True)

# %%
if KEEP.startswith("/content/drive"):
    from google.colab import drive

    drive.mount("/content/drive")
elif KEEP.startswith("gs://"):
    from google.colab import auth

    auth.authenticate_user()

# %% [markdown]
# ## The package
#
# Installed beside the JAX that the image brings for its accelerator: JAX is pinned to what is here,
# so pip refuses rather than replaces it.

# %% tags=["parameters", "hidden"]
ARCHIVE = ""  # the package as it was where this notebook was made, in base64


# %%
def pinned() -> pathlib.Path:
    """A constraints file that keeps every part of JAX as it is."""
    found = importlib.metadata.distributions()
    parts = [x for x in found if (x.name or "").startswith(("jax", "libtpu"))]
    path = pathlib.Path(tempfile.mkdtemp(), "constraints.txt")
    path.write_text("".join(f"{x.name}=={x.version}\n" for x in parts if x.name != "jaxtyping"))
    return path


def install() -> None:
    if PACKAGE == "installed":
        return
    wanted = PACKAGE
    if not PACKAGE:
        path = pathlib.Path(tempfile.mkdtemp(), "fm-distill.tar.xz")
        path.write_bytes(base64.b64decode(ARCHIVE))
        wanted = f"fm-distill[plots] @ {path.as_uri()}"
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--constraint", str(pinned())]
    buckets = ["gcsfs"] if KEEP.startswith("gs://") else []
    done = subprocess.run([*pip, wanted, "fsspec", *buckets], capture_output=True, text=True)
    print(done.stdout[-3000:], done.stderr[-3000:])
    if done.returncode:
        raise RuntimeError(f"pip could not install {wanted}: see above")


install()

# %% [markdown]
# ## The experiment

# %% tags=["experiment"]
from fm_distill.errors import EXIT_COMPLETE, EXIT_PAUSED
from fm_distill.notebooks.backup import fetch_copy, keep_copy, keep_file
from fm_distill.notebooks.live import report_and_show, run_and_show

PLACE = f"{KEEP.rstrip('/')}/{NAME}"
resume: list[str] = []
if not RUN.exists():
    copy = fetch_copy(PLACE, tempfile.mkdtemp())
    print(f"continuing the copy in {PLACE}" if copy else f"{PLACE} has no copy: a new run")
    resume = ["--resume-from", os.fspath(copy)] if copy else []

# %% [markdown]
# ## Training
#
# First the views as the networks see them, each at its own resolution, and the learning rate; then
# loss, agreement and accuracy, drawn anew every minute.

# %%
train = [
    sys.executable, "-m", "fm_distill", "train", os.fspath(FILES / EXPERIMENT),
    "--workdir", os.fspath(RUN),
]  # fmt: skip
while True:
    left = HOURS - (time.monotonic() - STARTED) / 3600
    hours = max(min(STRETCH, left), 0.001)
    code = run_and_show([*train, "--max-hours", f"{hours:.3f}", *resume, *OPTIONS], RUN)
    if code not in (EXIT_COMPLETE, EXIT_PAUSED):
        raise RuntimeError(f"the training ended with exit code {code}: see the last lines above")
    print(f"kept as {keep_copy(RUN, PLACE)}", flush=True)
    resume = []
    if code == EXIT_COMPLETE or left <= STRETCH:
        break

# %% [markdown]
# ## What came out
#
# Also in `report.html` beside the copy of the run.

# %%
page = pathlib.Path(WORK, "report.html")
if report_and_show(RUN, page):
    print(f"kept as {keep_file(page, PLACE)}")

# %%
if code == EXIT_COMPLETE:
    print(f"the run {NAME} is complete; it is in {PLACE}")
else:
    print(f"the run {NAME} is paused; run all cells again, here or in a new runtime")
if KEEP.startswith("/content/drive"):
    drive.flush_and_unmount()  # what was written may still be on its way
