"""Fine-tune a timm model on scikit-learn's digits in bfloat16: convert it, then train as always.

python examples/finetune_timm.py                     # timm downloads the pretrained weights
python examples/finetune_timm.py --from-scratch      # no network needed
"""

import argparse
from collections.abc import Sequence

import timm
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits

import fastcnn


def main(arguments: Sequence[str] | None = None) -> tuple[torch.nn.Module, list[float]]:
    """Train, and return the model and its losses."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="resnet18")
    parser.add_argument("--from-scratch", action="store_true", help="without pretrained weights")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--size", type=int, default=128, help="of the images")
    options = parser.parse_args(arguments)

    model = timm.create_model(options.model, pretrained=not options.from_scratch, num_classes=10)
    model = fastcnn.convert(model.to(memory_format=torch.channels_last))
    fastcnn.report(model)  # what runs fused, and of the rest why not
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)  # the same parameters as before

    pixels, labels = map(torch.from_numpy, load_digits(return_X_y=True))
    losses = []
    for step in range(options.steps):
        chosen = torch.randint(len(labels), (options.batch,))
        ink = pixels[chosen].float().view(-1, 1, 8, 8).expand(-1, 3, -1, -1) / 16
        images = F.interpolate(ink, size=options.size, mode="bilinear")
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(images.contiguous(memory_format=torch.channels_last))
        loss = F.cross_entropy(logits.float(), labels[chosen])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        print(f"step {step + 1}/{options.steps}  loss {losses[-1]:.3f}")
    return model, losses


if __name__ == "__main__":
    main()
