"""torch and transformers for the tests of the lower floors: imported when a test first uses them.

Where they are not installed, these tests are skipped, and all others of the same file run.
"""

from typing import Any

import pytest


class Late:
    """A module that is imported when one of its names is asked for."""

    def __init__(self, name: str):
        self._name = name

    def __getattr__(self, attribute: str) -> Any:
        return getattr(pytest.importorskip(self._name), attribute)


torch = Late("torch")
transformers = Late("transformers")
activations = Late("transformers.activations")
integration = Late("transformers.integrations.bitnet")
modeling = Late("transformers.models.bitnet.modeling_bitnet")
