"""What the search left out, and what separates ours from its next relative.

    python -m lab.studies.field_checks --scale demo                 the embedded shapes
    python -m lab.studies.field_checks --data-dir my_cifar10        two and a half hours, two cores

The search (lab/studies/field_search.py) gave NPID the released code's m, and all methods a warm-up
of a twentieth. Figure 1 warms up for two epochs, which are twice the share where a run is half as
long. At first the search gave the parametric classifier no window, though its paper has one (PIC,
arXiv 2006.14618), and m = 0.9. Every row here changes one of these for the method's best trial of
that time, and is trained and measured on held-out training images as the search does it.

The parametric classifier differs from ours in the start of its rows, which are random, and in what
the search chose for both, rate and crops. The last rows take these apart: ours with either start.
"""

import sys
from dataclasses import replace

from figures.field import NAMES, SEARCH, best, lasting, method_on
from figures.sweep import figure
from lab.studies import field_search
from lab.studies.field_ideas import table
from lab.train import LabConfig

STARTS = {"a forward pass": "forward", "random rows": "random"}


def points(base: LabConfig, scale: str = "cpu") -> dict[str, LabConfig]:
    centres = field_search.points(base, scale)

    def chosen(method: str) -> LabConfig:
        return replace(method_on(centres[f"{NAMES[method]}: centre"], method), **best(SEARCH)[method])

    npid, simclr = map(chosen, ("npid", "simclr"))
    rows = {f"NPID, m = {m:g}": replace(npid, bank_momentum=m) for m in (npid.bank_momentum, 0.75, 0.9)}
    parametric = replace(centres[f"{NAMES['parametric']}: centre"], temperature=0.05, bank_momentum=0.9, window=0)
    rows["parametric, every image in the bank"] = parametric
    window = min(1024, parametric.subset // 2)
    rows["parametric, a window"] = replace(parametric, window=window)
    rows["parametric, a window and m = 0.75"] = replace(parametric, window=window, bank_momentum=0.75)
    for share in (0.05, 0.1, 0.2):
        rows[f"SimCLR, warm-up of {share:.0%}"] = replace(simclr, warmup=share * simclr.epochs)
    ours, other = chosen("ours"), chosen("parametric")
    kinds = {
        "": ours,
        ", rate and crops of parametric": replace(ours, lr=other.lr, crop_min=other.crop_min),
        ", 4 visits": replace(ours, visits=min(4, ours.visits)),
        ", a third of the epochs": lasting(ours, max(1, round(ours.epochs / 3)), one_in=20),
    }
    for words, config in kinds.items():
        for start, init in STARTS.items():
            rows[f"ours, {start}{words}"] = replace(config, bank_init=init)
    return rows


if __name__ == "__main__":
    sys.exit(figure("field_checks", __doc__, points, show=table))
