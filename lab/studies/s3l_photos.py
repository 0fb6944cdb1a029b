"""S3L (arXiv 2103.13559) on a folder of photographs, where resolution means something.

    python -m lab.studies.s3l_photos --scale demo             the embedded shapes, a few minutes
    python -m lab.studies.s3l_photos --data-dir my_photos     two hours on two cores, in bf16
    python -m lab.studies.s3l_photos --scale paper --data-dir my_photos   ResNet-18, one GPU

The folder holds train/<class>/ and test/<class>/, with at least 3 000 training images. The arms are
those of s3l.py with the default recipe: views of 160 pixels, of 96 and of 64; 64, then 160; no last
stage; half of the images. All networks have torchvision's stem, so that a smaller view costs less,
and a network for one side goes on at another. All of them are fine-tuned at the full side, on half
of the images.

The 24 runs of three seeds took 115 minutes, evaluations included (AMD EPYC with bf16, two runs at a
time, 2026-11-26). Without bf16 a step took about twice as long.
"""

import json
import sys
from dataclasses import replace

from figures.field import lasting
from figures.sweep import figure
from lab.studies.s3l import FULL, Measure, draw, table
from lab.train import LabConfig

# sides, the full one last; images; epochs of pretraining, of the second stage, of fine-tuning, and
# of the missing stage alone
SCALES = {
    "demo": ((8, 12, 16), 1000, 4, 1, 5, 2),
    "cpu": ((64, 96, 160), 3000, 50, 12, 20, 10),
    "paper": ((64, 96, 160), 3000, 200, 50, 120, 10),
}
NETWORK = {"demo": dict(width=8), "cpu": dict(width=16), "paper": dict(arch="resnet18")}


def points(base: LabConfig, scale: str = "cpu") -> dict[str, LabConfig]:
    """The default recipe at its rate for a batch of 64, with a bank of all images."""
    sides, count, epochs, second, _, _ = SCALES[scale]
    dataset = base.dataset if scale == "demo" else "folder"
    default = LabConfig(dataset=dataset, data_dir=base.data_dir, device=base.device, knn_every=0, window=0)
    full = replace(default, size=sides[-1], subset=count, batch_size=64, lr=0.035, torchvision_stem=True)
    full = lasting(replace(full, **NETWORK[scale]), epochs)
    small, rows = {"size": sides[0], "epochs": epochs, "warmup": full.warmup}, {FULL: full}
    rows |= {f"{side} px": replace(full, size=side) for side in sides[-2::-1]}
    two = replace(lasting(full, second), init_from=json.dumps(small))
    return rows | {
        f"{sides[0]} px -> full, bank carried": replace(two, bank_init="carry"),
        f"{sides[0]} px -> full, bank anew": two,
        "small architecture": replace(full, drop_last_stage=True),
        "small data": replace(full, subset=count // 2),
        "all three": replace(full, size=sides[0], drop_last_stage=True, subset=count // 2),
    }


def measure(base: LabConfig, scale: str) -> Measure:
    return Measure(points(base, scale)[FULL], *SCALES[scale][-2:])


if __name__ == "__main__":
    sys.exit(figure("s3l_photos", __doc__, points, draw, show=table, measure=measure, needs=("finetune_tflop",)))
