"""Every architecture by name: shapes, the stem for small images, torchvision's parameter names, devices."""

from functools import cache
from types import SimpleNamespace

import pytest
import torch
import torchvision.models as tv
from torch import nn

import models
from models import (
    ARCHITECTURES,
    MOBILE,
    Encoder,
    build_backbone,
    build_projector,
    pick_device,
    pick_precision,
)

FEATURES = {
    "resnet10": 256,
    "resnet18": 512,
    "resnet34": 512,
    "resnet50": 2048,
    "mobilenet_v2": 1280,
    "mobilenet_v3_small": 576,
    "efficientnet_b0": 1280,
    "vit_tiny": 192,
}


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@cache
def backbone(arch, size):
    return build_backbone(arch, size).eval()


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


@pytest.mark.parametrize("arch, size", [("resnet10", 64), ("resnet10", 96), ("vit_tiny", 64), ("vit_tiny", 96)])
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


@pytest.mark.parametrize("arch", MOBILE)
@pytest.mark.parametrize("size, stride", [(64, 1), (96, 2)])
def test_the_first_convolution_of_a_mobile_network_strides_over_large_images_only(arch, size, stride):
    net = backbone(arch, size)
    assert net.features[0](views(size)).shape[-1] == size // stride


# ----------------------------------------------------------------------------------------------------------- torchvision


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
    assert_loads_and_agrees(build_backbone("resnet18", 96), tv.resnet18(), "fc", 96)


@pytest.mark.parametrize("arch", MOBILE)
def test_a_mobile_backbone_loads_into_torchvisions_network(arch):
    theirs = getattr(tv, arch)()
    theirs.features[0][0].stride = (1, 1)
    assert_loads_and_agrees(build_backbone(arch, 32), theirs, "classifier", 32)


def test_vit_tiny_loads_into_torchvisions_vision_transformer():
    theirs = tv.VisionTransformer(32, 4, num_layers=12, num_heads=3, hidden_dim=192, mlp_dim=768)
    assert_loads_and_agrees(build_backbone("vit_tiny", 32), theirs, "heads", 32)


# --------------------------------------------------------------------------------------------------------------- options


@pytest.mark.parametrize("arch, expected", [("resnet10", 128), ("resnet50", 512)])
@pytest.mark.parametrize("size", [32, 96])
def test_width_is_the_channels_of_the_first_stage(arch, expected, size):
    net = build_backbone(arch, size, width=16).eval()
    assert net.conv1.out_channels == net.bn1.num_features == 16
    assert net(views(size)).shape == (2, expected)


def test_a_width_of_64_is_torchvisions_own():
    named = [{k: v.shape for k, v in build_backbone("resnet18", 32, w).state_dict().items()} for w in (None, 64, 65)]
    assert named[0] == named[1] != named[2] and named[0].keys() == named[2].keys()


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
def test_vit_tiny_refuses_a_size_that_leaves_a_rest(size, patch):
    with pytest.raises(ValueError, match=f"patches of {patch}: size {size}"):
        build_backbone("vit_tiny", size)


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


# -------------------------------------------------------------------------------------------------- device and precision


@pytest.fixture
def accelerators(monkeypatch):
    def there(cuda=False, mps=False):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 2 * cuda)
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)

    return there


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


@pytest.mark.parametrize("able, expected", [(True, "bf16"), (False, "fp32")])
def test_the_automatic_precision_on_cuda_ignores_emulation(monkeypatch, able, expected):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation or able)
    assert pick_precision("auto", torch.device("cuda")) == expected


def test_freed_memory_is_kept_where_there_is_glibc_and_elsewhere_nothing_happens(monkeypatch):
    asked = []
    library = SimpleNamespace(mallopt=lambda *pair: asked.append(pair))
    for found in (library, SimpleNamespace()):
        monkeypatch.setattr(models.ctypes, "CDLL", lambda name, found=found: found)
        models.keep_freed_memory()
    assert {number for number, _ in asked} == {-1, -3} and all(0 < size < 2**31 for _, size in asked)

    def missing(name):
        raise OSError

    monkeypatch.setattr(models.ctypes, "CDLL", missing)
    models.keep_freed_memory()
