"""A run that is killed at any moment goes on to the same bits, and exports the model that it trained.

The counts are printed: pytest -m slow -s tests/vision/test_kills.py
"""

import json
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from test_training import assert_same_weights, timeless
from torch.utils.data import Subset

from fastshap_vision import JointObjective, SelfExplainingClassifier, fit, load_dataset
from fastshap_vision.training.checkpoint import Checkpoints, whole_checkpoints

KILLS, SEED, EPOCHS = 30, 0, 4


def run(folder):
    torch.manual_seed(0)
    arguments = {"patch_size": 4, "in_chans": 1, "embed_dim": 16, "depth": 1, "num_heads": 2}
    model = SelfExplainingClassifier("vit_tiny_patch16_224", 10, img_size=8, model_kwargs=arguments)
    data = Subset(load_dataset("digits", "train", augment=True), range(24))
    options = {"epochs": EPOCHS, "batch_size": 8, "progress": False, "resume": None if folder is None else "auto"}
    objective = JointObjective(2, masked_task_weight=0.5)
    return model, fit(model, data, objective=objective, output=folder, **options)


def reporting_run(folder, pipe):
    """In a process of its own: says when it begins (B), saves (S), has saved (E) and is done (D)."""
    save = Checkpoints.save

    def reporting(self, history):
        pipe.send("S")
        save(self, history)
        pipe.send("E")

    Checkpoints.save = reporting
    pipe.send("B")
    run(folder)
    pipe.send("D")


class Run:
    """A process that trains in `folder`; it is forked from one that has loaded everything."""

    def __init__(self, folder):
        context = multiprocessing.get_context("fork")
        self.pipe, theirs = context.Pipe(duplex=False)
        self.process = context.Process(target=reporting_run, args=(folder, theirs))
        self.process.start()
        theirs.close()
        self.said = ""

    def wait_for(self, word, times=1):
        while self.said.count(word) < times:
            self.said += self.pipe.recv()

    def kill(self):
        """Whether it was still at work; what it had said until then is known."""
        self.process.kill()
        self.process.join()
        with suppress(EOFError):
            while True:
                self.said += self.pipe.recv()
        assert self.process.exitcode in (-signal.SIGKILL, 0)
        return "D" not in self.said


def durations(folder):
    """Seconds of a whole run and of one save."""
    whole = Run(folder)
    whole.wait_for("B")
    begun, saving = time.perf_counter(), 0.0
    for epoch in range(1, EPOCHS + 1):
        whole.wait_for("S", epoch)
        started = time.perf_counter()
        whole.wait_for("E", epoch)
        saving += time.perf_counter() - started
    whole.wait_for("D")
    whole.process.join()
    return time.perf_counter() - begun, saving / EPOCHS


def killed_run(folder, moments, while_saving, seconds):
    """Starts runs until one was killed as wanted; returns its folder."""
    for attempt in range(50):
        place = folder / str(attempt)
        killed = Run(place)
        if while_saving:
            killed.wait_for("S", moments.randint(1, EPOCHS))
            time.sleep(moments.random() * seconds[1])
            if killed.kill() and killed.said.endswith("S"):
                return place
        else:
            killed.wait_for("B")
            time.sleep(moments.random() * seconds[0])
            if killed.kill():
                return place
    raise AssertionError("no run was killed in time")


def main(folder):
    """Kills runs in `folder` and prints the counts, half of the kills within a save."""
    torch.set_num_threads(1)
    expected, unbroken = run(None)
    seconds = durations(folder / "whole")
    moments, found, same, right = random.Random(SEED), [], 0, 0
    for kill in range(KILLS):
        place = killed_run(folder / str(kill), moments, kill % 2 == 1, seconds)
        found.append(len(whole_checkpoints(place)))
        model, result = run(place)
        with suppress(AssertionError):
            assert timeless(result.history) == timeless(unbroken.history)
            assert_same_weights(model, expected)
            same += 1
        with suppress(AssertionError):
            assert_same_weights(SelfExplainingClassifier.from_pretrained(place).eval(), expected)
            right += 1
    counts = {"seed": SEED, "killed": KILLS, "while saving": KILLS // 2, "checkpoints left": sorted(found)}
    print(json.dumps(counts | {"resumed to the same bits": same, "exported models right": right}))


@pytest.mark.slow
def test_killed_runs_go_on_to_the_same_bits(tmp_path):
    """In a process that forks before it has any thread, and without a GPU, which can't be forked."""
    alone = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, __file__, str(tmp_path)]
    done = subprocess.run(command, env=os.environ | alone, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    print("\n" + done.stdout)
    counts = json.loads(done.stdout)
    assert counts["resumed to the same bits"] == counts["exported models right"] == counts["killed"] == KILLS


if __name__ == "__main__":
    main(Path(sys.argv[1]))
