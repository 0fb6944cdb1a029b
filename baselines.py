"""Two-branch methods to stand beside: SimCLR, MoCo v2, BYOL and SimSiam from lightly's losses, heads and momentum updates.

Each is an nn.Module around a backbone: `forward(view, other)` takes two views (B, 3, H, W) of the same images and gives the
loss; `after_step()` follows the optimiser's step. Head sizes, temperatures and momenta are those of lightly's CIFAR-10
benchmark. lightly is an optional dependency: pip install -r requirements-bench.txt.
"""

import copy

from torch import Tensor, nn

from images import UserError

try:
    from lightly.loss import NegativeCosineSimilarity, NTXentLoss
    from lightly.models.modules import heads
    from lightly.models.utils import deactivate_requires_grad, update_momentum
except ImportError as error:
    raise UserError(f"the two-branch methods need lightly: pip install -r requirements-bench.txt ({error})") from error


class SimCLR(nn.Module):
    """arXiv 2002.05709: a view finds its partner among the views of the batch."""

    def __init__(self, backbone: nn.Module, features: int):
        super().__init__()
        self.backbone, self.head = backbone, heads.SimCLRProjectionHead(features, 512, 128)
        self.criterion = NTXentLoss(temperature=0.5)

    def forward(self, view: Tensor, other: Tensor) -> Tensor:
        return self.criterion(self.head(self.backbone(view)), self.head(self.backbone(other)))

    def after_step(self) -> None:
        pass


class SimSiam(nn.Module):
    """arXiv 2011.10566: a view predicts its partner's projection, through which no gradient flows."""

    def __init__(self, backbone: nn.Module, features: int):
        super().__init__()
        self.backbone = backbone
        self.head = heads.ProjectionHead(
            [(features, 2048, nn.BatchNorm1d(2048), nn.ReLU()), (2048, 2048, nn.BatchNorm1d(2048), None)]
        )
        self.predictor = heads.SimSiamPredictionHead(2048, 512, 2048)
        self.criterion = NegativeCosineSimilarity()

    def forward(self, view: Tensor, other: Tensor) -> Tensor:
        z, z_other = (self.head(self.backbone(v)) for v in (view, other))  # (B, 2048)
        p, p_other = self.predictor(z), self.predictor(z_other)
        return (self.criterion(p, z_other.detach()) + self.criterion(p_other, z.detach())) / 2

    def after_step(self) -> None:
        pass


class _WithTeacher(nn.Module):
    """A second network that follows the first: teacher <- m teacher + (1 - m) student after every step."""

    def __init__(self, backbone: nn.Module, head: nn.Module, m: float = 0.99):
        super().__init__()
        self.backbone, self.head, self.m = backbone, head, m
        self.teacher, self.teacher_head = copy.deepcopy(backbone), copy.deepcopy(head)
        deactivate_requires_grad(self.teacher), deactivate_requires_grad(self.teacher_head)

    def forward(self, view: Tensor, other: Tensor) -> Tensor:
        return (self.one_way(view, other) + self.one_way(other, view)) / 2

    def after_step(self) -> None:
        update_momentum(self.backbone, self.teacher, self.m)
        update_momentum(self.head, self.teacher_head, self.m)


class MoCo(_WithTeacher):
    """arXiv 2003.04297: a view finds its partner, seen by the teacher, among a queue of 4 096 earlier ones."""

    def __init__(self, backbone: nn.Module, features: int):
        super().__init__(backbone, heads.MoCoProjectionHead(features, 512, 128))
        self.criterion = NTXentLoss(temperature=0.1, memory_bank_size=(4096, 128))

    def one_way(self, view: Tensor, other: Tensor) -> Tensor:
        return self.criterion(self.head(self.backbone(view)), self.teacher_head(self.teacher(other)).detach())


class MoCoOneWay(MoCo):
    """As MoCo v2 was published: one view through the student and the other through the teacher, not both through both."""

    def forward(self, view: Tensor, other: Tensor) -> Tensor:
        return self.one_way(view, other)


class BYOL(_WithTeacher):
    """arXiv 2006.07733: a view predicts what the teacher makes of its partner."""

    def __init__(self, backbone: nn.Module, features: int):
        super().__init__(backbone, heads.BYOLProjectionHead(features, 1024, 256))
        self.predictor = heads.BYOLPredictionHead(256, 1024, 256)
        self.criterion = NegativeCosineSimilarity()

    def one_way(self, view: Tensor, other: Tensor) -> Tensor:
        prediction = self.predictor(self.head(self.backbone(view)))
        return self.criterion(prediction, self.teacher_head(self.teacher(other)).detach())


METHODS = {"SimCLR": SimCLR, "SimSiam": SimSiam, "BYOL": BYOL, "MoCo": MoCo, "MoCo, one way": MoCoOneWay}
