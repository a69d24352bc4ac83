"""The DALI executor: one graph for ``cpu`` and ``gpu`` that carries a plan out and draws nothing itself."""

from collections import deque
from collections.abc import Callable
from typing import Any, NoReturn

import numpy as np
import torch
from torch import Tensor
from torch.utils.dlpack import from_dlpack

from maestri.pipelines.corruption import corrupt
from maestri.pipelines.dali_graph import INTERPOLATION, batch_arguments, has_conditions, view_graph
from maestri.pipelines.executor import ExecutorOptions, PlannedBatch, Plans, Source, with_index
from maestri.pipelines.memory import BatchMemory
from maestri.pipelines.views import CORRUPTED
from maestri.shards.jpeg import read_header
from maestri.shards.jpeg_damage import find_damage


class DaliExecutor:
    """An iterator of (planned batch, its views), a few batches ahead of the caller.

    The source is called in the caller's thread, inside ``next``; decoding and resizing run in DALI's threads or on the
    GPU.  A sample that DALI can't decode fails its whole batch and leaves the graph in an undefined state.  Then the
    samples are tried one by one, the source replaces those that fail, and a new graph is fed again with all that was
    planned and not handed out.  An exception of the source is raised where it belongs: after the last good batch.
    """

    def __init__(self, source: Source, options: ExecutorOptions) -> None:
        """Notes what to do; the graph is built, and reading begins, with the first ``next``.

        Raises:
            ValueError: DALI doesn't run on the device.
        """
        self._source = source
        self._plans = Plans(source)
        self._options = options
        self._shapes = dict(options.shapes)
        self._device = with_index(options.device)
        self._pipeline: Any = None
        self._planned: deque[PlannedBatch] = deque()
        """Planned and not handed out, in order."""
        self._num_fed = 0
        """How many of these the graph has got."""
        self._decodes_windows = False
        """Whether the graph decodes windows alone."""
        self._is_closed = False
        self._memory = BatchMemory()
        self._in_use: deque[tuple[Any, Any]] = deque()

    def __iter__(self) -> "DaliExecutor":
        """Returns itself."""
        return self

    def __next__(self) -> tuple[PlannedBatch, dict[str, Tensor]]:
        """Returns the next batch's work and its views, uint8 ``view batch 3 height width`` by group (channels-last).

        Raises:
            RuntimeError: DALI failed, and not because of a sample.
            TooManyBadSamples: the source's budget of bad samples is spent.
        """
        outputs = self._next_outputs()
        planned = self._planned.popleft()
        self._num_fed -= 1
        views, first = {}, 0
        for name, shape in self._shapes.items():
            views[name] = self._hand_over(outputs[first : first + shape.count])
            first += shape.count
        self._release(outputs)
        for name, group in planned.plan.groups.items():
            if group.corruption is not None:
                views[name + CORRUPTED] = corrupt(views[name], group.corruption, group.token_mask)
        return planned, views

    def close(self) -> None:
        """Ends DALI's threads and frees its memory; can be called twice.  Views handed out stay valid."""
        self._is_closed = True
        self._drop_graph()
        self._planned.clear()

    def _next_outputs(self) -> tuple[Any, ...]:
        """Returns the graph's outputs for the first of the planned batches."""
        while not self._is_closed:
            # Planned here, and not by DALI's callback, so that "DALI" is the time of DALI alone.
            while len(self._planned) < self._options.prefetch and self._plan_next():
                pass
            if not self._planned:
                break
            try:
                if self._pipeline is None:
                    self._pipeline = self._graph(self._feed, self._options.batch_size, self._options.prefetch)
                with self._options.stages.at("DALI"):
                    return self._run(self._pipeline)
            except RuntimeError as error:
                self._recover(error)
        self.close()
        raise self._plans.error or StopIteration

    def _plan_next(self) -> bool:
        """Asks the source for another batch; returns False where there is none."""
        planned = self._plans.next()
        if planned is None:
            return False
        self._planned.append(planned)
        return True

    def _feed(self, _: int) -> list[Any]:
        """Returns the arguments of the next batch that the graph has not got: DALI's callback."""
        if self._num_fed == len(self._planned) and not self._plan_next():
            raise StopIteration
        planned = self._planned[self._num_fed]
        arguments = batch_arguments(planned, self._shapes, decodes_windows=self._decodes_windows)
        self._num_fed += 1
        return arguments

    def _recover(self, error: RuntimeError) -> None:
        """Has the first batch's undecodable samples replaced; raises the error where it has none."""
        self._drop_graph()
        planned = self._planned[0]
        bad = self._find_bad(planned)
        if not bad:
            self._fail(
                RuntimeError(f"DALI failed on the batch of rows {planned.samples.rows.tolist()}: {error}"), error
            )
        try:
            self._planned[0] = self._source.replace(planned, bad)
        except Exception as refusal:
            self._fail(refusal, error)

    def _fail(self, error: Exception, cause: Exception) -> NoReturn:
        """Closes and raises the error, as each later ``next`` will."""
        self._plans.error = error
        self.close()
        raise error from cause

    def _find_bad(self, planned: PlannedBatch) -> dict[int, str]:
        """Returns the numbers of the samples that fail in a batch of their own, and why.

        The graph itself is the judge: other decoders refuse other samples, and what is replaced must not depend on
        which batch a sample is in.
        """
        arguments = batch_arguments(planned, self._shapes, decodes_windows=self._decodes_windows)
        rows = planned.samples.rows.tolist()
        bad: dict[int, str] = {}
        graph, number = None, 0

        def feed(_: int) -> list[Any]:
            return [values[number : number + 1] for values in arguments]

        for number, row in enumerate(rows):
            graph = graph or self._graph(feed, batch_size=1, prefetch=1)
            try:
                with self._options.stages.at("DALI", f"row {row}"):
                    self._run(graph)
            except RuntimeError as error:
                bad[number] = _reason(planned.samples.encoded[number].tobytes(), error)
                graph = None
        return bad

    def _graph(self, feed: Callable[[int], list[Any]], batch_size: int, prefetch: int) -> Any:
        """Returns a new graph that gets its arguments from ``feed``."""
        on_gpu = self._device.type == "cuda"
        is_one_view = [shape.count for shape in self._shapes.values()] == [1]
        # A window that is resized with its surroundings (float32) needs them decoded.
        self._decodes_windows = not on_gpu and is_one_view and self._windows_are_cut()
        return view_graph(
            source=feed,
            shapes=self._shapes,
            device="gpu" if on_gpu else "cpu",
            interpolation=INTERPOLATION[self._options.interpolation],
            antialias=self._options.antialias,
            decodes_windows=self._decodes_windows,
            hardware_decoder=self._options.hardware_decoder,
            enable_conditionals=has_conditions(self._shapes),
            batch_size=batch_size,
            num_threads=self._options.num_threads,
            device_id=self._device.index if on_gpu else None,
            prefetch_queue_depth=prefetch,
        )

    def _windows_are_cut(self) -> bool:
        """Returns whether the first planned batch's windows are cut out before the resize."""
        return all(group.windows.dtype == np.int32 for group in self._planned[0].plan.groups.values())

    def _drop_graph(self) -> None:
        """Ends the graph; what it was fed and has not returned is to be fed again."""
        while self._in_use:
            self._in_use.popleft()[0].synchronize()
        self._pipeline = None
        self._num_fed = 0

    def _run(self, graph: Any) -> tuple[Any, ...]:
        """Returns a graph's next outputs, ordered on this thread's current torch stream if they are on a GPU."""
        if self._device.type == "cpu":
            return tuple(graph.run())
        return tuple(graph.run(torch.cuda.current_stream(self._device)))

    def _hand_over(self, outputs: tuple[Any, ...]) -> Tensor:
        """Returns the views as one tensor ``view batch 3 height width``.

        On the CPU a single view is DALI's own memory, without a copy: with the default executor a tensor made through
        DLPack owns it.  Several views are joined by the one copy of this path.
        """
        views = [from_dlpack(output.as_tensor()) for output in outputs]
        if self._device.type != "cpu":
            joined = torch.stack(views)
        elif len(views) == 1:
            joined = views[0][None]
        else:
            joined = self._memory.borrow((len(views), *views[0].shape))
            torch.stack(views, out=joined)
        return joined.permute(0, 1, 4, 2, 3)

    def _release(self, outputs: tuple[Any, ...]) -> None:
        """Keeps a GPU batch's DALI memory until the copy out of it, queued on torch's stream, is done."""
        if self._device.type == "cpu":
            return
        done: Any = torch.cuda.Event()
        done.record(torch.cuda.current_stream(self._device))
        self._in_use.append((done, outputs))
        while self._in_use and (len(self._in_use) > 4 or self._in_use[0][0].query()):
            # Waits only where the caller has queued four batches' work without the GPU having begun on the first.
            self._in_use.popleft()[0].synchronize()


def _reason(encoded: bytes, error: RuntimeError) -> str:
    """Returns why DALI failed on a sample, on one line."""
    text = " ".join(str(error).rpartition("encountered:")[2].partition("Current pipeline")[0].split())
    if text and "Failed to decode" not in text:
        return f"DALI: {text}"
    # DALI says no more than that; the reason is libjpeg's, which it uses on the CPU.
    header = read_header(encoded)
    damage = find_damage(encoded, header) if header is not None else ""
    return f"DALI can't decode it{': ' if damage else ''}{damage}"
