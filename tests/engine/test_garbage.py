"""Python's collector runs after chosen steps only, and as before afterwards."""

import gc
import weakref

from maestri.engine.garbage import collected_in_step


class Cycle:
    """Refers to itself, so only the collector frees it."""

    def __init__(self) -> None:
        self.itself = self


def test_collected_in_step__collects_after_each_so_many_steps() -> None:
    with collected_in_step(2) as collect:
        assert not gc.isenabled()
        found = weakref.ref(Cycle())
        collect(1)
        assert found() is not None
        collect(2)
        assert found() is None
    assert gc.isenabled() and gc.get_freeze_count() == 0


def test_collected_in_step__0_leaves_it_to_python() -> None:
    with collected_in_step(0) as collect:
        assert gc.isenabled()
        found = weakref.ref(Cycle())
        collect(0)
        assert found() is not None


def test_collected_in_step__what_was_there_before_is_freed_afterwards() -> None:
    kept = Cycle()
    found = weakref.ref(kept)
    with collected_in_step(1) as collect:
        del kept
        collect(1)
        assert found() is not None
    gc.collect()
    assert found() is None
