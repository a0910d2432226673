"""A run goes on within an epoch to the same bits, wherever it was stopped, by a crash or by a signal."""

import multiprocessing
import os
import signal
import subprocess

import pytest
import torch
from test_training import assert_same_weights, timeless
from torch.utils.data import Subset

import fastshap_vision as fv
from fastshap_vision.cli.main import main
from fastshap_vision.training.checkpoint import whole_checkpoints
from fastshap_vision.training.run import TrainingRun

UPDATES = 5  # of an epoch


class Crash(Exception):
    pass


class At(fv.Callback):
    """Does something after one update, and draws random numbers after each, which change nothing."""

    def __init__(self, step, act):
        self.step, self.act = step, act

    def on_step(self, report):
        torch.rand(3)
        if report.step == self.step:
            self.act()


def crash():
    raise Crash


def run(folder, *, stop=None, resume=None, **options):
    torch.manual_seed(0)
    arguments = {"patch_size": 4, "in_chans": 1, "embed_dim": 16, "depth": 2, "num_heads": 2, "drop_path_rate": 0.3}
    model = fv.SelfExplainingClassifier("vit_tiny_patch16_224", 10, img_size=8, model_kwargs=arguments)
    data = Subset(fv.load_dataset("digits", "train", augment=True), range(8 * UPDATES + 3))
    held_out = Subset(fv.load_dataset("digits", "test"), range(16))
    given = {"epochs": 3, "batch_size": 8, "progress": False, "lr": 5e-3, "opt": "adamw"} | options
    objective = fv.JointObjective(2, masked_task_weight=0.5)
    callbacks = [] if stop is None else [At(*stop)]
    result = fv.fit(
        model, data, held_out, objective=objective, output=folder, resume=resume, callbacks=callbacks, **given
    )
    return model, result


def names(folder):
    return [path.name for path in whole_checkpoints(folder)]


@pytest.fixture(scope="module")
def unbroken():
    return run(None)


@pytest.mark.parametrize("name", ["TERM", "USR1"])
def test_workers_leave_signals_to_the_main_process(unbroken, tmp_path, name):
    """torchrun and schedulers signal whole groups of processes, and a worker that ends so ends the run."""

    def signal_workers():
        workers = multiprocessing.active_children()
        assert workers
        subprocess.run(["kill", f"-{name}", *(str(worker.pid) for worker in workers)], check=True)

    model, _ = run(tmp_path, stop=(2, signal_workers), workers=1)
    assert_same_weights(unbroken[0], model)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize(("crashed", "left"), [(4, "epoch_0000_step_00000003"), (9, "epoch_0001_step_00000001")])
def test_a_crashed_run_goes_on_within_an_epoch(unbroken, tmp_path, crashed, left, workers):
    expected, whole = unbroken
    with pytest.raises(Crash):
        run(tmp_path, stop=(crashed, crash), checkpoint_steps=3, workers=workers)
    assert names(tmp_path)[-1] == left
    model, result = run(tmp_path, resume="auto", checkpoint_steps=3, workers=workers)
    assert timeless(result.history) == timeless(whole.history)
    assert_same_weights(model, expected)
    assert result.seconds > 0
    assert names(tmp_path) == ["epoch_0002_step_00000002", "epoch_0003"]


@pytest.mark.parametrize(
    "options", [{"batch_size": 4, "grad_accum_steps": 2}, {"mixup": 0.8, "smoothing": 0.1, "model_ema_decay": 0.9}]
)
def test_accumulated_gradients_mixed_images_and_averaged_weights_too(tmp_path, options):
    expected, whole = run(None, **options)
    with pytest.raises(Crash):
        run(tmp_path, stop=(3, crash), checkpoint_steps=2, **options)
    model, result = run(tmp_path, resume="auto", checkpoint_steps=2, **options)
    assert timeless(result.history) == timeless(whole.history)
    assert_same_weights(model, expected)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_ends_a_run_after_its_update(unbroken, tmp_path, number):
    expected, whole = unbroken
    before = signal.getsignal(number)
    with pytest.raises(fv.TrainingStopped) as caught:
        run(tmp_path, stop=(7, lambda: os.kill(os.getpid(), number)))
    assert str(caught.value) == (
        f"fit: stopped by {number.name} in epoch 2 after 2 of 5 updates; a checkpoint is written. Go on with "
        "resume='auto'."
    )
    assert caught.value.signal_number == number
    assert signal.getsignal(number) is before
    assert names(tmp_path) == ["epoch_0001", "epoch_0001_step_00000002"]
    model, result = run(tmp_path, resume="auto")
    assert timeless(result.history) == timeless(whole.history)
    assert_same_weights(model, expected)


def test_a_signal_in_an_epochs_last_update_ends_the_run_behind_it(unbroken, tmp_path):
    with pytest.raises(fv.TrainingStopped, match="stopped by SIGTERM after epoch 2; a checkpoint is written"):
        run(tmp_path, stop=(10, lambda: os.kill(os.getpid(), signal.SIGTERM)))
    assert names(tmp_path) == ["epoch_0001", "epoch_0002"]
    model, result = run(tmp_path, resume="auto")
    assert timeless(result.history) == timeless(unbroken[1].history)
    assert_same_weights(model, unbroken[0])


def test_a_run_that_goes_back_removes_what_came_later(tmp_path):
    with pytest.raises(Crash):
        run(tmp_path, stop=(9, crash), checkpoint_steps=4)
    assert names(tmp_path) == ["epoch_0001", "epoch_0001_step_00000003"]
    run(tmp_path, resume=tmp_path / "checkpoints" / "epoch_0001", checkpoint_steps=6, epochs=3)
    assert names(tmp_path) == ["epoch_0002_step_00000002", "epoch_0003"]


def test_without_a_folder_signals_do_what_they_did(tmp_path):
    found = []
    run(None, stop=(1, lambda: found.append(signal.getsignal(signal.SIGTERM))), epochs=1)
    assert found == [signal.getsignal(signal.SIGTERM)]


def test_wrong_arguments(tmp_path):
    with pytest.raises(ValueError, match="argument `checkpoint_steps` needs a folder to write to"):
        run(None, checkpoint_steps=3)
    with pytest.raises(ValueError, match="argument `checkpoint_steps` must be"):
        run(tmp_path, checkpoint_steps=0)


def test_the_command_line_says_how_it_ended(tmp_path, monkeypatch, capsys):
    step, calls = TrainingRun._train_batch, []

    def signalled(self, *arguments):
        step(self, *arguments)
        calls.append(1)
        if len(calls) == 2:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(TrainingRun, "_train_batch", signalled)
    assert main(["train", "--output", str(tmp_path), "--epochs", "1", "--batch-size", "16"]) == 128 + signal.SIGTERM
    said = capsys.readouterr().err
    assert "fastshap train: error: stopped by SIGTERM in epoch 1 after 2 of 89 updates" in said
    assert "Go on with --resume." in said
