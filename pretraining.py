"""The method, one step of it: encoder, bank, losses and optimiser together (arXiv 2404.19289; its equations are in
bank.py and loss.py, the loop around it in train.py).
"""

from dataclasses import asdict

import torch

import ranks
from augment import Augment, cutmix
from bank import MemoryBank
from config import Config
from images import Images, UserError
from loss import nce, sqrt_kl, streaming_losses
from models import Encoder, pick_precision
from runs import new_encoder


class Pretraining:
    """What a run learns with and what it has learnt: encoder, bank, optimiser. `step` is the method of the paper."""

    LOSSES = ("loss", "nce", "sqrt_kl")  # what `step` returns

    def __init__(self, config: Config, count: int, device: torch.device):
        self.config, self.device = config, device
        self.encoder = build_encoder(config).to(device, memory_format=torch.channels_last)
        self.encoder.precision = pick_precision(config.precision, device)
        self.forward = torch.compile(self.encoder) if config.compile else self.encoder
        dtype = torch.bfloat16 if config.bank_dtype == "bf16" else torch.float32
        rows = ranks.rows(count) if config.shard_bank else None
        bank = MemoryBank(count, config.dim, config.momentum, config.bank_update, config.temperature, dtype, rows)
        self.bank = bank.to(device)
        self.negatives = config.negatives if config.negatives < count - config.batch_size else 0  # K, or 0 for all N
        self.optimizer = torch.optim.SGD(
            self.encoder.parameters(), config.lr, config.sgd_momentum, weight_decay=config.weight_decay
        )
        whole = 4 * config.batch_size * count <= 1e9 * config.similarity_gb  # bytes of the similarities (B, N)
        plain = (
            self.negatives
            or config.cutmix
            or (config.kl_direction, config.kl_detach, config.power) != ("p||u", True, 0.5)
        )
        if config.shard_bank and plain:
            raise UserError(
                "--shard-bank reads all rows as they lie: --negatives 0, without --cutmix or SqrtKL's variants"
            )
        self.streams = config.shard_bank or not (whole or plain)
        self.augment = augmentation(config)

    @property
    def choices(self) -> int:
        """The rows that a step's softmax runs over."""
        return self.negatives + self.config.batch_size if self.negatives else self.bank.size

    def init_bank(self, images: Images) -> None:
        """Section "feature calibrate": one pass of the untrained encoder; a random bank is left as it was made."""
        if self.config.bank_init == "forward":
            batches = images.batches(torch.arange(len(images)), self.config.batch_size, self.device)
            views = ((self.augment(pixels), index) for pixels, index in batches)
            self.bank.init_forward(self.forward, views)

    def step(self, pixels: torch.Tensor, index: torch.Tensor, lr: float) -> torch.Tensor:
        """One step on images (B, 3, S, S) with their indices (B,): returns (L, L_NCE, L_SqrtKL), detached.

        Raises FloatingPointError, before weights or bank have moved, if the loss is not finite.
        """
        c, bank = self.config, self.bank
        for group in self.optimizer.param_groups:
            group["lr"] = lr

        views = self.augment(pixels)  # (B, 3, H, W) one view an image
        columns = bank.sample(index, self.negatives) if self.negatives else None  # (M,) rows, or None for all N
        target = bank.locate(index, columns)  # (B,) the column of each image's own row
        soft = None
        if c.cutmix:
            views, partner, share = cutmix(views, c.cutmix)
            soft = views.new_zeros(len(index), len(bank.weight) if columns is None else len(columns))  # (B, M)
            soft.scatter_add_(1, target[:, None], share[:, None])
            soft.scatter_add_(1, target[partner][:, None], 1 - share[:, None])

        mine = ranks.part(len(index))  # of the batch: all of it, unless there are other ranks
        z = self.forward(views[mine])  # (B, D) unit rows
        if self.streams:  # the same losses and update, a few thousand rows of the bank at a time
            l_nce, l_kl, log_total = streaming_losses(
                z, bank.weight, index[mine], c.temperature, c.kl_temperature if c.lam else None,
                first=bank.rows.start if c.shard_bank else None,
            )  # fmt: skip
            move = {"log_total": log_total if c.shard_bank else ranks.gather(log_total)}
        else:
            with self.encoder.autocast(z):  # the bank is the network's last layer
                similarity = bank.similarity(z, columns).float()  # (B, M) cosines
            l_nce = nce(similarity, (target if soft is None else soft)[mine], c.temperature)
            l_kl = torch.zeros_like(l_nce)
            if c.lam:
                l_kl = sqrt_kl(similarity, c.kl_temperature, c.kl_direction, c.kl_detach, c.power)
            move = {"similarity": ranks.gather(similarity.detach()), "columns": columns, "target": soft}
        loss = l_nce + c.lam * l_kl
        losses = ranks.mean(torch.stack([loss, l_nce, l_kl]).detach())
        if not torch.isfinite(losses).all():
            raise FloatingPointError
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        # The bank moves with the z and the P of this step. It moves last, since the backward pass needs the rows that the
        # similarities came from. The released code moves it before the losses; they read the old similarities either way.
        with self.encoder.autocast(z):
            bank.update(ranks.gather(z.detach()), index, **move)
        return losses

    def state(self) -> dict:
        parts = {name: getattr(self, name).state_dict() for name in ("encoder", "bank", "optimizer")}
        if self.config.shard_bank:  # a checkpoint holds the whole bank, for any number of ranks to go on with
            parts["bank"]["weight"] = ranks.collect(self.bank.weight, self.bank.size)
        return parts

    def load(self, checkpoint: dict) -> None:
        weight, rows = checkpoint["bank"]["weight"], self.bank.rows
        if len(weight) != self.bank.size:
            here = f"{self.config.dataset} has {self.bank.size} images here"
            raise UserError(f"--resume: the run's bank has {len(weight)} rows, one an image, but {here}")
        load_weights(self.encoder, checkpoint, self.config.arch, "--resume")
        self.bank.load_state_dict({"weight": weight[rows.start : rows.stop]})
        self.optimizer.load_state_dict(checkpoint["optimizer"])


def augmentation(config: Config) -> Augment:
    return Augment(
        config.size, scale=(config.crop_min, 1.0), jitter=config.jitter_strengths(), jitter_p=config.jitter_p,
        gray_p=config.gray, blur_p=config.blur,
    )  # fmt: skip


def build_encoder(config: Config) -> Encoder:
    try:
        return new_encoder(asdict(config))
    except (ValueError, RuntimeError) as error:
        raise UserError(f"--arch {config.arch} --size {config.size}: {error}") from error


def load_weights(encoder: Encoder, checkpoint: dict, arch: str, name: str) -> None:
    if checkpoint["config"]["arch"] != arch:
        raise UserError(f"{name}: holds a {checkpoint['config']['arch']}, not a {arch}")
    try:
        encoder.load_state_dict(checkpoint["encoder"])
    except RuntimeError as error:
        raise UserError(f"{name}: its encoder has another shape ({str(error).splitlines()[-1].strip()})") from error
