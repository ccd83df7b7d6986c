"""UNet against the same network written down once more with torch.nn.functional alone."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support.oracles import segmentation_models_pytorch
from support.seeds import seed_all
from support.tolerance import assert_same
from support.zoo import assert_identical, fill, results
from torch import Tensor, nn

from fastcnn import revert
from fastcnn.models import UNet, create_model, unet_resnet18
from fastcnn.models.unet_resnet import UNetResNet


class FunctionalUNet(nn.Module):
    """A recursion over the levels: what a level does not halve it hands to the one below."""

    def __init__(self, network: UNet, depth: int, norm: str, up: str, skip: bool, act: Any) -> None:
        super().__init__()
        self.network, self.depth = network, depth
        self.norm, self.up, self.skip, self.act = norm, up, skip, act

    def convs(self, x: Tensor, name: str) -> Tensor:
        tensors = {**dict(self.network.named_parameters()), **dict(self.network.named_buffers())}
        # Two convolutions with four dimensions each, and whatever comes behind them.
        convs = sorted(k for k, v in tensors.items() if k.startswith(f"{name}.") and v.ndim == 4)
        for conv in convs:
            index = int(conv.split(".")[-2])
            gamma, beta, *running = (
                tensors.get(f"{name}.{index + 1}.{k}")
                for k in ("weight", "bias", "running_mean", "running_var")
            )
            x = F.conv2d(x, tensors[conv], padding=1)
            if self.norm == "batch":
                x = F.batch_norm(x, *running, gamma, beta, self.training)
                if self.training:
                    tensors[f"{name}.{index + 1}.num_batches_tracked"].add_(1)
            elif self.norm == "instance":
                x = F.instance_norm(x, weight=gamma, bias=beta)
            else:
                groups = next(g for g in range(32, 0, -1) if 32 % g == 0 == x.shape[1] % g)
                x = F.group_norm(x, groups, gamma, beta)
            x = self.act(x)
        return x

    def forward(self, x: Tensor, level: int = 0) -> Tensor:
        x = self.convs(x, "stem" if level == 0 else f"downs.{level - 1}")
        if level < self.depth:
            below = self(F.max_pool2d(x, 2), level + 1)
            name = f"ups.{self.depth - 1 - level}"
            size = x.shape[2:]
            if self.up == "transposed":
                weight = self.network.get_parameter(f"{name}.transposed.weight")
                bias = self.network.get_parameter(f"{name}.transposed.bias")
                odd = [n % 2 for n in size]
                below = F.conv_transpose2d(below, weight, bias, stride=2, output_padding=odd)
            else:
                below = F.interpolate(below, size, mode=self.up)
            x = self.convs(torch.cat([x, below], 1) if self.skip else below, f"{name}.convs")
        if level:
            return x
        weight, bias = self.network.head.weight, self.network.head.bias
        return F.conv2d(x, weight, bias)

    def named_parameters(self, *args: Any, **kwargs: Any) -> Any:
        return self.network.named_parameters(*args, **kwargs)

    def named_buffers(self, *args: Any, **kwargs: Any) -> Any:
        return self.network.named_buffers(*args, **kwargs)


VARIANTS: list[dict[str, Any]] = [
    {},
    {"norm": "group", "width": 12},
    {"norm": "instance", "up": "nearest"},
    {"up": "transposed", "act": "leaky_relu"},
    {"up": "transposed", "skip": False},
    {"up": "nearest", "skip": False, "act": "silu"},
    {"depth": 1, "act": "gelu"},
]
ACTS = {"relu": F.relu, "leaky_relu": F.leaky_relu, "silu": F.silu, "gelu": F.gelu}


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("options", VARIANTS, ids=str)
def test_computes_the_formula(options: dict[str, Any], training: bool) -> None:
    options = {"depth": 3, "width": 8, "norm": "batch", "up": "bilinear", "act": "relu"} | options
    ours, copy = (UNet(2, 3, **options).double().train(training) for _ in range(2))
    fill(ours)
    copy.load_state_dict(ours.state_dict())
    act = ACTS[options["act"]]
    described = options["depth"], options["norm"], options["up"], options.get("skip", True), act
    oracle = FunctionalUNet(copy, *described).train(training)
    # 29 -> 14 -> 7 -> 3 and 22 -> 11 -> 5 -> 2: an odd row or column lost at each level.
    x = torch.randn(2, 2, 29, 22, dtype=torch.float64)
    actual, expected = results(ours, x), results(oracle, x)
    assert actual["out"].shape == (2, 3, 29, 22)
    assert_same(actual, expected)


def test_dropout_drops_channels_in_training_only() -> None:
    seed_all(0)
    model, without = UNet(depth=1, width=64, dropout=0.5), UNet(depth=1, width=64)
    assert [type(layer).__name__ for layer in model.stem][2:4] == ["ReLU", "Dropout2d"]
    x = torch.randn(1, 3, 8, 8)
    between = model.stem[:4](x)
    assert (between == 0).all((2, 3)).any()
    assert not torch.equal(model(x), model(x))
    # In evaluation it is not there: the other's weights, under the other's names.
    names = dict(zip(without.state_dict(), model.state_dict(), strict=True))
    without.load_state_dict({k: model.state_dict()[name] for k, name in names.items()})
    assert torch.equal(model.eval()(x), without.eval()(x))


def test_default_is_the_papers_size() -> None:
    with torch.device("meta"):
        model = create_model("unet")
        y = model(torch.empty(1, 3, 572, 572))
    assert y.shape == (1, 1, 572, 572)
    # The paper's encoder: 64 to 1024 channels, two 3x3 convolutions a level.
    channels = [(down[0].in_channels, down[0].out_channels) for down in model.downs]
    assert channels == [(64, 128), (128, 256), (256, 512), (512, 1024)]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"norm": "layer"}, "norm: expected one of batch, group, instance, got 'layer'"),
        ({"up": "bicubic"}, "up: expected one of bilinear, nearest, transposed, got 'bicubic'"),
        ({"act": "tanh"}, "act: expected one of relu, leaky_relu, silu, gelu, got 'tanh'"),
        ({"depth": 0}, "depth: expected at least 1, got 0"),
        ({"width": -8}, "width: expected at least 1, got -8"),
    ],
)
def test_errors(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        create_model("unet", **options)


def test_resnet_encoder_takes_other_decoders() -> None:
    channels = (64, 48, 32, 16, 8)
    theirs = segmentation_models_pytorch.Unet(
        "resnet18", encoder_weights=None, decoder_channels=channels, in_channels=4, classes=2
    )
    ours = revert(unet_resnet18(in_chans=4, num_classes=2, decoder_channels=channels))
    fill(theirs)
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(1, 4, 47, 70)
    assert_identical(results(ours, x), results(theirs, x))
    with pytest.raises(ValueError, match=r"decoder_channels: expected 5 numbers, got \(8, 4\)"):
        unet_resnet18(decoder_channels=(8, 4))
    assert isinstance(ours, UNetResNet)
