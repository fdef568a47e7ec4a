"""Steps that must not wait for the device: a wait on CUDA is an error inside."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch

__all__ = ["host_waits_are_errors"]


@contextmanager
def host_waits_are_errors() -> Iterator[None]:
    """Has torch raise where the host waits for a CUDA device.

    torch warns, after it has set the mode, that it does not notice all waits. pytest makes an error of that.
    """
    before = torch.cuda.get_sync_debug_mode()
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Synchronization debug mode is a prototype feature")
            torch.cuda.set_sync_debug_mode("error")
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)
