"""Every ResNet by name: shapes, the stem for small images, torchvision's names, devices."""

from dataclasses import asdict
from functools import cache
from types import SimpleNamespace

import pytest
import torch
import torchvision.models as tv
from torch import nn

from models import ARCHITECTURES, Encoder, build_projector, build_resnet, encoder_of
from plumbing import devices
from plumbing.devices import pick_device, pick_precision
from train import Config

FEATURES = {
    "resnet10": 256,
    "resnet18": 512,
    "resnet34": 512,
    "resnet50": 2048,
}


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@cache
def backbone(arch, size):
    return build_resnet(arch, size).eval()


def views(size, batch=2):
    return torch.randn(batch, 3, size, size)


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_features_and_unit_embeddings_have_their_shapes(arch):
    encoder, x = Encoder(arch, size=32, dim=16, hidden=8), views(32)
    assert encoder.training and encoder.backbone.training
    z, features = encoder(x), encoder.features(x)
    assert features.shape == (2, FEATURES[arch]) and encoder.feature_dim == FEATURES[arch]
    assert z.shape == (2, 16)
    torch.testing.assert_close(z.norm(dim=1), torch.ones(2))
    (z[0] - z[1]).square().sum().backward()
    assert all(p.grad is not None for p in encoder.parameters())


def test_embeddings_are_unit_vectors_in_float32_under_bf16():
    encoder = Encoder("resnet10", width=8, dim=64, hidden=16)
    x, seen = views(32), []
    exact = encoder.eval().features(x)
    encoder.backbone.layer4.register_forward_hook(lambda *call: seen.append(call[-1].dtype))
    encoder.precision = "bf16"
    rough, z = encoder.features(x), encoder(x)
    assert seen == [torch.bfloat16] * 2 and rough.dtype == z.dtype == torch.float32
    torch.testing.assert_close(z.norm(dim=1), torch.ones(2))
    assert 0 < (rough - exact).abs().max() < 0.05 * exact.abs().max()


@pytest.mark.parametrize("arch, size", [("resnet10", 64), ("resnet10", 96)])
def test_other_sizes_give_the_same_width_of_features(arch, size):
    assert backbone(arch, size)(views(size)).shape == (2, FEATURES[arch])


@pytest.mark.parametrize("size", [16, 32, 64])
def test_small_images_enter_a_resnet_at_full_resolution(size):
    net = backbone("resnet10", size)
    assert (net.conv1.kernel_size, net.conv1.stride, net.conv1.padding) == ((3, 3), (1, 1), (1, 1))
    assert isinstance(net.maxpool, nn.Identity)
    assert net.maxpool(net.conv1(views(size))).shape[-2:] == (size, size)


@pytest.mark.parametrize("size", [65, 96])
def test_larger_images_enter_a_resnet_by_torchvisions_own_stem(size):
    net = backbone("resnet10", size)
    assert (net.conv1.kernel_size, net.conv1.stride) == ((7, 7), (2, 2))
    assert isinstance(net.maxpool, nn.MaxPool2d)


# -------------------------------------------------------------------------------------- torchvision


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


def test_the_backbone_loads_into_torchvisions_resnet18_with_the_small_stem():
    theirs = tv.resnet18()
    theirs.conv1, theirs.maxpool = nn.Conv2d(3, 64, 3, 1, 1, bias=False), nn.Identity()
    assert_loads_and_agrees(Encoder("resnet18", dim=8, hidden=8).backbone, theirs, "fc", 32)


def test_the_backbone_for_large_images_loads_into_torchvisions_resnet18_as_it_is():
    assert_loads_and_agrees(build_resnet("resnet18", 96), tv.resnet18(), "fc", 96)


# ------------------------------------------------------------------------------------------ options


@pytest.mark.parametrize("arch, expected", [("resnet10", 128), ("resnet50", 512)])
@pytest.mark.parametrize("size", [32, 96])
def test_width_is_the_channels_of_the_first_stage(arch, expected, size):
    net = build_resnet(arch, size, width=16).eval()
    assert net.conv1.out_channels == net.bn1.num_features == 16
    assert net(views(size)).shape == (2, expected)


def test_a_width_of_64_is_torchvisions_own():
    named = [{k: v.shape for k, v in build_resnet("resnet18", 32, w).state_dict().items()} for w in (None, 64, 65)]
    assert named[0] == named[1] != named[2] and named[0].keys() == named[2].keys()


def test_an_unknown_architecture_is_answered_with_the_known_ones():
    with pytest.raises(ValueError, match="unknown arch 'resnet99'") as caught:
        build_resnet("resnet99", 32)
    assert all(arch in str(caught.value) for arch in ARCHITECTURES)


def test_a_backbone_of_your_own_takes_the_place_of_a_named_one():
    own = nn.Sequential(nn.Conv2d(3, 5, 3, bias=False), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    encoder = Encoder(own, size=16, dim=7, hidden=6)
    assert encoder.backbone is own and encoder.feature_dim == 5
    assert encoder.features(views(16)).shape == (2, 5) and encoder(views(16)).shape == (2, 7)


def test_without_a_projector_the_embedding_is_the_feature_on_the_unit_sphere():
    encoder = Encoder("resnet10", width=8, layers=0).eval()
    x = views(16)
    torch.testing.assert_close(encoder(x), nn.functional.normalize(encoder.features(x), dim=1))


def test_defaults_are_those_of_a_run():
    """`Encoder()` in a notebook is the encoder of `python train.py`."""
    of_run = encoder_of(asdict(Config()))
    torch.manual_seed(Config().seed)
    state = Encoder().state_dict()
    assert state.keys() == of_run.state_dict().keys()
    assert all(torch.equal(x, state[name]) for name, x in of_run.state_dict().items())


@pytest.mark.parametrize("layers", [1, 2, 3])
def test_the_projector_has_as_many_linear_layers_as_asked_for(layers):
    projector = build_projector(12, 7, 5, layers)
    linear = [m for m in projector if isinstance(m, nn.Linear)]
    assert [m.out_features for m in linear] == [7] * (layers - 1) + [5]
    assert [m.bias is None for m in linear] == [True] * (layers - 1) + [False]
    for kind in (nn.BatchNorm1d, nn.ReLU):
        assert sum(isinstance(m, kind) for m in projector) == layers - 1
    assert projector(torch.randn(2, 12)).shape == (2, 5)


@pytest.mark.parametrize("layers", [0, -1])
def test_a_projector_without_layers_is_refused(layers):
    with pytest.raises(ValueError, match=f"at least one layer, not {layers}"):
        build_projector(4, 4, 4, layers)


# ----------------------------------------------------------------------------- device and precision


@pytest.fixture
def accelerators(monkeypatch):
    def pretend(cuda=False, mps=False):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 2 * cuda)
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)

    return pretend


@pytest.mark.parametrize(
    "present, expected",
    [({}, "cpu"), ({"mps": True}, "mps"), ({"cuda": True}, "cuda"), ({"cuda": True, "mps": True}, "cuda")],
)
def test_the_automatic_device_is_the_fastest_there_is(accelerators, present, expected):
    accelerators(**present)
    assert pick_device("auto") == torch.device(expected) == pick_device(expected)
    assert pick_device("cpu") == torch.device("cpu")


@pytest.mark.parametrize("name", ["cuda", "cuda:0", "mps", "gpu", "", "CPU"])
def test_a_device_that_is_not_there_is_answered_with_those_that_are(accelerators, name):
    accelerators()
    with pytest.raises(ValueError, match="not available here: choose from cpu$"):
        pick_device(name)


def test_a_device_can_be_chosen_by_number(accelerators):
    accelerators(cuda=True)
    assert pick_device("cuda:1") == torch.device("cuda", 1)
    with pytest.raises(ValueError, match="device 'cuda:2' is not available"):
        pick_device("cuda:2")


@pytest.mark.parametrize("name", ["fp32", "bf16"])
def test_a_precision_that_is_named_is_taken(name):
    assert pick_precision(name, torch.device("cpu")) == name


@pytest.mark.parametrize(
    "able, expected",
    [({}, "fp32"), ({"avx512_bf16": True}, "bf16"), ({"amx_bf16": True, "avx512_bf16": False}, "bf16")],
)
def test_the_automatic_precision_on_a_cpu_follows_what_it_multiplies(monkeypatch, able, expected):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: able, raising=False)
    assert pick_precision("auto", torch.device("cpu")) == expected
    assert pick_precision("auto", torch.device("mps")) == "fp32"


def test_depthwise_convolutions_are_trained_in_fp32_on_a_cpu(monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"amx_bf16": True}, raising=False)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: True)
    usual, depthwise = (nn.Sequential(nn.Conv2d(4, 4, 3, groups=groups)) for groups in (1, 4))
    assert pick_precision("auto", torch.device("cpu"), usual) == "bf16"
    assert pick_precision("auto", torch.device("cpu"), depthwise) == "fp32"
    assert pick_precision("auto", torch.device("cuda"), depthwise) == "bf16", "on a GPU nothing was slow"
    assert pick_precision("bf16", torch.device("cpu"), depthwise) == "bf16", "what is named is taken"


@pytest.mark.parametrize("able, expected", [(True, "bf16"), (False, "fp32")])
def test_the_automatic_precision_on_cuda_ignores_emulation(monkeypatch, able, expected):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation or able)
    assert pick_precision("auto", torch.device("cuda")) == expected


def test_freed_memory_is_kept_where_there_is_glibc_and_elsewhere_nothing_happens(monkeypatch):
    asked = []
    library = SimpleNamespace(mallopt=lambda *pair: asked.append(pair))
    for found in (library, SimpleNamespace()):
        monkeypatch.setattr(devices.ctypes, "CDLL", lambda name, found=found: found)
        devices.keep_freed_memory()
    assert {number for number, _ in asked} == {-1, -3} and all(0 < size < 2**31 for _, size in asked)

    def missing(name):
        raise OSError

    monkeypatch.setattr(devices.ctypes, "CDLL", missing)
    devices.keep_freed_memory()
