"""The one-command demo: a U-Net learns to read pages of handwriting, compared with plain PyTorch.

Two copies of one network, one converted and one not, start from the same weights and take turns
on the same batches; each step of each is timed. So one run shows that both learn the same, what a
step of either takes, and what it saves for backward. It is a U-Net because resizing,
concatenation, batch norms and activations, which fastcnn fuses, are much of its time; and in
bfloat16 where the processor computes in it, since convolutions then leave the most to these.
"""

import copy
import dataclasses
import datetime
import json
import math
import platform
import statistics
import time
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from torch import Tensor, nn

import fastcnn
from fastcnn.lab import (
    bfloat16_instructions,
    describe,
    eager_baseline,
    ratio,
    saved_for_backward,
)
from fastcnn.models import unet
from fastcnn.train import pages
from fastcnn.train.pages import Digits, Pages
from fastcnn.train.picture import draw

__all__ = ["EPOCHS", "run"]

NAMES = ("fastcnn", "eager")
WIDTH, DEPTH = 16, 3
EPOCHS = 20
PAGES_A_STEP = 2
PEAK_LR = 0.01
# Five of six pixels are paper: unweighted, it takes twice as many steps to begin to read.
PAPER_WEIGHT = 0.2
# Of each network, not counted in its times: libraries prepare their kernels in the first steps.
WARMUP_STEPS = 5
# Laid out once, the same for every seed, as the split is.
PAPER_SEED = 0
ELSEWHERE = (
    "Elsewhere, as measured on two cores of an AMD EPYC (docs/performance.md): 1.51x for a U-Net "
    "of 64 channels on 256x256 images in bfloat16; 0.95x, a loss, for ResNet-20 on 32x32 in "
    "float32."
)
EXPECTED = (
    "Expected to gain more, not measured with this network: processors that are fast at products "
    "(AVX512_BF16, AMX), where convolutions leave the most to what fastcnn fuses; larger images."
)


@dataclasses.dataclass
class Trained:
    """A network, the loss and the share of validation digits read by epoch, seconds by step."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    schedule: torch.optim.lr_scheduler.LRScheduler
    loss: list[float] = dataclasses.field(default_factory=list)
    read: list[float] = dataclasses.field(default_factory=list)
    steps: list[float] = dataclasses.field(default_factory=list)

    def timed(self) -> list[float]:
        """Return the seconds of the steps that count: not the first ones, where there are more."""
        return self.steps[WARMUP_STEPS:] or self.steps


def autocast() -> torch.autocast:
    """The type of both networks' training and testing: bfloat16 where it is fast, else float32."""
    return torch.autocast("cpu", torch.bfloat16, enabled=bool(bfloat16_instructions()))


def loss_of(model: nn.Module, page: Pages) -> Tensor:
    """Cross-entropy of the pixels' classes."""
    with autocast():
        logits = model(page.x)
    weight = page.x.new_ones(pages.CLASSES)
    weight[0] = PAPER_WEIGHT
    return F.cross_entropy(logits.float(), page.classes, weight=weight)


@torch.inference_mode()
def evaluate(model: nn.Module, digits: Digits, page: Pages) -> dict[str, float]:
    """Return the share of digits read and the mean over classes of intersection over union.

    A digit counts as read where more than half of its ink has its class.
    """
    model.eval()
    with autocast():
        predicted = model(page.x).argmax(1)
    classes = page.classes
    ink = pages.cells(classes) > 0
    right = ink & (pages.cells(predicted) == pages.cells(classes))
    read = 2 * right.sum((1, 2)) > ink.sum((1, 2))
    pairs = classes.flatten() * pages.CLASSES + predicted.flatten()
    confusion = pairs.bincount(minlength=pages.CLASSES**2).view(pages.CLASSES, -1).double()
    both = confusion.diag()
    either = confusion.sum(0) + confusion.sum(1) - both
    return {
        "digits_read": int(read.sum()) / len(digits.labels),
        "mean_iou": float((both / either)[either > 0].mean()),
    }


def steps_an_epoch(digits: Digits) -> int:
    """Return how often a step's digits fit in; those left over sit this epoch out."""
    return len(digits.labels) // (PAGES_A_STEP * pages.DIGITS_A_PAGE)


def start(steps: int, seed: int) -> dict[str, Trained]:
    """Return both networks with the same weights, their optimizers and learning rates."""
    torch.manual_seed(seed)
    ours = unet(in_chans=1, num_classes=pages.CLASSES, width=WIDTH, depth=DEPTH)
    ours.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # torch's stub gap
    found = {}
    for name, model in zip(NAMES, (ours, eager_baseline(ours)), strict=True):
        optimizer = torch.optim.AdamW(model.parameters(), PEAK_LR)
        schedule = torch.optim.lr_scheduler.OneCycleLR(
            optimizer, PEAK_LR, total_steps=steps, cycle_momentum=False
        )
        found[name] = Trained(model, optimizer, schedule)
    return found


def step(trained: Trained, page: Pages) -> float:
    """Make a training step, note its seconds, and return its loss."""
    began = time.perf_counter()
    loss = loss_of(trained.model, page)
    trained.optimizer.zero_grad()
    torch.autograd.backward(loss)
    trained.optimizer.step()
    value = loss.item()
    trained.steps.append(time.perf_counter() - began)
    trained.schedule.step()
    return value


def train_epoch(both: dict[str, Trained], digits: Digits, generator: torch.Generator) -> None:
    """Pass once over the digits in random order on new pages; the networks take turns."""
    order = torch.randperm(len(digits.labels), generator=generator, device=generator.device)
    steps = steps_an_epoch(digits)
    total = dict.fromkeys(both, 0.0)
    for trained in both.values():
        trained.model.train()
    for i, chosen in enumerate(order.split(PAGES_A_STEP * pages.DIGITS_A_PAGE)[:steps]):
        page = pages.lay_out(Digits(digits.ink[chosen], digits.labels[chosen]), generator)
        # Odd steps in reverse order, so that none always runs into the other's caches.
        for name in list(both)[:: -1 if i % 2 else 1]:
            total[name] += step(both[name], page)
    for name, trained in both.items():
        trained.loss.append(total[name] / steps)


def fit(parts: dict[str, Digits], epochs: int, seed: int, console: Console) -> dict[str, Trained]:
    """Train both with AdamW and a one-cycle learning rate; the validation digits choose nothing."""
    both = start(epochs * steps_an_epoch(parts["train"]), seed)
    generator = torch.Generator().manual_seed(seed)
    paper = torch.Generator().manual_seed(PAPER_SEED)
    validation = pages.lay_out(parts["validation"], paper)
    columns = (
        TextColumn("epoch"),
        MofNCompleteColumn(),
        BarColumn(),
        TextColumn("{task.description}"),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task("", total=epochs)
        for epoch in range(1, epochs + 1):
            train_epoch(both, parts["train"], generator)
            for trained in both.values():
                found = evaluate(trained.model, parts["validation"], validation)
                trained.read.append(found["digits_read"])
            status = "  ".join(
                f"{name}: loss {three(trained.loss[-1])}, reads {percent(trained.read[-1])}"
                for name, trained in both.items()
            )
            # A terminal of 80 columns has room for this much beside the bar.
            reads = " | ".join(f"{name} reads {percent(of.read[-1])}" for name, of in both.items())
            progress.update(task, advance=1, description=reads)
            if not console.is_terminal:
                console.print(f"epoch {epoch}/{epochs}  {status}", highlight=False, soft_wrap=True)
    return both


def saved_by_step(model: nn.Module, page: Pages) -> int:
    """Bytes saved for backward, parameters and buffers not counted."""
    model = copy.deepcopy(model).train()  # running statistics move
    return saved_for_backward(
        lambda: loss_of(model, page), exclude=[*model.parameters(), *model.buffers()]
    )


def compare(both: dict[str, Trained], parts: dict[str, Digits]) -> dict[str, Any]:
    """Test each once, and return accuracy, time and memory of both with their ratios.

    train_step_speedup = median(time of eager / time of fastcnn); activation_memory_ratio =
    bytes of fastcnn / bytes of eager.
    """
    paper = torch.Generator().manual_seed(PAPER_SEED)
    page = pages.lay_out(parts["test"], paper)
    one_step = Pages(page.x[:PAGES_A_STEP], page.classes[:PAGES_A_STEP])
    found: dict[str, Any] = {}
    for name, trained in both.items():
        tested = evaluate(trained.model, parts["test"], page)
        found |= {f"test_{what}_{name}": value for what, value in tested.items()}
        found[f"seconds_training_{name}"] = sum(trained.steps)
        found[f"train_step_ms_{name}"] = 1e3 * statistics.median(trained.timed())
        found[f"activation_bytes_{name}"] = saved_by_step(trained.model, one_step)
    times = {name: trained.timed() for name, trained in both.items()}
    found["train_step_speedup"] = ratio(times["eager"], times["fastcnn"])
    found["activation_memory_ratio"] = (
        found["activation_bytes_fastcnn"] / found["activation_bytes_eager"]
    )
    return found


def percent(share: float) -> str:
    """Return a share as a percentage, as every one here is written."""
    return f"{100 * share:.1f} %"


def three(value: float) -> str:
    """Return a number to three significant digits, as every amount here is written."""
    above = math.floor(math.log10(value)) + 1 if value > 0 else 1
    return f"{value:.{max(0, 3 - above)}f}"


def shown(summary: dict[str, Any]) -> list[tuple[str, str, str, str]]:
    """Return the table's and the picture's lines: what, fastcnn's, eager's, and their ratio."""

    def of(key: str, write: Any, unit: float = 1.0) -> tuple[str, str]:
        fastcnn_, eager = (write(summary[f"{key}_{name}"] / unit) for name in NAMES)
        return fastcnn_, eager

    return [
        ("test digits read", *of("test_digits_read", percent), ""),
        ("mean IoU of test pixels", *of("test_mean_iou", percent), ""),
        ("all training steps, s", *of("seconds_training", three), ""),
        (
            "training step, ms",
            *of("train_step_ms", three),
            f"{summary['train_step_speedup']:.2f}x as fast",
        ),
        (
            "saved for backward, MiB",
            *of("activation_bytes", three, 2**20),
            f"{summary['activation_memory_ratio']:.2f}x the memory",
        ),
    ]


def conditions(summary: dict[str, Any]) -> str:
    """Return what the numbers depend on, in a line."""
    units = summary["bfloat16_by"]
    by = ", ".join(units) or "no AMX, no fast AVX512_BF16"
    return (
        f"U-Net of {WIDTH} channels and {DEPTH} levels, {PAGES_A_STEP} pages of "
        f"{pages.PAGE}x{pages.PAGE} a step, {summary['dtype']} ({by}), "
        f"{summary['device']}, torch {torch.__version__}"
    )


def results_table(summary: dict[str, Any]) -> Table:
    """What a reader wants first; a ratio on the wrong side of 1 is shown like any other."""
    table = Table(title="fastcnn demo", title_justify="left")
    table.add_column("")
    for column in (*NAMES, "fastcnn vs. eager"):
        table.add_column(column, justify="right")
    for row in shown(summary):
        table.add_row(*row)
    return table


def run(
    out: Path,
    epochs: int = EPOCHS,
    seed: int = 0,
    threads: int | None = None,
    console: Console | None = None,
) -> dict[str, Any]:
    """Train both, test each once; write summary.json and curves.png into `out`.

    Returns what summary.json holds. `threads` sets PyTorch's threads for the process, None leaves
    them. Bars are drawn if `console` is a terminal, otherwise one line an epoch.

    Raises:
        OSError: `out` cannot be made or written.
    """
    out.mkdir(parents=True, exist_ok=True)
    if threads is not None:
        torch.set_num_threads(threads)
    console = console or Console()
    parts = pages.load()
    both = fit(parts, epochs, seed, console)
    model = both["fastcnn"].model
    processor = describe(torch.device("cpu"))
    summary: dict[str, Any] = {
        **compare(both, parts),
        "model": "unet",
        "width": WIDTH,
        "depth": DEPTH,
        "parameters": sum(p.numel() for p in model.parameters()),
        "digits": {name: len(part.labels) for name, part in parts.items()},
        "epochs": epochs,
        "pages_a_step": PAGES_A_STEP,
        "page_size": pages.PAGE,
        "seed": seed,
        "dtype": "bfloat16" if bfloat16_instructions() else "float32",
        "bfloat16_by": bfloat16_instructions(),
        "memory_format": "channels_last",
        "device": f"{processor.name}, {processor.capability}",
        "threads": torch.get_num_threads(),
        "versions": {
            "fastcnn": fastcnn.__version__,
            "torch": torch.__version__,
            "scikit-learn": metadata.version("scikit-learn"),
            "python": platform.python_version(),
        },
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "history": {
            name: {"train_loss": trained.loss, "validation_digits_read": trained.read}
            for name, trained in both.items()
        },
    }
    (out / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    page = pages.lay_out(parts["test"], torch.Generator().manual_seed(PAPER_SEED))
    with torch.inference_mode(), autocast():
        predicted = model(page.x[:1]).argmax(1)
    first = Pages(page.x[:1], page.classes[:1])
    draw(summary["history"], shown(summary), conditions(summary), first, predicted, out)
    console.print(results_table(summary))
    for line in (
        conditions(summary),
        ELSEWHERE,
        EXPECTED,
        f"written: {out / 'summary.json'}, {out / 'curves.png'}",
    ):
        console.print(line, highlight=False, markup=False, soft_wrap=True)
    return summary
