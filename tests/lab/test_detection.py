"""Detection: drawn scenes, COCO's and VOC's files, average precision, fine-tuning, the study."""

import json
import re
import sys
from dataclasses import asdict

import numpy as np
import pytest
import torch
from conftest import UNTRAINED
from PIL import Image

from figures import sweep
from lab import detection as program
from lab import scenes
from lab.backbones import encoder_of as any_encoder_of
from lab.detection import build, coco_metric, score
from lab.studies import cells
from lab.studies import detection as study
from lab.train import LabConfig
from models import build_resnet, encoder_of
from plumbing import shapes
from plumbing.command_line import UserError
from plumbing.outputs import save_tensors
from plumbing.runs import read_checkpoint
from train import load_dataset
from train import train as pretrain

CONFIG = asdict(LabConfig(arch="resnet10", size=24, width=8, dim=8, layers=1, hidden=8))


def has_coco():
    try:
        return bool(coco_metric("segmentation"))
    except UserError:
        return False


needs_coco = pytest.mark.skipif(not has_coco(), reason="needs requirements-bench.txt")


def checkpoint_of(config, place):
    encoder = any_encoder_of(config)
    with torch.no_grad():
        for weight in encoder.parameters():  # away from where it started
            weight.mul_(1.01)
    save_tensors(UNTRAINED | {"config": config, "encoder": encoder.state_dict()}, place, "it")
    return place


@pytest.fixture
def run(tmp_path):
    return str(checkpoint_of(CONFIG, tmp_path / "run.pt"))


# ------------------------------------------------------------------------------------------- scenes


def test_boxes_are_the_tight_bounds_of_masks_that_share_no_pixel():
    train, test = scenes.drawn("segmentation", (20, 5))
    counts = set()
    for image, target in (*train, *test):
        boxes, masks = target["boxes"].long().tolist(), target["masks"]
        counts.add(len(boxes))
        assert image.shape == (3, 64, 64) and 0 <= image.min() and image.max() <= 1
        assert masks.sum(0).max() == 1 and masks.shape == (len(boxes), 64, 64) and not target["crowd"].any()
        assert all(1 <= label <= len(train.classes) for label in target["labels"].tolist())
        for (x0, y0, x1, y1), mask in zip(boxes, masks):
            rows, columns = mask.nonzero().unbind(1)
            assert (x0, y0) == (columns.min(), rows.min()) and (x1, y1) == (columns.max() + 1, rows.max() + 1)
    assert counts == {1, 2, 3, 4}
    assert "masks" not in scenes.drawn("detection", (1, 1))[0][0][1]


def test_a_scene_s_ink_lies_where_its_masks_say():
    for seed in range(10):
        image, _, masks = shapes.draw_scene(seed)
        inside, around = image[:, masks.any(0)], image[:, ~masks.any(0)]  # (3, pixels) each
        paper = np.median(around, axis=1)[:, None]  # (3, 1)
        far_inside, far_around = (np.abs(pixels - paper).max(0) > 45 for pixels in (inside, around))
        assert far_inside.mean() > 0.9 and far_around.mean() < 0.1


def test_a_scene_follows_from_its_seed():
    again = zip(shapes.draw_scene(3), shapes.draw_scene(3))
    assert all((one == other).all() for one, other in again)
    assert (shapes.draw_scene(3)[0] != shapes.draw_scene(4)[0]).any()


def photograph(path, height=20, width=30):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((height, width, 3), 100, np.uint8)).save(path)


SQUARE = [4, 5, 10, 5, 10, 9, 4, 9]  # x 4 to 10, y 5 to 9


@pytest.fixture
def coco(tmp_path):
    """A tiny COCO: one photograph per split, with a polygon, a crowd and a box without area."""
    runs = {"size": [20, 30], "counts": [20 * 2 + 3, 4, 20 * 30 - 20 * 2 - 7]}  # column 2, rows 3 to 6
    for split in ("train", "val"):
        photograph(tmp_path / f"{split}2017" / "a.jpg")
        things = [
            {"image_id": 7, "category_id": 9, "bbox": [4, 5, 6, 4], "segmentation": [SQUARE], "iscrowd": 0},
            {"image_id": 7, "category_id": 3, "bbox": [2, 3, 1, 4], "segmentation": runs, "iscrowd": 1},
            {"image_id": 7, "category_id": 3, "bbox": [2, 3, 0, 4], "segmentation": [[2, 3, 2, 7, 2, 3]]},
        ]
        known = {
            "images": [{"id": 7, "file_name": "a.jpg"}],
            "categories": [{"id": 9, "name": "dog"}, {"id": 3, "name": "cat"}],
            "annotations": things,
        }
        file = tmp_path / "annotations" / f"instances_{split}2017.json"
        file.parent.mkdir(exist_ok=True)
        file.write_text(json.dumps(known))
    return tmp_path


def test_coco_s_boxes_polygons_and_run_lengths(coco):
    train, test = scenes.load("coco", coco, "segmentation")
    image, target = train[0]
    assert train.classes == test.classes == ("cat", "dog") and image.shape == (3, 20, 30)
    assert target["boxes"].tolist() == [[4, 5, 10, 9], [2, 3, 3, 7]]
    assert target["labels"].tolist() == [2, 1] and target["crowd"].tolist() == [False, True]
    expected = torch.zeros(2, 20, 30, dtype=torch.uint8)
    expected[0, 5:9, 4:10] = 1
    expected[1, 3:7, 2] = 1
    assert torch.equal(target["masks"], expected)
    assert "masks" not in scenes.load("coco", coco, "detection")[0][0][1]


def test_a_mask_may_have_several_polygons_and_slanted_edges():
    mask = scenes.mask_of([SQUARE, [20, 0, 30, 0, 30, 10]], 20, 30)
    assert mask[5:9, 4:10].all() and mask[:10, 20:].sum() == pytest.approx(50, abs=6)
    assert mask.sum() == 24 + mask[:10, 20:].sum()


@pytest.fixture
def voc(tmp_path):
    """A tiny VOC of six photographs: a dog, and a difficult cat whose head has a box of its own."""
    thing = "<object><name>{}</name><difficult>{}</difficult>{}"
    thing += "<bndbox><xmin>{}</xmin><ymin>{}</ymin><xmax>{}</xmax><ymax>{}</ymax></bndbox></object>"
    head = "<part><name>head</name><bndbox><xmin>1</xmin><ymin>1</ymin><xmax>2</xmax><ymax>2</ymax></bndbox></part>"
    values = np.zeros((20, 30), np.uint8)
    values[5:9, 4:10], values[0:2, 0:3], values[4, 4:10] = 1, 2, 255
    for i in range(6):
        photograph(tmp_path / "JPEGImages" / f"{i}.jpg")
        for folder in ("Annotations", "SegmentationObject"):
            (tmp_path / folder).mkdir(exist_ok=True)
        text = thing.format("dog", 0, "", 5, 6, 10, 9) + thing.format("cat", 1, head, 1, 1, 3, 2)
        (tmp_path / "Annotations" / f"{i}.xml").write_text(f"<annotation>{text}</annotation>")
        indexed = Image.fromarray(values, "P")
        indexed.putpalette([v for k in range(256) for v in (k, 255 - k, 0)])
        indexed.save(tmp_path / "SegmentationObject" / f"{i}.png")
    return tmp_path


def test_voc_s_boxes_begin_at_one_and_masks_are_the_objects_values(voc):
    train, test = scenes.load("voc", voc, "segmentation")
    assert [name for _, name, _ in test.items] == ["0", "5"] and len(train) == 4 and train.classes == ("cat", "dog")
    _, target = train[0]
    assert target["boxes"].tolist() == [[4, 5, 10, 9], [0, 0, 3, 2]]
    assert target["labels"].tolist() == [2, 1] and target["crowd"].tolist() == [False, True]
    assert target["masks"].flatten(1).sum(1).tolist() == [24, 6] and target["masks"][0, 5:9, 4:10].all()


def test_voc_s_own_lists_say_what_is_trained_on(voc):
    for folder, train in (("Main", "1\n2\n3\n"), ("Segmentation", "4 1\n")):
        (voc / "ImageSets" / folder).mkdir(parents=True)
        (voc / "ImageSets" / folder / "train.txt").write_text(train)
        (voc / "ImageSets" / folder / "val.txt").write_text("0\n")
    assert [len(split) for split in scenes.load("voc", voc, "detection")] == [3, 1]
    assert [name for _, name, _ in scenes.load("voc", voc, "segmentation")[0].items] == ["4"]
    assert len(scenes.load("voc", voc, "detection", subset=2)[0]) == 2
    (voc / "ImageSets" / "Main" / "trainval.txt").write_text("0\n1\n2\n3\n")
    assert [len(split) for split in scenes.load("voc", voc, "detection")] == [3, 1], "no list of test images"
    (voc / "ImageSets" / "Main" / "test.txt").write_text("4\n5\n")
    assert [len(split) for split in scenes.load("voc", voc, "detection")] == [4, 2]


# -------------------------------------------------------------------------------- average precision


def boxes(*rows, labels=None, scores=None, crowd=None):
    detected = {"boxes": torch.tensor(rows, dtype=torch.float32).reshape(-1, 4)}
    detected["labels"] = torch.tensor(labels or [1] * len(rows), dtype=torch.long)
    detected["crowd"] = torch.tensor(crowd or [False] * len(rows), dtype=torch.bool)
    return detected | {"scores": torch.tensor(scores or [0.9] * len(rows))}


A, B = (0, 0, 10, 10), (20, 20, 30, 30)


def ap(detected, target, task="detection"):
    return score([(detected, target)], coco_metric(task))


def ap50(detected, target):
    return ap(detected, target)["box_ap50"]


@needs_coco
def test_average_precision_of_cases_done_by_hand():
    assert ap50(boxes(A, B), boxes(A, B)) == pytest.approx(1)
    assert ap50(boxes(), boxes(A, B)) == 0 and ap50(boxes((50, 50, 60, 60)), boxes(A)) == 0
    assert ap50(boxes(), boxes()) == 0 and ap50(boxes(A), boxes()) == 0
    assert ap50(boxes(A), boxes(A, B)) == pytest.approx(51 / 101), "half of them found: recalls 0, .01 … .5"
    assert ap50(boxes(A, labels=[2]), boxes(A)) == 0, "the right place, the wrong class"
    twice = boxes(A, A, B, scores=[0.9, 0.8, 0.7])
    assert ap50(twice, boxes(A, B)) == pytest.approx((51 + 50 * 2 / 3) / 101), "the second one of A is false"
    false_first = boxes((50, 50, 60, 60), A, scores=[0.9, 0.8])
    assert ap50(false_first, boxes(A)) == pytest.approx(0.5)
    assert ap50(boxes(A, labels=[2]), boxes(A, B, labels=[2, 1])) == pytest.approx(0.5), "the mean over two classes"


@needs_coco
def test_average_precision_is_the_mean_over_overlaps_from_50_to_95():
    figures = ap(boxes((0, 0, 10, 7.2)), boxes(A))  # IoU .72: right at .5, .55, .6, .65 and .7
    assert figures == {"box_ap50": pytest.approx(1), "box_ap": pytest.approx(0.5)}
    assert ap(boxes((0, 0, 10, 6)), boxes(A))["box_ap"] == pytest.approx(0.3), "exactly .6 is enough for .6"


@needs_coco
def test_the_surest_detection_takes_the_object_and_a_crowd_is_not_counted():
    detected = boxes((0, 0, 10, 9), A, scores=[0.6, 0.9])
    assert ap(detected, boxes(A))["box_ap"] == pytest.approx(1), "the other one is false, and comes later"
    crowd = boxes(A, B, crowd=[False, True])
    assert ap50(boxes(B, A, scores=[0.9, 0.8]), crowd) == pytest.approx(1)
    assert ap50(boxes(B, A, scores=[0.9, 0.8]), boxes(A)) == pytest.approx(0.5)
    assert ap50(boxes((20, 20, 25, 25), A, scores=[0.9, 0.8]), crowd) == pytest.approx(1), "one of the crowd"


@needs_coco
def test_images_are_ranked_together_and_masks_are_judged_by_their_pixels():
    images = [(boxes(A, scores=[0.5]), boxes(A)), (boxes(B, A, scores=[0.9, 0.1]), boxes(A))]
    assert score(images, coco_metric("detection"))["box_ap50"] == pytest.approx((51 * 2 / 3 + 50 * 2 / 3) / 101), (
        "false, right, right: precision 1/2 and 2/3, and the best beyond counts"
    )
    mask = torch.zeros(1, 8, 8, dtype=torch.bool)
    mask[0, :4] = True
    detected, target = boxes(A) | {"masks": mask}, boxes(A) | {"masks": mask.roll(2, 1).byte()}  # overlap 2 / 6
    figures = ap(detected, target, "segmentation")
    assert figures["mask_ap50"] == 0 and figures["box_ap50"] == pytest.approx(1)
    assert ap(detected, target | {"masks": mask.byte()}, "segmentation")["mask_ap"] == pytest.approx(1)


@pytest.mark.parametrize("missing", ["torchmetrics.detection", "pycocotools"])
def test_without_its_packages_a_detector_is_not_trained(run, missing, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, missing, None)
    if missing == "pycocotools":
        metrics = pytest.importorskip("torchmetrics.detection.mean_ap")
        monkeypatch.setattr(metrics, "_PYCOCOTOOLS_AVAILABLE", False)
    monkeypatch.setattr(program, "finetune", lambda *given: pytest.fail("it trains"))
    assert program.main([run]) == 2
    said = capsys.readouterr().err
    assert "needs torchmetrics and pycocotools: pip install -r requirements-bench.txt" in said
    assert said.count("\n") == 1


# -------------------------------------------------------------------------------------- fine-tuning


@needs_coco
@pytest.mark.parametrize("task", ["detection", "segmentation"])
def test_both_detectors_are_fine_tuned_from_the_same_heads_and_their_own_backbones(run, task, monkeypatch):
    starts, finetune = [], program.finetune

    def look(model, *given):
        starts.append({name: value.clone() for name, value in model.state_dict().items()})
        finetune(model, *given)

    monkeypatch.setattr(program, "finetune", look)
    checkpoint = read_checkpoint(run)
    train, test = scenes.drawn(task, (4, 2))
    results, detectors = program.transfer(checkpoint, train, test, task, epochs=1, batch_size=2, device="cpu")
    pretrained, scratch = starts
    encoder, untrained = checkpoint["encoder"], encoder_of(CONFIG).state_dict()
    assert any(key.startswith("backbone.body.layer4") for key in pretrained)
    for key, value in pretrained.items():
        if key.startswith("backbone.body."):
            name = key.replace("backbone.body.", "backbone.")
            assert torch.equal(value, encoder[name]) and torch.equal(scratch[key], untrained[name])
        else:
            assert torch.equal(value, scratch[key]), f"{key}: the heads are the same"
    for start, model in zip(starts, detectors.values()):
        moved = [not torch.equal(start[name], weight) for name, weight in model.named_parameters()]
        assert all(moved), "every layer is fine-tuned"
    keys = {"box_ap50", "box_ap"} | ({"mask_ap50", "mask_ap"} if task == "segmentation" else set())
    assert all(set(row) == keys and all(0 <= v <= 1 for v in row.values()) for row in results.values())


def test_a_flip_moves_the_boxes_and_masks_with_the_image(monkeypatch):
    """What reaches the model still has tight boxes around its masks, and is flipped at times."""
    seen = []

    class Model(torch.nn.Linear):
        def forward(self, images, targets):
            seen.extend(zip(images, targets))
            return {"loss": self.weight.sum()}

    train, _ = scenes.drawn("segmentation", (8, 1))
    program.finetune(Model(1, 1), train, 2, 3, 0.1, 0, torch.device("cpu"))
    for _, target in seen:
        for (x0, _, x1, _), mask in zip(target["boxes"].long().tolist(), target["masks"]):
            columns = mask.any(0).nonzero()
            assert (x0, x1) == (columns.min(), columns.max() + 1)
    known = [image for image, _ in train]
    flipped = sum(not any(torch.equal(image, other) for other in known) for image, _ in seen)
    assert len(seen) == 16 and 0 < flipped < 16


@needs_coco
def test_a_detector_learns_to_find_its_own_training_images(tmp_path):
    train, _ = scenes.drawn("detection", (2, 1))
    checkpoint = {"config": CONFIG, "encoder": encoder_of(CONFIG).state_dict()}
    results, _ = program.transfer(checkpoint, train, train, epochs=60, batch_size=2, lr=0.02, device="cpu")
    assert results["pretrained"]["box_ap50"] > 0.5
    assert results["pretrained"] == results["scratch"], "the same backbone in both, and nothing else differs"


@pytest.mark.parametrize(("arch", "size", "width"), [("resnet50", 32, 8), ("resnet18", 65, 16), ("resnet34", 32, None)])
@torch.no_grad()
def test_any_resnet_of_any_width_and_either_stem_carries_a_detector(arch, size, width):
    model = build(build_resnet(arch, size, width), 3, "segmentation", 64, size <= 64).eval()
    detected = model([torch.rand(3, 64, 80)])[0]
    assert set(detected) == {"boxes", "labels", "scores", "masks"} and detected["masks"].shape[1:] == (1, 64, 80)
    shapes_of = [tuple(v.shape[2:]) for v in model.backbone(torch.zeros(1, 3, 64, 64)).values()]
    assert shapes_of[0] == ((32, 32) if size <= 64 else (16, 16))


def test_thin_heads_have_fewer_channels_and_every_head_keeps_the_images_size():
    for size, thin, channels, least in (
        (96, False, 256, 32),
        (96, True, 64, 16),
        (32, True, 64, 8),
        (32, False, 64, 8),
    ):
        model = build(build_resnet("resnet10", size, 8), 3, "segmentation", 64, size <= 64, thin).eval()
        assert model.backbone.out_channels == channels and model.rpn.anchor_generator.sizes[0] == (least,)
        with torch.no_grad():
            assert model([torch.rand(3, 64, 80)])[0]["masks"].shape[1:] == (1, 64, 80)


@needs_coco
def test_the_command_prints_a_table_and_writes_fractions(run, coco, tmp_path, capsys):
    file = tmp_path / "x.json"
    line = [run, "--dataset", "coco", "--data-dir", str(coco), "--task", "segmentation"]
    line += ["--epochs", "1", "--json", str(file)]
    assert program.main([*line, "--device", "cpu"]) == 0
    printed, figures = capsys.readouterr().out.splitlines(), json.loads(file.read_text())
    assert printed[0].startswith("1 training and 1 test images") and "mask AP50" in printed[1]
    assert [line.split()[0] for line in printed[2:]] == ["pretrained", "scratch"]
    assert set(figures["scratch"]) == set(figures["pretrained"]) == {"box_ap50", "box_ap", "mask_ap50", "mask_ap"}
    assert figures["classes"] == ["cat", "dog"] and figures["epochs"] == 1 and figures["config"]["arch"] == "resnet10"


# ----------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (["nowhere"], "nowhere: no checkpoint there"),
        (["RUN", "--epochs", "0"], "--epochs and --batch-size must be at least 1"),
        (["RUN", "--lr", "nan"], "--lr greater than 0"),
        (["RUN", "--json", "not/there/x.json"], "--json: not/there/x.json: the folder not/there does not exist"),
        (["RUN", "--device", "tpu"], "--device: device 'tpu' is not available"),
        (["RUN", "--subset", "201"], "--subset 201: there are 200 training and 200 test images"),
        (["RUN", "--dataset", "coco", "--data-dir", "no"], "--data-dir no: no annotations/instances_train*.json"),
        (["RUN", "--data-dir", "no"], "--data-dir means nothing with --dataset shapes: add --dataset coco or voc"),
        (["RUN", "--dataset", "voc", "--data-dir", "no"], "--data-dir no: no Annotations/*.xml"),
        (["RUN", "--task", "keypoints"], "--task: invalid choice: 'keypoints'"),
        pytest.param(
            ["RUN", "--lr", "1e30", "--subset", "16", "--epochs", "3"],
            "--lr 1e+30: the detector's loss is no longer", marks=needs_coco,
        ),
    ],
)  # fmt: skip
def test_bad_input_is_one_line(run, line, message, capsys, monkeypatch):
    monkeypatch.setenv("TQDM_DISABLE", "1")
    assert program.main([run if word == "RUN" else word for word in line]) == 2
    said = [text for text in capsys.readouterr().err.splitlines() if "detection.py" in text]
    assert len(said) == 1 and said[0].startswith("detection.py: ") and message in said[0]


@pytest.mark.parametrize(
    "options, message",
    [
        ({"arch": "mobilenet_v2", "width": 0}, "this run has mobilenet_v2"),
        ({"drop_last_stage": True}, "trained with --drop-last-stage"),
    ],
)
def test_a_backbone_without_all_stages_is_refused(tmp_path, capsys, options, message):
    place = checkpoint_of(CONFIG | options, tmp_path / "short.pt")
    assert program.main([str(place)]) == 2
    assert message in capsys.readouterr().err


def test_damaged_files_are_named(coco, voc):
    (coco / "train2017" / "a.jpg").write_text("no image")
    with pytest.raises(UserError, match="a.jpg: cannot be read"):
        scenes.load("coco", coco, "detection")[0][0]
    with pytest.raises(UserError, match="x.jpg: its mask is compressed RLE"):
        scenes.mask_of({"size": [2, 2], "counts": "0110"}, 2, 2, "x.jpg")
    (coco / "annotations" / "instances_val2017.json").write_text('{"images": []}')
    with pytest.raises(UserError, match="instances_val2017.json: not COCO's instances"):
        scenes.load("coco", coco, "detection")
    (voc / "SegmentationObject" / "1.png").unlink()
    with pytest.raises(UserError, match="1 of its 4 images are missing, for instance .*SegmentationObject/1.png"):
        scenes.load("voc", voc, "segmentation")
    (voc / "Annotations" / "3.xml").write_text("<annotation><object>")
    with pytest.raises(UserError, match="3.xml: not VOC's annotations"):
        scenes.load("voc", voc, "detection")


def without_box(coco, voc):
    file = coco / "annotations" / "instances_train2017.json"
    content = json.loads(file.read_text())
    del content["annotations"][0]["bbox"]
    file.write_text(json.dumps(content))


def with_half_a_box(coco, voc):
    file = coco / "annotations" / "instances_val2017.json"
    content = json.loads(file.read_text())
    content["annotations"][1]["bbox"] = [1, 2]
    file.write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("dataset", "change", "message"),
    [
        ("coco", lambda coco, voc: (coco / "train2017" / "a.jpg").unlink(), "1 of its 1 images are missing, .*a.jpg"),
        ("voc", lambda coco, voc: (voc / "JPEGImages" / "0.jpg").unlink(), "1 of its 2 images are missing, .*0.jpg"),
        ("coco", without_box, "instances_train2017.json: not COCO's instances .*bbox"),
        ("coco", with_half_a_box, "instances_val2017.json: not COCO's instances .*bbox must be four numbers"),
    ],
    ids=["coco-image", "voc-image", "no-box", "half-a-box"],
)
def test_what_is_missing_is_named_before_a_detector_trains(run, coco, voc, capsys, dataset, change, message):
    change(coco, voc)
    assert program.main([run, "--dataset", dataset, "--data-dir", str({"coco": coco, "voc": voc}[dataset])]) == 2
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1 and re.search(message, said[0])


# ---------------------------------------------------------------------------------------- the study


def test_confident_detections_survive_being_written_down():
    masks = torch.rand(3, 6, 5) > 0.5
    masks[1], masks[2] = True, False
    detected = {"scores": torch.tensor([0.9, 0.8, 0.4]), "labels": torch.tensor([3, 1, 2]), "masks": masks}
    rows = study.confident(detected | {"boxes": torch.tensor([[0, 0, 5, 6.04]] * 3)})
    assert [(row["label"], row["box"]) for row in rows] == [(3, [0, 0, 5, 6]), (1, [0, 0, 5, 6])]
    for row, mask in zip(json.loads(json.dumps(rows)), masks):
        assert (scenes.mask_of(row["segmentation"], 6, 5) == mask.numpy()).all()


@needs_coco
def test_the_study_is_measured_drawn_and_tabled(tiny, tmp_path, monkeypatch):
    drawn = scenes.drawn
    monkeypatch.setattr(scenes, "drawn", lambda task, counts: drawn(task, (counts[0], min(counts[1], 8))))
    config = tiny(epochs=1)
    pretrain(config)
    final = study.Measure(4, 1)(read_checkpoint(config.out), load_dataset(config))
    runs = [{"name": "ours", "seed": 0, "config": asdict(config), "hardware": "a laptop", "final": final}]
    figures = {f"{who} {key}" for who in ("pretrained", "scratch") for key in study.FIGURES}
    assert set(final) == figures | {"knn", "linear", "scenes", "fine-tuning epochs", "seen"}
    assert (final["scenes"], final["fine-tuning epochs"]) == (4, 1)
    assert [len(seen) for seen in final["seen"].values()] == [study.SHOWN] * 2
    mask = {"counts": [64 * 10 + 5, 20, 64 * 53 + 39]}
    final["seen"]["pretrained"][0] = [{"label": 3, "box": [10, 5, 11, 25], "segmentation": mask}]
    final |= {f"pretrained {key}": 0.5 for key in study.FIGURES} | {f"scratch {key}": 0.4 for key in study.FIGURES}
    study.draw(runs, tmp_path / "x.png")
    assert (tmp_path / "x.png").stat().st_size > 10_000
    assert study.table(runs).splitlines()[2:] == [
        "| pretrained | 50.0 | 50.0 | 50.0 | 50.0 | 1 |", "| scratch | 40.0 | 40.0 | 40.0 | 40.0 | 1 |"
    ]  # fmt: skip


def test_cells_are_pretrained_on_the_training_pictures_alone(voc, tmp_path, monkeypatch):
    monkeypatch.setattr(cells, "ROOT", tmp_path / "root")
    folder = cells.pretraining_pictures(voc)
    assert sorted(path.name for path in folder.iterdir()) == ["1.jpg", "2.jpg", "3.jpg", "4.jpg"]
    assert cells.pretraining_pictures(voc) == folder and (folder / "1.jpg").resolve() == voc / "JPEGImages" / "1.jpg"
    (folder / "0.jpg").symlink_to(voc / "JPEGImages" / "0.jpg")
    with pytest.raises(UserError, match=r"0\.jpg is not one of the training pictures; remove the folder"):
        cells.pretraining_pictures(voc)
    assert cells.pretraining_pictures(tmp_path / "none") == tmp_path / "none"


@needs_coco
def test_cells_are_measured_drawn_and_tabled(voc, tmp_path, monkeypatch):
    monkeypatch.setattr(cells, "FINETUNING", {"cpu": 1})
    monkeypatch.setattr(cells, "SHORTER", {"cpu": 0})
    config = asdict(LabConfig(arch="resnet10", size=96, width=8, dim=8, layers=1, hidden=8))
    checkpoint = {"config": config | {"device": "cpu"}, "encoder": any_encoder_of(config).state_dict()}
    final = cells.Measure(str(voc), "cpu")(checkpoint, None)
    assert set(final) == {f"{who} {key}" for who in ("pretrained", "scratch") for key in ("box_ap50", "box_ap")}
    final |= {"pretrained box_ap50": 0.5, "scratch box_ap50": 0.4}
    runs = [{"name": "ours", "seed": 0, "config": config, "hardware": "a laptop", "final": final}]
    cells.draw(runs, tmp_path / "x.png")
    assert (tmp_path / "x.png").stat().st_size > 10_000
    assert cells.table(runs).splitlines()[0] == "| backbone | box AP50 | box AP | seeds |"


@pytest.mark.parametrize("scale", sweep.SCALES)
def test_the_study_s_runs_can_be_run_at_every_scale(scale):
    base = LabConfig(**(sweep.SCALES[scale] | {"knn_every": 0}))
    (config,) = study.points(base, scale).values()
    config.check()
    assert config.arch.startswith("resnet") and scale in study.FINETUNING
    assert sweep.identity(asdict(config), 0)
