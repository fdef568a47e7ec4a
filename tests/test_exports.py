import subprocess
import sys

import pytest

import fasttrain

PUBLIC = """
ConfigError DataError DeviceError EngineError EpochResult FastLoop FasttrainError History Prefetcher Ragged
RecordedLoader FitState Interrupted ResidentBatches RunError RunningMetrics TrainStep count_host_reads prefetch profile
record resident
""".split()


def test_the_public_names_are_these() -> None:
    assert sorted(fasttrain.__all__) == sorted(PUBLIC)
    assert all(getattr(fasttrain, name) is not None for name in PUBLIC)


def test_importing_starts_nothing_and_changes_no_global() -> None:
    code = """
import threading, torch, os
before = (torch.get_num_threads(), torch.get_default_dtype(), torch.initial_seed(), dict(os.environ))
import fasttrain
names = [getattr(fasttrain, name) for name in fasttrain.__all__]
assert (torch.get_num_threads(), torch.get_default_dtype(), torch.initial_seed(), dict(os.environ)) == before
assert threading.active_count() == 1
assert not torch.cuda.is_initialized()
import sys
assert "matplotlib" not in sys.modules and "tyro" not in sys.modules
"""
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True, timeout=120)


def test_pytest_loads_the_fixtures_without_torch() -> None:
    code = """
import sys, fasttrain.measure.pytest_plugin
assert not {"torch", "numpy", "pandas"} & set(sys.modules)
"""
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True, timeout=120)


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'FastLop'"):
        fasttrain.FastLop  # noqa: B018
