"""The method, one step of it: encoder, bank, losses and optimiser together (arXiv 2404.19289; its equations are in
bank.py and loss.py, the loop around it in train.py).
"""

from dataclasses import asdict

import torch

import ranks
from augment import cutmix
from bank import MemoryBank
from config import Config, flag
from images import Images, UserError
from loss import nce, sqrt_kl, streaming_losses
from models import SMALL, Encoder, pick_precision
from runs import new_encoder
from views import crops, through


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
        # A look at a loss waits for the GPU, which then waits for the next step: there `train` looks once an epoch.
        self.checks = self.bank.checks = device.type != "cuda"
        self.negatives = config.negatives if config.negatives < count - config.batch_size else 0  # K, or 0 for all N
        self.optimizer = torch.optim.SGD(
            self.encoder.parameters(), config.lr, config.sgd_momentum, weight_decay=config.weight_decay
        )
        self.crops = crops(config)
        self.omega = torch.tensor(
            [crop.weight for crop in self.crops], device=device
        )  # (V,) here: a copy makes a GPU wait
        self.augment = self.crops[0].augment  # of the bank's first pass
        views = len(self.crops) * config.batch_size  # V B
        whole = 4 * views * count <= 1e9 * config.similarity_gb  # bytes of the similarities (V B, N)
        plain = (
            self.negatives
            or config.cutmix
            or (config.kl_direction, config.kl_detach, config.power) != ("p||u", True, 0.5)
        )
        if config.shard_bank and (plain or len(self.crops) > 1):
            raise UserError(
                "--shard-bank reads all rows as they lie: --negatives 0, --views single, no --cutmix or SqrtKL's variants"
            )
        self.streams = config.shard_bank or not (whole or plain)

    @property
    def choices(self) -> int:
        """The rows that a step's softmax runs over."""
        return self.negatives + self.config.batch_size if self.negatives else self.bank.size

    def init_bank(self, images: Images) -> None:
        """Section "feature calibrate": one pass of the encoder as it starts; a random or carried bank is left as it is."""
        if self.config.bank_init == "forward":
            batches = images.batches(torch.arange(len(images)), self.config.batch_size, self.device)
            views = ((self.augment(pixels), index) for pixels, index in batches)
            self.bank.init_forward(self.encoder, views)  # not compiled: its batches have sizes of their own

    def step(self, pixels: torch.Tensor, index: torch.Tensor, lr: float) -> torch.Tensor:
        """One step on images (B, 3, S, S) with their indices (B,): returns (L, L_NCE, L_SqrtKL), detached.

        With --views each of V crops of an image is classified by itself: a loss is the weighted sum over the crops.
        Raises FloatingPointError, before weights or bank have moved, if the loss is not finite and `checks` is on.
        """
        c, bank = self.config, self.bank
        for group in self.optimizer.param_groups:
            group["lr"] = lr

        views = [crop.augment(pixels) for crop in self.crops]  # V of (B, 3, H, W), one unless --views says more
        weights = [crop.weight for crop in self.crops]
        columns = bank.sample(index, self.negatives) if self.negatives else None  # (M,) rows, or None for all N
        target = bank.locate(index, columns)  # (B,) the column of each image's own row
        soft = None
        if c.cutmix:
            views[0], partner, share = cutmix(views[0], c.cutmix)
            soft = share.new_zeros(len(index), len(bank.weight) if columns is None else len(columns))  # (B, M)
            soft.scatter_add_(1, target[:, None], share[:, None])
            soft.scatter_add_(1, target[partner][:, None], 1 - share[:, None])

        mine = ranks.part(len(index))  # of the batch: all of it, unless there are other ranks
        z = through(self.forward, [view[mine] for view in views])  # (V B, D) unit rows, crop after crop
        if self.streams:  # the same losses and update, a few thousand rows of the bank at a time
            parts = [
                streaming_losses(
                    part, bank.weight, index[mine], c.temperature, c.kl_temperature if c.lam else None,
                    first=bank.rows.start if c.shard_bank else None,
                ) for part in z.chunk(len(views))
            ]  # fmt: skip
            l_nce, l_kl = (sum(w * part[k] for w, part in zip(weights, parts)) for k in (0, 1))
            log_total = torch.cat([part[2] for part in parts])
            move = {"log_total": log_total if c.shard_bank else ranks.gather(log_total)}
        else:
            with self.encoder.autocast(z):  # the bank is the network's last layer
                similarity = bank.similarity(z, columns).float()  # (V B, M) cosines
            parts, truth = similarity.chunk(len(views)), (target if soft is None else soft)[mine]
            l_nce = sum(w * nce(part, truth, c.temperature) for w, part in zip(weights, parts))
            l_kl = torch.zeros_like(l_nce)
            if c.lam:
                variant = c.kl_temperature, c.kl_direction, c.kl_detach, c.power
                l_kl = sum(w * sqrt_kl(part, *variant) for w, part in zip(weights, parts))
            move = {"similarity": ranks.gather(similarity.detach()), "columns": columns, "target": soft}
        loss = l_nce + c.lam * l_kl
        losses = ranks.mean(torch.stack([loss, l_nce, l_kl]).detach())
        if self.checks and not torch.isfinite(losses).all():
            raise FloatingPointError
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        # The bank moves with the z and the P of this step. It moves last, since the backward pass needs the rows that the
        # similarities came from. The released code moves it before the losses; they read the old similarities either way.
        if len(views) > 1:
            index = ranks.gather(index[mine].repeat(len(views)))  # (V B,) in the order of z
            move["omega"] = ranks.gather(self.omega.repeat_interleave(len(z) // len(views)))
        with self.encoder.autocast(z):
            bank.update(ranks.gather(z.detach()), index, **move)
        return losses

    def state(self) -> dict:
        parts = {name: getattr(self, name).state_dict() for name in ("encoder", "bank", "optimizer")}
        if self.config.shard_bank:  # a checkpoint holds the whole bank, for any number of ranks to go on with
            parts["bank"]["weight"] = ranks.collect(self.bank.weight, self.bank.size)
        return parts

    def load(self, checkpoint: dict) -> None:
        self.load_bank(checkpoint, "--resume")
        load_weights(self.encoder, checkpoint, self.config.arch, "--resume")
        self.optimizer.load_state_dict(checkpoint["optimizer"])

    def load_bank(self, checkpoint: dict, name: str) -> None:
        weight, rows = checkpoint["bank"]["weight"], self.bank.rows  # (N, D)
        if len(weight) != self.bank.size:
            here = f"{self.config.dataset} has {self.bank.size} images here"
            raise UserError(f"{name}: the run's bank has {len(weight)} rows, one an image, but {here}")
        if weight.shape[1] != self.config.dim:
            raise UserError(
                f"{name}: the run's bank has rows of {weight.shape[1]} numbers, --dim {self.config.dim} here"
            )
        self.bank.load_state_dict({"weight": weight[rows.start : rows.stop]})


def build_encoder(config: Config) -> Encoder:
    try:
        return new_encoder(asdict(config))
    except (ValueError, RuntimeError) as error:
        raise UserError(f"--arch {config.arch} --size {config.size}: {error}") from error


def start_from(run, checkpoint: dict, config: Config) -> None:
    """Start a learner from another run's encoder, which may have seen views of another size, and from its bank to carry."""
    name, before = f"--init-from {config.init_from}", checkpoint["config"]
    if (before["size"] <= SMALL) != (config.size <= SMALL):
        stems = f"views of up to {SMALL} px have a stem of their own"
        raise UserError(f"{name}: trained at --size {before['size']}, it cannot go on at {config.size}: {stems}")
    if config.bank_init == "carry":
        name += " --bank-init carry"
        for key in ("dataset", "subset", "holdout"):  # row i stands for image i
            if before[key] != getattr(config, key):
                raise UserError(f"{name}: its rows are other images, those of {flag(key)} {before[key]}")
        if "bank" not in checkpoint:
            raise UserError(f"{name}: a run of --method {before['method']} has no bank")
        run.load_bank(checkpoint, name)
    load_weights(run.encoder, checkpoint, config.arch, name)


def load_weights(encoder: Encoder, checkpoint: dict, arch: str, name: str) -> None:
    if checkpoint["config"]["arch"] != arch:
        raise UserError(f"{name}: holds a {checkpoint['config']['arch']}, not a {arch}")
    try:
        encoder.load_state_dict(checkpoint["encoder"])
    except RuntimeError as error:
        raise UserError(f"{name}: its encoder has another shape ({str(error).splitlines()[-1].strip()})") from error
