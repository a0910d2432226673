"""What a run draws follows from its seed, the epoch and the rows: not from who reads them, nor since when."""

import multiprocessing
import random
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from test_training import CountingObjective, assert_same_weights, interrupt, timeless, train
from torch.utils.data import Dataset, get_worker_info

import fastshap_vision as fv
from fastshap_vision._runtime.errors import sendable
from fastshap_vision.training.loader import EpochRows, SeededRows, training_loader


class Noisy(Dataset):
    """Images that Python's, numpy's and torch's generators change at each reading."""

    def __init__(self, count=40):
        generator = torch.Generator().manual_seed(1)
        self.images = torch.randn(count, 1, 4, 4, generator=generator)
        self.read_by = []

    def __len__(self):
        return len(self.images)

    def __getitem__(self, row):
        noise = random.random() + np.random.rand() + torch.rand(1, 4, 4)
        return self.images[row] + noise, row % 3


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    """Threads only slow down models as small as these."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def epochs(workers, numbers=(0, 1), **options):
    arguments = {"batch_size": 8, "batches": 4, "seed": 3, "pinned": False, "collate": torch.utils.data.default_collate}
    loader = training_loader(Noisy(), workers=workers, **arguments | options)
    found = []
    for number in numbers:
        loader.sampler.set_epoch(number)
        found += [images for images, _ in loader]
    return torch.stack(found)


def test_no_number_of_workers_changes_what_is_read():
    expected = epochs(0)
    assert expected.shape == (8, 8, 1, 4, 4)
    assert torch.equal(epochs(2), expected)
    assert torch.equal(epochs(1, numbers=(1,)), expected[4:])  # by workers that were started in this epoch
    assert not torch.equal(expected[:4], expected[4:])
    assert not torch.equal(epochs(0, seed=4), expected)


def test_workers_live_as_long_as_the_loader():
    loader = training_loader(Noisy(), 8, 4, seed=0, workers=2, pinned=False, collate=torch.utils.data.default_collate)
    list(loader)
    first = {process.pid for process in multiprocessing.active_children()}
    list(loader)
    assert {process.pid for process in multiprocessing.active_children()} == first
    assert len(first) == 2


def test_a_run_ends_its_workers():
    train(workers=2, epochs=2, data=Noisy())
    assert not multiprocessing.active_children()


FAILS = """
import multiprocessing, sys
sys.path[:0] = [{tests!r}]
from test_loader import Noisy, train

class Broken(Noisy):
    def __getitem__(self, row):
        raise OSError("no such row")

if __name__ == "__main__":
    multiprocessing.set_start_method({method!r})
    train(workers=1, epochs=1, data=Broken())
"""


@pytest.mark.parametrize("method", ["fork", "forkserver"])
def test_a_run_that_fails_ends_its_workers(method, tmp_path):
    """They ended by no SIGTERM, with which multiprocessing ends what an error has kept: the exit waited for ever."""
    script = tmp_path / "run.py"
    script.write_text(FAILS.format(tests=str(Path(__file__).parent), method=method))
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, check=False, timeout=100)
    assert done.returncode == 1
    assert "OSError: no such row" in done.stderr


class Locked(Noisy):
    """Whose error no other process could read."""

    def __getitem__(self, row):
        class Unknown(Exception):
            pass

        if get_worker_info() is not None:
            raise Unknown("the archive is locked")
        return self.images[row], row % 3


READERS = {
    "fit": lambda data: train(workers=1, epochs=1, data=data),
    "evaluate": lambda data: fv.evaluate(torch.nn.Flatten(), data, 8, workers=1),
}


@pytest.mark.parametrize("reader", READERS)
def test_the_error_of_a_worker_reaches_the_run_whatever_its_class(reader):
    """One that can't be pickled never left the worker, and the run waited for ever."""
    before = signal.signal(signal.SIGALRM, lambda *_: pytest.fail("no error came"))
    signal.alarm(60)
    try:
        READERS[reader](Locked())
        said = "no error"
    except RuntimeError as error:  # not pytest.raises, which keeps the error, and by it the workers
        said = str(error)
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
    assert "RuntimeError: Unknown: the archive is locked" in said


class Coded(Exception):
    def __init__(self, code, reason):
        super().__init__(f"{code}: {reason}")


@pytest.mark.parametrize(
    "error",
    [
        ValueError("wrong"),
        FileNotFoundError(2, "No such file", "a.png"),
        UnicodeDecodeError("utf-8", b"x", 0, 1, "odd"),
        fv.CheckpointError("damaged"),
    ],
)
def test_errors_that_can_be_made_again_are_sent_as_they_are(error):
    assert sendable(error) is error


@pytest.mark.parametrize("error", [Coded(7, "locked"), ValueError(lambda: 1)])
def test_of_others_the_words_are_sent(error):
    found = sendable(error)
    assert type(found) is RuntimeError
    assert str(found) == f"{type(error).__name__}: {error}"


def test_reading_leaves_the_runs_own_generators_alone():
    def drawn():
        return random.random(), np.random.rand(), torch.rand(2).tolist()

    def seeded():
        random.seed(0), np.random.seed(0), torch.manual_seed(0)

    seeded()
    expected = drawn()
    seeded()
    epochs(0)
    assert drawn() == expected
    seeded()
    epochs(1)
    assert drawn() == expected


def test_rows_of_an_epoch_are_each_row_once():
    rows = EpochRows(10, 10, seed=0)
    seen = []
    for epoch in range(3):
        rows.set_epoch(epoch)
        order = [row for number, row in rows if number == epoch]
        assert sorted(order) == list(range(10))
        seen.append(order)
    assert seen[0] != seen[1] != seen[2]
    assert len(list(EpochRows(10, 6, seed=0))) == len(EpochRows(10, 6, seed=0)) == 6
    assert seen[0][:6] == [row for _, row in EpochRows(10, 6, seed=0)]


def test_a_batch_is_read_at_once_where_the_data_can():
    class AtOnce(Noisy):
        def __getitems__(self, rows):
            self.read_by.append(rows)
            return [self[row] for row in rows]

    data = AtOnce()
    found = SeededRows(data, 0).__getitems__([(0, 5), (0, 2)])
    assert data.read_by == [[5, 2]]
    assert [label for _, label in found] == [2, 2]


@pytest.mark.parametrize(("before", "after"), [(0, 0), (2, 2), (2, 0)])
def test_a_resumed_run_with_augmentation_ends_in_the_same_bits(tmp_path, before, after):
    expected, unbroken = train(data=Noisy())
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path, CountingObjective(at=13, event=interrupt), data=Noisy(), workers=before)
    resumed, result = train(tmp_path, data=Noisy(), workers=after, resume="auto")
    assert timeless(result.history) == timeless(unbroken.history)
    assert_same_weights(resumed, expected)
