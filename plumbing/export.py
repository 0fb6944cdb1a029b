"""A backbone for other programs: its weights, what rebuilds the network, and the lines that do it.

The lines need torchvision and Pillow alone. What they say is looked up in the network itself,
because a file of weights loads without complaint into a network with another stride.
"""

import json
from pathlib import Path

from torch import nn
from torchvision.models import ResNet, VisionTransformer

from plumbing.command_line import UserError
from plumbing.features import side_of
from plumbing.files import DEEP, GREY
from plumbing.image_ops import MEAN, STD
from plumbing.outputs import output, save_tensors, save_text

ROUNDED = ("image_size", "patch_size", "hidden_dim", "mlp_dim")


def weights_file(place: str) -> Path:
    """The `type` of --export: an `output`, and what its recipe would replace is a recipe too."""
    file, beside = output(place), output(beside_of(Path(place)))
    if beside.exists():
        try:
            ours = "lines" in dict(json.loads(beside.read_text()))
        except (OSError, ValueError, TypeError, RecursionError):
            ours = False
        if not ours:
            raise UserError(f"{place}: would replace {beside}, which no --export wrote; name another file")
    return file


def beside_of(file: Path) -> Path:
    return file.with_suffix(".json") if file.suffix != ".json" else file.with_suffix(".recipe.json")


def export(backbone: nn.Module, config: dict, file: Path, own: int | None = None) -> None:
    """Write the weights to file and what rebuilds the network next to it, and print the lines.

    own is the side to which the run's images are decoded; None, of older runs: as large as it gets.
    """
    recipe = recipe_of(backbone, config, side_of(config, own or 2 * config["size"]))
    lines = lines_of(recipe, file.name)
    beside = beside_of(file)
    save_tensors(backbone.state_dict(), file, "--export")
    save_text(json.dumps(recipe | {"lines": lines.splitlines()}, indent=1) + "\n", beside, "--export")
    print(f"{file}: the {config['arch']} backbone, a plain state_dict; {beside}: what rebuilds it. In Python:\n")
    print(lines)


def recipe_of(backbone: nn.Module, config: dict, side: int) -> dict:
    """What the weights do not say about the network, and what its input is: plain values."""
    recipe = {"arch": config["arch"], "size": config["size"], "side": side, "mean": list(MEAN), "std": list(STD)}
    recipe["fit"] = config.get("fit", "crop")
    if isinstance(backbone, ResNet):
        stages = [stage for stage in backbone.children() if isinstance(stage, nn.Sequential)]
        recipe |= {"block": type(stages[0][0]).__name__, "depths": [len(stage) for stage in stages]}
        recipe |= {"width": backbone.conv1.out_channels, "small_stem": backbone.conv1.stride == (1, 1)}
    elif isinstance(backbone, VisionTransformer):
        recipe |= {name: getattr(backbone, name) for name in ROUNDED}
        heads = backbone.encoder.layers[0].num_heads
        recipe |= {"num_layers": len(backbone.encoder.layers), "num_heads": heads}
    else:
        recipe |= {"small_stem": backbone.features[0][0].stride == (1, 1)}
    return recipe


def lines_of(recipe: dict, name: str) -> str:
    """Python that loads the weights from the file called name as `model`, and prepares pictures."""
    imports = ["import torch", "import torchvision", "from PIL import Image, ImageOps", "from torch import nn"]
    if "depths" in recipe:
        imports.append(f"from torchvision.models.resnet import {recipe['block']}, ResNet")
        lines = _resnet(recipe)
    elif "patch_size" in recipe:
        names = (*ROUNDED, "num_layers", "num_heads")
        settings = ", ".join(f"{name}={recipe[name]}" for name in names)
        lines = ["model = torchvision.models.VisionTransformer(", f"    {settings}", ")", "model.heads = nn.Identity()"]
    else:
        lines = [f"model = torchvision.models.{recipe['arch']}()", "model.classifier = nn.Identity()"]
        if recipe["small_stem"]:
            lines.append("model.features[0][0].stride = (1, 1)  # weights do not tell the stride")
    mean, std = (tuple(recipe[key]) for key in ("mean", "std"))
    side, how = recipe["side"], "fit" if recipe["fit"] == "crop" else "pad"
    shown, grey = ("central square", "") if how == "fit" else ("whole image", f", color={GREY}")
    lines += [
        f'model.load_state_dict(torch.load("{name}"))',
        "model.eval()",
        f"normalize = torchvision.transforms.Normalize({mean}, {std})",
        "\n",
        f"def prepared(file):  # (1, 3, {side}, {side}), the {shown} of a picture",
        "    image = Image.open(file)",
        "    image.getexif()",
        '    image.info.pop("exif", None)  # Pillow would write it anew, and fails at odd tags',
        "    ImageOps.exif_transpose(image, in_place=True)",
        '    if image.mode.startswith(("I", "F")):',
        f'        raise ValueError(f"{{file}}: {DEEP}; scale them to 0 to 255 as training did")',
        '    image = image.convert("RGBA")',
        '    image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")',
        f"    image = ImageOps.{how}(image, ({side}, {side}), Image.Resampling.BILINEAR{grey})",
        "    return normalize(torchvision.transforms.functional.to_tensor(image))[None]",
        "\n",
        '# features = model(prepared("picture.jpg"))  # within torch.no_grad()',
    ]
    return "\n".join([*imports, "", *lines]) + "\n"


def _resnet(recipe: dict) -> list[str]:
    block, width, whole = recipe["block"], recipe["width"], len(recipe["depths"]) == 4
    depths = recipe["depths"] + [1] * (not whole)
    lines = [f"model = ResNet({block}, {depths})"]
    if width != 64:
        lines += [
            f"model.inplanes, model.bn1 = {width}, nn.BatchNorm2d({width})  # torchvision fixes 64 channels",
            *[f"model.conv1 = nn.Conv2d(3, {width}, 7, 2, padding=3, bias=False)"] * (not recipe["small_stem"]),
            f"for i, depth in enumerate({depths}):",
            f"    stage = model._make_layer({block}, {width} * 2**i, depth, stride=1 if i == 0 else 2)",
            '    setattr(model, f"layer{i + 1}", stage)',
        ]
    if recipe["small_stem"]:
        lines += [
            f"model.conv1 = nn.Conv2d(3, {width}, 3, padding=1, bias=False)  # the stem for small views",
            "model.maxpool = nn.Identity()",
        ]
    lines += ["model.layer4 = nn.Identity()"] * (not whole)
    return [*lines, "model.fc = nn.Identity()"]
