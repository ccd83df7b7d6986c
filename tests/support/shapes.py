"""The shapes and layouts of images that tests and benchmarks use, each with its reason."""

from typing import NamedTuple

import torch


class Image(NamedTuple):
    """Sizes of a batch [n, c, h, w], and why it is in the list."""

    n: int
    c: int
    h: int
    w: int
    reason: str

    @property
    def sizes(self) -> tuple[int, int, int, int]:
        return self.n, self.c, self.h, self.w

    def __str__(self) -> str:
        return "x".join(map(str, self.sizes))


LAYOUTS = {"nchw": torch.contiguous_format, "channels_last": torch.channels_last}

# Small, each at an edge of some kernel. A vector is 4 to 16 floats wide.
EDGES = [
    Image(2, 1, 1, 1, "the fewest values a channel that training takes"),
    Image(37, 5, 1, 1, "1x1 images are NCHW and channels_last at once"),
    Image(3, 1, 7, 5, "one channel: both layouts at once"),
    Image(1, 3, 5, 7, "batch 1, c = 3, and a plane that is no whole number of vectors"),
    Image(2, 3, 17, 19, "c = 3: channels_last vectors come out even after 3 of them, then a rest"),
    Image(2, 16, 1, 9, "one row: h is a dimension without order"),
    Image(2, 16, 9, 1, "one column: likewise w"),
    Image(3, 257, 3, 3, "c one more than a power of two"),
    Image(1, 2, 96, 101, "a plane over 8192 elements: more than one chunk of 32 KiB"),
    Image(1, 1, 131, 211, "several chunks of one plane, the last one short"),
    Image(67, 3, 3, 3, "many small planes: several share a chunk, and images are cut into parts"),
    Image(5, 8, 13, 11, "channels_last: 715 rows, left over by every block of rows"),
    Image(9, 24, 41, 5, "c not a power of two, pixels over several tasks with a shorter last one"),
    Image(1, 1030, 2, 2, "channels_last: a row wider than a chunk of 32 rows would like"),
]

# The inputs of ResNet-50's batch norms for 224x224 images; benchmarks set their own n.
RESNET50 = [
    Image(1, 64, 112, 112, "the stem: the largest, few channels"),
    Image(1, 64, 56, 56, "stage 1, inside the bottleneck"),
    Image(1, 256, 56, 56, "stage 1, after the expansion"),
    Image(2, 128, 28, 28, "stage 2, inside"),
    Image(2, 512, 28, 28, "stage 2, after"),
    Image(2, 256, 14, 14, "stage 3, inside"),
    Image(2, 1024, 14, 14, "stage 3, after: 196 pixels a plane"),
    Image(2, 512, 7, 7, "stage 4, inside: an odd plane of 49"),
    Image(2, 2048, 7, 7, "stage 4, after: the most channels"),
]


class Conv(NamedTuple):
    """A convolution of a network: channels, kernel, stride, input side, how often it occurs."""

    c_in: int
    c_out: int
    kernel: int
    stride: int
    side: int
    times: int

    def __str__(self) -> str:
        return f"{self.c_in}-{self.c_out}-k{self.kernel}-s{self.stride}-{self.side}"


# torchvision's ResNet-50 on 224x224 images, whose 3x3 convolutions have the strides; padding is
# kernel // 2. tests/ops/conv2d_int8/test_calls.py counts them in the model.
RESNET50_CONVS = [
    Conv(3, 64, 7, 2, 224, 1),
    Conv(64, 64, 1, 1, 56, 1), Conv(64, 64, 3, 1, 56, 3), Conv(64, 256, 1, 1, 56, 4),
    Conv(256, 64, 1, 1, 56, 2),
    Conv(256, 128, 1, 1, 56, 1), Conv(128, 128, 3, 2, 56, 1), Conv(128, 512, 1, 1, 28, 4),
    Conv(256, 512, 1, 2, 56, 1), Conv(512, 128, 1, 1, 28, 3), Conv(128, 128, 3, 1, 28, 3),
    Conv(512, 256, 1, 1, 28, 1), Conv(256, 256, 3, 2, 28, 1), Conv(256, 1024, 1, 1, 14, 6),
    Conv(512, 1024, 1, 2, 28, 1), Conv(1024, 256, 1, 1, 14, 5), Conv(256, 256, 3, 1, 14, 5),
    Conv(1024, 512, 1, 1, 14, 1), Conv(512, 512, 3, 2, 14, 1), Conv(512, 2048, 1, 1, 7, 3),
    Conv(1024, 2048, 1, 2, 14, 1), Conv(2048, 512, 1, 1, 7, 2), Conv(512, 512, 3, 1, 7, 2),
]  # fmt: skip

# U-Net (Ronneberger et al. 2015) on 256x256 RGB images, with padding, so that sizes stay: levels of
# 64, 128, 256, 512 and 1024 channels, with two 3x3 convolutions in each, down and up again. The
# first on the way up gets the skip and the level below, upsampled bilinearly: the widest inputs of
# all. A 1x1 convolution at the end, to two classes.
UNET_CONVS = [
    Conv(3, 64, 3, 1, 256, 1), Conv(64, 64, 3, 1, 256, 2), Conv(64, 128, 3, 1, 128, 1),
    Conv(128, 128, 3, 1, 128, 2), Conv(128, 256, 3, 1, 64, 1), Conv(256, 256, 3, 1, 64, 2),
    Conv(256, 512, 3, 1, 32, 1), Conv(512, 512, 3, 1, 32, 2), Conv(512, 1024, 3, 1, 16, 1),
    Conv(1024, 1024, 3, 1, 16, 1),
    Conv(1024 + 512, 512, 3, 1, 32, 1), Conv(512 + 256, 256, 3, 1, 64, 1),
    Conv(256 + 128, 128, 3, 1, 128, 1), Conv(128 + 64, 64, 3, 1, 256, 1), Conv(64, 2, 1, 1, 256, 1),
]  # fmt: skip

# For group norms, with the number of groups: each at an edge of some kernel.
GROUPED = [
    (Image(37, 5, 1, 1, "1x1 images, one group"), 1),
    (Image(3, 20, 1, 1, "1x1 images, c / g = 5"), 4),
    (Image(2, 3, 5, 7, "c / g = 1, and a plane that is no whole number of vectors"), 3),
    (Image(3, 9, 17, 19, "c / g = 3: channels_last vectors straddle groups, then a rest"), 3),
    (Image(2, 20, 9, 5, "c / g = 5"), 4),
    (Image(1, 640, 3, 4, "c / g = 320: a row longer than any vector"), 2),
    (Image(1, 3, 7, 5, "layer norm of a sample"), 1),
    (Image(3, 257, 3, 3, "instance norm, c one more than a power of two"), 257),
    (Image(40, 8, 6, 6, "many samples: several a task"), 2),
    (Image(130, 2, 3, 3, "more groups than tasks"), 2),
    (Image(1, 2, 130, 211, "few large groups: parts, with the border of a channel inside one"), 1),
    (Image(2, 8, 120, 128, "few samples, cut into parts of whole rows with a shorter last one"), 4),
    (Image(1, 1, 512, 512, "the largest image: 32 parts of a group"), 1),
    (Image(1, 8, 4, 100, "NCHW by pixels: two tiles of columns"), 4),
]

# Inputs of group norms, with the number of groups.
GROUP_NORM = [
    (Image(16, 256, 56, 56, "a ResNet-50 with group norm: a sample of 3.2 MB"), 32),
    (Image(8, 320, 64, 64, "the U-Net of a latent diffusion: c / g = 10"), 32),
    (Image(4, 64, 256, 256, "few large samples"), 8),
    (Image(32, 128, 28, 28, "a whole sample normalised"), 1),
    (Image(32, 128, 28, 28, "each channel normalised"), 128),
]
