"""Where the CUDA headers and the driver's library are looked for."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from fasttrain.errors import EngineError
from fasttrain.step import build
from fasttrain.step.build import HEADERS, cuda_environment


def headers(home: Path, *, of_cccl: str = "include/cccl") -> Path:
    """A toolkit's folder of headers, as they lie in CUDA 13."""
    for header in HEADERS:
        path = home / (of_cccl if header.startswith("nv/") else "include") / header
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    return home


@pytest.fixture(autouse=True)
def nothing_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("CUDA_HOME", "CUDA_PATH", "CPATH", "LIBRARY_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(build, "USUAL_HOME", tmp_path / "usual")
    monkeypatch.setattr(build, "MAPS", tmp_path / "maps")
    monkeypatch.setattr(build.torch, "__file__", str(tmp_path / "site" / "torch" / "__init__.py"))
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))


def folder_for(tmp_path: Path) -> Path:
    folder = tmp_path / "child"
    folder.mkdir()
    return folder


def test_without_headers_it_says_what_to_install(tmp_path: Path) -> None:
    with pytest.raises(EngineError, match="needs the CUDA headers, and none were found: install the CUDA toolkit"):
        cuda_environment(folder_for(tmp_path))


def test_a_folder_that_lacks_one_is_passed_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As the wheels that torch needs lack those of two other wheels."""
    lacking = headers(tmp_path / "lacking")
    (lacking / "include" / "crt" / "host_defines.h").unlink()
    monkeypatch.setenv("CUDA_HOME", str(lacking))
    home = headers(tmp_path / "usual", of_cccl="include")
    assert cuda_environment(folder_for(tmp_path))["CUDA_HOME"] == str(home)


def test_the_users_own_word_comes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    headers(tmp_path / "usual")
    monkeypatch.setenv("CUDA_PATH", str(headers(tmp_path / "own")))
    monkeypatch.setenv("CPATH", "before")
    found = cuda_environment(folder_for(tmp_path))
    assert found["CUDA_HOME"] == str(tmp_path / "own")
    include = tmp_path / "own" / "include"
    assert found["CPATH"].split(os.pathsep) == [str(include), str(include / "cccl"), "before"]


def test_nvcc_and_wheels_are_followed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wheels = headers(tmp_path / "site" / "nvidia" / "cu13")
    assert cuda_environment(folder_for(tmp_path))["CUDA_HOME"] == str(wheels)
    home = headers(tmp_path / "toolkit")
    for path in (home / "bin" / "nvcc", tmp_path / "bin"):
        path.parent.mkdir(parents=True, exist_ok=True)
    (home / "bin" / "nvcc").touch(0o700)
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "nvcc").symlink_to(home / "bin" / "nvcc")
    (tmp_path / "child").rmdir()
    assert cuda_environment(folder_for(tmp_path))["CUDA_HOME"] == str(home)


@pytest.mark.parametrize(
    ("script", "is_found"),
    [
        ('echo "#$ _NVVM_BRANCH_=nvvm" >&2; echo "#$ TOP={home}/bin/.." >&2; echo "#$ cicc" >&2', True),
        ('echo "#$ TOP={home}/bin/.." >&2; exit 1', True),
        ('echo "$@" | grep -q -e --dryrun || exit 1; echo "#$ TOP={home}/bin/.." >&2', True),
        ("echo nvcc: not here >&2; exit 127", False),
        ("exec sleep 60", False),
    ],
)
def test_where_nvcc_is_a_script_it_is_asked(
    script: str, is_found: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The folder above the script's is no toolkit then."""
    home = headers(tmp_path / "a toolkit")
    (home / "bin").mkdir()
    nvcc = tmp_path / "bin" / "nvcc"
    nvcc.parent.mkdir()
    nvcc.write_text(f"#!/bin/sh\nPATH=/usr/bin:/bin\n{script.format(home=home)}\n")
    nvcc.chmod(0o700)
    monkeypatch.setattr(build, "NVCC_S", 5.0 if is_found else 0.5)
    if is_found:
        assert cuda_environment(folder_for(tmp_path))["CUDA_HOME"] == str(home)
    else:
        with pytest.raises(EngineError, match="none were found"):
            cuda_environment(folder_for(tmp_path))


def test_the_driver_is_linked_under_the_name_that_the_linker_wants(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    headers(tmp_path / "usual")
    driver = tmp_path / "a folder" / "libcuda.so.580.1"
    driver.parent.mkdir()
    driver.touch()
    (tmp_path / "maps").write_text(
        "7f00-7f01 r-xp 00000000 fe:00 12   /lib/libcudart.so.13\n7f02-7f03 rw-p 00000000 00:00 0\n"
        f"7f04-7f05 r-xp 00000000 fe:00 13   {driver}\n"
    )
    monkeypatch.setenv("LIBRARY_PATH", "before")
    folder = folder_for(tmp_path)
    assert cuda_environment(folder)["LIBRARY_PATH"].split(os.pathsep) == [str(folder), "before"]
    assert (folder / "libcuda.so").resolve() == driver


def test_without_a_loaded_driver_the_linker_finds_its_own(tmp_path: Path) -> None:
    headers(tmp_path / "usual")
    (tmp_path / "maps").write_text("7f02-7f03 rw-p 00000000 00:00 0 \n")
    assert "LIBRARY_PATH" not in cuda_environment(folder_for(tmp_path))
