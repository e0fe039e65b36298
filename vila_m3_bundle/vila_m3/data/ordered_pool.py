"""Conversion of many rows in several processes, in the order of the source."""

from __future__ import annotations

import multiprocessing
import os
import threading
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from itertools import chain, islice
from multiprocessing.process import BaseProcess

from .checks import Line, RowChecks, make_lines
from .source import Item, Rejected

# Rows that travel together: enough that sending them costs little, few enough that memory stays small.
CHUNK_ROWS = 1000
# Chunks that wait for each worker, so that none idles while this process reads the source.
_WAITING = 2

Lines = list[Line | Rejected]


def convert_in_order(
    items: Iterator[Item], checks: RowChecks, workers: int = 1, chunk_rows: int = CHUNK_ROWS
) -> Iterator[Lines]:
    """Yield the lines of consecutive chunks of rows.

    Args:
        items: the source; read in this process, a few chunks ahead of what is yielded.
        checks: what a record must fulfil.
        workers: processes that convert; with fewer than 2, or a source of one chunk, this process does it.
        chunk_rows: rows of a chunk.
    """
    chunks = iter(lambda: list(islice(items, chunk_rows)), [])
    first = list(islice(chunks, 1))
    if workers < 2 or not first or len(first[0]) < chunk_rows:
        for chunk in chain(first, chunks):
            yield make_lines(chunk, checks)
        return
    # Spawned, not forked: a fork would copy this process's threads' locks.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, context, _end_with_parent) as pool:
        waiting: deque[Future[Lines]] = deque()
        for chunk in chain(first, chunks):
            waiting.append(pool.submit(make_lines, chunk, checks))
            if len(waiting) > _WAITING * workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def _end_with_parent() -> None:
    """End a worker whose parent was killed; it would wait for work for ever."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        threading.Thread(target=_exit_after, args=(parent,), daemon=True).start()


def _exit_after(parent: BaseProcess) -> None:
    parent.join()
    os._exit(1)
