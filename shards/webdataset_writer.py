"""webdataset's ``TarWriter``, imported without torch.

webdataset imports torch if there is one, which takes 1.7 of its 1.9 s (two cores at 2.5 GHz) and 200 MB, and its writer
needs nothing of it.  Only worker processes import this module: elsewhere, webdataset would stay without torch.
"""

import sys
from typing import Any

_has_torch = "torch" in sys.modules
if not _has_torch:
    sys.modules["torch"] = None  # type: ignore[assignment]  # an import of it raises ModuleNotFoundError
try:
    import webdataset
finally:
    if not _has_torch:
        del sys.modules["torch"]

TarWriter: Any = webdataset.TarWriter
