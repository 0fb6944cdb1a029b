"""The methods that the comparisons include, each with its own settings, on one base.

All methods share backbone, images, augmentation, batch size, SGD with a cosine, and evaluation. A
method has its own head, weight decay and learning rate. For the two-branch methods they come from
lightly's CIFAR-10 benchmark (the weight decay is 5e-4), for ours from `sweep.ROUND_ONE`. The
learning rate of each method is the best of a few (lab/studies/field_lr.py).

    NPID        our bank with a random start, NPID's rule and NPID's m (arXiv 1805.01978)
    parametric  instance classification with a classifier that SGD trains (arXiv 2006.14618). A bank
                can play that part: for a unit row w, w + a g has the direction of m w + (1 - m) g
                with a = (1 - m) / m, so the corrected rule is a step of projected gradient descent.
                SGD with the network's lr 0.1 and momentum 0.9, on the mean over a batch of 128 with
                tau 0.07, gives a = 0.1 / (1 - 0.9) / 128 / 0.07 = 0.11, which is m = 0.9. The
                classifier starts at random.
"""

from dataclasses import replace

from figures.sweep import ROUND_ONE
from lab.train import LabConfig

NAMES = {
    "ours": "ours", "npid": "NPID", "parametric": "parametric", "simclr": "SimCLR", "moco": "MoCo v2, both ways",
    "mocov2": "MoCo v2", "byol": "BYOL", "simsiam": "SimSiam", "barlow": "Barlow Twins", "dino": "DINO",
}  # fmt: skip
OURS = {
    "ours": {},
    "npid": dict(bank_init="random", bank_update="npid", bank_momentum=0.5),
    "parametric": dict(bank_init="random", bank_momentum=0.9),
}
LR = {  # for a batch of 128, the best of the search
    "ours": 0.1, "npid": 0.0125, "parametric": 0.1, "simclr": 0.24, "moco": 0.12, "mocov2": 0.12, "byol": 0.96,
    "simsiam": 0.48, "barlow": 0.0002, "dino": 0.24,
}  # fmt: skip
BEST = ("simclr", "moco")  # the best two-branch methods in Figure 1: the other tables have these two
# Settings that mean nothing to a two-branch method, which gets them at their value in ROUND_ONE.
OWN = "layers hidden dim temperature bank_momentum bank_init bank_update negatives lam kl_temperature cutmix".split()
OWN += ["sgd_momentum"]


def contestant(base: LabConfig, method: str, lr: float = 0.0) -> LabConfig:
    """base with the settings of a method of NAMES.

    lr is for a batch of 128; 0 takes the method's own.
    """
    if method in OURS:
        settings = OURS[method]
    else:
        settings = {name: ROUND_ONE[name] for name in OWN} | dict(method=method, weight_decay=5e-4)
    return replace(base, lr=(lr or LR[method]) * base.batch_size / 128, **settings)


def at_scale(base: LabConfig, scale: str) -> LabConfig:
    """base; at cpu scale with K negatives and a head that costs no more than its network.

    At that scale a network of width 16 takes 9 million multiply-adds per view. D = 2048 would
    double a step's time and is no better: linear / kNN 44.7 / 39.6, compared with 44.4 / 40.2 for
    D = 512 (held-out images, ten epochs, one seed).
    """
    return replace(base, dim=512, hidden=512, negatives=ROUND_ONE["negatives"]) if scale == "cpu" else base


def lasting(config: LabConfig, epochs: int) -> LabConfig:
    """config for that many epochs; at most a fifth of them are warm-up."""
    return replace(config, epochs=epochs, warmup=min(config.warmup, epochs / 5))
