"""A signal to one of two processes stops both behind the same update, and they go on to the same bits."""

import json
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file
from test_stopping import run

import fastshap_vision as fv


def train_as(rank, port, folder, stops, pipe):
    ranks = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ |= {name: str(value) for name, value in ranks.items()}
    stop = (3, lambda: os.kill(os.getpid(), signal.SIGTERM)) if stops and rank == 1 else None
    try:
        _, result = run(folder, stop=stop, resume="auto", epochs=2, batch_size=4)
        pipe.send([row["loss"] for row in result.history])
    except fv.TrainingStopped as error:
        pipe.send(str(error))


def together(folder, stops):
    """What each of two processes has said in the end."""
    context = multiprocessing.get_context("fork")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    started = []
    for rank in range(2):
        mine, theirs = context.Pipe(duplex=False)
        process = context.Process(target=train_as, args=(rank, port, folder, stops, theirs))
        process.start()
        theirs.close()
        started.append((process, mine))
    said = [pipe.recv() for _, pipe in started]
    for process, _ in started:
        process.join()
    return said


def main(folder):
    whole = together(folder / "whole", stops=False)
    stopped = together(folder / "stopped", stops=True)
    left = sorted(path.name for path in (folder / "stopped" / "checkpoints").iterdir())
    print(json.dumps([whole, stopped, left, together(folder / "stopped", stops=False)]))


@pytest.mark.slow
def test_both_stop_and_go_on(tmp_path):
    """From a process that forks before it has any thread."""
    alone = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, __file__, str(tmp_path)]
    done = subprocess.run(command, env=os.environ | alone, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    whole, stopped, left, resumed = json.loads(done.stdout.splitlines()[-1])
    # The other hears of it one update later.
    message = "fit: stopped by SIGTERM in epoch 1 after 4 of 5 updates; a checkpoint is written. Go on with "
    assert stopped == [message + "resume='auto'."] * 2
    assert left == ["epoch_0000_step_00000004"]
    assert resumed == whole
    assert whole[0] == whole[1]
    expected, found = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "stopped"))
    assert all((found[name] == tensor).all() for name, tensor in expected.items())


if __name__ == "__main__":
    main(Path(sys.argv[1]))
