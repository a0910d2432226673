"""Requests that wait become batches of the model."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any


class Batches:
    """Gathers what came while the model was busy: one request alone waits for no other.

    Args:
        answer: from a list of questions to the list of their answers. Runs in a thread of its own, one call at a time.
        size: questions at once, at most.
    """

    def __init__(self, answer: Callable[[Sequence[Any]], Sequence[Any]], size: int) -> None:
        self._answer, self._size, self._thread = answer, size, ThreadPoolExecutor(1, "model")
        self._waiting: deque[tuple[Any, asyncio.Future[Any]]] = deque()
        self._task: asyncio.Task[None] | None = None

    async def ask(self, question: Any) -> Any:
        """The answer to one question; raises what `answer` raised for its batch."""
        found: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self._waiting.append((question, found))
        if self._task is None or self._task.done():
            self._task = asyncio.create_task(self._work())
        return await found

    async def _work(self) -> None:
        """Until nothing waits."""
        try:
            while self._waiting:
                batch = self._next()
                if not batch:
                    continue
                questions = [question for question, _ in batch]
                try:
                    answers = await asyncio.get_running_loop().run_in_executor(self._thread, self._answer, questions)
                except Exception as error:
                    answers = [error] * len(batch)
                for (_, found), answer in zip(batch, answers, strict=True):
                    if found.done():  # given up meanwhile
                        continue
                    if isinstance(answer, Exception):
                        found.set_exception(answer)
                    else:
                        found.set_result(answer)
        finally:
            self._waiting.clear()  # where the loop ends, whose requests end with it

    def _next(self) -> list[tuple[Any, asyncio.Future[Any]]]:
        """The first ones whose answer somebody still waits for."""
        batch: list[tuple[Any, asyncio.Future[Any]]] = []
        while self._waiting and len(batch) < self._size:
            waiting = self._waiting.popleft()
            if not waiting[1].done():
                batch.append(waiting)
        return batch
