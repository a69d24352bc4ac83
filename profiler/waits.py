"""Calls that make the host wait for a GPU, found without one: by what they ask, not by how long they take."""

import sys
from collections import Counter
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from maestri.profiler.findings import Wait

_aten = torch.ops.aten

OPERATIONS: dict[Any, str] = {
    _aten._local_scalar_dense: "item",
    _aten.is_nonzero: "item",
    _aten.nonzero: "nonzero",
    _aten.masked_select: "masked_select",
    _aten.equal: "equal",
    _aten._unique2: "unique",
    _aten.unique_consecutive: "unique",
    _aten.unique_dim: "unique",
}
"""What needs values on the host, or a number of elements that only values tell."""
ROOTS = sorted({str(Path(__file__).resolve().parents[1]), *filter(None, sys.path)}, key=len, reverse=True)
"""Folders that a place is told from, the innermost first."""
OUTSIDE = (str(Path(torch.__file__).parent), __file__)
"""Files whose frames are not a caller's."""
OPTIMIZERS = str(Path(torch.optim.__file__).parent)


class WaitFinder(TorchDispatchMode):
    """Counts, inside its block, the calls of each place; on a GPU each waits for all the work that was given before.

    Work of other threads, as a loader's, is not seen, and neither is what torch has compiled.
    """

    def __init__(self, device: torch.device) -> None:
        """Has found nothing yet; ``device`` is the model's.  On a CPU its tensors stand for a GPU's."""
        super().__init__()  # type: ignore[no-untyped-call]  # torch's base class has no annotations
        self._device = device.type
        self._found: Counter[tuple[str, str]] = Counter()

    @property
    def waits(self) -> list[Wait]:
        """What was found, the most often first."""
        return [
            Wait(place=place, operation=operation, count=count)
            for (place, operation), count in self._found.most_common()
        ]

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), keywords: Any = None) -> Any:
        operation = _operation(function.overloadpacket, arguments, keywords or {})
        if operation and (operation == "copy" or arguments[0].device.type == self._device):
            place = _place(sys._getframe(1))
            if place:
                self._found[place, operation] += 1
        return function(*arguments, **(keywords or {}))


def _operation(packet: Any, arguments: Any, keywords: Any) -> str:
    if packet is _aten.index and any(
        isinstance(leaf, torch.Tensor) and leaf.dtype == torch.bool for leaf in tree_leaves(arguments[1])
    ):
        return "index by bool"
    if packet is _aten._to_copy and _crosses(arguments[0].device, keywords):
        return "copy"
    return OPERATIONS.get(packet, "")


def _crosses(device: torch.device, keywords: Any) -> bool:
    """Returns whether a copy goes from host to device or back, and is waited for."""
    to = keywords.get("device")
    crosses = to is not None and torch.device(to).type != device.type
    return crosses and not keywords.get("non_blocking", False)


def _place(frame: FrameType | None) -> str:
    """Returns ``file:line`` of the innermost frame that is neither torch's nor this file's; empty for an optimizer.

    torch's optimizers count their steps on the host, whatever the device.
    """
    while frame is not None and frame.f_code.co_filename.startswith(OUTSIDE):
        if frame.f_code.co_filename.startswith(OPTIMIZERS):
            return ""
        frame = frame.f_back
    if frame is None:
        return "torch"
    path = Path(frame.f_code.co_filename)
    root = next((root for root in ROOTS if path.is_relative_to(root)), None)
    return f"{path.relative_to(root) if root else path}:{frame.f_lineno}"
