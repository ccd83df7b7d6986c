"""Converted ResNets against torchvision, and the CIFAR family against its paper."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support.chains import randomize
from support.oracles import torchvision_resnet
from support.resnets import LAYERS, assert_same_network, resnets
from torch import Tensor, nn

from fastcnn import convert, models
from fastcnn.convert.converted import Converted
from fastcnn.lab import eager_baseline
from fastcnn.models.registry import architecture

COMPUTED: list[tuple[str, dict[str, Any]]] = [
    ("BasicBlock", {}),
    ("Bottleneck", {}),
    ("Bottleneck", {"replace_stride_with_dilation": [False, True, True]}),
]


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize(("block", "options"), COMPUTED)
def test_computes_what_torchvision_computes(
    block: str, options: dict[str, Any], training: bool
) -> None:
    ours, theirs = resnets(block, **options)
    # Odd sizes: at 65x51 every stride-2 layer rounds up somewhere. channels_last, as on GPUs.
    x = torch.randn(3, 3, 65, 51, dtype=torch.float64).to(memory_format=torch.channels_last)
    assert_same_network(ours.train(training), theirs.train(training), x)


def test_torchvision_checkpoint_with_a_missing_key_is_refused() -> None:
    checkpoint = torchvision_resnet.resnet18(num_classes=10).state_dict()
    del checkpoint["layer2.0.downsample.1.running_var"]
    with pytest.raises(RuntimeError, match=r"layer2\.0\.downsample\.1\.running_var"):
        models.resnet18(num_classes=10).load_state_dict(checkpoint)


@pytest.mark.parametrize(
    "options",
    [
        {"groups": 2},
        {"width_per_group": 128},
        {"replace_stride_with_dilation": [False, True, False]},
    ],
)
def test_basic_block_says_what_it_lacks(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="groups, base_width, dilation: BasicBlock has only"):
        models.resnet18(**options)


def test_lists_of_the_wrong_length_are_refused() -> None:
    with pytest.raises(ValueError, match="replace_stride_with_dilation: expected None or 3"):
        models.resnet50(replace_stride_with_dilation=[True])
    with pytest.raises(ValueError, match="layers: expected 4 block counts"):
        models.ResNet(models.BasicBlock, [2, 2, 2])


@pytest.mark.parametrize(
    ("depth", "millions"),
    # Table 6 of the paper.
    [(20, "0.27"), (32, "0.46"), (44, "0.66"), (56, "0.85"), (110, "1.7")],
)
def test_cifar_parameter_counts_are_the_papers(depth: int, millions: str) -> None:
    digits = len(millions.split(".")[1])
    for family in ("resnet", "plain"):  # option A's shortcuts have no parameters
        with torch.device("meta"):
            model = architecture(f"{family}{depth}")
        count = sum(p.numel() for p in model.parameters())
        assert f"{count / 1e6:.{digits}f}" == millions
        # The paper's depth counts layers with weights: convolutions and the classifier.
        layers = [m for m in model.modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
        assert len(layers) == depth


@pytest.mark.parametrize("depth", [18, 21, 2, 0, -4])
def test_cifar_depth_must_be_6n_plus_2(depth: int) -> None:
    with pytest.raises(ValueError, match=rf"depth: expected 6n \+ 2 .* got {depth}"):
        models.CifarResNet(depth)


class FunctionalCifar(nn.Module):
    """The paper's section 4.2 written once more, without blocks: a loop over 2n convolutions."""

    def __init__(self, model: models.CifarResNet, shortcut: bool) -> None:
        super().__init__()
        self.network, self.shortcut = model, shortcut

    def forward(self, x: Tensor) -> Tensor:
        tensors = dict(self.network.named_parameters()) | dict(self.network.named_buffers())

        def conv_bn(x: Tensor, conv: str, bn: str, stride: int) -> Tensor:
            x = F.conv2d(x, tensors[f"{conv}.weight"], stride=stride, padding=1)
            tensors[f"{bn}.num_batches_tracked"].add_(int(self.training))
            return F.batch_norm(
                x,
                *(tensors[f"{bn}.{k}"] for k in ("running_mean", "running_var", "weight", "bias")),
                self.training,
            )

        x = F.relu(conv_bn(x, "conv1", "bn1", 1))
        names = sorted({k.rsplit(".", 2)[0] for k in tensors if k.startswith("layer")})
        for name in names:
            stride = 2 if name in ("layer2.0", "layer3.0") else 1
            y = F.relu(conv_bn(x, f"{name}.conv1", f"{name}.bn1", stride))
            y = conv_bn(y, f"{name}.conv2", f"{name}.bn2", 1)
            if self.shortcut:
                zeros = torch.zeros_like(y)
                zeros[:, : x.shape[1]] = x[:, :, ::stride, ::stride]
                y = y + zeros
            x = F.relu(y)
        x = F.adaptive_avg_pool2d(x, 1)[:, :, 0, 0]
        return x @ tensors["fc.weight"].T + tensors["fc.bias"]

    def named_parameters(self, *args: Any, **kwargs: Any) -> Any:
        return self.network.named_parameters(*args, **kwargs)

    def named_buffers(self, *args: Any, **kwargs: Any) -> Any:
        return self.network.named_buffers(*args, **kwargs)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("shortcut", [True, False], ids=["resnet", "plain"])
def test_cifar_computes_what_the_paper_describes(shortcut: bool, training: bool) -> None:
    ours = models.CifarResNet(14, shortcut).double().train(training)
    randomize(ours)
    theirs = models.CifarResNet(14, shortcut).double().train(training)
    theirs.load_state_dict(ours.state_dict())
    # 13x10 halves to 7x5 and 4x3: odd sizes, where subsampling and stride-2 must agree.
    x = torch.randn(4, 3, 13, 10, dtype=torch.float64).to(memory_format=torch.channels_last)
    oracle = FunctionalCifar(theirs, shortcut).train(training)
    assert_same_network(ours, oracle, x)


BUILDERS: list[tuple[Callable[[], nn.Module], int]] = [
    (lambda: models.resnet20(), 16),
    (lambda: models.plain20(), 16),
    (lambda: convert(models.ResNet(models.Bottleneck, LAYERS, num_classes=10)), 64),
]


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize(("build", "size"), BUILDERS, ids=["resnet20", "plain20", "bottlenecks"])
def test_eager_baseline_is_the_same_network(
    build: Callable[[], nn.Module], size: int, training: bool
) -> None:
    # Speedups are measured against the eager: it must compute the same, and only that.
    model = build().double().train(training)
    randomize(model)
    eager = eager_baseline(model)
    assert_same_network(model, eager, torch.randn(4, 3, size, size, dtype=torch.float64))


def test_eager_baseline_shares_nothing_with_the_model_and_leaves_it_fused() -> None:
    model = models.resnet20()
    eager = eager_baseline(model)
    assert isinstance(model, Converted)
    assert not any(isinstance(module, Converted) for module in eager.modules())
    ours = {t.data_ptr() for t in model.state_dict().values()}
    assert ours.isdisjoint(t.data_ptr() for t in eager.state_dict().values())


def test_eager_baseline_of_an_unconverted_network_is_refused() -> None:
    # Its copy would be the same network twice, and the speedup always 1.
    with pytest.raises(TypeError, match=r"model: expected a converted model, got Linear as it was"):
        eager_baseline(nn.Linear(1, 1))
