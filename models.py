"""Encoders: a torchvision ResNet with a stem for small images, and an MLP projector on top.

    x (B, 3, H, W) -- backbone --> (B, F) -- projector --> f(x) (B, D) -- normalise --> z (B, D)

The projector serves pretraining only. Evaluation and export use the backbone, a torchvision ResNet
with torchvision's parameter names and no fc. Its state_dict loads into torchvision's model of the
same name (strict=False) above 64 px and at the usual width. For every other backbone
`eval_linear.py --export` prints the lines that build it. More backbones: lab/backbones.py.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock, Bottleneck, ResNet

SMALL = 64  # training views up to this side, in pixels, get a stem that keeps their resolution

RESNETS = {  # the block and the number of blocks in each of the four stages
    "resnet10": (BasicBlock, (1, 1, 1, 1)),
    "resnet18": (BasicBlock, (2, 2, 2, 2)),
    "resnet34": (BasicBlock, (3, 4, 6, 3)),
    "resnet50": (Bottleneck, (3, 4, 6, 3)),
}
ARCHITECTURES = tuple(RESNETS)


class Encoder(nn.Module):
    """Backbone and projector: `features(x)` gives (B, F), `forward(x)` unit z (B, D), in float32.

    arch is one of ARCHITECTURES, or a backbone: a module that maps (B, 3, H, W) to (B, F). size is
    the side of the training views in pixels, which chooses the stem. width is the channels of the
    first stage (None: 32 for resnet10, 64 for the others). dim is D. layers and hidden shape the
    projector (layers 0: no projector, and D = F). Raises ValueError for an unknown arch.
    """

    precision = "fp32"  # or "bf16": the numbers that the layers compute in, see `pick_precision`

    def __init__(self, arch="resnet10", size=24, width=None, dim=256, layers=2, hidden=512):
        super().__init__()
        self.backbone = arch if isinstance(arch, nn.Module) else build_resnet(arch, size, width)
        with torch.no_grad():  # ask the backbone for F
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
        return F.normalize(f.float(), dim=1)  # float32 first: rounding to bf16 changes the length

    def autocast(self, x: Tensor):
        return torch.autocast(x.device.type, torch.bfloat16, enabled=self.precision == "bf16")


def encoder_of(config: dict) -> Encoder:
    """The encoder of a run before its first step: the same seed gives the same weights."""
    torch.manual_seed(config["seed"])
    c = config
    return Encoder(c["arch"], c["size"], c["width"] or None, c["dim"], c["layers"], c["hidden"])


def build_resnet(arch: str, size: int, width: int | None = None) -> ResNet:
    """The ResNet called arch without its classifier; see `Encoder` for the arguments."""
    if arch not in RESNETS:
        raise ValueError(f"unknown arch {arch!r}: choose from {', '.join(RESNETS)}")
    block, depths = RESNETS[arch]
    width = width or (32 if arch == "resnet10" else 64)
    net = ResNet(block, list(depths))
    if width != 64:  # torchvision fixes the first stage at 64 channels: build the stages again
        net.inplanes = width
        net.conv1 = nn.Conv2d(3, width, kernel_size=7, stride=2, padding=3, bias=False)
        net.bn1 = nn.BatchNorm2d(width)
        for i, depth in enumerate(depths):
            setattr(net, f"layer{i + 1}", net._make_layer(block, width * 2**i, depth, stride=1 if i == 0 else 2))
        for module in net.modules():
            if isinstance(module, nn.Conv2d):  # torchvision's own initialisation
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    net.fc = nn.Identity()
    if size <= SMALL:  # the usual stem for CIFAR: a 3x3 convolution at full resolution, no pooling
        net.conv1 = nn.Conv2d(3, width, kernel_size=3, stride=1, padding=1, bias=False)
        nn.init.kaiming_normal_(net.conv1.weight, mode="fan_out", nonlinearity="relu")
        net.maxpool = nn.Identity()
    return net


def build_projector(inputs: int, hidden: int, dim: int, layers: int) -> nn.Sequential:
    """An MLP of `layers` linear maps, BatchNorm and ReLU between them: (B, inputs) -> (B, dim)."""
    if layers < 1:
        raise ValueError(f"the projector needs at least one layer, not {layers}")
    modules: list[nn.Module] = []
    for _ in range(layers - 1):
        modules += [nn.Linear(inputs, hidden, bias=False), nn.BatchNorm1d(hidden), nn.ReLU(inplace=True)]
        inputs = hidden
    return nn.Sequential(*modules, nn.Linear(inputs, dim))
