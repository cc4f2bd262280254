"""For all tests: one thread a process, and `slow` and `gpu` tests only where they are asked for or possible."""
import os

for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"): os.environ.setdefault(name, "1")

import pytest


def pytest_addoption(parser):
    parser.addoption("--slow", action="store_true", help="also run tests that take minutes or install packages")


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: takes minutes or installs packages; runs with --slow")
    config.addinivalue_line("markers", "gpu: needs a CUDA device; skipped where there is none")


def pytest_collection_modifyitems(config, items):
    for item in items:
        if item.get_closest_marker("slow") and not config.getoption("--slow"):
            item.add_marker(pytest.mark.skip(reason="slow: make test SLOW=1"))
        if item.get_closest_marker("gpu"):
            import torch
            if not torch.cuda.is_available(): item.add_marker(pytest.mark.skip(reason="no CUDA device"))
