"""Train a U-Net to find the ink of handwritten digits on noisy paper.

python examples/segment_unet.py
"""

import argparse
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits

import fastcnn


def main(arguments: Sequence[str] | None = None) -> tuple[torch.nn.Module, list[float]]:
    """Train, and return the model and the intersection over union of each step's batch."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--size", type=int, default=64, help="of the images")
    parser.add_argument("--width", type=int, default=16, help="channels of the first level")
    options = parser.parse_args(arguments)

    # Built of plain PyTorch and converted; `up` and `norm` choose what it is made of.
    model = fastcnn.create_model("unet", num_classes=1, in_chans=1, depth=3, width=options.width)
    model.to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)

    pixels = torch.from_numpy(load_digits().data).float().view(-1, 1, 8, 8) / 16
    ious = []
    for step in range(options.steps):
        chosen = pixels[torch.randint(len(pixels), (options.batch,))]
        ink = F.interpolate(chosen, size=options.size, mode="bilinear")
        mask = (ink > 0.25).float()
        paper = (1 - 0.5 * ink + 0.3 * torch.randn_like(ink)).to(memory_format=torch.channels_last)
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(paper)
        loss = F.binary_cross_entropy_with_logits(logits.float(), mask)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        found = logits > 0
        ious.append(float((found & (mask > 0)).sum() / (found | (mask > 0)).sum()))
        print(f"step {step + 1}/{options.steps}  loss {loss.item():.3f}  IoU {ious[-1]:.3f}")
    return model, ious


if __name__ == "__main__":
    main()
