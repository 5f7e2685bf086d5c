"""Views of a long log, made anew: the partitions of `decisions` are folded side by side, by several processes.

A run is in one partition only, so nothing that is known of one partition matters in another. Each process makes ordinary views of
its partitions, with the code that follows the topics afterwards, in a file of its own; then the rows of all files are put
into one, and the projector goes on where they end. What ends this in between leaves views that are empty: it begins again.
"""

import gc
import multiprocessing
import os
import shutil
import signal
import threading
from concurrent.futures import ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing
from multiprocessing.sharedctypes import SynchronizedArray
from multiprocessing.synchronize import Event
from pathlib import Path
from typing import Final, NamedTuple

from events import topics
from events.errors import NewerCodeError
from projections.database import LittleRoomError, Positions, ViewsError, check_room, merge
from projections.source import Source
from projections.views import Views
from streams.kafka import Cluster
from streams.settings import Settings

_BATCH: Final = 20_000
"""Records of one transaction (measured: 63 µs a decision at 10,000, 55 at 20,000, no less at 50,000)."""
_MOST: Final = 4
"""Most processes: each holds up to 1.3 GB."""
_LOOK_S: Final = 0.2


class _Shared(NamedTuple):
    """What a process shares with the one that started it. `read`: records of each partition, `stop`: it is to end."""

    read: "SynchronizedArray[int]"
    stop: Event


_shared: _Shared


def _begin(shared: _Shared) -> None:
    """Prepare a process that folds."""
    global _shared  # noqa: PLW0603 - an executor hands shared memory to its processes in this way only
    _shared = shared
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal sends it to all: the parent says when it is time
    gc.disable()  # decoded decisions hold no cycles, and to look for some takes a third of the time


class Building:
    """A rebuild. `firsts` and `ends`: where the topics begin and end, as far as it reads."""

    def __init__(self, settings: Settings, path: Path, cluster: Cluster, firsts: Positions, ends: Positions) -> None:
        self._settings, self._path, self._cluster = settings, path, cluster
        self._ends = {
            partition: end
            for (topic, partition), end in ends.items()
            if topic == topics.DECISIONS.name and end > firsts[topic, partition]
        }
        self._context = multiprocessing.get_context("spawn")  # this process has threads
        self._shared = _Shared(self._context.Array("q", cluster.partitions[topics.DECISIONS.name]), self._context.Event())

    def positions(self) -> Positions:
        """Return up to where each partition is folded so far."""
        return {(topics.DECISIONS.name, partition): self._shared.read[partition] for partition in self._ends}

    def run(self, stop: threading.Event) -> None:
        """Fill the views at `path`, which must be there, empty and closed. Told to stop, it leaves them empty.

        Raises ViewsError, KafkaUnreachableError and whatever else hinders a process.
        """
        processes = min(len(os.sched_getaffinity(0)), len(self._ends), _MOST)
        path = self._path.resolve()  # the parts must lie on the disk where the whole will
        folder = path.with_name(path.name + ".parts")
        shutil.rmtree(folder, ignore_errors=True)
        parts = [folder / f"{number}.duckdb" for number in range(processes)]
        try:
            with ProcessPoolExecutor(processes, self._context, _begin, (self._shared,)) as pool:
                under_way = [
                    pool.submit(_fold, self._settings, part, self._cluster, dict(list(self._ends.items())[number::processes]))
                    for number, part in enumerate(parts)
                ]
                while wait(under_way, _LOOK_S).not_done:
                    if stop.is_set() or any(each.done() and each.exception() for each in under_way):
                        self._shared.stop.set()
                for each in under_way:
                    each.result()
        except BrokenProcessPool as error:
            raise ViewsError(
                "a process that read the log for the views was killed: is there memory enough? It begins anew"
            ) from error
        else:
            if not stop.is_set():
                merge(path, parts)
        finally:
            shutil.rmtree(folder, ignore_errors=True)


def _fold(settings: Settings, path: Path, cluster: Cluster, ends: dict[int, int]) -> None:
    """Make views of these partitions of `decisions` up to these offsets: what a process does."""
    views = Views(path, cluster.ids, cluster.partitions[topics.DECISIONS.name], part=True)
    parent = multiprocessing.parent_process()
    with closing(views), closing(Source(settings, cluster, [*ends], _BATCH)) as source:
        source.look()
        source.begin({})
        behind = dict(ends)
        while behind and not _shared.stop.is_set() and parent is not None and parent.is_alive():
            batch = source.poll()
            if batch:
                _make_room(views)
                views.apply(batch)
            for (_, partition), position in batch.positions().items():
                _shared.read[partition] = position
                if position >= ends[partition]:
                    behind.pop(partition, None)
            try:
                source.refuse_newer()
            except NewerCodeError:
                break  # who follows the topics afterwards meets it too, and says so


def _make_room(views: Views) -> None:
    """Look whether there is room for a batch, at the latest when the file is in order. Raises LittleRoomError."""
    try:
        check_room(views.path)
    except LittleRoomError:
        views.tidy()
        check_room(views.path)
