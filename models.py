"""Encoders: a torchvision backbone by name, its stem made fit for small images, and an MLP projector on top.

    x (B, 3, H, W)  --backbone-->  features (B, F)  --projector-->  f(x) (B, D)  --normalise-->  z (B, D)

The projector is for pretraining only. What one keeps, evaluates and exports is the backbone. It is a torchvision module
with torchvision's parameter names, so `encoder.backbone.state_dict()` loads into torchvision's model of the same name
(resnet10 and vit_tiny, which torchvision does not name, are built from its ResNet and VisionTransformer).
"""

import ctypes

import torch
import torch.nn.functional as F
import torchvision.models as tv
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock, Bottleneck, ResNet

SMALL = 64  # images up to this many pixels a side get a stem that keeps their resolution

RESNETS = {
    "resnet10": (BasicBlock, (1, 1, 1, 1)),
    "resnet18": (BasicBlock, (2, 2, 2, 2)),
    "resnet34": (BasicBlock, (3, 4, 6, 3)),
    "resnet50": (Bottleneck, (3, 4, 6, 3)),
}
MOBILE = {
    "mobilenet_v2": tv.mobilenet_v2,
    "mobilenet_v3_small": tv.mobilenet_v3_small,
    "efficientnet_b0": tv.efficientnet_b0,
}
ARCHITECTURES = (*RESNETS, *MOBILE, "vit_tiny")


class Encoder(nn.Module):
    """Backbone and projector: `features(x)` gives (B, F), `forward(x)` gives unit z (B, D), both float32.

    arch is one of ARCHITECTURES; size the side of the training views in pixels (it chooses the stem, and the number of
    positions of vit_tiny); width the channels of a ResNet's first stage (None: 64 as in torchvision, and 32 for
    resnet10, the small one that torchvision has not) or of vit_tiny's tokens (None: 192); dim is D; layers and hidden
    shape the projector (none for layers 0: D is then F); drop_last_stage leaves out a ResNet's layer4, so that features
    are those of layer3, pooled (S3L, arXiv 2103.13559). Raises ValueError for an unknown arch or an option where it has
    no meaning.
    """

    precision = "fp32"  # or "bf16": what the layers compute in, see `pick_precision`

    def __init__(self, arch="resnet18", size=32, width=None, dim=2048, layers=2, hidden=2048, drop_last_stage=False):
        super().__init__()
        self.backbone = build_backbone(arch, size, width, drop_last_stage)
        with torch.no_grad():  # ask the backbone how wide its output is
            self.backbone.eval()
            self.feature_dim = self.backbone(torch.zeros(1, 3, size, size)).shape[1]
            self.backbone.train()
        self.projector = build_projector(self.feature_dim, hidden, dim, layers) if layers else nn.Identity()

    def features(self, x: Tensor) -> Tensor:  # (B, 3, H, W) -> (B, F)
        with self.autocast(x):
            return self.backbone(x).float()

    def forward(self, x: Tensor) -> Tensor:  # (B, 3, H, W) -> (B, D)
        with self.autocast(x):
            f = self.projector(self.backbone(x))
        return F.normalize(f.float(), dim=1)  # float first: a unit vector in bf16 is not one

    def autocast(self, x: Tensor):
        return torch.autocast(x.device.type, torch.bfloat16, enabled=self.precision == "bf16")


def build_backbone(arch: str, size: int, width: int | None = None, drop_last_stage: bool = False) -> nn.Module:
    """The torchvision network called arch without its classifier; see `Encoder` for the arguments."""
    if arch not in ARCHITECTURES:
        raise ValueError(f"unknown arch {arch!r}: choose from {', '.join(ARCHITECTURES)}")
    small = size <= SMALL
    if width is not None and arch in MOBILE:
        raise ValueError(f"width is an option of {', '.join(RESNETS)} and vit_tiny, not of {arch}")
    if drop_last_stage and arch not in RESNETS:
        raise ValueError(f"drop_last_stage is an option of {', '.join(RESNETS)}, not of {arch}")
    if arch in RESNETS:
        block, depths = RESNETS[arch]
        width = width or (32 if arch == "resnet10" else 64)
        net = _resnet(block, depths, width)
        net.fc = nn.Identity()
        if drop_last_stage:
            net.layer4 = nn.Identity()
        if small:  # 3x3 convolution at full resolution, no pooling: the usual CIFAR stem
            net.conv1 = nn.Conv2d(3, width, kernel_size=3, stride=1, padding=1, bias=False)
            nn.init.kaiming_normal_(net.conv1.weight, mode="fan_out", nonlinearity="relu")
            net.maxpool = nn.Identity()
    elif arch in MOBILE:
        net = MOBILE[arch](weights=None)
        net.classifier = nn.Identity()
        if small:  # these begin with a 3x3 convolution already: only its stride goes
            net.features[0][0].stride = (1, 1)
    else:
        patch, width = patch_of(size), width or 192
        if size % patch:
            raise ValueError(f"vit_tiny cuts images in patches of {patch}: size {size} is not a multiple of it")
        if width % 3:
            raise ValueError(f"vit_tiny has three heads: width {width} is not a multiple of 3")
        net = _ViT(size, patch, num_layers=12, num_heads=3, hidden_dim=width, mlp_dim=4 * width)
        net.heads = nn.Identity()
    return net


def patch_of(size: int) -> int:
    """The side of vit_tiny's patches for training views of that side: an 8 x 8 grid on small images."""
    return max(1, size // 8) if size <= SMALL else 16


class _ViT(tv.VisionTransformer):
    """torchvision's, for images of any side that is a multiple of the patch: as in DINO, the position embeddings are
    resized (bicubic) to the other grid."""

    def forward(self, x: Tensor) -> Tensor:  # (B, 3, H, H) -> (B, F)
        if x.shape[-1] == self.image_size:
            return super().forward(x)
        token, grid = self.encoder.pos_embedding.tensor_split([1], 1)  # (1, 1, F), (1, G G, F)
        side = self.image_size // self.patch_size  # G
        grid = F.interpolate(grid.mT.unflatten(2, (side, side)), x.shape[-1] // self.patch_size, mode="bicubic")
        patches = self.conv_proj(x).flatten(2) + grid.flatten(2)  # (B, F, L)
        x = torch.cat([(self.class_token + token).expand(len(x), -1, -1), patches.mT], 1)  # (B, 1 + L, F)
        return self.heads(self.encoder.ln(self.encoder.layers(self.encoder.dropout(x)))[:, 0])


def _resnet(block, depths, width: int) -> ResNet:
    net = ResNet(block, list(depths))
    if width != 64:  # torchvision fixes the first stage at 64 channels: build the stages again, from `width`
        net.inplanes = width
        net.conv1 = nn.Conv2d(3, width, kernel_size=7, stride=2, padding=3, bias=False)
        net.bn1 = nn.BatchNorm2d(width)
        for i, depth in enumerate(depths):
            setattr(net, f"layer{i + 1}", net._make_layer(block, width * 2**i, depth, stride=1 if i == 0 else 2))
        for module in net.modules():
            if isinstance(module, nn.Conv2d):  # torchvision's own initialisation
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    return net


def build_projector(inputs: int, hidden: int, dim: int, layers: int) -> nn.Sequential:
    """An MLP of `layers` linear maps, BatchNorm and ReLU between them: (B, inputs) -> (B, dim)."""
    if layers < 1:
        raise ValueError(f"the projector needs at least one layer, not {layers}")
    steps: list[nn.Module] = []
    for _ in range(layers - 1):
        steps += [nn.Linear(inputs, hidden, bias=False), nn.BatchNorm1d(hidden), nn.ReLU(inplace=True)]
        inputs = hidden
    return nn.Sequential(*steps, nn.Linear(inputs, dim))


# ------------------------------------------------------------------------------------------- where and how it is computed


def keep_freed_memory() -> None:
    """Have glibc keep what is freed: memory that goes back to the system and is taken anew makes a step on a CPU slower.

    By a twelfth for the default recipe, by half for the augmentation. Where there is no glibc, nothing happens.
    """
    try:
        tune = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):
        return
    tune(-1, 2**31 - 1)  # M_TRIM_THRESHOLD, bytes
    tune(-3, 2**25)  # M_MMAP_THRESHOLD: the largest that it takes


def pick_device(name: str = "auto") -> torch.device:
    """The device of that name; "auto" is CUDA, else Apple's MPS, else the CPU. ValueError for one that is not there."""
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        name = next(kind for kind, present in there.items() if present)
    kind, _, number = name.partition(":")
    known = there.get(kind, False) and (not number or number.isdigit())
    if not known or (kind == "cuda" and int(number or 0) >= torch.cuda.device_count()):
        raise ValueError(
            f"device {name!r} is not available here: choose from {', '.join(k for k in there if there[k])}"
        )
    return torch.device(name)


def pick_precision(name: str, device: torch.device) -> str:
    """The precision of that name; "auto" is bf16 where the hardware multiplies it, fp32 elsewhere.

    On a CPU that does not multiply it, bf16 was ten times slower.
    """
    if name != "auto":
        return name
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    able = torch.cpu.get_capabilities() if device.type == "cpu" and hasattr(torch.cpu, "get_capabilities") else {}
    return "bf16" if able.get("avx512_bf16") or able.get("amx_bf16") else "fp32"
