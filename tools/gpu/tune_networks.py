"""Meet every convolution of ResNet-50 and U-Net, so that FASTCNN_PLAN=tune times their candidates.

Prints the plans at the end, also of an end that came early: each is in the plan file at once.
"""

import time
from collections.abc import Mapping

import torch

import fastcnn

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


def main(networks: Mapping[str, tuple[int, int]] = NETWORKS, device: str = "cuda") -> None:
    """Meet them all."""
    try:
        for training in (False, True):
            for name, (batch, side) in networks.items():
                started = time.monotonic()
                meet(name, batch, side, training, device)
                what = "training" if training else "inference"
                print(f"{name} {what}: {time.monotonic() - started:.1f} s", flush=True)
    finally:
        fastcnn.report()


if __name__ == "__main__":
    main()
