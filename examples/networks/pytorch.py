"""A ResNet in PyTorch with the module names of torchvision and timm, for where neither is installed."""

from collections.abc import Sequence

import torch
from torch import nn


class Block(nn.Module):
    """torchvision's `BasicBlock`, or its `Bottleneck`."""

    def __init__(self, inputs: int, width: int, stride: int, bottleneck: bool):
        """Make the layers."""
        super().__init__()
        features, first = (4 * width, 1) if bottleneck else (width, stride)
        size = 1 if bottleneck else 3
        self.conv1 = nn.Conv2d(inputs, width, size, first, size // 2, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride if bottleneck else 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.bottleneck, self.downsample = bottleneck, None
        if bottleneck:
            self.conv3, self.bn3 = nn.Conv2d(width, features, 1, bias=False), nn.BatchNorm2d(features)
        if stride != 1 or inputs != features:
            skip = nn.Conv2d(inputs, features, 1, stride, bias=False)
            self.downsample = nn.Sequential(skip, nn.BatchNorm2d(features))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map `[batch, channels, height, width]` to `[batch, features, height / stride, width / stride]`."""
        y = self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x)))))
        if self.bottleneck:
            y = self.bn3(self.conv3(torch.relu(y)))
        return torch.relu(y + (x if self.downsample is None else self.downsample(x)))


class ResNet(nn.Module):
    """torchvision's `ResNet`; with `small_images` a 3x3 first convolution and no pooling."""

    def __init__(
        self,
        stages: Sequence[int],
        width: int = 64,
        bottleneck: bool = False,
        channels: int = 3,
        classes: int = 1000,
        small_images: bool = False,
    ):
        """Make the layers."""
        super().__init__()
        size, stride = (3, 1) if small_images else (7, 2)
        self.conv1 = nn.Conv2d(channels, width, size, stride, size // 2, bias=False)
        self.bn1, self.small_images, self.num_stages = nn.BatchNorm2d(width), small_images, len(stages)
        inputs = width
        for i, blocks in enumerate(stages):
            stage, own = [], width * 2**i
            for j in range(blocks):
                stage.append(Block(inputs, own, 2 if i > 0 and j == 0 else 1, bottleneck))
                inputs = own * (4 if bottleneck else 1)
            setattr(self, f"layer{i + 1}", nn.Sequential(*stage))
        self.fc = nn.Linear(inputs, classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the logits `[batch, classes]` of images `[batch, channels, height, width]`."""
        x = torch.relu(self.bn1(self.conv1(x)))
        x = x if self.small_images else nn.functional.max_pool2d(x, 3, 2, 1)
        for i in range(self.num_stages):
            x = getattr(self, f"layer{i + 1}")(x)
        return self.fc(x.mean((2, 3)))
