"""State that a micro-step changes only where its optimizer step is made: centres, codebooks, queues."""

from abc import ABC, abstractmethod

from torch import nn


class Staged(nn.Module, ABC):
    """A part of a method's state: a micro-step stages its update, which is then made or forgotten."""

    @abstractmethod
    def commit(self) -> None:
        """Makes the staged update; nothing if there is none."""

    @abstractmethod
    def rollback(self) -> None:
        """Forgets it."""


def commit(state: nn.Module) -> None:
    """Makes the updates that all parts of a method's state have staged."""
    for part in _staged_parts(state):
        part.commit()


def rollback(state: nn.Module) -> None:
    """Forgets them."""
    for part in _staged_parts(state):
        part.rollback()


def _staged_parts(state: nn.Module) -> list[Staged]:
    return [module for module in state.modules() if isinstance(module, Staged)]
