"""Settings that follow from the pictures: how many train, and how large they are.

`settings` is the table. `chosen` applies it to a folder, beneath the flags that were given.
"""

import statistics
from pathlib import Path

from plumbing.command_line import flag
from plumbing.files import sample, say
from plumbing.folders import layout_of

# Shorter side of the pictures, pixels    views, the network for them, whole images in evaluation
SIDES = (
    (96,                                  dict(size=96, eval_size=128, arch="resnet10", width=32, jitter=0.8)),
    (48,                                  dict(size=48, eval_size=64, arch="resnet10", width=32)),
    (0,                                   dict(size=24, eval_size=0, arch="resnet10", width=32)),
)  # fmt: skip

# Pictures that train, fewer than    length and step; without a row: the defaults
COUNTS = (
    (4_000,                          dict(batch_size=128, lr=0.05, epochs=120)),
)  # fmt: skip

BANK = dict(bank_momentum=0.75, window=1024, visits=16)  # window 0, all pictures, if there are no more

# What was chosen together with a setting goes if the setting's flag is given.
TOGETHER = {"size": {"eval_size"}, "arch": {"width"}, "batch_size": {"lr"}, "optimizer": {"lr"}, "window": {"visits"}}


def settings(count: int, side: int) -> dict:
    """The settings for `count` pictures whose shorter side is typically `side` pixels."""
    views = next(row for least, row in SIDES if side >= least)
    length = next((row for limit, row in COUNTS if count < limit), {})
    values = views | length | BANK
    values["size"] = min(values["size"], max(1, side))
    if "batch_size" in values:
        values["batch_size"] = min(values["batch_size"], max(2, count // 2))  # some may be unreadable
    if count <= values["window"]:
        values["window"] = 0
        del values["visits"]
    return values


def chosen(data_dir: str, given: dict) -> dict:
    """The settings that follow from the pictures in data_dir; it says them.

    What the flags in `given` set is left out. Reads the folder's listing, and the headers of a
    sample of its pictures. Raises UserError where the listing has no layout.
    """
    root = Path(data_dir)
    names = [name for name, _ in layout_of(root).train]
    sizes, _ = sample([root / name for name in names])
    if not sizes:
        return {}  # decoding says why none can be read
    count = max(0, len(names) - given.get("holdout", 0))
    count = min(count, given.get("subset") or count)
    side = round(statistics.median(map(min, sizes)))
    gone = given.keys() | {name for key in given.keys() & TOGETHER.keys() for name in TOGETHER[key]}
    values = {name: value for name, value in settings(count, given.get("size", side)).items() if name not in gone}
    if values:
        flags = " ".join(f"{flag(name)} {value}" for name, value in values.items())
        say(f"{count} pictures train, shorter side {side}, so: {flags} (flags win; --recipe laptop: the default)")
    return values
