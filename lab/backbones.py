"""Backbones that the core lacks: mobile networks, a small vision transformer, cut ResNets."""

from dataclasses import asdict

import torch
import torch.nn.functional as F
import torchvision.models as tv
from torch import Tensor, nn

from models import RESNETS, SMALL, Encoder, build_resnet
from plumbing.command_line import UserError

MOBILE = {
    "mobilenet_v2": tv.mobilenet_v2,
    "mobilenet_v3_small": tv.mobilenet_v3_small,
    "efficientnet_b0": tv.efficientnet_b0,
}
ARCHITECTURES = (*RESNETS, *MOBILE, "vit_tiny")


def encoder_of(config: dict) -> Encoder:
    """The encoder of a run before its first step, for any run of lab.train.

    The same seed gives the same weights. A two-branch method brings heads of its own, so its
    encoder has no projector.
    """
    torch.manual_seed(config["seed"])
    arch, size, drop = config["arch"], config["size"], config.get("drop_last_stage", False)
    layers = config["layers"] if config.get("method", "ours") == "ours" else 0
    stem = size if has_small_stem(config) else max(size, SMALL + 1)
    backbone = build_backbone(arch, stem, config["width"] or None, drop)
    return Encoder(backbone, size, None, config["dim"], layers, config["hidden"])


def has_small_stem(config: dict) -> bool:
    """Whether a run's network begins with the stem that keeps the resolution of small views."""
    return config["size"] <= SMALL and not config.get("torchvision_stem")


def encoder_for(config) -> Encoder:
    """The encoder of a `LabConfig`. Raises UserError if its --arch cannot have its --size."""
    try:
        return encoder_of(asdict(config))
    except (ValueError, RuntimeError) as error:
        raise UserError(f"--arch {config.arch} --size {config.size}: {error}") from error


def build_backbone(arch: str, size: int, width: int | None = None, drop_last_stage: bool = False) -> nn.Module:
    """The torchvision network called arch, without its classifier.

    size is the side of the training views; up to 64 pixels they get a stem that keeps their
    resolution. width is the channels of a ResNet's first stage or of vit_tiny's tokens (None: 192).
    drop_last_stage leaves out a ResNet's layer4, so that features are those of layer3, pooled
    (S3L, arXiv 2103.13559). Raises ValueError for an unknown arch or an option that it lacks.
    """
    if arch not in ARCHITECTURES:
        raise ValueError(f"unknown arch {arch!r}: choose from {', '.join(ARCHITECTURES)}")
    if width is not None and arch in MOBILE:
        raise ValueError(f"width is an option of {', '.join(RESNETS)} and vit_tiny, not of {arch}")
    if drop_last_stage and arch not in RESNETS:
        raise ValueError(f"drop_last_stage is an option of {', '.join(RESNETS)}, not of {arch}")
    if arch in RESNETS:
        return _resnet(arch, size, width, drop_last_stage)
    if arch in MOBILE:
        net = MOBILE[arch](weights=None)
        net.classifier = nn.Identity()
        if size <= SMALL:  # these begin with a 3x3 convolution already: only its stride goes
            net.features[0][0].stride = (1, 1)
        for norm in net.modules():
            if isinstance(norm, nn.BatchNorm2d):
                norm.momentum = 0.1  # mobilenet_v3_small has 0.01: a short run ended with the statistics of its start
        return net
    return _vit(size, width or 192)


def _resnet(arch: str, size: int, width: int | None, drop_last_stage: bool) -> nn.Module:
    net = build_resnet(arch, size, width)
    if drop_last_stage:
        net.layer4 = nn.Identity()
    return net


def _vit(size: int, width: int) -> nn.Module:
    patch = patch_of(size)
    if size % patch:
        raise ValueError(f"vit_tiny cuts images in patches of {patch}: size {size} is not a multiple of it")
    if width % 3:
        raise ValueError(f"vit_tiny has three heads: width {width} is not a multiple of 3")
    net = _ViT(size, patch, num_layers=12, num_heads=3, hidden_dim=width, mlp_dim=4 * width)
    net.heads = nn.Identity()
    return net


def patch_of(size: int) -> int:
    """The side of vit_tiny's patches for training views of that side: an 8 x 8 grid if small."""
    return max(1, size // 8) if size <= SMALL else 16


class _ViT(tv.VisionTransformer):
    """torchvision's, for images of any side that is a multiple of the patch.

    As in DINO, the position embeddings are resized (bicubic) to the other grid.
    """

    def forward(self, x: Tensor) -> Tensor:  # (B, 3, H, H) -> (B, F)
        if x.shape[-1] == self.image_size:
            return super().forward(x)
        token, grid = self.encoder.pos_embedding.tensor_split([1], 1)  # (1, 1, F), (1, G G, F)
        side = self.image_size // self.patch_size  # G
        grid = F.interpolate(grid.mT.unflatten(2, (side, side)), x.shape[-1] // self.patch_size, mode="bicubic")
        patches = self.conv_proj(x).flatten(2) + grid.flatten(2)  # (B, F, L)
        x = torch.cat([(self.class_token + token).expand(len(x), -1, -1), patches.mT], 1)  # (B, 1 + L, F)
        return self.heads(self.encoder.ln(self.encoder.layers(self.encoder.dropout(x)))[:, 0])
