"""One run on one page: what it learnt, what its bank looks like, what one step does to the bank.

    python figures/page.py runs/demo            writes runs/demo/page.html

The page needs nothing but a browser: its pictures lie inside it. Its words come from
figures/page.html; each function in this file fills in one section of it. Where the run has no
labels or no bank, a sentence replaces the sections that need them.
"""

import base64
import io
import json
import math
import os
import re
import sys
from dataclasses import replace
from html import escape
from pathlib import Path
from string import Template

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import figures  # isort: skip  # noqa: F401  first: Ctrl-C while torch is imported
import torch
import torch.nn.functional as F
from torch import Tensor

from bank import RULES, MemoryBank
from data import seed_of, windows
from eval_linear import eval_side
from figures import neighbours, observe
from figures.plots import BLUE, GREY, ORANGE, plt
from lab.train import LabConfig, build
from plumbing.command_line import Parser, UserError, command, python, quoted
from plumbing.devices import pick_device
from plumbing.features import extract, random_images
from plumbing.files import Dataset
from plumbing.outputs import output
from plumbing.runs import read_checkpoint, save_text
from train import Pretraining

TEMPLATE = Path(__file__).with_suffix(".html")
PLAY = Path(__file__).resolve().parents[1] / "docs" / "play.html"
SECTION = re.compile(r'(<section id="(\w+)">\s*<h2>.*?</h2>)(.*?)(?=</section>)', re.S)
NAMES = ("untrained", "trained")
SPOTS = 1000  # images on the map
MARKERS = "os^DvPX*<>"  # of the first ten classes: colour alone does not tell ten apart
NO_LABELS = "This part needs labels, or 200 pictures of which some are kept to judge features by: it is left out."
VOTE = (
    "The second curve asks what the run was not trained for: the twenty training images nearest to a test image vote "
    "on its class. It looks at no more than 1 000 test images, so a step of a point or two is noise. Look for a rise "
    "that lasts."
)
BLIND = (
    "Without labels there are two figures. Recovered: how often a second view of a picture that did not train finds "
    "its own picture. The effective rank: how many directions the features use. Look for a share that rises."
)
PROBES = (
    "The nearest training images vote (kNN), or a logistic regression is fitted (the linear probe). What training is "
    "worth is the distance between the first row and the two below: the same network before its first step, and the "
    "pixels without a network. Look for a first row that is well above both, in both columns; where it is not, "
    "training was too short, or did not go well."
)
NO_WHOLE_BANK = "This part is about a bank of all images, as with --window 0; this bank holds one window of them."
NO_BANK = "This part is about the bank, which the run's method does not keep, so it is left out."


def picture(figure, alt: str, words: str, dpi: int = 150) -> str:
    """The figure as HTML with its PNG inside and words below it; closes the figure.

    Readers who do not see the picture get alt, then the words.
    """
    with io.BytesIO() as file:
        figure.savefig(file, format="png", dpi=dpi)
        png = base64.b64encode(file.getvalue()).decode()
    width, height = (round(100 * inches) for inches in figure.get_size_inches())
    plt.close(figure)
    about = f'alt="{escape(f"{alt} {words}")}" width="{width}" height="{height}"'
    return f'<figure><img src="data:image/png;base64,{png}" {about}><figcaption>{escape(words)}</figcaption></figure>\n'


def panel(height: float = 3.2, **labels):
    """One small plot, (figure, axis): two fit side by side, and one is still legible on a phone."""
    figure, axis = plt.subplots(figsize=(4.4, height), constrained_layout=True)
    axis.set(**labels)
    return figure, axis


def table(rows: list[list[str]]) -> str:
    """HTML of rows of text; the first row and the first column are headings."""
    text = "<tr>" + "".join(f'<th scope="col">{cell}</th>' for cell in rows[0]) + "</tr>\n"
    for name, *cells in rows[1:]:
        text += f'<tr><th scope="row">{name}</th>' + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>\n"
    return f'<div class="wide"><table>\n{text}</table></div>'


# ------------------------------------------------------------------------------------- the sections


def curve(rows: list[dict], key: str, name: str, unit: str, form: str, colour: str, level: int | None = None) -> str:
    """The picture of history's `key` over epochs, with ln level as a dashed line.

    form is the format of its values.
    """
    figure, axis = panel(xlabel="epoch", ylabel=name + unit)
    values = [row[key] * (100 if "%" in form else 1) for row in rows]
    axis.plot([row["epoch"] for row in rows], values, "o-", color=colour, markersize=3)
    axis.xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)
    ends = rows[:1] + rows[1:][-1:]  # one, if there is one
    words = f"{name}: " + " to ".join(f"{row[key]:{form}} in epoch {row['epoch']}" for row in ends) + "."
    if level:
        axis.axhline(math.log(level), color=GREY, linestyle="--", linewidth=1, label=f"guessing: ln {level}")
        axis.legend()
        words += f" Guessing among {level} rows costs {math.log(level):.3f}."
    return picture(figure, f"A curve of {len(rows)} values.", words)


def curves(history: list[dict], choices: int | None) -> dict | str:
    """From the checkpoint's epochs.

    choices is the number of rows that a step's softmax runs over, None without a bank.
    """
    if not history:
        return "This run was stopped in its first epoch: there is no curve yet."
    looks, loss = [row for row in history if "knn" in row], ("nce", "NCE loss") if choices else ("loss", "loss")
    shown = curve(history, *loss, ", nats" if choices else "", ".3f", BLUE, choices)
    if looks:
        return {"pictures": shown + curve(looks, "knn", "kNN accuracy", ", %", ".1%", ORANGE), "looks": VOTE}
    judged = [row for row in history if "recovered" in row]
    if judged:
        shown += curve(judged, "recovered", "recovered", ", %", ".1%", ORANGE)
        return {"pictures": shown + curve(judged, "rank", "effective rank", "", ".1f", BLUE), "looks": BLIND}
    return {"pictures": shown, "looks": "This run did not look at its features while it trained."}


def compared(measured: dict) -> list[list[str]]:
    """The rows of eval_linear.py's table, from its JSON; without labels those of both figures."""
    if "recovered" in measured["trained"]:
        rows = [["pictures that did not train", "recovered, %", "effective rank"]]
        named = [(name, measured[name]) for name in NAMES[::-1]]
        return rows + [[name, f"{100 * row['recovered']:.1f}", f"{row['rank']:.1f}"] for name, row in named]
    rows = [["top-1, % of test images", f"kNN, k = {int(measured['k'])}", "linear probe"]]
    for name, words in (("trained", "trained"), ("untrained", "untrained"), ("raw", "raw pixels")):
        rows.append([words, *(f"{100 * measured[name][key]:.1f}" for key in ("knn", "linear"))])
    return rows


def accuracy(file: Path, checkpoint: dict) -> dict | str:
    """From the JSON that eval_linear.py wrote, if it exists and is of this checkpoint."""
    ask = f"{python()} eval_linear.py {quoted(file.parent)} --json {quoted(file)} measures it."
    if not file.is_file():
        return f"This run has no eval.json yet: {ask}"
    try:
        measured = json.loads(file.read_text())
        ways = BLIND if "recovered" in measured["trained"] else PROBES
        content = {"table": table(compared(measured)), "date": escape(measured["date"]), "ways": ways}
        same = {**measured["config"], "data_dir": ""} == {**checkpoint["config"], "data_dir": ""}
        same = same and measured.get("step", checkpoint["step"]) == checkpoint["step"]  # older files have none
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{file}: damaged ({type(error).__name__}); delete it, or measure the run again") from error
    return content if same else f"The eval.json here is of another run, or of an earlier step: {ask}"


def nearest(encoders, dataset: Dataset, size: int, device) -> dict:
    dataset, queries, hits, share = neighbours.search(encoders, dataset, size, device)
    shown = []
    for name, index, own in zip(NAMES, hits, share):
        figure, axes = neighbours.grid(len(queries), index.shape[1] + 1, 0.0)
        for axis, query in zip(axes[:, 0], queries.tolist()):
            neighbours.show(axis, dataset.test, query, "black")
        neighbours.fill(axes[:, 1:], dataset, queries, index)
        words = f"{name.capitalize()}."
        if own is not None:
            words = f"{name.capitalize()}: {own:.0%} of the neighbours are of the image's own class."
        alt = f"{len(queries)} images, each with its {index.shape[1]} nearest training images."
        shown.append(picture(figure, alt, words, dpi=100))
    return {"pictures": "".join(shown)}


def layout(close: Tensor, start: Tensor, steps: int = 150) -> Tensor:
    """Places (T, 2) for the graph that joins each point to its neighbours close (T, k).

    Neighbours pull at each other, and all points push each other apart. start is (T, 2).
    """
    joined = torch.zeros(len(close), len(close)).scatter_(1, close, 1.0)
    joined = torch.maximum(joined, joined.T)  # (T, T)
    count = joined.sum(1, keepdim=True)  # (T, 1)
    spots = (start - start.mean(0)) / start.std()
    for i in range(steps):
        push = 1 / (torch.cdist(spots, spots).square() + 0.01)  # (T, T)
        push = (push.sum(1, keepdim=True) * spots - push @ spots) / len(spots)
        pull = joined @ spots / count - spots
        spots = spots + 0.3 * (1 - i / steps) * (pull + 0.3 * push)
    return spots


def feature_map(encoders, dataset: Dataset, size: int, device) -> dict | str:
    images = dataset.test or dataset.train
    if len(images) < 3:
        return "There are too few images for a map."
    images = images.take(random_images(images, SPOTS))
    labels, k, shown = images.labels, min(10, len(images) - 1), []
    for name, encoder in zip(NAMES, encoders):
        features = F.normalize(extract(encoder, images, size, device), dim=1)  # (T, F)
        close = (features @ features.T).fill_diagonal_(-2).topk(k).indices  # (T, k)
        centred = features - features.mean(0)
        _, axes = torch.linalg.eigh(centred.T @ centred)  # smallest first; (F, F)
        spots = layout(close, centred @ axes[:, [-1, -2]])  # (T, 2)
        figure, axis = panel(4.4, xticks=[], yticks=[])
        words = f"{name.capitalize()}."
        if labels is None:
            axis.scatter(*spots.T, 14, color=GREY, linewidth=0, alpha=0.7)
        else:
            own = labels.cpu()
            same = (own[close] == own[:, None]).float().mean()
            for c, marker in zip(range(len(dataset.classes)), MARKERS):
                name_of_class = dataset.classes[c].encode(errors="replace").decode()  # of a folder not in UTF-8
                name_of_class = name_of_class.replace("$", r"\$")  # not a formula
                name_of_class = " " * name_of_class.startswith("_") + name_of_class  # the legend would leave it out
                style = {"color": f"C{c}", "marker": marker, "linewidth": 0, "alpha": 0.7}
                axis.scatter(*spots[own == c].T, 14, label=name_of_class, **style)
            others = own >= len(MARKERS)
            if others.any():
                axis.scatter(*spots[others].T, 14, label="other classes", color=GREY, linewidth=0, alpha=0.4)
            figure.legend(loc="outside lower center", ncols=4, fontsize=9, markerscale=1.8, handletextpad=0)
            words = f"{name.capitalize()}: of the {k} nearest of each dot, {same:.1%} are of its class."
        shown.append(picture(figure, f"{len(images)} images as dots, joined ones near each other.", words))
    return {"count": len(images), "pictures": "".join(shown)}


def spectrum(start: Tensor | None, end: Tensor, init: str) -> dict:
    """The spectra of the bank before the first step and in the checkpoint.

    start (None if unknown) and end are its rows (N, D).
    """
    figure, axis = panel(xscale="log", yscale="log", xlabel="principal axis of the bank", ylabel="share of variance, %")
    words = []
    for name, weight, colour in (("Before the first step", start, GREY), ("In the checkpoint", end, BLUE)):
        if weight is not None:
            shares = observe.spectrum(weight.float())
            variance = 1 - weight.float().mean(0).square().sum()
            words.append(f"{name}: {observe.perplexity(shares):.1f} effective axes, variance {variance:.3f}.")
            shares = shares[shares > 1e-6 * shares[0]]  # smaller ones are rounding
            axis.plot(range(1, len(shares) + 1), 100 * shares.cpu(), color=colour, label=name.lower())
    axis.legend()
    shown = picture(figure, "The bank's variance along each principal axis, on logarithmic scales.", " ".join(words))
    begun = "one forward pass of the untrained network" if init == "forward" else "random directions"
    return {"rows": len(end), "dim": end.shape[1], "init": begun, "pictures": shown}


@torch.no_grad()
def one_step(run: Pretraining, dataset: Dataset) -> dict:
    """Move the checkpoint's bank by one batch under either rule.

    The weights and the run's own bank stay as they are.
    """
    m, tau, batch = run.config.bank_momentum, run.config.temperature, run.config.batch_size
    pixels, index = next(dataset.train.batches(random_images(dataset.train, batch), batch, run.device))
    torch.manual_seed(0)  # the same views every time
    run.encoder.train()
    z = run.encoder(run.augment(pixels)).float()  # (B, D)
    before = run.bank.weight.float()  # (N, D)
    similarity = z @ before.T  # (B, N)
    own = torch.zeros(len(before), dtype=torch.bool, device=run.device).index_fill_(0, index, True)
    view = similarity.argmax(0)  # (N,) the view that a row is most like,
    view[index] = torch.arange(len(index), device=run.device)  # or that of its own image
    cosine = (before * z[view]).sum(1)  # (N,)
    shown, rows = [], [["rule and rows", "how many", "median move", "towards the view"]]
    for rule in RULES:
        bank = MemoryBank(*before.shape, m, rule, tau).to(run.device)
        bank.weight.copy_(before)
        bank.update(z, index, similarity)
        chord = (bank.weight - before).norm(dim=1)  # (N,) whose arc an arc cosine would lose to rounding
        moved = 2 * (chord / 2).clamp(max=1).asin().rad2deg()
        moved[moved < 1e-4] = 0  # rounding, when a row is normalised again
        nearer = (bank.weight * z[view]).sum(1) > cosine
        name = "NPID's" if rule == "npid" else rule.capitalize()
        figure, axis = panel(xlabel="cosine with the view, before the step", ylabel="the row moved, degrees")
        axis.set_yscale("symlog", linthresh=1e-2)
        axis.set_ylim(-2e-3, 180)
        for words, chosen, colour, size in (("other rows", ~own, GREY, 4), ("own rows", own, ORANGE, 9)):
            axis.scatter(cosine[chosen].cpu(), moved[chosen].cpu(), size, colour, linewidth=0, alpha=0.6, label=words)
            if chosen.any():
                towards = nearer[chosen & (moved > 0)].float()
                share = f"{towards.mean():.0%} of {len(towards)}" if len(towards) else "none moved"
                rows.append([f"{name}, {words}", str(int(chosen.sum())), f"{moved[chosen].median():.3g}°", share])
        axis.legend(loc="center left", markerscale=2.5)  # at 0, below, lie rows that NPID leaves
        words = "Median moves. " + "; ".join(f"{row[0]}: {row[2]}" for row in rows if row[0].startswith(name)) + "."
        shown.append(picture(figure, "How far every row of the bank moved, against its cosine with a view.", words))
    return {"batch": len(index), "m": f"{m:g}", "tau": f"{tau:g}", "pictures": "".join(shown), "table": table(rows)}


# ----------------------------------------------------------------------------------------- the page


def compose(place: str, home: Path, checkpoint: dict, dataset: Dataset, file: str | Path) -> str:
    """The HTML of the page that is saved as file.

    Raises UserError for a run of another version, or one whose images are no longer as many.
    """
    try:
        config = LabConfig(**checkpoint["config"])
    except TypeError as error:
        raise UserError(f"{place}: written by another version of this code ({error})") from error
    device, run = pick_device(), None
    dataset = dataset.to(device)
    sections = {"accuracy": NO_LABELS} | dict.fromkeys(("spectrum", "step"), NO_BANK)
    measured = home / "eval.json"
    if dataset.test or measured.is_file():  # another dataset's labels can measure any run
        sections["accuracy"] = accuracy(measured, checkpoint)
    if config.method == "ours":
        run, start = restored(place, config, checkpoint, dataset, device)
        whole = run.bank.images is None
        sections["spectrum"] = spectrum(start, run.bank.weight, config.bank_init)
        sections["step"] = one_step(run, dataset) if whole else NO_WHOLE_BANK
    size = eval_side(checkpoint["config"], dataset.test or dataset.train)
    encoders = neighbours.encoders(checkpoint, dataset, size, device)
    sections["map"] = feature_map(encoders, dataset, size, device)
    sections["neighbours"] = nearest(encoders, dataset, size, device)
    sections["curves"] = curves(checkpoint["history"], run and run.choices)
    about = vars(config) | {"run": place.rstrip("/"), "count": len(dataset.train)}
    about["dataset"] = config.data_dir if config.dataset == "folder" else config.dataset
    about["method"] = "the paper's method" if config.method == "ours" else f"the method {config.method}"
    about |= {"done": len(checkpoint["history"]), "seconds": round(checkpoint["seconds"])}
    about["play"] = Path(os.path.relpath(PLAY, Path(file).resolve().parent)).as_posix()
    return fill(about, sections)


def restored(place: str, config: LabConfig, checkpoint: dict, dataset: Dataset, device):
    """The run as its checkpoint has it, and the bank's rows (N, D) before the first step.

    The rows are None for a run that started from another run's weights.
    """
    settings = replace(config, compile=False, shard_bank=False, init_from="", bank="", loss="")  # runs no other code
    run, start = build(settings, len(dataset.train), device), None
    if (count := len(checkpoint["bank"]["weight"])) != run.bank.size:
        problem = f"its bank has {count} rows, one per image, but there are {run.bank.size} images now"
        raise UserError(f"{place}: {problem}")
    if not config.init_from:  # the bank as `train` begins with it
        torch.manual_seed(seed_of(config.seed, "bank"))
        _, _, entering = next(windows(len(dataset.train), config.window, config.visits, config.seed))
        run.enter(dataset.train, entering)
        start = run.bank.weight.clone()
    run.load(checkpoint)
    return run, start


def fill(about: dict, sections: dict) -> str:
    """The template with the run's settings and the content of every section in it."""

    def section(match: re.Match) -> str:
        head, name, body = match.groups()
        content = sections[name]
        if isinstance(content, str):
            return f"{head}\n<p>{escape(content)}</p>\n"
        return head + Template(body).substitute(content)

    head, tag, body = TEMPLATE.read_text(encoding="utf-8").partition("<section")
    named = {name: escape(f"{value:g}" if isinstance(value, float) else str(value)) for name, value in about.items()}
    return Template(head).substitute(named) + SECTION.sub(section, tag + body)


@command
def main(argv: list[str] | None = None) -> None:
    parser = Parser(description=__doc__.split("\n")[0])
    parser.add_argument("run", help="a run's folder")
    parser.add_argument("--out", type=output, metavar="FILE", help="the page [RUN/page.html]")
    parser.add_argument("--data-dir", help="where the run's images lie now [as in the run]")
    args = parser.parse_args(argv)
    checkpoint = read_checkpoint(args.run, LabConfig)
    home = Path(args.run) if Path(args.run).is_dir() else Path(args.run).parent
    place = args.out or output(home / "page.html")
    html = compose(args.run, home, checkpoint, neighbours.load_images(args.run, checkpoint, args.data_dir), place)
    save_text(html.encode("ascii", "xmlcharrefreplace").decode(), place, "the page")
    print(place)


if __name__ == "__main__":
    sys.exit(main())
