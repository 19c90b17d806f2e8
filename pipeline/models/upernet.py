"""UperNet's heads on a plain ViT, as in BEiT's and MAE's experiments on ADE20K.

"Unified Perceptual Parsing for Scene Understanding", Xiao et al., ECCV 2018, https://arxiv.org/abs/1807.10221; the
auxiliary head is that of "Fully Convolutional Networks for Semantic Segmentation", Long et al., CVPR 2015. Parameters
have the names of transformers' `UperNetHead` and `UperNetFCNHead`, and the initial values of mmsegmentation.
"""

from collections.abc import Callable, Sequence

import torch
from torch import nn
from torch.nn import functional as F

NormLayer = Callable[[int], nn.Module]
"""Makes the batch normalization of a number of channels."""
POOL_SCALES = (1, 2, 3, 6)
CLASSIFIER_STD = 0.01


class ConvModule(nn.Module):
    """Convolution without bias, which keeps the size; batch normalization; ReLU."""

    def __init__(self, in_channels: int, channels: int, kernel_size: int, norm_layer: NormLayer) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, channels, kernel_size, padding=kernel_size // 2, bias=False)
        self.batch_norm = norm_layer(channels)
        nn.init.kaiming_normal_(self.conv.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return F.relu(self.batch_norm(self.conv(images)))


class FeaturePyramid(nn.Module):
    """Rescale the feature maps of four blocks by 4, 2, 1 and 1/2: deconvolutions, identity, max pooling."""

    def __init__(self, width: int, norm_layer: NormLayer) -> None:
        super().__init__()
        self.up4 = nn.Sequential(_double(width), norm_layer(width), nn.GELU(), _double(width))
        self.up2 = _double(width)
        self.down2 = nn.MaxPool2d(2)

    def forward(self, maps: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Map four maps (B, D, G, G) to (B, D, 4 G, 4 G), (B, D, 2 G, 2 G), (B, D, G, G) and (B, D, G / 2, G / 2)."""
        first, second, third, fourth = maps
        return [self.up4(first), self.up2(second), third, self.down2(fourth)]


class UperNetHead(nn.Module):
    """Feature pyramid network with pyramid pooling (PPM) on its coarsest map."""

    def __init__(self, in_channels: Sequence[int], channels: int, num_classes: int, norm_layer: NormLayer) -> None:
        super().__init__()
        *finer, coarsest = in_channels

        def conv(inputs: int, kernel_size: int) -> ConvModule:
            return ConvModule(inputs, channels, kernel_size, norm_layer)

        self.psp_modules = nn.ModuleList(
            nn.Sequential(nn.AdaptiveAvgPool2d(scale), conv(coarsest, 1)) for scale in POOL_SCALES
        )
        self.bottleneck = conv(coarsest + len(POOL_SCALES) * channels, 3)
        self.lateral_convs = nn.ModuleList(conv(inputs, 1) for inputs in finer)
        self.fpn_convs = nn.ModuleList(conv(channels, 3) for _ in finer)
        self.fpn_bottleneck = conv(len(in_channels) * channels, 3)
        self.classifier = _classifier(channels, num_classes)

    def forward(self, features: Sequence[torch.Tensor], scale: torch.Tensor | None = None) -> torch.Tensor:
        """Predict logits (B, C, h, w) from maps (B, D, h, w), (B, D, h / 2, w / 2), ..., the finest first.

        Args:
            scale: (B, channels), factors of the channels before the classifier: its dropout.
        """
        top = features[-1]
        pooled = [_resize_as(module(top), top) for module in self.psp_modules]
        maps = [conv(feature) for conv, feature in zip(self.lateral_convs, features[:-1], strict=True)]
        maps.append(self.bottleneck(torch.cat([top, *pooled], dim=1)))
        for level in range(len(maps) - 1, 0, -1):
            maps[level - 1] = maps[level - 1] + _resize_as(maps[level], maps[level - 1])
        maps = [*(conv(level) for conv, level in zip(self.fpn_convs, maps[:-1], strict=True)), maps[-1]]
        fused = self.fpn_bottleneck(torch.cat([_resize_as(level, maps[0]) for level in maps], dim=1))
        return self.classifier(_scale_channels(fused, scale))


class FCNHead(nn.Module):
    """The auxiliary head: one convolution and a classifier."""

    def __init__(self, in_channels: int, channels: int, num_classes: int, norm_layer: NormLayer) -> None:
        super().__init__()
        self.convs = nn.Sequential(ConvModule(in_channels, channels, 3, norm_layer))
        self.classifier = _classifier(channels, num_classes)

    def forward(self, feature: torch.Tensor, scale: torch.Tensor | None = None) -> torch.Tensor:
        """Predict logits (B, C, h, w) from a map (B, D, h, w); `scale` as for UperNetHead."""
        return self.classifier(_scale_channels(self.convs(feature), scale))


def _double(width: int) -> nn.ConvTranspose2d:
    return nn.ConvTranspose2d(width, width, kernel_size=2, stride=2)


def _classifier(channels: int, num_classes: int) -> nn.Conv2d:
    classifier = nn.Conv2d(channels, num_classes, 1)
    nn.init.normal_(classifier.weight, std=CLASSIFIER_STD)
    assert classifier.bias is not None
    nn.init.zeros_(classifier.bias)
    return classifier


def _resize_as(images: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    return F.interpolate(images, size=target.shape[-2:], mode="bilinear", align_corners=False)


def _scale_channels(images: torch.Tensor, scale: torch.Tensor | None) -> torch.Tensor:
    return images if scale is None else images * scale[:, :, None, None].to(images.dtype)
