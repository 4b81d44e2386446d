# %% [markdown]
# # Function matching on Kaggle
#
# One session of one run of [fm-distill](https://arxiv.org/abs/2106.05237): it trains until the run
# is complete or the session's hours are used, and shows what there is to see. The next session
# takes this one's output as its input and goes on, bit for bit.
#
# Made by `tools/kaggle/make_kernel.py`, which fills in the next cell.

# %% tags=["parameters"]
NAME = "digits"  # of the run, which lies in WORK/runs/NAME
EXPERIMENT = "digits.py"
OPTIONS: list[str] = []  # of `fm-distill train`; @OWNER/SLUG/PATH is a path inside an input
SESSION = 1
PREVIOUS = ""  # the kernel whose output is continued, as OWNER/SLUG
HOURS = 8.5  # from the first cell to the end of the training
PACKAGE = ""  # for pip; "installed": the image has it; empty: the archive in this notebook
WHEELS = ""  # without internet, the data set with the wheels, as OWNER/SLUG
INPUT = "/kaggle/input"
WORK = "/kaggle/working"
NEXT = ""  # the line that makes the next session

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


def find_input(source: str) -> pathlib.Path:
    """Where this image has put the data set, model or kernel output OWNER/SLUG."""
    owner, slug, *inside = source.split("/")
    kinds = ("datasets", "notebooks", "models")
    places = [pathlib.Path(INPUT, slug), *(pathlib.Path(INPUT, x, owner, slug) for x in kinds)]
    for place in places:
        if place.is_dir():
            return place.joinpath(*inside)
    have = sorted(str(x) for x in pathlib.Path(INPUT).glob("*"))
    raise RuntimeError(f"the input {source} is not under {INPUT}; there is {', '.join(have)}")


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
    wanted = [PACKAGE]
    if WHEELS:
        # A data set that was made from a folder may lie one folder deeper.
        folders = sorted({str(x.parent) for x in find_input(WHEELS).rglob("*.whl")})
        wanted = ["--no-index", *(f"--find-links={x}" for x in folders), "fm-distill[plots]"]
    elif not PACKAGE:
        path = pathlib.Path(tempfile.mkdtemp(), "fm-distill.tar.xz")
        path.write_bytes(base64.b64decode(ARCHIVE))
        wanted = [f"fm-distill[plots] @ {path.as_uri()}"]
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--constraint", str(pinned())]
    done = subprocess.run([*pip, *wanted], capture_output=True, text=True)
    print(done.stdout[-3000:], done.stderr[-3000:])
    if done.returncode:
        raise RuntimeError(f"pip could not install {wanted[-1]}: see above")


install()

# %% [markdown]
# ## The experiment

# %% tags=["experiment"]
options = [str(find_input(x[1:])) if x.startswith("@") else x for x in OPTIONS]
if PREVIOUS:
    previous = find_input(PREVIOUS) / "runs" / NAME
    print(f"session {SESSION} continues {previous}")
    options += ["--resume-from", os.fspath(previous)]

# %% [markdown]
# ## Training
#
# First the views as the networks see them, each at its own resolution, and the learning rate; then
# loss, agreement and accuracy, drawn anew every minute.

# %%
from fm_distill.errors import EXIT_COMPLETE, EXIT_PAUSED
from fm_distill.notebooks.live import report_and_show, run_and_show

hours = HOURS - (time.monotonic() - STARTED) / 3600
code = run_and_show(
    [
        sys.executable, "-m", "fm_distill", "train", os.fspath(FILES / EXPERIMENT),
        "--workdir", os.fspath(RUN), "--max-hours", f"{hours:.3f}", *options,
    ],
    RUN,
)  # fmt: skip
if code not in (EXIT_COMPLETE, EXIT_PAUSED):
    raise RuntimeError(f"the training ended with exit code {code}: see the last lines above")

# %% [markdown]
# ## What came out
#
# Also in `report.html`, in the output of this session.

# %%
page = pathlib.Path(WORK, "report.html")
report_and_show(RUN, page)

# %%
if code == EXIT_COMPLETE:
    print(f"the run {NAME} is complete; it is in runs/{NAME} of this session's output")
else:
    print(f"the run {NAME} is paused. When this session is saved, continue it with\n{NEXT}")
