"""Backbones that the core lacks: shapes, stems, torchvision's parameter names, the same weights."""

import json
import re
from functools import cache
from pathlib import Path

import pytest
import torch
import torchvision.models as tv
from torch import nn

import models
from lab.backbones import ARCHITECTURES, MOBILE, build_backbone, encoder_for, encoder_of
from lab.train import build
from models import Encoder
from plumbing.command_line import UserError
from plumbing.export import export

FEATURES = {"mobilenet_v2": 1280, "mobilenet_v3_small": 576, "efficientnet_b0": 1280, "vit_tiny": 192}


@cache
def backbone(arch, size):
    return build_backbone(arch, size).eval()


def views(size, batch=2):
    return torch.randn(batch, 3, size, size)


@pytest.mark.parametrize("arch", FEATURES)
def test_features_and_unit_embeddings_have_their_shapes(arch):
    encoder, x = Encoder(build_backbone(arch, 32), 32, dim=16, hidden=8), views(32)
    assert encoder.training and encoder.backbone.training
    z, features = encoder(x), encoder.features(x)
    assert features.shape == (2, FEATURES[arch]) and encoder.feature_dim == FEATURES[arch]
    assert z.shape == (2, 16)
    torch.testing.assert_close(z.norm(dim=1), torch.ones(2))
    (z[0] - z[1]).square().sum().backward()
    assert all(p.grad is not None for p in encoder.parameters())


@pytest.mark.parametrize("size", [64, 96])
def test_other_sizes_give_the_same_width_of_features(size):
    assert backbone("vit_tiny", size)(views(size)).shape == (2, FEATURES["vit_tiny"])


@pytest.mark.parametrize("arch", MOBILE)
@pytest.mark.parametrize("size, stride", [(64, 1), (96, 2)])
def test_the_first_convolution_of_a_mobile_network_strides_over_large_images_only(arch, size, stride):
    net = backbone(arch, size)
    assert net.features[0](views(size)).shape[-1] == size // stride


@pytest.mark.parametrize("arch", MOBILE)
def test_a_run_of_fifty_steps_is_evaluated_with_its_own_statistics_of_batchnorm(arch):
    net, x = backbone(arch, 32).train(), views(32)
    for _ in range(50):
        net(x)
    first, norm, *_ = net.features[0]
    torch.testing.assert_close(norm.running_mean, first(x).mean((0, 2, 3)), rtol=0.02, atol=1e-3)


# ------------------------------------------------------------------------------------ torchvision


def assert_loads_and_agrees(ours, theirs, head, size):
    for module in ours.modules():
        if isinstance(module, nn.BatchNorm2d):  # statistics that are not the initial ones
            module.running_mean.normal_(std=0.1)
    ours.eval()
    report = theirs.load_state_dict(ours.state_dict(), strict=False)
    assert not report.unexpected_keys
    assert report.missing_keys and all(key.startswith(head + ".") for key in report.missing_keys)
    setattr(theirs, head, nn.Identity())
    with torch.no_grad():
        x = views(size)
        torch.testing.assert_close(ours(x), theirs.eval()(x))


@pytest.mark.parametrize("arch", MOBILE)
def test_a_mobile_backbone_loads_into_torchvisions_network(arch):
    theirs = getattr(tv, arch)()
    theirs.features[0][0].stride = (1, 1)
    assert_loads_and_agrees(build_backbone(arch, 32), theirs, "classifier", 32)


def test_vit_tiny_loads_into_torchvisions_vision_transformer():
    theirs = tv.VisionTransformer(32, 4, num_layers=12, num_heads=3, hidden_dim=192, mlp_dim=768)
    assert_loads_and_agrees(build_backbone("vit_tiny", 32), theirs, "heads", 32)


# ---------------------------------------------------------------------------------------- options


@pytest.mark.parametrize("arch", MOBILE)
def test_width_is_refused_where_it_has_no_meaning(arch):
    with pytest.raises(ValueError, match=f"width is an option of resnet10.*not of {arch}"):
        build_backbone(arch, 32, width=32)


def test_the_width_of_vit_tiny_is_that_of_its_tokens():
    assert build_backbone("vit_tiny", 16, width=24)(views(16)).shape == (2, 24)
    with pytest.raises(ValueError, match="three heads: width 32"):
        build_backbone("vit_tiny", 16, width=32)


def test_an_unknown_architecture_is_answered_with_the_known_ones():
    with pytest.raises(ValueError, match="unknown arch 'resnet99'") as caught:
        build_backbone("resnet99", 32)
    assert all(arch in str(caught.value) for arch in ARCHITECTURES)


@pytest.mark.parametrize("size, grid", [(8, 8), (16, 8), (32, 8), (64, 8), (96, 6), (36, 9)])
def test_vit_tiny_cuts_an_image_into_whole_patches(size, grid):
    net = backbone("vit_tiny", size)
    assert net.encoder.pos_embedding.shape[1] == grid * grid + 1
    assert net(views(size)).shape == (2, 192)


@pytest.mark.parametrize("size, patch", [(33, 4), (65, 16), (100, 16)])
def test_vit_tiny_refuses_a_size_that_leaves_a_remainder(size, patch, lab_config):
    with pytest.raises(ValueError, match=f"patches of {patch}: size {size}"):
        build_backbone("vit_tiny", size)
    with pytest.raises(UserError, match=f"--arch vit_tiny --size {size}: .* patches of {patch}"):
        encoder_for(lab_config(arch="vit_tiny", width=0, size=size))


# --------------------------------------------------------------------------------- whole encoders

CONFIG = {"seed": 3, "arch": "resnet10", "size": 16, "width": 8, "dim": 16, "layers": 2, "hidden": 16}


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_a_run_of_the_core_has_the_core_s_encoder():
    assert same(encoder_of(CONFIG).state_dict(), models.encoder_of(CONFIG).state_dict())


def test_a_dropped_stage_changes_no_weight_of_the_others():
    short, whole = (encoder_of(CONFIG | {"drop_last_stage": drop}).backbone.state_dict() for drop in (True, False))
    assert same(short, {name: weight for name, weight in whole.items() if not name.startswith("layer4")})


def test_a_two_branch_method_has_no_projector():
    ours, other = (encoder_of(CONFIG | {"method": method}) for method in ("ours", "byol"))
    assert isinstance(other.projector, nn.Identity) and not isinstance(ours.projector, nn.Identity)
    assert same(ours.backbone.state_dict(), other.backbone.state_dict())


@pytest.mark.parametrize("method", ["ours", "simclr"])
def test_a_mobile_network_is_trained_in_fp32_on_a_cpu_with_bf16(lab_config, monkeypatch, method):
    if method != "ours":
        pytest.importorskip("lightly")
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": True}, raising=False)
    for arch, expected in {"mobilenet_v3_small": "fp32", "resnet10": "bf16"}.items():
        run = build(lab_config(arch=arch, width=0, method=method, precision="auto"), 96, torch.device("cpu"))
        assert run.encoder.precision == expected


# ---------------------------------------------------------------------------------------- exporting


def exported(arch, size, width, drop, place):
    """A backbone with statistics of its own, and the lines that its export prints."""
    net = build_backbone(arch, size, width, drop).eval()
    for norm in (module for module in net.modules() if isinstance(module, nn.BatchNorm2d)):
        norm.running_mean.normal_()
        norm.running_var.uniform_(0.5, 2)
    export(net, {"arch": arch, "size": size}, place)
    return net, "\n".join(json.loads(place.with_suffix(".json").read_text())["lines"]) + "\n"


@torch.no_grad()
@pytest.mark.parametrize(
    ("arch", "size", "width", "drop"),
    [
        ("mobilenet_v2", 32, None, False), ("mobilenet_v2", 96, None, False), ("mobilenet_v3_small", 64, None, False),
        ("efficientnet_b0", 32, None, False), ("vit_tiny", 32, None, False), ("vit_tiny", 96, 96, False),
        ("resnet18", 32, 16, True), ("resnet34", 96, None, True),
    ],
)  # fmt: skip
def test_the_lines_of_an_export_rebuild_the_network_to_the_last_bit(
    tmp_path, monkeypatch, capsys, arch, size, width, drop
):
    monkeypatch.chdir(tmp_path)
    net, lines = exported(arch, size, width, drop, Path("backbone.pt"))
    names, x = {}, views(size)
    exec(lines, names)
    assert torch.equal(names["model"](x), net(x)) and lines in capsys.readouterr().out


@pytest.mark.parametrize(("arch", "size"), [("mobilenet_v2", 32), ("vit_tiny", 32)])
def test_the_docs_have_the_lines_of_each_family(tmp_path, monkeypatch, arch, size):
    monkeypatch.chdir(tmp_path)
    text = (Path(__file__).parents[2] / "docs" / "usage.md").read_text()
    block = re.search(rf"`--arch {arch} --size {size}`.*?```python\n(.*?)```", text, re.S)[1]
    assert exported(arch, size, None, False, Path("backbone.pt"))[1] == block


def test_the_weights_of_a_small_mobile_network_alone_give_other_features(tmp_path):
    """Why an export says more than the weights: they load without complaint."""
    (net, _), x = exported("mobilenet_v2", 32, None, False, tmp_path / "backbone.pt"), views(32)
    other = tv.mobilenet_v2().eval()
    other.classifier = nn.Identity()
    other.load_state_dict(net.state_dict())
    assert (other(x) - net(x)).norm() > 1e-3 * net(x).norm()
