"""Requests that wait become batches of the model."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

#: What is asked of the model, and where its answer is awaited.
Waiting = tuple[Any, "asyncio.Future[Any]"]


class Batches:
    """Gathers what came while the model was busy: one request alone waits for no other.

    Args:
        answer: from a list of questions to the list of their answers. Runs in a thread of its own, one call at a time.
        size: questions at once, at most.
    """

    def __init__(self, answer: Callable[[Sequence[Any]], Sequence[Any]], size: int) -> None:
        self._answer, self._size = answer, size
        self._waiting: asyncio.Queue[Waiting] = asyncio.Queue()

    async def ask(self, question: Any) -> Any:
        """The answer to one question; raises what `answer` raised for its batch."""
        found: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self._waiting.put_nowait((question, found))
        return await found

    async def run(self) -> None:
        """Answers until it is cancelled."""
        with ThreadPoolExecutor(1, "model") as thread:
            while True:
                batch = await self._next()
                if not batch:
                    continue
                questions = [question for question, _ in batch]
                try:
                    answers = await asyncio.get_running_loop().run_in_executor(thread, self._answer, questions)
                except Exception as error:
                    answers = [error] * len(batch)
                for (_, found), answer in zip(batch, answers, strict=True):
                    if found.done():  # given up meanwhile
                        continue
                    if isinstance(answer, Exception):
                        found.set_exception(answer)
                    else:
                        found.set_result(answer)

    async def _next(self) -> list[Waiting]:
        """Of those that wait, the first ones that somebody still wants to know."""
        batch = [await self._waiting.get()]
        while len(batch) < self._size and not self._waiting.empty():
            batch.append(self._waiting.get_nowait())
        return [(question, found) for question, found in batch if not found.done()]
