"""The file of a profile: where it is, and that it stays small."""

from __future__ import annotations

from pathlib import Path

from fasttrain.errors import DataError
from fasttrain.measure.profiling.record import Profile, check_name
from fasttrain.measure.strict import read_json

__all__ = ["MAX_BYTES", "make_folder", "profile_path", "read_profile", "write_profile"]

MAX_BYTES = 48 * 1024


def profile_path(out: Path, workload: str, device_type: str, name: str) -> Path:
    """Where a profile is kept: <out>/<workload>-<device>/<name>.json.

    Raises:
        ConfigError: a name is none.
    """
    return out / f"{check_name(workload)}-{device_type}" / f"{check_name(name)}.json"


def make_folder(folder: Path) -> None:
    """Makes the folder of profiles, and those above it, where they are not there.

    Raises:
        DataError: it cannot be made; a file is in the way, for instance.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(f"the folder cannot be made: {error.strerror or error}", file=str(folder)) from error


def write_profile(profile: Profile, path: Path) -> None:
    """Writes a profile, and the folders above it.

    Raises:
        DataError: it is larger than 48 KB, or cannot be written.
    """
    text = profile.to_text().encode()
    if len(text) > MAX_BYTES:
        raise DataError(f"the profile has {len(text):,} bytes, more than the {MAX_BYTES:,} allowed", file=str(path))
    make_folder(path.parent)
    try:
        path.write_bytes(text)
    except OSError as error:
        raise DataError(f"cannot be written: {error.strerror or error}", file=str(path)) from error


def read_profile(path: Path) -> Profile:
    """Reads a profile from anywhere: whatever it holds, it is checked and nothing of it is run.

    Raises:
        DataError: it is no profile; says why.
    """
    content = read_json(path)
    try:
        return Profile.from_dict(content)
    except DataError as error:
        raise DataError(error.problem, file=str(path)) from None
