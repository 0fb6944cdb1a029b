"""The methods that the comparisons include, each with its own settings, on one base.

All methods share backbone, images, augmentation, schedule and evaluation. A method has its own
head; those of the two-branch methods are lightly's for CIFAR-10. Optimiser, learning rate, weight
decay, batch size, smallest crop and the method's own setting are those that served it best in a
search of equal size for each (lab/studies/field_search.py).

    NPID        our bank with a random start, NPID's rule and NPID's m (arXiv 1805.01978)
    parametric  instance classification with a classifier that SGD trains, and a window of images
                (PIC, arXiv 2006.14618). A bank can play the classifier's part: for a unit row w,
                w + a g has the direction of m w + (1 - m) g with a = (1 - m) / m, so the corrected
                rule is a step of projected gradient descent. Rows start at random. m plays the
                classifier's rate; lab/studies/field_checks.py chose it. In PIC an image that
                returns to the window finds its row as it left it, here a new one.

NPID has every image in the bank.
"""

from dataclasses import replace
from functools import lru_cache
from pathlib import Path

from figures.sweep import RESULTS, ROUND_ONE, read
from lab.studies import default
from lab.train import LabConfig
from train import RECIPES

NAMES = {
    "ours": "ours", "npid": "NPID", "parametric": "parametric", "simclr": "SimCLR", "moco": "MoCo v2, both ways",
    "mocov2": "MoCo v2", "byol": "BYOL", "simsiam": "SimSiam", "barlow": "Barlow Twins", "dino": "DINO",
}  # fmt: skip
OURS = {
    "ours": {},
    "npid": dict(bank_init="random", bank_update="npid", bank_momentum=0.5, window=0),
    "parametric": dict(bank_init="random", bank_momentum=0.75),
}
LR = {  # of SGD for a batch of 128, the best of the first search (lab/studies/field_lr.py)
    "ours": 0.1, "npid": 0.0125, "parametric": 0.1, "simclr": 0.24, "moco": 0.12, "mocov2": 0.12, "byol": 0.96,
    "simsiam": 0.48, "barlow": 0.0002, "dino": 0.24,
}  # fmt: skip
BEST = ("simclr", "moco")  # the best two-branch methods in Figure 1: the other tables have these two
# Settings that mean nothing to a two-branch method, which gets them at their value in ROUND_ONE.
OWN = "layers hidden dim temperature bank_momentum bank_init bank_update negatives lam kl_temperature cutmix".split()
OWN += ["sgd_momentum"]
SEARCH = RESULTS / "field_search-cpu.json"
SEARCHED = "optimizer lr weight_decay batch_size crop_min temperature branch_setting".split()


def base_of(base: LabConfig, scale: str = "cpu") -> LabConfig:
    """The default recipe for the images of base; at cpu scale with a network of width 16."""
    if scale == "paper":
        return LabConfig(**(RECIPES["gpu"] | dict(dataset=base.dataset, data_dir=base.data_dir, device=base.device)))
    recipe = default.points(base, scale)[default.NAME]
    return replace(recipe, width=recipe.width or 16)


def method_on(base: LabConfig, method: str) -> LabConfig:
    """base with the bank or the branches of a method of NAMES; optimiser and rates stay base's."""
    alone = {name: ROUND_ONE[name] for name in OWN} | dict(method=method, window=0)
    return replace(base, **(OURS[method] if method in OURS else alone))


def contestant(base: LabConfig, method: str) -> LabConfig:
    """base with a method of NAMES and the settings that the search chose for it.

    Where base has smaller batches, so has the method, with a rate to match.
    """
    config = replace(method_on(base, method), **best(SEARCH).get(method, {}))
    return with_batch(config, min(base.batch_size, config.batch_size))


def with_batch(config: LabConfig, batch_size: int) -> LabConfig:
    """config with batches of another size, and a rate in proportion, Muon's to the square root."""
    share = batch_size / config.batch_size
    rate = config.lr * (share if config.optimizer == "sgd" else share**0.5)
    return replace(config, batch_size=batch_size, lr=rate)


@lru_cache
def best(file: Path) -> dict[str, dict]:
    """By method, the settings of the trial with the best linear and kNN accuracy together."""
    runs, leaders = read(file), {}
    kinds = {words: method for method, words in NAMES.items()}
    for run in runs:
        method, both = kinds[run["name"].split(": ")[0]], total(runs, run["name"])
        if both > leaders.get(method, (0.0,))[0]:
            leaders[method] = both, {key: run["config"][key] for key in SEARCHED}
    return {method: settings for method, (_, settings) in leaders.items()}


def total(runs: list[dict], name: str) -> float:
    """Linear and kNN accuracy of a trial together, the mean over the seeds."""
    sums = [run["final"]["linear"] + run["final"]["knn"] for run in runs if run["name"] == name]
    return sum(sums) / len(sums)


def with_sgd(base: LabConfig, method: str, lr: float = 0.0) -> LabConfig:
    """base with a method of NAMES as the first round compared it: SGD, and no windows.

    lr is for a batch of 128; 0 takes the method's own. The classifier had m = 0.9, which is SGD at
    rate 0.1 with momentum 0.9: a = 0.1 / (1 - 0.9) / 128 / 0.07 for a batch of 128 and tau 0.07.
    """
    decay = base.weight_decay if method in OURS else 5e-4
    rate = (lr or LR[method]) * base.batch_size / 128
    config = replace(method_on(base, method), optimizer="sgd", lr=rate, window=0, weight_decay=decay)
    return replace(config, bank_momentum=0.9) if method == "parametric" else config


def at_scale(base: LabConfig, scale: str) -> LabConfig:
    """base; at cpu scale with K negatives and a head that costs no more than its network.

    At that scale a network of width 16 takes 9 million multiply-adds per view. D = 2048 would
    double a step's time and is no better: linear / kNN 44.7 / 39.6, compared with 44.4 / 40.2 for
    D = 512 (held-out images, ten epochs, one seed).
    """
    return replace(base, dim=512, hidden=512, negatives=ROUND_ONE["negatives"]) if scale == "cpu" else base


def lasting(config: LabConfig, epochs: int, one_in: int = 5) -> LabConfig:
    """config for that many epochs; at most one in five of them, or in one_in, is warm-up."""
    return replace(config, epochs=epochs, warmup=min(config.warmup, epochs / one_in))
