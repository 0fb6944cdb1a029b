"""Average precision as lab/detection.py computed it until torchmetrics took over: the oracle."""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.ops import box_iou

THRESHOLDS = torch.from_numpy(np.linspace(0.5, 0.95, 10))  # (T,)


def judge(detected: dict, target: dict, kind: str) -> Tensor:
    """COCO's verdict (T, D) on each detection of an image, at each threshold.

    1 means right, 0 false, -1 not counted. The surest detection chooses first, among the objects of
    its class that are still free. A detection that overlaps only a crowd is not counted. kind,
    "boxes" or "masks", says what overlaps.
    """
    overlap = _overlap(detected[kind].double(), target[kind].double(), kind)  # (D, M)
    verdict = torch.zeros(len(THRESHOLDS), len(overlap), dtype=torch.long)
    free = (~target["crowd"]).expand(len(THRESHOLDS), -1).clone()  # (T, M)
    order = detected["scores"].argsort(descending=True, stable=True).tolist() if overlap.shape[1] else ()
    for d in order:
        fits = overlap[d] * (target["labels"] == detected["labels"][d])  # (M,)
        most, which = (fits * free).max(1)  # (T,) each
        right = most >= THRESHOLDS
        free[right, which[right]] = False
        crowded = (fits * target["crowd"]).max() >= THRESHOLDS
        verdict[:, d] = torch.where(right, 1, torch.where(crowded, -1, 0))
    return verdict


def _overlap(one: Tensor, other: Tensor, kind: str) -> Tensor:
    """Intersection over union of each with each.

    In float64, overlaps of whole pixels meet thresholds exactly.
    """
    if kind == "boxes":
        return box_iou(one, other)
    one, other = one.flatten(1), other.flatten(1)  # (D, H W), (M, H W)
    both = one @ other.T
    return both / (one.sum(1)[:, None] + other.sum(1) - both).clamp(min=1)


def average_precision(scores: Tensor, verdict: Tensor, count: int) -> Tensor:
    """AP (T,) of a class with `count` objects at each threshold: COCO's mean over 101 recalls.

    scores (D,) and verdict (T, D) are the detections of all images. The precision at a recall is
    the best one at that recall or beyond.
    """
    verdict = verdict[:, scores.argsort(descending=True, stable=True)]
    right, false = (verdict == 1).cumsum(1), (verdict == 0).cumsum(1)
    precision = F.pad(right.double() / (right + false).clamp(min=1), (0, 1))  # (T, D + 1): 0 beyond the last recall
    best = precision.flip(1).cummax(1).values.flip(1)
    recalls = torch.from_numpy(np.linspace(0, 1, 101)).repeat(len(verdict), 1)  # (T, 101)
    return best.gather(1, torch.searchsorted(right.double() / count, recalls)).mean(1)


def score(pairs, classes: int) -> dict[str, float]:
    """Average precision of (detected, target) pairs, the mean over the targets' classes.

    Fractions of 1. "box_ap50" is AP at an overlap of 1/2, "box_ap" the mean over THRESHOLDS;
    "mask_ap50" and "mask_ap" are the same for masks.
    """
    verdicts, scores, labels, truth = {"boxes": [], "masks": []}, [], [], []
    for detected, target in pairs:
        for kind in verdicts:
            if kind in target:
                verdicts[kind].append(judge(detected, target, kind))
        scores.append(detected["scores"])
        labels.append(detected["labels"])
        truth.append(target["labels"][~target["crowd"]])
    scores, labels, counts = torch.cat(scores), torch.cat(labels), torch.cat(truth).bincount(minlength=classes + 1)
    present, figures = counts.nonzero()[:, 0].tolist(), {}
    for kind, name in (("boxes", "box"), ("masks", "mask")):
        if verdicts[kind]:
            verdict = torch.cat(verdicts[kind], 1)  # (T, D)
            by_class = [average_precision(scores[labels == c], verdict[:, labels == c], counts[c]) for c in present]
            ap = torch.stack(by_class).mean(0) if by_class else torch.zeros(len(THRESHOLDS))  # (T,)
            figures |= {f"{name}_ap50": ap[0].item(), f"{name}_ap": ap.mean().item()}
    return figures
