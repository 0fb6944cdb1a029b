"""Detection and segmentation: torchvision's R-CNNs on a run's backbone, and from scratch.

    python -m lab.detection runs/shapes                          drawn scenes of shapes: box AP
    python -m lab.detection runs/shapes --task segmentation      Mask R-CNN: box AP and mask AP
    python -m lab.detection runs/folder --dataset coco --data-dir DIR     your own images, or voc

Formats of datasets: lab/scenes.py. Every layer is fine-tuned. Both detectors start with the same
heads and see the same images in the same order. They differ in the backbone alone: as the run left
it, or as it was before its first step ("scratch"). BatchNorm learns in both, which needs
several images per batch. Average precision is COCO's, by two optional packages: pip install -r
requirements-bench.txt.
"""

import argparse
import json
import math
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torchvision.models.detection as tv
from torch import Tensor, nn
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from tqdm import tqdm

from eval_linear import load_backbone
from lab import scenes
from lab.backbones import encoder_of, has_small_stem
from lab.scenes import Scenes
from lab.train import LabConfig
from models import RESNETS
from plumbing.command_line import Parser, UserError, check_device, command, loaded
from plumbing.devices import hardware, pick_device
from plumbing.image_ops import MEAN, STD
from plumbing.outputs import output, save_text
from plumbing.runs import read_checkpoint

SETTINGS = ("task", "size", "epochs", "batch_size", "lr", "seed", "device", "thin_heads")
FIGURES = {"box_ap50": "box AP50", "box_ap": "box AP", "mask_ap50": "mask AP50", "mask_ap": "mask AP"}


# ------------------------------------------------------------------------------------- the detector


def build(backbone: nn.Module, classes: int, task: str, size: int, small: bool, thin: bool = False) -> nn.Module:
    """torchvision's Faster R-CNN, or its Mask R-CNN for segmentation, on a ResNet of models.py.

    It uses the ResNet's modules, not a copy. size is the shorter side that images are brought to.
    small is for a ResNet with the small stem: the pyramid stands on the last three stages (strides
    2 to 8), and the heads are thin. Thin heads are for two cores: 64 channels, few proposals, and
    anchors from 8 pixels on (16 with the usual stem). Otherwise everything is as in torchvision.
    """
    thin = thin or small
    stages = [f"layer{i}" for i in range(2 if small else 1, 5)]
    norms = [[m for m in getattr(backbone, stage).modules() if isinstance(m, nn.BatchNorm2d)] for stage in stages]
    body = BackboneWithFPN(
        backbone,
        {stage: str(i) for i, stage in enumerate(stages)},
        [norm[-1].num_features for norm in norms],  # a stage is as wide as its last BatchNorm
        64 if thin else 256,
    )
    options = dict(num_classes=classes + 1, min_size=size, max_size=2 * size, image_mean=MEAN, image_std=STD)
    if thin:
        options |= _thin_heads(classes, len(stages) + 1, 8 if small else 16, 20 if small else 100)
    if task == "detection":
        return tv.FasterRCNN(body, **options)
    if thin:
        options["mask_head"] = tv.mask_rcnn.MaskRCNNHeads(64, (64, 64), 1)
        options["mask_predictor"] = tv.mask_rcnn.MaskRCNNPredictor(64, 64, classes + 1)
    return tv.MaskRCNN(body, **options)


def _thin_heads(classes: int, levels: int, anchor: int, most: int) -> dict:
    """anchor is the side of the smallest anchors; most bounds an image's detections."""
    heads = tv.faster_rcnn
    anchors = tuple((anchor * 2**i,) for i in range(levels)), ((0.5, 1.0, 2.0),) * levels
    return dict(
        num_classes=None, box_head=heads.TwoMLPHead(64 * 7 * 7, 256), box_detections_per_img=most,
        box_predictor=heads.FastRCNNPredictor(256, classes + 1), box_batch_size_per_image=64,
        rpn_anchor_generator=tv.anchor_utils.AnchorGenerator(*anchors),
        rpn_pre_nms_top_n_train=300, rpn_pre_nms_top_n_test=300,
        rpn_post_nms_top_n_train=100, rpn_post_nms_top_n_test=100,
    )  # fmt: skip


def finetune(
    model: nn.Module, train: Scenes, epochs: int, batch_size: int, lr: float, seed: int, device, name=""
) -> None:
    """Train all of the model on scenes with random flips.

    SGD with momentum 0.9 and weight decay 1e-4. The learning rate rises to lr in a tenth of the
    steps and falls as a cosine. Raises UserError if the loss is no longer finite.
    """
    draws = torch.Generator().manual_seed(seed)  # its own: how much torchvision's sampling draws depends on the network
    batches = torch.utils.data.DataLoader(
        train, batch_size, True, collate_fn=list, num_workers=train.workers, generator=draws
    )
    optimizer = torch.optim.SGD(model.parameters(), lr, 0.9, weight_decay=1e-4)
    total = epochs * len(batches)
    rise = max(1, total // 10)
    pace = lambda step: min((step + 1) / rise, 0.5 + 0.5 * math.cos(math.pi * step / total))  # noqa: E731
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, pace)
    model.to(device).train()
    with tqdm(total=total, desc=f"fine-tuning, {name}", unit="step", leave=False) as bar:
        for _ in range(epochs):
            for batch in loaded(batches):
                images, targets = zip(*(_prepared(*scene, draws, device) for scene in batch))
                loss = sum(model(list(images), list(targets)).values())
                if not torch.isfinite(loss):
                    raise UserError(f"--lr {lr}: the detector's loss is no longer finite; take a smaller one")
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
                bar.update()


def _prepared(image: Tensor, target: dict, draws: torch.Generator, device) -> tuple[Tensor, dict]:
    """A scene on the device, without its crowds, flipped with probability 1/2."""
    kept = {key: value[~target["crowd"]].to(device) for key, value in target.items()}
    if torch.rand(1, generator=draws) < 0.5:
        image, (x0, y0, x1, y1) = image.flip(-1), kept["boxes"].unbind(1)
        kept["boxes"] = torch.stack([image.shape[-1] - x1, y0, image.shape[-1] - x0, y1], 1)
        kept |= {"masks": kept["masks"].flip(-1)} if "masks" in kept else {}
    return image.to(device), kept


@torch.no_grad()
def predict(model: nn.Module, test: Scenes, device, name=""):
    """Yields (detected, target) of every test image, on the CPU.

    detected has boxes (D, 4), labels (D,), scores (D,) and for segmentation bool masks (D, H, W).
    """
    model.eval()
    batches = torch.utils.data.DataLoader(test, 8, collate_fn=list, num_workers=test.workers)
    for batch in tqdm(loaded(batches), desc=f"testing, {name}", total=len(batches), leave=False):
        for detected, (_, target) in zip(model([image.to(device) for image, _ in batch]), batch):
            detected = {key: value.cpu() for key, value in detected.items()}
            yield detected | ({"masks": detected["masks"][:, 0] > 0.5} if "masks" in detected else {}), target


def transfer(
    checkpoint: dict, train: Scenes, test: Scenes, task="detection", size=0, epochs=20, batch_size=8, lr=0.02, seed=0,
    device="auto", thin_heads=False,
) -> tuple[dict, dict]:  # fmt: skip
    """Fine-tune and test both detectors.

    Returns {"pretrained": figures, "scratch": figures} and the detectors by the same names. size is
    the shorter side of the images (0: that of the first one). Raises UserError for a backbone that
    is not a whole ResNet, and if the packages of `coco_metric` are missing.
    """
    config, device = checkpoint["config"], pick_device(device)
    if config["arch"] not in RESNETS:
        raise UserError(f"a detector stands on the stages of {', '.join(RESNETS)}; this run has {config['arch']}")
    if config.get("drop_last_stage"):
        raise UserError("a detector stands on all stages of a ResNet; this run was trained with --drop-last-stage")
    coco_metric(task)  # raises now, not after the training
    encoders = {"pretrained": load_backbone(checkpoint, encoder_of), "scratch": encoder_of(config)}
    size, small, results, detectors = size or min(train[0][0].shape[1:]), has_small_stem(config), {}, {}
    for name, encoder in encoders.items():
        torch.manual_seed(seed)
        model = detectors[name] = build(encoder.backbone, len(train.classes), task, size, small, thin_heads)
        finetune(model, train, epochs, batch_size, lr, seed, device, name)
        results[name] = score(predict(model, test, device, name), coco_metric(task))
    return results, detectors


# -------------------------------------------------------------------------------- average precision


def coco_metric(task: str):
    """torchmetrics' metric, which has COCO's own code (pycocotools) judge the detections.

    Raises UserError if one of the two is missing.
    """
    try:
        from torchmetrics.detection import MeanAveragePrecision  # imported late: it is optional, and takes time

        metric = MeanAveragePrecision(
            iou_type="bbox" if task == "detection" else ("bbox", "segm"),
            # COCO's, in float64: torchmetrics' own are float32, which an overlap of just 0.6 misses
            iou_thresholds=np.linspace(0.5, 0.95, 10).tolist(), rec_thresholds=np.linspace(0, 1, 101).tolist(),
        )  # fmt: skip
    except ImportError as error:
        needs = "average precision needs torchmetrics and pycocotools: pip install -r requirements-bench.txt"
        raise UserError(f"{needs} ({str(error).splitlines()[0]})") from error
    metric.warn_on_many_detections = False
    return metric


def score(pairs, metric) -> dict[str, float]:
    """COCO's average precision of (detected, target) pairs, the mean over the targets' classes.

    Fractions of 1. "box_ap50" is AP at an overlap of 1/2, "box_ap" the mean over overlaps of 0.5,
    0.55 … 0.95; "mask_ap50" and "mask_ap" are the same for masks. metric is a new `coco_metric`.
    """
    for detected, target in pairs:
        metric.update([detected], [target | {"iscrowd": target["crowd"].int()}])
    values = metric.compute()
    kinds = {"box": "bbox_", "mask": "segm_"} if "segm" in metric.iou_type else {"box": ""}
    names = {"ap50": "map_50", "ap": "map"}
    # -1 stands for no object of any class
    return {f"{k}_{n}": max(0.0, values[kinds[k] + names[n]].item()) for k in kinds for n in names}


def table(results: dict) -> str:
    """The results as aligned text, in percent."""
    columns = [key for key in FIGURES if key in results["pretrained"]]
    lines = [["%", *(FIGURES[key] for key in columns)]]
    lines += [[name, *(f"{100 * row[key]:.1f}" for key in columns)] for name, row in results.items()]
    return "\n".join(f"{name:<12}" + "".join(f"{text:>12}" for text in cells) for name, *cells in lines)


# ------------------------------------------------------------------------------------- command line


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(description=__doc__.split("\n")[0])
    parser.add_argument("run", metavar="RUN_OR_CHECKPOINT", help="a run's folder, or a checkpoint file")
    parser.add_argument("--task", choices=("detection", "segmentation"), default="detection", help="[detection]")
    parser.add_argument("--dataset", choices=("shapes", "coco", "voc"), default="shapes", help="[shapes]")
    parser.add_argument("--data-dir", type=Path, help="where coco or voc lies [data]")
    parser.add_argument("--subset", type=int, default=0, help="train on this many labelled images only, 0 for all [0]")
    parser.add_argument("--size", type=int, default=0, help="shorter side of the images, pixels [the first one's own]")
    words = "fewer channels and proposals, for two cores (always so with the small stem)"
    parser.add_argument("--thin-heads", action="store_true", help=words)
    parser.add_argument("--epochs", type=int, default=20, help="[20]")
    parser.add_argument("--batch-size", type=int, default=8, help="[8]")
    parser.add_argument("--lr", type=float, default=0.02, help="peak learning rate of SGD [0.02]")
    parser.add_argument("--seed", type=int, default=0, help="of the heads, the order of the images and the flips [0]")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or mps")
    parser.add_argument("--json", type=output, metavar="FILE", help="write the figures there, as fractions of 1")
    return parser.parse_args(argv)


@command
def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    checkpoint = read_checkpoint(args.run, LabConfig)
    if min(args.epochs, args.batch_size) < 1 or args.size < 0 or not 0 < args.lr < math.inf:
        raise UserError("--epochs and --batch-size must be at least 1, --lr greater than 0, and --size not negative")
    if args.data_dir and args.dataset == "shapes":
        raise UserError("--data-dir means nothing with --dataset shapes: add --dataset coco or voc")
    check_device(args.device)
    started = time.perf_counter()
    train, test = scenes.load(args.dataset, args.data_dir or Path("data"), args.task, args.subset)
    settings = {key: getattr(args, key) for key in SETTINGS}
    results, _ = transfer(checkpoint, train, test, **settings)
    seconds = time.perf_counter() - started
    if args.json:  # before it is printed: nobody may be reading
        note = settings | {"run": args.run, "dataset": args.dataset, "images": len(train), "classes": train.classes}
        note |= {"hardware": hardware(args.device), "date": time.strftime("%Y-%m-%d"), "config": checkpoint["config"]}
        save_text(json.dumps(results | note, indent=1) + "\n", args.json, "--json")
    print(f"{len(train)} training and {len(test)} test images, {seconds:.0f} s")
    print(table(results))


if __name__ == "__main__":
    sys.exit(main())
