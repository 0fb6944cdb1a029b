"""Two-branch methods to compare with, made of lightly's losses, heads and updates: --method byol.

Each is an nn.Module around a backbone. `forward(view, other)` takes two views (B, 3, H, W) of the
same images and gives the loss. `after_step()` follows the optimiser's step. Methods that are
`_OfPairs` take the crops of --views too. Head sizes, temperatures and momenta are those of
lightly's CIFAR-10 benchmark, and of its example for DINO. BatchNorm sees the whole batch, also in
MoCo, whose keys the benchmark shuffles over eight parts.
The setting that matters most to a method is its argument; --branch-setting gives it another value.
Backbone, augmentation, optimiser, schedule, checkpoints and evaluation are those of our own method.
lightly is an optional dependency: pip install -r requirements-bench.txt.
"""

import copy
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lab import ranks
from lab.backbones import encoder_for
from lab.crops import crops, pairs, through
from plumbing.command_line import UserError
from plumbing.devices import looking_is_free, pick_precision
from plumbing.optimizer import optimizer_of, set_rate
from plumbing.runs import load_state

try:
    from lightly.loss import BarlowTwinsLoss, DINOLoss, NegativeCosineSimilarity, NTXentLoss, SwaVLoss
    from lightly.loss.swav_loss import sinkhorn
    from lightly.models.modules import heads
    from lightly.models.utils import deactivate_requires_grad, update_momentum
except ImportError as error:
    raise UserError(f"the two-branch methods need lightly: pip install -r requirements-bench.txt ({error})") from error


class InFloat32(nn.Module):
    """A loss of the networks' outputs in float32, also where the networks compute in bf16."""

    def __init__(self, criterion: nn.Module):
        super().__init__()
        self.criterion = criterion

    def forward(self, *outputs):
        def exact(x):
            return [y.float() for y in x] if isinstance(x, list) else x.float()

        device = next(iter(outputs[0])).device if isinstance(outputs[0], list) else outputs[0].device
        with torch.autocast(device.type, enabled=False):
            return self.criterion(*map(exact, outputs))


class _OfPairs:
    """For more than two crops.

    `online(x)` is what a method makes of a crop. `target(x)` is what a teacher makes of a global
    crop (None: there is no teacher, online(x) serves). `aim(target)` is what other crops are
    compared with, and `agree(online, aim)` the loss of a pair; both are in float32.
    """

    target = None

    def of_pairs(self, views: list[Tensor], weights: dict[tuple[int, int], float]) -> Tensor:
        """The weighted sum over pairs of V crops (B, 3, H, W), global ones first.

        weights are those of `crops.pairs`.
        """
        count = len({j for _, j in weights})  # of the crops are global
        online = through(self.online, views).float()  # (V B, D)
        target = through(self.target, views[:count]).float() if self.target else online[: count * len(views[0])]
        with torch.autocast(online.device.type, enabled=False):
            outputs, aims = online.chunk(len(views)), [self.aim(output) for output in target.chunk(count)]
            loss = sum(w * self.agree(outputs[i], aims[j]) for (i, j), w in weights.items())
            self.remember(target.detach())
        return loss

    def aim(self, target: Tensor) -> Tensor:
        return target

    def remember(self, target: Tensor) -> None:
        """Called once a step with the targets of all global crops (G B, D)."""


class SimCLR(_OfPairs, nn.Module):
    """arXiv 2002.05709: a view finds its partner among the views of the batch."""

    def __init__(self, backbone: nn.Module, features: int, temperature: float = 0.5):
        super().__init__()
        self.backbone, self.head = backbone, heads.SimCLRProjectionHead(features, 512, 128)
        self.criterion = InFloat32(NTXentLoss(temperature))

    def online(self, view: Tensor) -> Tensor:
        return self.head(self.backbone(view))

    def agree(self, online: Tensor, target: Tensor) -> Tensor:
        return self.criterion(online, target)

    def forward(self, view: Tensor, other: Tensor) -> Tensor:
        return self.criterion(self.online(view), self.online(other))

    def after_step(self) -> None:
        pass


class SimSiam(nn.Module):
    """arXiv 2011.10566: a view predicts its partner's projection, which gets no gradient."""

    def __init__(self, backbone: nn.Module, features: int, bottleneck: float = 512):
        super().__init__()
        self.backbone = backbone
        self.head = heads.ProjectionHead(
            [(features, 2048, nn.BatchNorm1d(2048), nn.ReLU()), (2048, 2048, nn.BatchNorm1d(2048), None)]
        )
        self.predictor = heads.SimSiamPredictionHead(2048, int(bottleneck), 2048)
        self.criterion = InFloat32(NegativeCosineSimilarity())

    def forward(self, view: Tensor, other: Tensor) -> Tensor:
        z, z_other = (self.head(self.backbone(v)) for v in (view, other))  # (B, 2048)
        p, p_other = self.predictor(z), self.predictor(z_other)
        return (self.criterion(p, z_other.detach()) + self.criterion(p_other, z.detach())) / 2

    def after_step(self) -> None:
        pass


class BarlowTwins(nn.Module):
    """arXiv 2103.03230: each output agrees with itself over two views, and with no other output."""

    def __init__(self, backbone: nn.Module, features: int, decorrelation: float = 0.005):
        super().__init__()
        self.backbone = backbone
        self.head = heads.ProjectionHead([(features, 2048, nn.BatchNorm1d(2048), nn.ReLU()), (2048, 2048, None, None)])
        self.criterion = InFloat32(BarlowTwinsLoss(decorrelation))

    def forward(self, view: Tensor, other: Tensor) -> Tensor:
        return self.criterion(self.head(self.backbone(view)), self.head(self.backbone(other)))

    def after_step(self) -> None:
        pass


class _WithTeacher(nn.Module):
    """A second network follows the first: teacher <- m teacher + (1 - m) student after a step."""

    def __init__(self, backbone: nn.Module, head, m: float = 0.99):
        super().__init__()
        self.backbone, self.head, self.m = backbone, head(), m
        self.teacher, self.teacher_head = copy.deepcopy(backbone), head()
        self.teacher_head.load_state_dict(self.head.state_dict())
        deactivate_requires_grad(self.teacher), deactivate_requires_grad(self.teacher_head)

    def forward(self, view: Tensor, other: Tensor) -> Tensor:
        return (self.one_way(view, other) + self.one_way(other, view)) / 2

    def after_step(self) -> None:
        update_momentum(self.backbone, self.teacher, self.m)
        update_momentum(self.head, self.teacher_head, self.m)


class MoCo(_OfPairs, _WithTeacher):
    """arXiv 2003.04297: a view finds its partner, seen by the teacher, among earlier ones."""

    def __init__(self, backbone: nn.Module, features: int, temperature: float = 0.1, queue: int = 4096):
        super().__init__(backbone, lambda: heads.MoCoProjectionHead(features, 512, 128))
        self.criterion = InFloat32(NTXentLoss(temperature, memory_bank_size=(queue, 128)))

    def online(self, view: Tensor) -> Tensor:
        return self.head(self.backbone(view))

    def target(self, view: Tensor) -> Tensor:
        return self.teacher_head(self.teacher(view)).detach()

    def forward(self, view: Tensor, other: Tensor) -> Tensor:
        views = view, other
        online, targets = [self.online(v).float() for v in views], [self.target(v).float() for v in views]
        with torch.autocast(view.device.type, enabled=False):
            loss = (self.agree(online[0], targets[1]) + self.agree(online[1], targets[0])) / 2
            self.remember(torch.cat(targets))
        return loss

    def agree(self, online: Tensor, target: Tensor) -> Tensor:
        """What the criterion gives, without its side effect.

        The criterion puts the target in the queue with every pair, and the next pair would find it
        among its negatives: the teacher's view of the very same pixels.
        """
        z, key = (F.normalize(x, dim=1) for x in (online, target))  # (B, 128)
        queue = self.criterion.criterion.memory_bank(key)[1]  # (128, K)
        logits = torch.cat([(z * key).sum(1, keepdim=True), z @ queue], 1) / self.criterion.criterion.temperature
        return F.cross_entropy(logits, torch.zeros(len(z), dtype=torch.long, device=z.device))

    def remember(self, target: Tensor) -> None:
        self.criterion.criterion.memory_bank(F.normalize(target, dim=1), update=True)


class MoCoOneWay(MoCo):
    """MoCo v2 as published: one view through the student, the other through the teacher."""

    of_pairs = None

    def forward(self, view: Tensor, other: Tensor) -> Tensor:
        return self.criterion(self.online(view), self.target(other))


class BYOL(_WithTeacher):
    """arXiv 2006.07733: a view predicts what the teacher makes of its partner."""

    def __init__(self, backbone: nn.Module, features: int, m: float = 0.99):
        super().__init__(backbone, lambda: heads.BYOLProjectionHead(features, 1024, 256), m)
        self.predictor = heads.BYOLPredictionHead(256, 1024, 256)
        self.criterion = InFloat32(NegativeCosineSimilarity())

    def one_way(self, view: Tensor, other: Tensor) -> Tensor:
        prediction = self.predictor(self.head(self.backbone(view)))
        return self.criterion(prediction, self.teacher_head(self.teacher(other)).detach())


class DINO(_OfPairs, _WithTeacher):
    """arXiv 2104.14294: a view predicts the teacher's centred, sharpened output."""

    def __init__(self, backbone: nn.Module, features: int, student_temperature: float = 0.1):
        super().__init__(backbone, lambda: heads.DINOProjectionHead(features, 512, 64, 2048, batch_norm=True))
        self.criterion = InFloat32(DINOLoss(2048, student_temp=student_temperature))

    def online(self, view: Tensor) -> Tensor:
        return self.head(self.backbone(view))

    @torch.no_grad()
    def target(self, view: Tensor) -> Tensor:
        return self.teacher_head(self.teacher(view))

    def forward(self, view: Tensor, other: Tensor) -> Tensor:
        return self.criterion([self.target(v) for v in (view, other)], [self.online(v) for v in (view, other)])

    # The criterion gives all pairs one weight. These are its pieces.

    def aim(self, target: Tensor) -> Tensor:
        c = self.criterion.criterion
        return ((target - c.center[0]) / c.teacher_temp).softmax(1)

    def agree(self, online: Tensor, aim: Tensor) -> Tensor:
        return F.cross_entropy(online / self.criterion.criterion.student_temp, aim)

    def remember(self, target: Tensor) -> None:
        self.criterion.criterion.update_center(target[None])


class SwAV(_OfPairs, nn.Module):
    """arXiv 2006.09882: a view predicts the prototypes that its partner is assigned to.

    Sinkhorn's iterations share a batch's views out evenly over the prototypes. No queue.
    """

    def __init__(self, backbone: nn.Module, features: int, prototypes: float = 512):
        super().__init__()
        self.backbone, self.head = backbone, heads.SwaVProjectionHead(features, 512, 128)
        self.prototypes = heads.SwaVPrototypes(128, int(prototypes))
        self.criterion = InFloat32(SwaVLoss())
        self.after_step()

    def online(self, view: Tensor) -> Tensor:
        """The similarities (B, K) to the prototypes. Sinkhorn divides them by 0.05: float32."""
        z = self.head(self.backbone(view)).float()  # (B, 128)
        with torch.autocast(z.device.type, enabled=False):
            return self.prototypes(F.normalize(z, dim=1))

    @torch.no_grad()
    def aim(self, target: Tensor) -> Tensor:
        c = self.criterion.criterion
        return sinkhorn(target.detach(), c.sinkhorn_iterations, c.sinkhorn_epsilon)

    def agree(self, online: Tensor, aim: Tensor) -> Tensor:
        return self.criterion.criterion.subloss(online, aim)

    def forward(self, view: Tensor, other: Tensor) -> Tensor:
        return self.criterion([self.online(v) for v in (view, other)], [])[0]

    def after_step(self) -> None:
        self.prototypes.normalize()  # to unit length


METHODS = {
    "simclr": SimCLR,
    "simsiam": SimSiam,
    "byol": BYOL,
    "moco": MoCo,
    "mocov2": MoCoOneWay,
    "barlow": BarlowTwins,
    "dino": DINO,
    "swav": SwAV,
}


class TwoBranches:
    """What a run of one of these learns with; `train.train` takes it in place of `Pretraining`."""

    LOSSES = ("loss",)
    choices = None

    def __init__(self, config, count: int, device: torch.device):
        if ranks.count() > 1:
            raise UserError(f"--method {config.method} runs in one process")
        self.config, self.device = config, device
        self.encoder = encoder_for(config).to(device, memory_format=torch.channels_last)
        self.encoder.precision = pick_precision(config.precision, device, self.encoder)
        own = [config.branch_setting] if config.branch_setting else []
        kind = METHODS[config.method]
        if issubclass(kind, MoCo):  # a longer queue would hold the images of the batch, as negatives
            kind = partial(kind, queue=max(1, min(4096, count // 2)))
        model = kind(self.encoder.backbone, self.encoder.feature_dim, *own)
        self.model = model.to(device, memory_format=torch.channels_last).train()
        self.crops, self.pairs = crops(config), pairs(config)
        self.augment = self.crops[0].augment
        of_pairs = getattr(model, "of_pairs", None)
        if self.pairs and not of_pairs:
            able = ", ".join(name for name, kind in METHODS.items() if getattr(kind, "of_pairs", None))
            raise UserError(f"--views {config.views}: not with --method {config.method}, but with ours, {able}")
        call = of_pairs if self.pairs else self.model
        self.forward = torch.compile(call) if config.compile else call
        trained = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = optimizer_of(config, trained)

    def enter(self, images, entering) -> None:
        """There is none."""

    def loss(self, pixels: Tensor) -> Tensor:
        """The loss of images (B, 3, S, S) seen in two views each, or in those of --views."""
        views = [crop.augment(pixels) for crop in (self.crops if self.pairs else 2 * self.crops)]
        with self.encoder.autocast(pixels):
            return self.forward(views, self.pairs) if self.pairs else self.forward(*views)

    def step(self, pixels: Tensor, index: Tensor, lr: float) -> Tensor:
        """One step on images (B, 3, S, S): returns (loss,), detached.

        Raises FloatingPointError if the loss is not finite and looking at it is free.
        """
        set_rate(self.optimizer, lr)
        loss = self.loss(pixels)
        if looking_is_free(loss) and not torch.isfinite(loss):
            raise FloatingPointError
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self.model.after_step()
        return loss.detach()[None]

    def state(self) -> dict:
        state = {"encoder": self.encoder.state_dict(), "model": self._tensors()}
        return state | {"optimizer": self.optimizer.state_dict()}

    def load(self, checkpoint: dict) -> None:
        load_state(self.encoder, checkpoint["encoder"], "--resume: the run's encoder")
        stored = checkpoint.get("model")
        for name, tensor in self._tensors().items():
            if not isinstance(stored, dict) or getattr(stored.get(name), "shape", None) != tensor.shape:
                raise UserError(f"--resume: the run's model has another shape ({name})")
            tensor.copy_(stored[name])
        load_state(self.optimizer, checkpoint["optimizer"], "--resume: the run's optimizer")

    def _tensors(self) -> dict[str, Tensor]:
        """Parameters and buffers of the model; its state_dict would leave out MoCo's queue."""
        return {name: p.detach() for name, p in (*self.model.named_parameters(), *self.model.named_buffers())}
