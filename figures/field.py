"""Who stands in the comparisons of Figure 1 and its neighbours: every method with its own settings, on one base.

Backbone, images, augmentation, batch size, SGD with a cosine, and the evaluation are everybody's. A method's own are its
head, its weight decay and its learning rate. Those of the others come from lightly's CIFAR-10 benchmark
(the weight decay is 5e-4), ours from `config.Config`; the learning rate of each is the best of a few by `figures/field_lr.py`.

    NPID        our bank at a random start, with NPID's rule and its m (arXiv 1805.01978)
    parametric  instance classification with a classifier that SGD trains (arXiv 2006.14618). A bank is one: w + a g for
                a unit row w has the direction of m w + (1 - m) g with a = (1 - m) / m, so that the corrected rule is a
                step of projected gradient descent. SGD at the network's lr .1 and momentum .9, on the mean over a batch
                of 128 with tau .07, comes to a = .1 / (1 - .9) / 128 / .07 = .11, or m = .9. It starts at random.
"""

from dataclasses import replace

from sweep import Config

NAMES = {
    "ours": "ours", "npid": "NPID", "parametric": "parametric", "simclr": "SimCLR", "moco": "MoCo v2, both ways",
    "mocov2": "MoCo v2", "byol": "BYOL", "simsiam": "SimSiam", "barlow": "Barlow Twins", "dino": "DINO",
}  # fmt: skip
OURS = {
    "ours": {},
    "npid": dict(bank_init="random", bank_update="npid", momentum=0.5),
    "parametric": dict(bank_init="random", momentum=0.9),
}
LR = {  # for a batch of 128, the best of the search
    "ours": 0.1, "npid": 0.0125, "parametric": 0.1, "simclr": 0.24, "moco": 0.12, "mocov2": 0.12, "byol": 0.96,
    "simsiam": 0.48, "barlow": 0.0002, "dino": 0.24,
}  # fmt: skip
BEST = ("simclr", "moco")  # of the others, by Figure 1: those that the further tables have
# A method's settings that mean nothing to a two-branch one: put back to their defaults there.
OWN = "layers hidden dim temperature momentum bank_init bank_update negatives lam kl_temperature cutmix sgd_momentum"


def contestant(base: Config, method: str, lr: float = 0.0) -> Config:
    """base with the settings of a method of NAMES; lr is for a batch of 128, and 0 takes the method's own."""
    if method in OURS:
        settings = OURS[method]
    else:
        settings = {name: getattr(Config, name) for name in OWN.split()} | dict(method=method, weight_decay=5e-4)
    return replace(base, lr=(lr or LR[method]) * base.batch_size / 128, **settings)


def at_scale(base: Config, scale: str) -> Config:
    """base with a head that costs no more than its network, and the default's K, at cpu scale.

    There a network of width 16 takes 9 million multiply-adds a view. D = 2048 would double a step's time, and reads no better:
    44.7 / 39.6 (linear / kNN) against 44.4 / 40.2 on held-out images, ten epochs, one seed.
    """
    return replace(base, dim=512, hidden=512, negatives=Config.negatives) if scale == "cpu" else base


def lasting(config: Config, epochs: int) -> Config:
    """config for that many epochs, of which at most a fifth are warm-up."""
    return replace(config, epochs=epochs, warmup=min(config.warmup, epochs / 5))
