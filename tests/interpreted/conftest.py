"""What the host code of the CUDA ops does that no other backend has: launches, tables, plans and errors of the driver.

The driver is the stand-in of tests/standin.py, on CPU tensors. By hand:

    TRITON_INTERPRET=1 python -m pytest tests/interpreted/test_launcher.py
"""

import pytest


@pytest.fixture(autouse=True)
def _interpreting(driver, poisoned):
    """In every test here launches are interpreted, and fresh memory is NaN."""
