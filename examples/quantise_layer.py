"""Run one convolution of a network in 8-bit integers, from its float weights.

Whole networks are not quantised yet: this is the operation that they will be made of.

python examples/quantise_layer.py
"""

import argparse
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from sklearn.datasets import load_sample_image

import fastcnn
from fastcnn.functional import conv2d_int8, pack_conv2d_int8


def main(arguments: Sequence[str] | None = None) -> dict[str, torch.Tensor | float]:
    """Quantise, run, compare with float32, and return what a test looks at."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", type=int, default=224, help="of the image")
    options = parser.parse_args(arguments)

    layer = fastcnn.create_model("resnet18").conv1  # 3 to 64 channels, 7x7, stride 2
    weight = layer.weight.detach()
    photo = torch.from_numpy(load_sample_image("china.jpg").copy()).permute(2, 0, 1)[None]
    x8 = F.interpolate(photo, size=options.size).to(memory_format=torch.channels_last)
    x_scale, x_zero_point = 1 / 64, 128  # the photograph's bytes as they are: x = (x8 - 128) / 64

    # Weights: a scale for each output channel, symmetric around 0.
    weight_scale = weight.abs().amax((1, 2, 3)) / 127
    w8 = (weight / weight_scale.view(-1, 1, 1, 1)).round().to(torch.int8)
    # The output after ReLU: its range from float32, here of the one image that there is.
    x = (x8.float() - x_zero_point) * x_scale
    y = F.relu(F.conv2d(x, weight, stride=2, padding=3))
    out_scale = float(y.max()) / 255

    y8 = conv2d_int8(
        x8, pack_conv2d_int8(w8), x_scale=x_scale, x_zero_point=x_zero_point,
        weight_scale=weight_scale, stride=2, padding=3, act="relu",
        out_scale=out_scale, out_zero_point=0,
    )  # fmt: skip
    error = (y8.float() * out_scale - y).abs()
    mean, most = (float(of / y.max()) for of in (error.mean(), error.max()))
    print(f"uint8 {tuple(y8.shape)}; weights in {w8.numel()} bytes, float32 takes 4 times as many")
    print(f"differs from float32 by {mean:.2%} of the range, by {most:.2%} at most")
    scales = {"weight_scale": weight_scale, "out_scale": out_scale}
    return {"x": x, "weight": weight, "error": error, **scales}


if __name__ == "__main__":
    main()
