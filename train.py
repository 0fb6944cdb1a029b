"""Pretrain a backbone without labels, on one device: one branch, one view an image, one memory bank (arXiv 2404.19289).

    python train.py --recipe demo                                  the embedded shapes, a few minutes on two cores
    python train.py --dataset cifar10                              downloaded on first use
    python train.py --dataset folder --data-dir my_images          your own pictures
    python train.py --dataset cifar10 --recipe released            the released script's settings
    python train.py --resume runs/cifar10                          go on where a run stopped

A run lives in --out (runs/<dataset>): config.json, metrics.jsonl (a line an epoch), progress.png and last.pt, written
atomically after every epoch and when the run is interrupted. `python eval_linear.py runs/<dataset>` measures it.

Every random draw is a function of (seed, step): the order of an epoch comes from a generator seeded with the epoch, and
torch's generators are seeded anew before the bank's first pass and before each step. A resumed run therefore needs no
generator's state to repeat the uninterrupted one, to the last bit on a CPU.
"""

import hashlib
import math
import signal
import sys
import time
from dataclasses import asdict
from pathlib import Path

import torch
from tqdm import tqdm

import data
import ranks
from config import Config, parse
from eval_linear import knn_monitor
from images import Dataset, UserError
from models import keep_freed_memory, pick_device
from pretraining import Pretraining, start_from
from runs import SignalCatcher, draw_progress, read_checkpoint, save_metrics, save_tensors, start_folder


class Interrupted(KeyboardInterrupt):
    """Ctrl-C or SIGTERM, after the run was saved; args are (message, signal number)."""


def learning_rate(config: Config, step: int, per_epoch: int) -> float:
    """Linear warm-up, then half a cosine that would reach 0 one step after the last."""
    warmup, total = config.warmup * per_epoch, config.epochs * per_epoch
    if step < warmup:
        return config.lr * (step + 1) / (warmup + 1)
    return config.lr * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, total - warmup)))


def view_side(config: Config, done: float) -> int:
    """Side of the views when a share `done` of the run lies behind: from --size-start to --size over three quarters of it.

    Small views are cheap, and the first epochs can do with them (progressive resolution, as in arXiv 2104.00298).
    """
    start = config.size_start or config.size
    return start + round((config.size - start) * min(1.0, done / 0.75) / 2) * 2  # an even number of pixels more


def seed_of(*numbers) -> int:
    """A seed that depends on all of the numbers: torch's CPU generator reads 32 bits only, so they are hashed to 32."""
    return int.from_bytes(hashlib.blake2s(repr(numbers).encode(), digest_size=4).digest(), "big")


def epoch_order(config: Config, epoch: int, count: int) -> torch.Tensor:
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed_of(config.seed, "epoch", epoch)))


def train(config: Config, resume: dict | None = None, dataset: Dataset | None = None, watch=None) -> dict:
    """Pretrain as config says; returns the last epoch's metrics and, as "out", the run's folder.

    resume is a checkpoint of the same configuration, from `read_checkpoint`; without it a run that lies in the same
    folder is replaced. dataset is what `load_dataset` gave, if it was called already. watch(run, dataset, epoch), if
    given, is called after every epoch with the `Pretraining`; the figures it returns join that epoch's metrics. Raises
    UserError for what the user can mend (a diverging loss among it) and Interrupted after Ctrl-C or SIGTERM; the run's
    last.pt is good in every case.
    """
    config.check()
    keep_freed_memory()
    out, device = config.folder(), ranks.start(pick_device(config.device))
    ranks.part(config.batch_size)  # raises UserError if it cannot be shared out
    dataset = (dataset or load_dataset(config)).to(device)
    count, batch = len(dataset.train), config.batch_size  # N, B
    per_epoch = count // batch  # the rest of an epoch's shuffled images waits for the next one
    total = config.epochs * per_epoch
    run = learner(config)(config, count, device)
    home = device if device.type == "cuda" else torch.device("cpu")  # where losses add up, without waiting for a GPU
    step, sums, seconds, history = 0, torch.zeros(len(run.LOSSES), dtype=torch.float64), 0.0, []
    if resume:
        run.load(resume)
        step, sums, seconds, history = resume["step"], resume["sums"], resume["seconds"], resume["history"]
    elif config.init_from:
        start_from(run, read_checkpoint(config.init_from), config)
    sums = sums.to(home)

    def save():
        if not all(torch.isfinite(p).all() for p in run.encoder.parameters()):
            raise diverged(config, step, per_epoch, out)
        state = run.state()
        if not ranks.first():
            return
        progress = {"config": asdict(config), "step": step, "sums": sums.cpu(), "seconds": seconds, "history": history}
        save_tensors(state | progress, out / "last.pt", "the checkpoint")
        save_metrics(out, history)

    if ranks.first():
        start_folder(out, asdict(config) | {"precision": run.encoder.precision}, keep=bool(resume))
        save_metrics(out, history)
        where = f"{device} in {run.encoder.precision}" + (f", {ranks.count()} processes" if ranks.count() > 1 else "")
        print(f"{config.dataset}: {count} images, {config.arch} on {where}, {total} steps -> {out}")
    stop, stopped = SignalCatcher(), 0
    quiet = {} if ranks.first() else {"disable": True}
    bar = tqdm(total=total * batch, initial=step * batch, unit=" images", unit_scale=True, smoothing=0.05, **quiet)
    with stop, bar:
        started = time.perf_counter() - seconds
        if not resume:
            bar.set_description("bank: one forward pass")
            torch.manual_seed(seed_of(config.seed, "bank"))
            run.init_bank(dataset.train)
        run.forward = ranks.wrap(run.forward, device)
        run.encoder.train()
        while step < total and not stopped:
            epoch, done = divmod(step, per_epoch)
            bar.set_description(f"epoch {epoch + 1}/{config.epochs}")
            order = epoch_order(config, epoch, count)[done * batch : per_epoch * batch]
            for pixels, index in dataset.train.batches(order, batch, device):
                torch.manual_seed(seed_of(config.seed, "step", step))
                lr = learning_rate(config, step, per_epoch)
                if config.size_start:
                    for crop in run.crops:
                        crop.augment.size = view_side(config, step / total)
                try:
                    losses = run.step(pixels, index, lr)
                except FloatingPointError:
                    raise diverged(config, step, per_epoch, out) from None
                sums += losses.to(home)
                step += 1
                bar.update(batch)
                stopped = ranks.any_of(stop.signal, device)
                if stopped:
                    break
            totals = sums.tolist()  # the one wait for a GPU in an epoch
            if not all(map(math.isfinite, totals)):
                raise diverged(config, step, per_epoch, out)
            seconds = time.perf_counter() - started
            if step % per_epoch == 0:
                row = {"epoch": epoch + 1, "step": step, "lr": lr, "seconds": round(seconds, 1)}
                row |= {name: value / per_epoch for name, value in zip(run.LOSSES, totals)}
                due = config.knn_every and (step == total or (epoch + 1) % config.knn_every == 0) and ranks.first()
                if due and dataset.labelled and dataset.test:
                    row["knn"] = knn_monitor(run.encoder, dataset, asdict(config), device)
                    bar.set_postfix(loss=f"{row['loss']:.3f}", knn=f"{row['knn']:.1%}")
                history.append(row | (watch(run, dataset, epoch + 1) if watch else {}))
                sums.zero_()
                if step == total or (epoch + 1) % config.save_every == 0:
                    save()
                elif ranks.first():
                    save_metrics(out, history)
                if (due or step == total) and ranks.first():
                    draw_progress(history, run.choices, out / "progress.png")
                started = time.perf_counter() - seconds  # looking and saving are not training
        if step < total:
            save()
    if step < total:
        message = f"stopped after step {step} of {total}, saved; go on with: python train.py --resume {out}"
        raise Interrupted(message, stopped)
    return history[-1] | {"out": str(out)}


def learner(config: Config):
    """The class that makes the steps of config's method."""
    if config.method == "ours":
        return Pretraining
    import baselines  # here: it needs a package that our own method does not

    return baselines.TwoBranches


def load_dataset(config: Config) -> Dataset:
    c = config
    dataset = data.load(c.dataset, c.data_dir, c.size, c.subset, c.holdout, c.cache_gb, c.workers, c.cache_dir)
    count = len(dataset.train)
    if c.batch_size > count:
        raise UserError(f"--batch-size {c.batch_size} is larger than the dataset, which has {count} training images")
    others = count - c.batch_size
    if c.negatives > others and c.negatives != Config.negatives:  # the default gives way to the whole bank
        raise UserError(f"--negatives {c.negatives} is more than the {others} rows that the bank has beside a batch")
    return dataset


def diverged(config: Config, step: int, per_epoch: int, out: Path) -> UserError:
    kept = f"{out / 'last.pt'} is the last good checkpoint" if (out / "last.pt").exists() else "nothing was saved yet"
    lr = learning_rate(config, step, per_epoch)
    return UserError(f"the loss is no longer finite at step {step}, learning rate {lr:.4g}: try a smaller --lr; {kept}")


def main(argv: list[str] | None = None) -> int:
    try:
        config, checkpoint = parse(argv, __doc__.split("\n")[0])
        result = train(config, checkpoint)
    except UserError as error:
        if ranks.first():
            print(f"train.py: {error}", file=sys.stderr)
        return 2
    except Interrupted as interrupted:
        if ranks.first():
            print(interrupted.args[0], file=sys.stderr)
        return 128 + interrupted.args[1]
    except RuntimeError as error:
        if ranks.count() == 1:
            raise
        print(f"train.py: another process of the group is gone ({str(error).splitlines()[0]})", file=sys.stderr)
        print(f"go on, with any number of processes: train.py --resume {config.folder()}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("stopped at once; what was saved before is in the run's folder", file=sys.stderr)
        return 128 + signal.SIGINT
    finally:
        ranks.stop()
    if not ranks.first():
        return 0
    knn = f", kNN {result['knn']:.1%}" if "knn" in result else ""
    print(f"done in {result['seconds']:.0f} s: loss {result['loss']:.3f}{knn}")
    print(f"measure it with: python eval_linear.py {result['out']}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
