"""What recording coalitions costs, and what is lost in what is kept: python -m bench.recordings.

    --parts kept       R² of explainers that learnt from float32, float16, features and the likeliest classes
    --parts memory     memory and speed of recording 100 000 images and of training from them; v(S) is simulated
    --parts processes  images a second of two processes beside one, a core each, and whether their bits are equal

Of CIFAR-10 too, with `--data`, the folder of its archives.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Subset

import fastshap_vision as fv
from bench import digits
from bench.fidelity import archives
from bench.fidelity.runs import BUDGETS
from bench.lib import machine
from bench.lib.results import RESULTS, Results, Row
from bench.lib.timer import Timer
from fastshap_vision._runtime.processes import processes as joined

#: What is kept, as arguments of `record_coalitions`; the first is what the others are set beside.
KEPT: dict[str, dict[str, Any]] = {
    "float32": {"dtype": "float32"},
    "float16": {"dtype": "float16"},
    "features, float16": {"dtype": "float16", "store": "features"},
    "5 likeliest classes, float16": {"dtype": "float16", "classes": 5},
    "3 likeliest classes, float16": {"dtype": "float16", "classes": 3},
}
#: Test images whose values the explanations are set beside.
TESTED = 24
#: Of the classifier of CIFAR-10: as accurate as two cores allow in minutes.
CIFAR = {"images": 4000, "epochs": 6, "batch_size": 64, "lr": 2e-3, "weight_decay": 0.05, "warmup_epochs": 1}
#: Of the simulated recording.
SIMULATED = {"coalitions": 64, "classes": 1000}
#: Images of it that are trained on, from disk and from memory, batches that are timed, and images in each.
TRAINED, BATCHES, BATCH = 8192, 20, 64
#: Seconds in which steps are timed.
SECONDS = 30.0
#: Of the recording by processes, and images in a shard.
DIVIDED, SHARD = 128, 16


def kept(options: argparse.Namespace) -> list[Row]:
    """A row for everything that may be kept of each network's coalitions."""
    rows = []
    for source in ["digits", *(["cifar10"] if options.data else [])]:
        for network in options.networks:
            plain, train, images, truth = _of_digits(network) if source == "digits" else _of_cifar(network, options)
            for name, how in KEPT.items():
                model = deepcopy(plain)
                with tempfile.TemporaryDirectory(dir=options.work) as folder:
                    mirror = source != "digits"
                    recorded = fv.recipe.record(model, train, mirror=mirror, output=folder, progress=False, **how)
                    size = sum(path.stat().st_size for path in Path(folder).rglob("*.safetensors"))
                    fv.train_explainer(model, train, mirror=mirror, output=folder, progress=False)
                found = fv.fidelity(model, images, truth)
                row = {"data": source, "network": network, "kept": name, "r2": round(found.r2, 4)}
                rows.append(row | {"bytes_an_image": round(size / sum(map(len, recorded)))})
                print(rows[-1], flush=True)
    return rows


def _of_digits(network: str) -> tuple[Any, Dataset, Tensor, Any]:
    """A trained classifier, its data, test images and their exact values."""
    torch.manual_seed(0)
    train, test = (fv.load_dataset("digits", split) for split in ("train", "test"))
    model = fv.SelfExplainingClassifier(num_classes=10, **digits.MODELS[network], **fv.recipe.MODEL)
    fv.fit(model.backbone, train, objective=fv.TaskObjective(), progress=False, **digits.TRAINING)
    images = torch.stack([test[row][0] for row in range(TESTED)])
    return model, train, images, fv.exact_values(model, images)


def _of_cifar(network: str, options: argparse.Namespace) -> tuple[Any, Dataset, Tensor, Any]:
    torch.manual_seed(0)
    train, test = (archives.load(options.data, split, augment=False) for split in ("train", "test"))
    settings = dict(CIFAR)
    train = Subset(train, range(settings.pop("images")))
    model = fv.SelfExplainingClassifier(num_classes=10, **BUDGETS["small"].networks[network] | fv.recipe.MODEL)
    fv.fit(model.backbone, train, objective=fv.TaskObjective(), progress=False, **settings)
    images = torch.stack([test[row][0] for row in range(TESTED)])
    return model, train, images, fv.kernel_shap_values(model, images, 4096)


class _Simulated(Dataset):
    """Images that follow from their number."""

    def __init__(self, count: int) -> None:
        self.count, self.pool = count, torch.randn(64, 3, 48, 48, generator=torch.Generator().manual_seed(0))

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, row: int) -> tuple[Tensor, int]:
        return self.pool[row % 64].roll(row // 64, -1), 0


def _simulated_model() -> fv.SelfExplainingClassifier:
    torch.manual_seed(0)
    return fv.SelfExplainingClassifier("test_vit", SIMULATED["classes"], img_size=48)


def memory(options: argparse.Namespace) -> list[Row]:
    """Of recording by a process of its own, and of training from the files."""
    with tempfile.TemporaryDirectory(dir=options.work) as folder:
        found = subprocess.run(
            [sys.executable, "-m", "bench.recordings", "--simulate", folder, "--images", str(options.images)],
            check=True,
            capture_output=True,
            text=True,
        )
        grown, seconds = map(float, found.stdout.split()[-2:])
        size = sum(path.stat().st_size for path in Path(folder).glob("*.safetensors"))
        row = {
            "what": "recording",
            "images": options.images,
            **SIMULATED,
            "grown_mb": round(grown),
            "files_gb": round(size / 1e9, 2),
        }
        rows = [row | {"images_a_second": round(options.images / seconds)}]
        print(rows[-1], flush=True)
        rows.append({"what": "training from the files", **_trained(folder, options.images)})
        print(rows[-1], flush=True)
    return rows


def simulate(folder: str, images: int) -> None:
    """Records simulated values; prints the MB by which the process grew, and the seconds."""
    model, process = _simulated_model(), psutil.Process()
    table = torch.randn(256, SIMULATED["coalitions"], SIMULATED["classes"])

    def values(images: Tensor, *_: Any, **__: Any) -> Tensor:
        return table.roll(int(images[0, 0, 0, 0] * 1e4), 0)[: len(images)]

    model.coalition_values = values  # type: ignore[method-assign]
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before, started = process.memory_info().rss, time.perf_counter()
    fv.record_coalitions(
        model, _Simulated(images), SIMULATED["coalitions"], output=folder, batch_size=256, progress=False
    )
    text = Path("/proc/self/status").read_text()
    peak = next(int(line.split()[1]) * 1024 for line in text.splitlines() if line.startswith("VmHWM"))
    print((peak - before) / 1e6, time.perf_counter() - started)


def _trained(folder: str, images: int) -> Row:
    """Speed of steps on some images, from the files and from memory by turns, and memory of reading them all."""
    model = _simulated_model().train()
    recorded = fv.RecordedCoalitions.load(folder, _Simulated(images))
    process = psutil.Process()
    before = process.memory_info().rss
    for _ in _steps(model, recorded, 200):
        pass
    resident = (process.memory_info().rss - before) / 1e6
    rows = range(min(TRAINED, images))
    found = recorded.rows(rows)
    in_memory = fv.RecordedCoalitions(Subset(recorded.data, rows), found["bits"], found["values"])
    on_disk = Subset(recorded, rows)
    calls: dict[str, Callable[[], Any]] = {
        "disk": lambda: list(_steps(model, on_disk, BATCHES)),
        "memory": lambda: list(_steps(model, in_memory, BATCHES)),
    }
    times = Timer(torch.device("cpu"), SECONDS, least=5, by="wall").measure(calls)
    speeds = {name: BATCHES * BATCH / each.median * 1e3 for name, each in times.items()}
    shuffled = torch.randperm(len(rows), generator=torch.Generator().manual_seed(1))[:1024].tolist()
    reading = Timer(torch.device("cpu"), SECONDS / 6, least=5, by="wall").measure(
        {"read": lambda: recorded.rows(shuffled)}
    )
    return {
        "grown_mb": round(resident),
        "images_a_second": round(speeds["disk"]),
        "from_memory": round(speeds["memory"]),
        "ratio": round(speeds["disk"] / speeds["memory"], 3),
        "rows_a_second": round(len(shuffled) / reading["read"].median * 1e3),
    }


def _steps(model: Any, data: Any, count: int) -> Any:
    """Steps of the explainer's training on shuffled images."""
    objective = fv.ExplainerObjective()
    optimizer = torch.optim.AdamW(model.head.parameters(), 1e-4)
    generator = torch.Generator().manual_seed(0)
    loader = DataLoader(data, BATCH, shuffle=True, drop_last=True, generator=generator)
    for number, (images, batch) in enumerate(loader):
        if number == count:
            return
        objective(model, images, batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        yield number


def processes(options: argparse.Namespace) -> list[Row]:
    """Images a second of one and of two processes, by turns, each on a core of its own."""
    found: dict[int, list[float]] = {1: [], 2: []}
    digests = set()
    for _ in range(options.turns):
        for count in found:
            with tempfile.TemporaryDirectory(dir=options.work) as folder:
                ended = [process.communicate()[0].split() for process in _started(folder, count)]
            found[count].append(max(float(words[-1]) for words in ended))
            digests |= {words[-2] for words in ended}
    medians = {count: sorted(times)[len(times) // 2] for count, times in found.items()}
    row = {"images": DIVIDED, "one": round(DIVIDED / medians[1], 2), "two": round(DIVIDED / medians[2], 2)}
    rows = [row | {"ratio": round(medians[1] / medians[2], 3), "equal_digests": len(digests) == 1}]
    print(rows[-1], flush=True)
    return rows


def _started(folder: str, count: int) -> list[subprocess.Popen]:
    common = {**os.environ, "OMP_NUM_THREADS": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29531"}
    common |= {"WORLD_SIZE": str(count)}
    words = [sys.executable, "-m", "bench.recordings", "--divide", folder]
    return [
        subprocess.Popen(
            words, stdout=subprocess.PIPE, text=True, env=common | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
        )
        for rank in range(count)
    ]


def divide(folder: str) -> None:
    """Records this process's part; prints the digest and the seconds."""
    torch.manual_seed(0)
    model = fv.SelfExplainingClassifier("vit_tiny_patch16_224", 1000)
    images = torch.randn(8, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    data = [(images[row % 8].roll(row // 8, -1), 0) for row in range(DIVIDED)]
    warm = fv.Coalitions(torch.zeros(2, 2, 7, dtype=torch.int32), model.players)
    with torch.no_grad():
        model.eval().coalition_values(images[:2], warm)
    joined().wait_for_everyone()  # the start of a process is no part of it
    started = time.perf_counter()
    found = fv.record_coalitions(model, data, 8, output=folder, shard=SHARD, batch_size=SHARD, progress=False)
    print(found.digest, time.perf_counter() - started)


PARTS = {"kept": kept, "memory": memory, "processes": processes}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=list(PARTS), default=list(PARTS))
    parser.add_argument("--networks", nargs="+", choices=list(digits.MODELS), default=list(digits.MODELS))
    parser.add_argument("--data", type=Path, help="folder of CIFAR-10's archives")
    parser.add_argument("--images", type=int, default=100_000, help="of the simulated recording")
    parser.add_argument("--turns", type=int, default=5, help="of processes")
    parser.add_argument("--work", type=Path, default=Path("runs"), help="folder for the recordings, 13 GB at most")
    parser.add_argument("--output", type=Path, default=RESULTS / "recordings.json")
    parser.add_argument("--simulate", metavar="FOLDER", help=argparse.SUPPRESS)
    parser.add_argument("--divide", metavar="FOLDER", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.simulate or options.divide:
        return simulate(options.simulate, options.images) if options.simulate else divide(options.divide)
    options.work.mkdir(parents=True, exist_ok=True)
    if shutil.disk_usage(options.work).free < 2e10 and "memory" in options.parts:
        parser.error("argument --work: needs 20 GB")
    results = Results(options.output, ("part", "data", "network", "kept", "what"))
    for part in options.parts:
        rows = PARTS[part](options)
        results.replace([{"part": part, **row} for row in rows])
        results.content = machine.header() | {"rows": results.rows}
        results.write()
    return None


if __name__ == "__main__":
    main()
