"""What every test shares: no hub, fixed seeds, a thread count that does not fight the other worker."""

from __future__ import annotations

import os

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # the suite needs nothing from outside; say so to the libraries as well


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--support", help="write what tests marked with `support` have shown to this JSON file")


def pytest_configure(config: pytest.Config) -> None:
    import torch

    if config.getoption("--support"):
        from support import Recorder

        config.pluginmanager.register(Recorder(config.getoption("--support")))

    if os.environ.get("PYTEST_XDIST_WORKER"):
        torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seed() -> None:
    import numpy as np
    import torch

    torch.manual_seed(0)
    np.random.seed(0)


@pytest.fixture
def refused(request: pytest.FixtureRequest):
    """Call it with the exception where a test of `support` expects a refusal."""

    def refuse(error: BaseException) -> None:
        request.node.refused = str(error).splitlines()[0]

    return refuse


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item):
    out = yield
    if item.config.getoption("--support") and item.get_closest_marker("support"):
        from dataclasses import asdict

        from support import cells_of

        said = [asdict(cell) for cell in cells_of(item, getattr(item, "refused", ""))]
        item.user_properties.append(("support", said))
    return out


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    import torch

    if torch.cuda.is_available():
        return
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
