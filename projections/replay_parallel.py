"""Work on the partitions of a log in several processes: a partition needs no other, and Python's threads share one core."""

import copyreg
import gc
import multiprocessing
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor, wait
from typing import Any, Final, Protocol, TypeVar

from events.errors import NewerCodeError
from projections.replay_sources import Span

R_co = TypeVar("R_co", covariant=True)
_LOOK_S: Final = 0.2
_YOUNG: Final = 50_000


class Job(Protocol[R_co]):
    """What is done with a partition, in whatever process: it can be given to one."""

    def __call__(self, partition: int, tick: Callable[[int], None], /) -> R_co:
        """Do it; `tick` hears how many records were read meanwhile."""


def each_partition(job: Job[R_co], spans: Mapping[int, Span], processes: int, tick: Callable[[int], None]) -> list[R_co]:
    """Return the job's results, by partition. Raises what the job raises."""
    order = sorted(spans, key=lambda partition: spans[partition].first - spans[partition].end)
    if min(processes, len(order)) <= 1:
        return [job(partition, tick) for partition in sorted(order)]
    # Not forked: librdkafka's threads don't survive that.
    context = multiprocessing.get_context("spawn")
    read, told = context.Value("q", 0), 0
    with ProcessPoolExecutor(min(processes, len(order)), context, _begin, (read,)) as pool:
        futures = {partition: pool.submit(_work, job, partition) for partition in order}
        waiting = set(futures.values())
        try:
            while waiting:
                done, waiting = wait(waiting, timeout=_LOOK_S)
                tick(read.value - told)
                told = read.value
                for future in done:
                    future.result()  # a failure ends the rest too
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
        return [futures[partition].result() for partition in sorted(futures)]


_read: Any = None


def _begin(read: Any) -> None:
    global _read  # noqa: PLW0603 - what is shared by processes can only be handed over when they begin
    _read = read
    # What is decided is short-lived and has no cycles: looking for them at Python's own pace costs a sixth of the time.
    gc.freeze()
    gc.set_threshold(_YOUNG, 20, 50)


def _work(job: Job[R_co], partition: int) -> R_co:
    def tick(records: int) -> None:
        with _read.get_lock():
            _read.value += records

    return job(partition, tick)


def _newer(text: str) -> NewerCodeError:
    error = NewerCodeError.__new__(NewerCodeError)
    Exception.__init__(error, text)
    return error


copyreg.pickle(NewerCodeError, lambda error: (_newer, (str(error),)))  # its own arguments aren't kept
