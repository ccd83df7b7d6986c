"""The one-command demo: train ResNet-20 on real images, then compare with plain PyTorch.

The images are scikit-learn's digits: 1,797 of 8x8 pixels, scanned handwriting (UCI, Alpaydin and
Kaynak 1998), enlarged to the 32x32 that this network is made for. They are few enough to train on
in well under a minute without a GPU.
"""

import copy
import dataclasses
import datetime
import json
import platform
import statistics
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn

import fastcnn
from fastcnn.lab import eager_baseline, interleaved, ratio, saved_for_backward
from fastcnn.models import resnet20

__all__ = ["EPOCHS", "run"]

EPOCHS = 20
BATCH = 64
PEAK_LR = 0.1
MOMENTUM = 0.9
WEIGHT_DECAY = 5e-4
# The split is the same for every seed: seeds then differ by initial weights, order and shifts only.
SPLIT_SEED = 0
TIMING_ROUNDS = 40
TIMING_WARMUP = 5


class Images(NamedTuple):
    """x (n, 1, 8, 8), ink from 0 to 16; labels (n), 0 to 9."""

    x: Tensor
    labels: Tensor


class Digits(NamedTuple):
    """The three parts, and mean and standard deviation of the training pixels."""

    train: Images
    validation: Images
    test: Images
    mean: float
    std: float


@dataclasses.dataclass
class Trained:
    """The network of the best epoch on the validation images, and how training went."""

    model: nn.Module
    train_loss: list[float]
    validation_accuracy: list[float]
    best_epoch: int
    seconds: float


def load() -> Digits:
    """Split stratified by digit: 20 % test, 15 % validation, the rest for training."""
    images, labels = load_digits(return_X_y=True)
    indices = range(len(labels))
    rest, test = train_test_split(indices, test_size=0.2, stratify=labels, random_state=SPLIT_SEED)
    train, validation = train_test_split(
        rest, test_size=0.15 / 0.8, stratify=labels[rest], random_state=SPLIT_SEED
    )
    x = torch.from_numpy(images).float().view(-1, 1, 8, 8)
    y = torch.from_numpy(labels)
    return Digits(
        train=Images(x[train], y[train]),
        validation=Images(x[validation], y[validation]),
        test=Images(x[test], y[test]),
        mean=x[train].mean().item(),
        std=x[train].std().item(),
    )


def shift(x: Tensor, generator: torch.Generator) -> Tensor:
    """Move each image of x (n, 1, h, w) by -1, 0 or 1 pixel in y and in x; paper (0) comes in."""
    n, _, h, w = x.shape
    # windows (n, 1, 3, 3, h, w): the nine positions of an image in its frame of zeros, as views.
    windows = F.pad(x, (1, 1, 1, 1)).unfold(2, h, 1).unfold(3, w, 1)
    dy, dx = torch.randint(3, (2, n), generator=generator)
    return windows[torch.arange(n), :, dy, dx]


def prepare(x: Tensor, digits: Digits) -> Tensor:
    """(x - mean) / std, enlarged from (n, 1, 8, 8) to (n, 1, 32, 32), in channels_last."""
    x = F.interpolate((x - digits.mean) / digits.std, scale_factor=4, mode="bilinear")
    return x.to(memory_format=torch.channels_last)


def sgd(model: nn.Module) -> torch.optim.SGD:
    """The optimizer of training and of timing."""
    return torch.optim.SGD(
        model.parameters(), PEAK_LR, MOMENTUM, weight_decay=WEIGHT_DECAY, nesterov=True
    )


@torch.inference_mode()
def accuracy(model: nn.Module, images: Images, digits: Digits) -> float:
    """Share of images whose largest logit is the label's."""
    model.eval()
    predicted = model(prepare(images.x, digits)).argmax(1)
    right = int((predicted == images.labels).sum())
    return right / len(images.labels)


def train_epoch(
    model: nn.Module,
    digits: Digits,
    optimizer: torch.optim.Optimizer,
    schedule: torch.optim.lr_scheduler.LRScheduler,
    generator: torch.Generator,
) -> float:
    """One pass over the training images in random order; returns the mean loss of an image."""
    model.train()
    total = 0.0
    order = torch.randperm(len(digits.train.x), generator=generator)
    for batch in torch.split(order, BATCH):
        x = prepare(shift(digits.train.x[batch], generator), digits)
        loss = F.cross_entropy(model(x), digits.train.labels[batch])
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        optimizer.step()
        schedule.step()
        total += loss.item() * len(batch)
    return total / len(digits.train.x)


def fit(digits: Digits, epochs: int, seed: int, console: Console) -> Trained:
    """Train with SGD and a one-cycle learning rate; keep the epoch that validates best."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    model = resnet20(num_classes=10, in_chans=1)
    model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # torch's stub gap
    optimizer = sgd(model)
    steps = -(-len(digits.train.x) // BATCH)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, PEAK_LR, epochs=epochs, steps_per_epoch=steps, cycle_momentum=False
    )
    losses: list[float] = []
    accuracies: list[float] = []
    best = copy.deepcopy(model.state_dict())
    columns = (
        TextColumn("epoch"),
        MofNCompleteColumn(),
        BarColumn(),
        TextColumn("{task.description}"),
        TimeElapsedColumn(),
    )
    start = time.perf_counter()
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task("", total=epochs)
        for epoch in range(1, epochs + 1):
            losses.append(train_epoch(model, digits, optimizer, schedule, generator))
            accuracies.append(accuracy(model, digits.validation, digits))
            # The later of two equals: the learning rate is lower there.
            if accuracies[-1] == max(accuracies):
                best = copy.deepcopy(model.state_dict())
            status = f"loss {losses[-1]:.4f}  validation {accuracies[-1]:.2%}"
            progress.update(task, advance=1, description=status)
            if not console.is_terminal:
                console.print(f"epoch {epoch}/{epochs}  {status}", highlight=False)
    seconds = time.perf_counter() - start
    model.load_state_dict(best)
    best_epoch = epochs - accuracies[::-1].index(max(accuracies))
    return Trained(model, losses, accuracies, best_epoch, seconds)


def training_step(model: nn.Module, x: Tensor, labels: Tensor) -> Callable[[], None]:
    """One training step as a function: forward, loss, backward, optimizer, always on one batch."""
    model.train()
    optimizer = sgd(model)

    def step() -> None:
        loss = F.cross_entropy(model(x), labels)
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        optimizer.step()

    return step


def saved_by_step(model: nn.Module, x: Tensor, labels: Tensor) -> int:
    """Bytes saved for backward, parameters and buffers not counted."""
    return saved_for_backward(
        lambda: F.cross_entropy(model(x), labels),
        exclude=[*model.parameters(), *model.buffers()],
    )


def compare(model: nn.Module, digits: Digits) -> dict[str, float]:
    """Time and memory of a training step of `model` (m) and its original in plain PyTorch (e).

    train_step_speedup = median(time e / time m); activation_memory_ratio = bytes m / bytes e.
    """
    x = prepare(digits.train.x[:BATCH], digits)
    labels = digits.train.labels[:BATCH]
    # Copies: the steps change weights, and the trained ones are not ours to change.
    models = {"fastcnn": copy.deepcopy(model), "eager": eager_baseline(model)}
    steps = {name: training_step(net, x, labels) for name, net in models.items()}
    kept = {name: saved_by_step(net, x, labels) for name, net in models.items()}
    times = interleaved(steps, TIMING_ROUNDS, TIMING_WARMUP)
    return {
        "train_step_speedup": ratio(times["eager"], times["fastcnn"]),
        "train_step_ms_fastcnn": 1e3 * statistics.median(times["fastcnn"]),
        "train_step_ms_eager": 1e3 * statistics.median(times["eager"]),
        "activation_memory_ratio": kept["fastcnn"] / kept["eager"],
        "activation_bytes_fastcnn": kept["fastcnn"],
        "activation_bytes_eager": kept["eager"],
    }


def results_table(summary: dict[str, Any]) -> Table:
    """What a reader wants first; a ratio on the wrong side of 1 is shown like any other."""
    table = Table(title="fastcnn demo", title_justify="left")
    table.add_column("")
    for column in ("fastcnn", "eager", ""):
        table.add_column(column, justify="right")
    table.add_row("test accuracy", f"{summary['test_accuracy']:.2%}", "", "")
    table.add_row("training, seconds", f"{summary['seconds_training']:.1f}", "", "")
    table.add_row(
        "training step, ms",
        f"{summary['train_step_ms_fastcnn']:.2f}",
        f"{summary['train_step_ms_eager']:.2f}",
        f"{summary['train_step_speedup']:.2f}x as fast",
    )
    table.add_row(
        "saved for backward, KiB",
        f"{summary['activation_bytes_fastcnn'] / 1024:.0f}",
        f"{summary['activation_bytes_eager'] / 1024:.0f}",
        f"{summary['activation_memory_ratio']:.2f}x the memory",
    )
    return table


def draw(trained: Trained, test_accuracy: float, path: Path) -> None:
    """Training loss and validation accuracy over the epochs, as a PNG."""
    epochs = range(1, len(trained.train_loss) + 1)
    # One epoch has no line: its points are drawn.
    marker = "o" if len(epochs) == 1 else ""
    figure = Figure(figsize=(9, 3.6), dpi=150, layout="constrained")
    figure.suptitle(f"ResNet-20 on scanned digits: {test_accuracy:.1%} of the test images right")
    left, right = figure.subplots(1, 2)
    left.plot(epochs, trained.train_loss, color="#c2410c", linewidth=2, marker=marker)
    left.set_yscale("log")
    left.set_title("training loss (cross-entropy)", fontsize=10)
    percent = [100 * value for value in trained.validation_accuracy]
    right.plot(epochs, percent, color="#1d4ed8", linewidth=2, marker=marker)
    best = max(percent)
    kept = f"kept: epoch {trained.best_epoch}, {best:.1f} %"
    right.plot(trained.best_epoch, best, "o", color="#1d4ed8", markersize=7, label=kept)
    right.legend(loc="lower right", frameon=False, fontsize=9)
    right.set_title("validation accuracy (%)", fontsize=10)
    for axes in (left, right):
        axes.set_xlabel("epoch")
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(alpha=0.25, linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path)


def run(
    out: Path,
    epochs: int = EPOCHS,
    seed: int = 0,
    threads: int | None = None,
    console: Console | None = None,
) -> dict[str, Any]:
    """Train, test once, compare with plain PyTorch; write summary.json and curves.png into `out`.

    Returns what summary.json holds. `threads` sets PyTorch's threads for the process, None leaves
    them; the epoch with the best validation accuracy is tested. Bars are drawn if `console` is a
    terminal, otherwise one line an epoch.

    Raises:
        OSError: `out` cannot be made or written.
    """
    out.mkdir(parents=True, exist_ok=True)
    if threads is not None:
        torch.set_num_threads(threads)
    console = console or Console()
    digits = load()
    trained = fit(digits, epochs, seed, console)
    test_accuracy = accuracy(trained.model, digits.test, digits)
    summary: dict[str, Any] = {
        "test_accuracy": test_accuracy,
        "validation_accuracy": max(trained.validation_accuracy),
        "best_epoch": trained.best_epoch,
        "seconds_training": trained.seconds,
        **compare(trained.model, digits),
        "model": "resnet20",
        "parameters": sum(p.numel() for p in trained.model.parameters()),
        "images": {name: len(getattr(digits, name).x) for name in ("train", "validation", "test")},
        "epochs": epochs,
        "batch_size": BATCH,
        "seed": seed,
        "dtype": "float32",
        "memory_format": "channels_last",
        "image_size": 32,
        "device": f"cpu, {platform.machine()}, {torch.backends.cpu.get_cpu_capability()}",
        "threads": torch.get_num_threads(),
        "timing_rounds": TIMING_ROUNDS,
        "versions": {
            "fastcnn": fastcnn.__version__,
            "torch": torch.__version__,
            "scikit-learn": metadata.version("scikit-learn"),
            "python": platform.python_version(),
        },
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "history": {
            "train_loss": trained.train_loss,
            "validation_accuracy": trained.validation_accuracy,
        },
    }
    (out / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    draw(trained, test_accuracy, out / "curves.png")
    console.print(results_table(summary))
    console.print(
        f"written: {out / 'summary.json'}, {out / 'curves.png'}",
        highlight=False,
        markup=False,
        soft_wrap=True,
    )
    return summary
