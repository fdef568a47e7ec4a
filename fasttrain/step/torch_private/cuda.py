"""CUDA with torch's private APIs: pools of memory, cuBLAS's workspace, TF32 in cuDNN."""

# pyright: reportPrivateUsage=false

from __future__ import annotations

import threading
from collections.abc import Generator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch

__all__ = ["cudnn_precision", "end_failed_capture", "reserve_workspace", "without_cudnn_tf32"]

Pool = tuple[int, int]
"""What `torch.cuda.graph_pool_handle` returns."""

_CUDNN_OPERATORS = ("conv", "rnn")


_UNENDED: list[torch.cuda.CUDAGraph] = []
"""Graphs whose capture failed. torch's allocator of pinned memory keeps a pointer to each and has no way to end it."""


def end_failed_capture(graph: torch.cuda.CUDAGraph, device: int, pool: Pool) -> bool:
    """Ends the allocation into a graph's pool where `CUDAGraph.capture_end` raised before it did so.

    `capture_end` asks CUDA first and raises at once if the capture was invalidated. The allocator then believes that
    the capture goes on: it refuses the next capture into the pool, and does not reclaim blocks that were recorded on
    another stream.

    Args:
        graph: that was to be captured; it is kept for the life of the process if there was something to end.
        device: the index of the device.
        pool: that the graph was captured into.

    Returns:
        False where nothing was left to end.
    """
    try:
        torch._C._cuda_endAllocateToPool(device, pool)
    except RuntimeError:  # not recording to this pool
        return False
    # A graph gives up its share of the pool when it is deleted, but only if its capture has ended.
    torch._C._cuda_releasePool(device, pool)
    _UNENDED.append(graph)
    return True


def reserve_workspace(device: torch.device) -> None:
    """Has cuBLAS make its workspace for this thread and the current stream, in memory that nothing else gets.

    A CUDA graph that was captured on the stream keeps the workspace's address. torch frees the workspace when somebody
    calls `torch._C._cuda_clearCublasWorkspaces` (as CUDA graphs of `torch.compile` do) and, in newer versions, when any
    graph of the stream is deleted. The graph would then write to memory of other tensors. Here the workspace lies in a
    pool that is never released: freed memory goes back to that pool, and the next workspace of the stream takes it.

    Call it before each warm-up: it launches two small matrix products and does nothing else if there is a workspace.

    Args:
        device: of the current stream.
    """
    left, out = torch.ones(16, 16, device=device), torch.empty(16, 16, device=device)
    index = out.get_device()
    pool = _workspace_pool(index, threading.get_ident())
    # Not `torch.cuda.MemPool`: it would be released with the Python object.
    torch._C._cuda_beginAllocateCurrentThreadToPool(index, pool)
    try:
        torch.mm(left, left, out=out)  # cuBLAS
        torch.addmm(left[0], left, left, out=out)  # cublasLt, which may have a workspace of its own
    finally:
        torch._C._cuda_endAllocateToPool(index, pool)


@cache
def _workspace_pool(_device: int, _thread: int) -> Pool:
    """One for each thread: cuBLAS has a handle and workspaces for each."""
    return torch.cuda.graph_pool_handle()


def cudnn_precision() -> tuple[str, ...]:
    """How cuDNN multiplies fp32 numbers now, in convolutions and recurrent networks: "tf32", "ieee" or "none"."""
    return tuple(torch._C._get_fp32_precision_getter("cuda", name) for name in _CUDNN_OPERATORS)


@contextmanager
def without_cudnn_tf32() -> Generator[None]:
    """Turns TF32 off in cuDNN, where torch has it on by default; puts all settings back as they were.

    torch has two sets of functions for this setting, and reading it with the old ones raises an error after it was
    changed with the new ones. So this changes it with those that the user has used.
    """
    backend: Any = torch.backends.cudnn
    before = cudnn_precision()
    try:
        was_allowed: bool | None = backend.allow_tf32
    except RuntimeError:  # set with the new functions
        was_allowed = None
    if was_allowed is None:
        _set_cudnn_precision(("ieee", "ieee"))
    else:
        backend.allow_tf32 = False
    try:
        yield
    finally:
        if was_allowed is not None:
            backend.allow_tf32 = was_allowed
        if cudnn_precision() != before:
            _set_cudnn_precision(before)


def _set_cudnn_precision(values: tuple[str, ...]) -> None:
    for name, value in zip(_CUDNN_OPERATORS, values, strict=True):
        torch._C._set_fp32_precision_setter("cuda", name, value)
