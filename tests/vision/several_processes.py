"""Runs of several processes on this machine, by gloo: a scenario is a function that each of them calls.

python several_processes.py FOLDER NAME=ARGUMENTS…, where a launcher set RANK and WORLD_SIZE.
"""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path

import torch
from accelerate import Accelerator, PartialState
from torch.utils.data import TensorDataset

from fastshap_vision._runtime.digest import digest_of_json
from fastshap_vision._runtime.processes import processes, together
from fastshap_vision.training.checkpoint import whole_checkpoints
from fastshap_vision.training.monitor import TERMS

SCENARIOS = {}


def scenario(function):
    SCENARIOS[function.__name__] = function
    return function


def digits(count, size):
    generator = torch.Generator().manual_seed(1)
    labels = torch.arange(count) % 4
    pictures = torch.randn(4, 1, size, size, generator=generator)
    return TensorDataset(pictures[labels] + torch.randn(count, 1, size, size, generator=generator), labels)


def model_of(kind, seed=0):
    from fastshap_vision import SelfExplainingClassifier

    torch.manual_seed(seed)
    name, size, arguments = "vit_tiny_patch16_224", 16, {"patch_size": 4, "embed_dim": 16, "depth": 2, "num_heads": 2}
    if kind == "eva":
        name = "eva02_tiny_patch14_224"
    if kind == "cnn":
        name, size, arguments = "resnet10t", 64, {"channels": (8, 8, 16, 16)}
    model = SelfExplainingClassifier(name, 4, img_size=size, model_kwargs=arguments | {"in_chans": 1})
    with torch.no_grad():
        model.backbone.get_classifier().weight *= 20  # values that differ by more than rounding
    return model


class Stopped(Exception):
    """Ends a run in its middle, in every process."""


def objective_of(name, stop_at=2.0, kill_at=2.0):
    """An objective that stops at a share of the training, or kills the last process of the run."""
    import fastshap_vision as fv

    kinds = {
        "joint": lambda: fv.JointObjective(4, masked_task_weight=0.5, regression_ramp=(0.2, 0.6)),
        "task": fv.TaskObjective,
        "explainer": lambda: fv.ExplainerObjective(keep_best=True),
    }
    objective = kinds[name]()
    call = type(objective).__call__

    class Watched(type(objective)):
        def __call__(self, *arguments, progress=1.0):
            is_training = progress < 1  # an evaluation gives none
            if is_training and progress >= stop_at:
                raise Stopped
            if is_training and progress >= kill_at and int(os.environ["RANK"]) == int(os.environ["WORLD_SIZE"]) - 1:
                os.kill(os.getpid(), signal.SIGKILL)
            return call(self, *arguments, progress=progress)

    objective.__class__ = Watched
    return objective


@scenario
def trained(kind="vit", objective="joint", batch_size=4, seeds=False, stop_at=2.0, kill_at=2.0, **options):
    """A run: what each process ends with; None where it was stopped."""
    import fastshap_vision as fv

    size = 64 if kind == "cnn" else 16
    images, held_out = digits(16 if kind == "cnn" else 32, size), digits(13, size)
    model = model_of(kind, seed=int(os.environ.get("RANK", 0)) if seeds else 0)
    if objective == "explainer":
        images, held_out = (fv.record_coalitions(model, part, 8, progress=False) for part in (images, held_out))
    settings = {"epochs": 2, "lr": 0.01, "clip_grad": 1.0, "progress": False} | options
    watched = objective_of(objective, stop_at, kill_at)
    try:
        result = fv.fit(model, images, held_out, objective=watched, batch_size=batch_size, **settings)
    except Stopped:
        return None
    names = {"epoch", "lr", "grad_norm", "eval_loss", "eval_accuracy", "eval_value_r2", *TERMS}
    history = [{name: value for name, value in row.items() if name in names} for row in result.history]
    explained = model.explain(digits(3, size).tensors[0]).values
    return {"weights": model.state_dict(), "history": history, "explained": explained}


@scenario
def evaluated(batch_size=3):
    """Of 13 images, in five batches that two processes don't divide; and of one image."""
    import fastshap_vision as fv

    model, found = model_of("vit"), {}
    with torch.no_grad():
        for parameter in model.head.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(3)) / 4)
    processes()
    for count in (13, 1):
        data = digits(count, 16)
        recorded = fv.record_coalitions(model, data, 8, progress=False)
        found[count] = list(fv.evaluate(model, data, batch_size, accelerator=Accelerator()))
        objective = fv.ExplainerObjective(keep_best=True)
        with together():
            found[count].append(objective.evaluate(model, recorded, batch_size=batch_size)["eval_value_r2"])
        found[count].append(objective.state_dict()["best_value_r2"])
    return found


@scenario
def exchanged(**options):
    """Bytes of gradients that an update exchanges, and those of the model's parts."""
    from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
    from torch.nn.parallel import DistributedDataParallel

    sent, begin = [], DistributedDataParallel.__init__

    def counting(self, *arguments, **settings):
        begin(self, *arguments, **settings)

        def hook(_, bucket):
            sent.append(bucket.buffer().numel() * bucket.buffer().element_size())
            return allreduce_hook(torch.distributed.group.WORLD, bucket)

        self.register_comm_hook(None, hook)

    DistributedDataParallel.__init__ = counting
    try:
        trained(epochs=1, **options)
    finally:
        DistributedDataParallel.__init__ = begin
    parts = {name: 4 * sum(one.numel() for one in part.parameters()) for name, part in model_of("vit").named_children()}
    updates = 4 // options.get("grad_accum_steps", 1)
    return {"bytes": sum(sent) / updates, **parts}


@scenario
def refused(**options):
    """The error that a run ends in."""
    return {"error": error_of(lambda: trained(**options))}


def error_of(work):
    try:
        work()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return None


@scenario
def errors_of_others():
    """What each process hears of errors that can't be pickled, or not made again: of the first, and of the last."""
    from fastshap_vision.training.agreement import of_all, of_main

    class Unknown(Exception):
        def __init__(self, code, reason):
            super().__init__(f"{code}: {reason}")

    def fail(rank):
        if int(os.environ["RANK"]) == rank:
            raise Unknown(7, "the archive is locked")

    processes()
    return [error_of(lambda: of_main(lambda: fail(0))), error_of(lambda: of_all(lambda: fail(1)))]


@scenario
def called_otherwise():
    """The processes were given different learning rates."""
    return {"error": error_of(lambda: trained(lr=0.01 * (1 + int(os.environ["RANK"]))))}


@scenario
def disks_of_nodes(folder):
    """Each process has a disk of its own; what comes of a run that goes on, by what is on them."""
    rank, run = int(os.environ["RANK"]), Path("run")
    own, before = Path(folder) / f"disk{rank}", Path.cwd()
    own.mkdir(parents=True)
    os.chdir(own)
    found = {
        "begun": trained(output=run, stop_at=0.7),
        "nothing there": error_of(lambda: trained(output=run, resume="auto")),
    }
    processes().wait_for_everyone()
    if rank:
        shutil.copytree("../disk0/run", run)
        record = run / "checkpoints" / "epoch_0001" / "record.json"
        content = json.loads(record.read_text())
        content["record"]["history"][0]["lr"] = 0.5
        content["digest"] = digest_of_json(content["record"])
        record.write_text(json.dumps(content))
    found["another there"] = error_of(lambda: trained(output=run, resume="auto"))
    if rank:
        shutil.rmtree(run)
        shutil.copytree("../disk0/run", run)
    found["the same there"] = trained(output=run, resume="auto")
    os.chdir(before)
    return found


@scenario
def stopped_and_resumed(folder, then=None, **options):
    """A run that was stopped in its second epoch and goes on, with other options."""
    assert trained(output=folder, stop_at=0.7, **options) is None
    assert whole_checkpoints(Path(folder))[-1].name.startswith("epoch_0001")
    return trained(output=folder, resume="auto", **options | (then or {}))


@scenario
def held_in_shards():
    """The numbers that a process holds of the blocks in a step, and of all when the optimiser has used them."""
    from torch.optim.optimizer import register_optimizer_step_post_hook

    import fastshap_vision as fv
    from fastshap_vision.games.hooks import has_hooks

    def size(tensors):
        return sum(getattr(tensor, "to_local", lambda tensor=tensor: tensor)().numel() for tensor in tensors)

    found = {}

    class Measured(fv.TaskObjective):
        def __call__(self, model, *arguments, **options):
            found["blocks"] = size(model.backbone.blocks.parameters())
            found["packs"] = model.game.packs
            hook = model.backbone.blocks[0].register_forward_hook(lambda *_: None)
            found["another hook is seen"] = has_hooks(model.backbone.blocks[0])
            hook.remove()
            return super().__call__(model, *arguments, **options)

    def measure(optimizer, *_):
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        found["weights"] = size(parameters)
        found["gradients"] = size(parameter.grad for parameter in parameters if parameter.grad is not None)
        found["averages"] = size(state["exp_avg"] for state in optimizer.state.values())

    model, hook = model_of("vit"), register_optimizer_step_post_hook(measure)
    fv.fit(model, digits(8, 16), objective=Measured(), epochs=1, batch_size=4, fsdp=True, progress=False)
    hook.remove()
    return found | {
        "whole blocks": size(model.backbone.blocks.parameters()),
        "whole": size(fv.TaskObjective().trained(model)),
    }


@scenario
def command_line(folder):
    """What the commands print; they end the process group."""
    from fastshap_vision.cli.main import main as command

    network = ("--model-kwargs", "patch_size=4", "embed_dim=16", "depth=1", "num_heads=2")
    training = ("train", "--epochs", "1", "--batch-size", "256", "--coalitions", "2", *network, "--output", folder)
    found = []
    for arguments in (training, ("evaluate", "--checkpoint", folder, "--num-images", "2", "--json")):
        with redirect_stdout(StringIO()) as printed:
            assert command(arguments) == 0
        PartialState._reset_state()
        found.append(printed.getvalue())
    return found


def start(folder, count, calls, **environment):
    """Starts `count` processes that call the scenarios, [(name, {argument: value})]; `ended` waits for them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    folder.mkdir(parents=True, exist_ok=True)
    known = {
        "WORLD_SIZE": count,
        "LOCAL_WORLD_SIZE": count,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
        "OMP_NUM_THREADS": 1,
        "PYTHONPATH": os.pathsep.join(sys.path),
    }
    started = []
    for rank in range(count):
        own = known | {"RANK": rank, "LOCAL_RANK": rank} | environment
        variables = os.environ | {name: str(value) for name, value in own.items()}
        with (folder / f"log{rank}").open("w") as log:
            command = [sys.executable, __file__, str(folder), json.dumps(calls)]
            started.append(subprocess.Popen(command, env=variables, stdout=log, stderr=subprocess.STDOUT))
    return started


def ended(folder, started, seconds=400):
    """What each process found: [rank][call]."""
    try:
        for rank, process in enumerate(started):
            assert process.wait(seconds) == 0, (folder / f"log{rank}").read_text()
    finally:
        for process in started:
            process.kill()
            process.wait()
    return [torch.load(folder / f"found{rank}") for rank in range(len(started))]


def main(folder, calls):
    torch.set_num_threads(1)
    found, start = [], time.perf_counter()
    for name, arguments in json.loads(calls):
        found.append(SCENARIOS[name](**arguments))
        print(f"{time.perf_counter() - start:.1f} s: {name} {arguments}", flush=True)
    torch.save(found, Path(folder) / f"found{os.environ['RANK']}")
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
