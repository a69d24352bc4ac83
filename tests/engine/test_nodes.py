"""Two nodes, each a network namespace; the other proofs are in tools/rehearse_nodes.py."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from rehearse_nodes import rehearsed

TOOL = Path(__file__).resolve().parents[2] / "tools" / "rehearse_nodes.py"


def test_rehearsed__two_nodes_equal_two_ranks_on_one(undisturbed: Any) -> None:
    found = rehearsed("same", undisturbed.folder, "torchrun", undisturbed.steps)
    assert list(found) == []


def test_main__without_ip_refuses_in_one_line(tmp_path: Path) -> None:
    environment = os.environ | {"PATH": str(tmp_path)}
    done = subprocess.run([sys.executable, str(TOOL)], env=environment, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr == (
        "rehearse_nodes.py: there is no ip and no unshare and no nsenter; install iproute2 and util-linux\n"
    )
