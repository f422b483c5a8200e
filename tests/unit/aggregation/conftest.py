"""Every study here is light (``tests/unit/conftest.py``)."""

import pytest


@pytest.fixture(autouse=True)
def always_light(light: None) -> None:
    """No test here is about scores."""
