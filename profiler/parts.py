"""Which part of the step runs: module calls, their backward passes, chosen calls, and the step's spans."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.autograd.graph import Node
from torch.utils._pytree import tree_leaves

from maestri.engine.spans import SpanRecorder, current_recorder, recording
from maestri.model.method import Method
from maestri.profiler.findings import UNNAMED

BACKWARD = " backward"
"""Behind a part's name: its backward pass."""


class PartFollower(ABC):
    """Follows, inside its block, which part runs; subclasses book on it what they measure.

    A part is a module's calls, or a span of the step outside of those.  Of two, one inside the other, the inner one
    counts.  A part's backward pass has a name of its own, the part's and ``BACKWARD``: each node of autograd's graph
    that a call leaves behind knows its part.
    """

    def __init__(self, parts: Mapping[str, Sequence[nn.Module]]) -> None:
        """Follows nothing yet; ``parts`` are modules by the name of their part."""
        self._parts = parts
        self._names: list[str] = []
        self._marked: dict[Node, str] = {}
        self._stack = ExitStack()

    @abstractmethod
    def settle(self, part: str) -> None:
        """Books on ``part``, which ran, what was measured since the last call."""

    def enter_context(self, context: Any) -> None:
        """Enters a context that ends with the block."""
        self._stack.enter_context(context)

    def __enter__(self) -> Self:
        """Starts following."""
        for part, modules in self._parts.items():
            for module in modules:
                before = module.register_forward_pre_hook(self._entering(part), prepend=True)
                after = module.register_forward_hook(self._leaving(part), always_call=True)
                self._stack.callback(before.remove)
                self._stack.callback(after.remove)
        self._stack.enter_context(recording(_SpanNames(self.named)))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Stops following."""
        self._change()
        self._stack.close()
        self.forget()

    @contextmanager
    def named(self, part: str) -> Iterator[None]:
        """Makes its block a part."""
        self._enter_part(part)
        try:
            yield
        finally:
            self._leave_part()

    def follow_call(self, owner: Any, method: str, part: str) -> None:
        """Makes every call of ``owner.method`` a part, until the block ends."""
        original = getattr(owner, method)
        was_own = method in vars(owner)

        def call(*arguments: Any, **keywords: Any) -> Any:
            with self.named(part):
                return original(*arguments, **keywords)

        setattr(owner, method, call)
        self._stack.callback(lambda: setattr(owner, method, original) if was_own else delattr(owner, method))

    def forget(self) -> None:
        """Forgets the nodes of a graph that is gone."""
        self._marked.clear()

    def _change(self) -> None:
        self.settle(self._names[-1] if self._names else UNNAMED)

    def _enter_part(self, part: str) -> None:
        self._change()
        self._names.append(part)

    def _leave_part(self) -> None:
        self._change()
        self._names.pop()

    def _entering(self, part: str) -> Callable[..., None]:
        def hook(module: nn.Module, arguments: Any) -> None:
            self._enter_part(part)

        return hook

    def _leaving(self, part: str) -> Callable[..., None]:
        def hook(module: nn.Module, arguments: Any, outputs: Any) -> None:
            self._leave_part()
            ends = {tensor.grad_fn for tensor in tree_leaves(arguments) if isinstance(tensor, Tensor)}
            starts = [tensor.grad_fn for tensor in tree_leaves(outputs) if isinstance(tensor, Tensor)]
            self._mark([node for node in starts if node is not None], ends, part + BACKWARD)

        return hook

    def _mark(self, nodes: list[Node], ends: set[Node | None], part: str) -> None:
        """Names the nodes behind ``nodes``, up to ``ends``, that no inner part has named."""
        while nodes:
            node = nodes.pop()
            if node in ends or node in self._marked:
                continue
            self._marked[node] = part
            # Those that add to a parameter's gradient compute nothing, and outlive the step.
            if type(node).__name__ != "AccumulateGrad":
                node.register_prehook(lambda _, part=part: self._enter_part(part))
                node.register_hook(lambda *_: self._leave_part())
            nodes += [following for following, _ in node.next_functions if following is not None]


class _SpanNames(SpanRecorder):
    """Lets a follower see the spans of a step, which are recorded as before."""

    def __init__(self, named: Callable[[str], Any]) -> None:
        super().__init__(torch.device("cpu"))
        self._named = named
        self._outer = current_recorder()

    @contextmanager
    def measure(self, name: str) -> Iterator[None]:
        """Names its block."""
        with self._named(name), self._outer.measure(name) if self._outer else nullcontext():
            yield


def parts_of(method: Method) -> dict[str, list[nn.Module]]:
    """Returns a method's modules by part: each teacher by its role; the student's encoder, decoder and heads."""
    parts = {role: list(teacher.module.children()) for role, teacher in method.teachers.items()}
    for name, module in method.student.named_children():
        parts.setdefault("heads" if name.endswith("head") else name, []).append(module)
    return parts
