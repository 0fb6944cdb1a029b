"""S3L, "small is beautiful" (arXiv 2103.13559): start from a smaller run, give back what it lacked.

--init-from RUN starts from another run's encoder, which may have seen views of another size.
--bank-init carry takes its bank too. In fine-tuning, a run with --drop-last-stage gets that stage
back.
"""

import copy
from dataclasses import asdict

from lab.backbones import encoder_of, has_small_stem
from models import SMALL, Encoder
from plumbing.command_line import UserError, flag
from plumbing.runs import load_state


def start_from(run, checkpoint: dict, config) -> None:
    """Give a learner the encoder of another run, and its bank to carry.

    Raises UserError, naming the option, if they do not fit.
    """
    name, before = f"--init-from {config.init_from}", checkpoint["config"]
    if has_small_stem(before) != has_small_stem(asdict(config)):
        stems = f"views of up to {SMALL} px have a stem of their own, unless --torchvision-stem is on"
        raise UserError(f"{name}: trained at --size {before['size']}, it cannot go on at {config.size}: {stems}")
    if config.bank_init == "carry":
        _carry(run, checkpoint, config, f"{name} --bank-init carry")
    if (before.get("method", "ours") == "ours") != (config.method == "ours"):
        raise UserError(f"{name}: a run of --method {before['method']} has another head than --method {config.method}")
    if before["arch"] != config.arch:
        raise UserError(f"{name}: holds a {before['arch']}, not a {config.arch}")
    load_state(run.encoder, checkpoint["encoder"], f"{name}: its encoder")


def _carry(run, checkpoint: dict, config, name: str) -> None:
    before = checkpoint["config"]
    for key in ("dataset", "subset", "holdout"):  # row i stands for image i
        if before[key] != getattr(config, key):
            raise UserError(f"{name}: its rows are other images, those of {flag(key)} {before[key]}")
    if "bank" not in checkpoint:
        raise UserError(f"{name}: a run of --method {before['method']} has no bank")
    count, dim = checkpoint["bank"]["weight"].shape
    if count != run.bank.size:
        counts = f"{count} rows, one per image, but {config.dataset} has {run.bank.size} images here"
        raise UserError(f"{name}: the run's bank has {counts}")
    if dim != config.dim:
        raise UserError(f"{name}: the run's bank has rows of {dim} numbers, --dim {config.dim} here")
    load_state(run.bank, checkpoint["bank"], f"{name}: its bank")


def restore_last_stage(encoder: Encoder, config: dict) -> Encoder:
    """A copy of an encoder trained with --drop-last-stage, with that stage as it starts out.

    Its projector, which no probe uses, still fits the features before that stage.
    """
    whole, encoder = encoder_of(config | {"drop_last_stage": False}), copy.deepcopy(encoder)
    encoder.backbone.layer4, encoder.feature_dim = whole.backbone.layer4, whole.feature_dim
    return encoder
