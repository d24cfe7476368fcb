"""Which client the recipes speak through: ours, or the official SDK with TINSMITH_SDK=tinker.

    from tinsmith_cookbook.sdk import tinker

Both have the names the recipes use. This is the one place that chooses.
"""

import os
from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import tinsmith as tinker
else:
    tinker = import_module(os.environ.get("TINSMITH_SDK", "tinsmith"))

__all__ = ["tinker"]
