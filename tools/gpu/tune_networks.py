"""Meet every convolution of ResNet-50 and U-Net, so that FASTCNN_PLAN=tune times their candidates.

python tune_networks.py          prints the plans at the end, also of an end that came early:
each is in the plan file at once
python tune_networks.py 1 4      runs the second quarter of the candidates once, and times none:
Triton then has them compiled, on disk
"""

import contextlib
import sys
import time
from collections.abc import Iterator, Mapping, Sequence

import torch

import fastcnn
from fastcnn.plan import OPS, Problem

# Batch and side: inference first, since its epilogue is what most users meet.
NETWORKS = {"resnet50": (256, 224), "unet": (16, 256)}


def meet(name: str, batch: int, side: int, training: bool, device: str) -> None:
    """One step of a network in bf16, channels_last."""
    model = fastcnn.create_model(name, num_classes=10).train(training)
    model = model.to(device, memory_format=torch.channels_last)
    x = torch.randn(batch, 3, side, side, device=device).to(memory_format=torch.channels_last)
    with torch.set_grad_enabled(training), torch.autocast(device, torch.bfloat16):
        y = model(x)
    if training:
        y.float().mean().backward()


def meet_all(networks: Mapping[str, tuple[int, int]], device: str) -> None:
    """Meet them in inference and in training."""
    for training in (False, True):
        for name, (batch, side) in networks.items():
            started = time.monotonic()
            meet(name, batch, side, training, device)
            what = "training" if training else "inference"
            print(f"{name} {what}: {time.monotonic() - started:.1f} s", flush=True)


def main(networks: Mapping[str, tuple[int, int]] = NETWORKS, device: str = "cuda") -> None:
    """Meet them all, and print the plans."""
    try:
        meet_all(networks, device)
    finally:
        fastcnn.report()


def compile_part(
    part: int, parts: int, networks: Mapping[str, tuple[int, int]] = NETWORKS, device: str = "cuda"
) -> list[tuple[Problem, str]]:
    """Run one candidate in `parts` once; return which."""
    meet_all(networks, device)
    ran = [*candidates(met())][part::parts]
    for problem, name in ran:
        with contextlib.suppress(Exception):  # tuning will meet it again, and say so
            run_once(problem, name)
    return ran


def met() -> list[Problem]:
    """Return the problems that were planned in this process."""
    return [*fastcnn.plan._planner().plans()]


def candidates(problems: Sequence[Problem]) -> Iterator[tuple[Problem, str]]:
    """Yield what tuning will compare with PyTorch's own ways."""
    for problem in problems:
        op = OPS[problem.op]
        able, _ = op.supporting(problem)
        yield from ((problem, name) for name in able if name != op.baseline)


def run_once(problem: Problem, name: str) -> None:
    """Run a candidate on inputs of its op's making."""
    op = OPS[problem.op]
    generator = torch.Generator(problem.device).manual_seed(0)
    op.candidates[name].run(problem, *op.tensors(problem, generator))


if __name__ == "__main__":
    if sys.argv[1:]:
        compile_part(*map(int, sys.argv[1:]))
    else:
        main()
