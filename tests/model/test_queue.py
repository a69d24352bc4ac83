"""The queue of projections; golden values from the authors' code, see test_maect.py."""

import torch
import torch.nn.functional as F

from maestri.model.queue import NOBODY, NeighbourQueue


def waves(*shape: int, step: float, start: float) -> torch.Tensor:
    """Returns sines of a running number: inputs that need no file."""
    count = torch.Size(shape).numel()
    return torch.sin(torch.arange(count, dtype=torch.float64) * step + start).view(shape).float()


def golden_queue() -> NeighbourQueue:
    queue = NeighbourQueue(size=12, dim=6)
    queue.entries.copy_(F.normalize(waves(12, 6, step=1.7, start=0.3), dim=-1))
    queue.rows.copy_(torch.arange(12) % 6)
    queue.pointer.fill_(8)
    return queue


PROJECTIONS = F.normalize(waves(2, 4, 6, step=0.9, start=0.1), dim=-1)
ROWS = torch.tensor([3, 4, 40, 41])


def filled(count: int, dim: int = 4) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Returns projections that are all equal to their row, rows and labels, from ``count`` on."""
    rows = torch.arange(count, count + 2)
    return rows[:, None].expand(-1, dim).float(), rows, rows * 10


def test_queue__starts_with_unit_vectors_of_nobody_drawn_from_the_seed():
    first, again, other = (NeighbourQueue(size=64, dim=8, seed=seed) for seed in (3, 3, 4))
    torch.testing.assert_close(first.entries.norm(dim=-1), torch.ones(64))
    assert torch.equal(first.entries, again.entries)
    assert not torch.equal(first.entries, other.entries)
    assert bool((first.rows == NOBODY).all()) and bool((first.labels == NOBODY).all())


def test_nearest__is_the_authors_with_own_samples_passed_over():
    queue, zeros = golden_queue(), torch.zeros(2, 4, dtype=torch.int64)
    own = queue.nearest(PROJECTIONS, ROWS, zeros, top_k=1)
    assert own.tolist() == [[4, 9, 4, 5], [0, 0, 3, 9]]
    others = queue.nearest(PROJECTIONS, torch.full((4,), 99), zeros, top_k=1)
    assert others.tolist() == [[9, 4, 4, 5], [0, 0, 3, 9]]


def test_nearest__draws_choose_among_the_authors_top_3():
    queue = golden_queue()
    found = [queue.nearest(PROJECTIONS, ROWS, torch.full((2, 4), draw), top_k=3)[0].tolist() for draw in range(3)]
    assert found == [[4, 9, 4, 5], [1, 1, 7, 10], [6, 7, 9, 2]]


def test_nearest__never_finds_an_own_entry_while_there_are_others():
    queue = NeighbourQueue(size=4, dim=4)
    queue.rows.copy_(torch.tensor([7, 7, 7, 1]))
    query = F.normalize(-queue.entries[3], dim=-1)[None, None]  # as far as can be from the only other
    assert queue.nearest(query, torch.tensor([7]), torch.zeros(1, 1, dtype=torch.int64), top_k=1).item() == 3


def test_commit__is_the_authors_queue_after_an_update():
    queue = golden_queue()
    queue.enqueue(PROJECTIONS[0], ROWS, torch.tensor([0, 1, 2, 3]))
    queue.commit()
    assert queue.rows.tolist() == [0, 1, 2, 3, 4, 5, 0, 1, 3, 4, 40, 41]
    assert queue.labels[8:].tolist() == [0, 1, 2, 3]
    assert queue.pointer == 0
    # Sums of each entry's components.
    sums = [0.744861364, -0.593942389, 0.122728258, 0.388791973, -0.737859190, 0.613284022]
    sums += [-0.149906769, -0.363453234, 0.404017348, 0.615933210, 0.302976355, -0.157077581]
    torch.testing.assert_close(queue.entries.double().sum(dim=1), torch.tensor(sums).double(), rtol=1e-5, atol=1e-6)


def test_commit__first_in_first_out_around_the_end():
    queue = NeighbourQueue(size=6, dim=4)
    for count in range(0, 10, 2):
        queue.enqueue(*filled(count))
        queue.commit()
    assert queue.rows.tolist() == [6, 7, 8, 9, 4, 5]
    assert queue.entries[:, 0].tolist() == [6, 7, 8, 9, 4, 5]
    assert queue.labels.tolist() == [60, 70, 80, 90, 40, 50]
    assert queue.pointer == 4


def test_enqueue__changes_nothing_before_commit_and_nothing_after_rollback():
    queue = NeighbourQueue(size=4, dim=4)
    before = {name: value.clone() for name, value in queue.state_dict().items()}
    queue.enqueue(*filled(0))
    queue.rollback()
    queue.commit()
    assert all(torch.equal(value, before[name]) for name, value in queue.state_dict().items())


def test_state_dict__holds_all_of_it():
    queue, other = NeighbourQueue(size=4, dim=4, seed=1), NeighbourQueue(size=4, dim=4, seed=2)
    queue.enqueue(*filled(0))
    queue.commit()
    other.load_state_dict(queue.state_dict())
    for each in (queue, other):
        each.enqueue(*filled(2))
        each.commit()
    assert all(torch.equal(value, queue.state_dict()[name]) for name, value in other.state_dict().items())
    assert queue.entries.dtype == torch.float32
