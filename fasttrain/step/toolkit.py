"""What compiling for CUDA needs besides torch: the toolkit's headers, and the driver's library to link with."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import torch

from fasttrain.errors import EngineError

__all__ = ["cuda_environment", "cuda_home"]

HEADERS = ("cuda.h", "crt/host_defines.h", "nv/target")
"""Those that the compiler has asked for; in wheels each is of another package."""

DRIVER = "libcuda.so"
USUAL_HOME = Path("/usr/local/cuda")
MAPS = Path("/proc/self/maps")

NVCC_S = 10.0
"""How long `nvcc` may take to tell where its toolkit is; it takes milliseconds."""


def cuda_home() -> Path:
    """The folder of a toolkit whose headers a program for CUDA can be compiled with.

    Raises:
        EngineError: there is none.
    """
    home = next(filter(_is_toolkit, _homes()), None)
    if home is None:
        raise EngineError(
            "compiling for a GPU needs the CUDA headers, and none were found: install the CUDA toolkit (and set "
            "CUDA_HOME), or its packages of headers, `pip install nvidia-cuda-crt nvidia-cuda-cccl`"
        )
    return home


def cuda_environment(folder: Path) -> dict[str, str]:
    """The environment variables by which torch's compiler finds headers and driver.

    torch's own search goes wrong where `nvcc` is a script in another folder, does not look into wheels, and expects a
    `libcuda.so`, which most machines have under its full name alone.

    Args:
        folder: an empty one, which stays while the compiler runs.

    Raises:
        EngineError: there are no such headers.
    """
    home = cuda_home()
    found = {"CUDA_HOME": str(home), "CPATH": _joined("CPATH", *map(str, _include_folders(home)))}
    driver = _loaded_driver()
    if driver is not None:
        (folder / DRIVER).symlink_to(driver)
        found["LIBRARY_PATH"] = _joined("LIBRARY_PATH", str(folder))
    return found


def _homes() -> Iterator[Path]:
    """Where a toolkit may be, the user's own word first."""
    for name in ("CUDA_HOME", "CUDA_PATH"):
        if name in os.environ:
            yield Path(os.environ[name])
    yield USUAL_HOME
    nvcc = shutil.which("nvcc")
    if nvcc is not None:
        yield Path(nvcc).resolve().parents[1]
        yield from _home_by_nvcc(nvcc)
    wheels = Path(torch.__file__).parents[1] / "nvidia"
    yield from sorted(wheels.glob("cu[0-9]*"), reverse=True)


def _home_by_nvcc(nvcc: str) -> Iterator[Path]:
    """The toolkit's folder as `nvcc` itself tells: where that is a script, the folder is not near the script."""
    command = [nvcc, "--dryrun", "-x", "cu", "-c", os.devnull, "-o", os.devnull]
    try:
        ended = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=NVCC_S, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return
    # Of the toolkit's settings, which nvcc prints to stderr: "#$ TOP=/opt/cuda/bin/.."
    for top in re.findall(r"^#\$ TOP=(.+)$", ended.stderr + "\n" + ended.stdout, flags=re.MULTILINE):
        yield Path(top.strip()).resolve()


def _is_toolkit(home: Path) -> bool:
    folders = _include_folders(home)
    return all(any((folder / header).is_file() for folder in folders) for header in HEADERS)


def _include_folders(home: Path) -> list[Path]:
    return [home / "include", home / "include" / "cccl"]


def _joined(name: str, *folders: str) -> str:
    """A search path with folders in front of those that are there already."""
    return os.pathsep.join([*folders, *filter(None, [os.environ.get(name)])])


def _loaded_driver() -> str | None:
    """The file of the CUDA driver that this process has loaded, None where it has none or the system does not tell."""
    try:
        lines = MAPS.read_text(encoding="utf-8").splitlines()
    except OSError:
        return None
    files = (line.split(maxsplit=5)[-1] for line in lines)
    return next((file for file in files if Path(file).name.startswith(DRIVER)), None)
