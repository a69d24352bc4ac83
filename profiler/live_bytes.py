"""Bytes that a step has at once, followed storage by storage, where none of them exists: on the ``meta`` device."""

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

from maestri.model.method import Method


class LiveBytes(TorchDispatchMode):
    """Follows, inside its block, the bytes of all storages that a step makes, from their making to their end."""

    def __init__(self, method: Method, *, divided_above: int) -> None:
        """Follows nothing yet.

        Args:
            method: whose step it will be; what it holds already does not count.
            divided_above: elements of the largest parameter that ZeRO 3 leaves whole.
        """
        super().__init__()  # type: ignore[no-untyped-call]  # torch's base class has no annotations
        self.peak = 0
        """Most bytes at once since it was last taken, without gradients of parameters."""
        self.peak_with_gradients = 0
        """Most bytes at once since the beginning, with gradients from their making on."""
        self.saved = 0
        """Bytes that autograd saved, parameters apart."""
        self.saved_parameters = 0
        """Bytes of parameters that ZeRO 3 divides, which autograd refers to."""
        self._live = 0
        self._gradients = 0
        self._seen = WeakIdKeyDictionary()
        self._parameters = [parameter for parameter in method.student.parameters() if parameter.requires_grad]
        for module in (method.student, method.state, *(teacher.module for teacher in method.teachers.values())):
            for tensor in (*module.parameters(), *module.buffers()):
                self._seen[tensor.untyped_storage()] = None
        self._known = {tensor.untyped_storage()._cdata for tensor in method.student.buffers()}
        self._parameter_bytes = {
            parameter.untyped_storage()._cdata: parameter.nbytes if parameter.numel() > divided_above else 0
            for parameter in method.student.parameters()
        }
        self._hooks: list[Any] = []

    def __enter__(self) -> "LiveBytes":
        for parameter in self._parameters:
            self._hooks.append(parameter.register_post_accumulate_grad_hook(self._book))
        super().__enter__()  # type: ignore[no-untyped-call]  # torch's base class has no annotations
        return self

    def __exit__(self, *problem: Any) -> None:
        super().__exit__(*problem)  # type: ignore[no-untyped-call]  # torch's base class has no annotations
        for hook in self._hooks:
            hook.remove()

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), keywords: Any = None) -> Any:
        found = function(*arguments, **(keywords or {}))
        for leaf in tree_leaves(found):
            if isinstance(leaf, Tensor):
                self._note(leaf.untyped_storage())
        self.peak = max(self.peak, self._live - self._gradients)
        self.peak_with_gradients = max(self.peak_with_gradients, self._live)
        return found

    def take_peak(self) -> int:
        """Returns ``peak``, and begins it anew."""
        taken, self.peak = self.peak, self._live - self._gradients
        return taken

    @contextmanager
    def saving(self) -> Iterator[None]:
        """Counts what autograd saves inside the block, as ``activations.saved_bytes``, which asks for addresses."""
        seen = self._known

        def pack(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            if storage._cdata not in seen:
                seen.add(storage._cdata)
                own = self._parameter_bytes.get(storage._cdata)
                self.saved += storage.nbytes() if own is None else 0
                self.saved_parameters += own or 0
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            yield

    def _note(self, storage: torch.UntypedStorage) -> None:
        if storage in self._seen:
            return
        self._seen[storage] = None
        self._live += storage.nbytes()
        weakref.finalize(storage, self._forget, storage.nbytes()).atexit = False

    def _forget(self, num_bytes: int) -> None:
        self._live -= num_bytes

    def _book(self, parameter: Tensor) -> None:
        assert parameter.grad is not None
        self._gradients += parameter.grad.nbytes
