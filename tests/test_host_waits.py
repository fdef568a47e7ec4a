"""The mode in which waits are errors, on a stand-in for torch's own switch of it."""

from __future__ import annotations

import warnings

import pytest
import torch

from tests.host_waits import host_waits_are_errors


class Switch:
    """Warns at its first use, after the mode is set, as torch's does."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.mode = 0
        self.message = "Synchronization debug mode is a prototype feature and does not yet detect all"
        monkeypatch.setattr(torch.cuda, "get_sync_debug_mode", lambda: self.mode)
        monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", self.set)

    def set(self, mode: str | int) -> None:
        self.mode = {"default": 0, "warn": 1, "error": 2}[mode] if isinstance(mode, str) else mode
        message, self.message = self.message, ""
        if message:
            warnings.warn(message, UserWarning, stacklevel=2)


def test_the_mode_holds_inside_and_is_put_back(monkeypatch: pytest.MonkeyPatch) -> None:
    switch = Switch(monkeypatch)
    with host_waits_are_errors():
        assert switch.mode == 2
    assert switch.mode == 0
    with pytest.raises(ZeroDivisionError), host_waits_are_errors():
        _ = 1 / 0
    assert switch.mode == 0


def test_the_mode_is_put_back_where_setting_it_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    switch = Switch(monkeypatch)
    switch.message = "another warning"
    with pytest.raises(UserWarning, match="another"), host_waits_are_errors():
        pass
    assert switch.mode == 0
