"""What all tests share."""

import os

# Ranks that tests start would otherwise have a thread per core each.  Set before torch and numpy are imported.
for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
    os.environ.setdefault(name, "1")
# A test must not depend on who else uses the machine's launcher variables.
for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
    os.environ.pop(name, None)
