"""Pre-training of few-step flows on labelled images, and their distillation: `scfm pretrain`."""
import copy
import json
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import Accelerator
from torchvision.transforms.functional import to_pil_image
from torchvision.utils import make_grid
from tqdm import tqdm

from scfm.data.labelled_images import load_pictures
from scfm.method.consistency import keyed_generator
from scfm.method.distill import (
    DistillConfig,
    FullSpeakers,
    TimeBins,
    draw_update,
    follow,
    make_emas,
    make_optimizer,
    one_update,
    option,
    whole,
)
from scfm.method.ema import EMA
from scfm.method.metrics import endpoint_distance
from scfm.models.pixels import save_pipeline
from scfm.models.unet import SIZES, PictureFlow, drop_labels, generate, load_flow, save_flow
from scfm.training.checkpoint import latest, load_checkpoint, save_checkpoint
from scfm.training.config import begin_folder


@dataclass
class PretrainConfig(DistillConfig):
    """Everything that one `scfm pretrain` needs to know; the defaults are for CIFAR-10 on one GPU."""
    data: str = option("", "folder of parquet files with the columns img and label, or hub:OWNER/NAME")
    out: str = option("runs/pretrain", "folder of checkpoints, previews and the result, flow.safetensors")
    size: str = option("full", f"of the network: {', '.join(SIZES)}")
    method: str = option("scfm", "scfm, or shortcut: a network that is told the step size (arXiv 2410.12557)")
    teacher: str = option("", "flow.safetensors of a finished run: distil it instead of starting from nothing")
    updates: int = option(200_000, "updates of the student")
    batch: int = option(128, "rows of one update, over all processes")
    lr: float = option(3e-4, "learning rate of AdamW, after the warm-up")
    warmup: int = option(1000, "updates over which the learning rate rises in a straight line; 0 for none")
    clip: float = option(1.0, "largest gradient norm; inf for no clipping")
    flow_share: float = option(0.75, "share of rows of plain flow matching, 1 for nothing else; the others are self rows")
    teacher_share: float = option(0.0, "share of those others on which the teacher speaks; 0 without a teacher")
    shift: tuple = option((1.0, 2.0), "range of the time shift, drawn per row")
    algorithm: str = option("one_ema", "one_ema: one average speaks; dual and dual_pure only with a teacher")
    slow_decay: float = option(0.999, "decay of the EMA, per update: it speaks, and it is what ships")
    label_dropout: float = option(0.1, "share of rows whose label is hidden, so that guidance is possible")
    flip: bool = option(True, "mirror every other picture")
    precision: str = option("fp32", "fp32, or bf16: autocast of the networks (weights and averages stay in fp32)")
    checkpoint_every: int = option(2000, "updates between checkpoints")
    preview_every: int = option(2000, "updates between preview pictures; 0 for none")
    preview_steps: tuple = option((1, 2, 4, 8, 64), "step counts of the previews, rising; the others are compared with the last")

    def check(self):
        """ValueError with the field, its value and the mend, before anything is loaded."""
        super().check()
        follow(self, PRETRAIN_RULES)


LEVELS = 8                                                        # the step sizes 1, 1/2, ..., 1/128 of a Shortcut Model
SHORTCUT = {"method": "shortcut", "flow_share": .75, "shift": (1., 1.), "self_grids": tuple(2 ** k for k in range(1, LEVELS))}
PRETRAIN_RULES = [
    ("data", lambda c: c.data, "say --data FOLDER, with files such as train-00000-of-00001.parquet"),
    ("size", lambda c: c.size in SIZES, f"one of {', '.join(SIZES)}"),
    ("method", lambda c: c.method in ("scfm", "shortcut"), "scfm or shortcut"),
    ("method", lambda c: c.method == "scfm" or (c.shift, c.self_grids, c.t_skip, c.teacher) == (*list(SHORTCUT.values())[2:], 2, ""),
     f"needs --shift 1,1 --self_grids {','.join(map(str, SHORTCUT['self_grids']))} --t_skip 2 and no teacher"),
    ("teacher_share", lambda c: c.teacher or c.teacher_share == 0, "there is no teacher: take 0, or name one with --teacher"),
    ("algorithm", lambda c: c.teacher or c.algorithm == "one_ema", "without a teacher there is one average: take one_ema"),
    ("label_dropout", lambda c: 0 <= c.label_dropout < 1, "a share of the rows, in [0, 1)"),
    ("warmup", lambda c: whole(c.warmup, 0), "a whole number of updates; 0 for none"),
    ("precision", lambda c: c.precision in ("fp32", "bf16"), "fp32 or bf16"),
    ("checkpoint_every", lambda c: whole(c.checkpoint_every, 1), "a whole number of at least 1"),
    ("preview_every", lambda c: whole(c.preview_every, 0), "a whole number of updates; 0 for none"),
    ("preview_steps", lambda c: c.preview_steps and all(whole(n, 1) for n in c.preview_steps), "step counts of 1 or more, as 1,4,64"),
]


def batch_of(config, update, pictures, part=(0, 1)):
    """(data (n, 3, H, W) in [-1, 1], labels (n,)) of this part of an update: drawn with replacement, mirrored, labels hidden."""
    generator = keyed_generator(config.seed, update, stream=1)
    rows = torch.randint(len(pictures.labels), (config.batch,), generator=generator)
    mirrored = torch.rand(config.batch, generator=generator) < .5 * config.flip
    labels = drop_labels(pictures.labels[rows], config.label_dropout, len(pictures.names), generator)
    n = config.batch // part[1]
    mine = slice(part[0] * n, (part[0] + 1) * n)
    data = pictures.pixels[rows[mine]].float() / 127.5 - 1
    return torch.where(mirrored[mine, None, None, None], data.flip(-1), data), labels[mine]


class FlowSpeakers:
    """The two speakers of pre-training: the student, and `slow`, its average, which says the targets and is what ships.

    A network that is told the step size (labels and levels, (B, 2)) is told half of it as a speaker: one level more.
    """

    def __init__(self, network):
        self.networks = {"student": network, "slow": copy.deepcopy(network).eval().requires_grad_(False)}
        self.half = network.levels > 0

    def student(self, x, t, cond=None):
        return self.networks["student"](x, t, cond)

    @torch.no_grad()
    def slow(self, x, t, cond=None):
        return self.networks["slow"](x, t, cond + torch.tensor([0, 1], device=cond.device) if self.half else cond)

    def parameters(self, name):
        """The tensors of one speaker, as a list."""
        return list(self.networks[name].parameters())


def with_level(labels, jumps):
    """Labels (B,) -> (B, 2): beside each the level of its row's jump, log2(1 / jump); flow rows get the last, as in the paper."""
    level = torch.where(jumps.is_flow, LEVELS - 1, jumps.steps.clamp(min=2).log2().long() - 1)     # a jump is 2 of `steps`
    return torch.stack([labels, level], 1)


def evaluations(jumps):
    """Network evaluations of an update: a forward of a row counts 1, its backward 2, each hop of a row that is no flow row 1."""
    return 3 * len(jumps.steps) + (jumps.times.shape[1] - 1) * int((~jumps.is_flow).sum())


class Pretraining:
    """One run: prepare, train, save. Everything that it writes lies under config.out. `pictures`: what config.data would give."""

    def __init__(self, config, progress=True, pictures=None):
        config.check()
        self.config, self.progress, self.out = config, progress, Path(config.out)
        self.pictures = pictures or load_pictures(config.data)
        self.accelerator = Accelerator()
        torch.manual_seed(config.seed)
        with self.accelerator.main_process_first():
            begin_folder(self.out, config)
        self.speakers = speakers_of(config, self.pictures, self.accelerator.device)
        self.optimizer, self.scheduler = make_optimizer(self.speakers, config)
        if config.teacher:
            self.emas = make_emas(self.speakers, config)
        else:
            self.emas = EMA(self.speakers.parameters("slow"), self.speakers.parameters("student"), config.slow_decay)
        self.speakers.networks["student"] = self.accelerator.prepare(self.speakers.networks["student"])
        self.bins, self.update, self.evaluations = TimeBins(), 0, 0

    def one(self):
        """The next update; returns its report."""
        config, accelerator = self.config, self.accelerator
        part = accelerator.process_index, accelerator.num_processes
        data, labels = batch_of(config, self.update, self.pictures, part)
        noise, jumps = draw_update(config, self.update, config.batch, tuple(data.shape[1:]), part=part)
        cond = with_level(labels, jumps) if config.method == "shortcut" else labels
        for group in self.optimizer.param_groups:
            group["lr"] = self.scheduler.get_last_lr()[0] * min(1, (self.update + 1) / max(1, config.warmup))
        report = one_update(self.speakers, self.emas, self.optimizer, data.to(accelerator.device), noise, jumps, config,
                            cond.to(accelerator.device), backward=accelerator.backward)
        self.scheduler.step()
        self.update += 1
        spent = torch.tensor(evaluations(jumps), device=accelerator.device)
        self.evaluations += int(accelerator.reduce(spent))
        return report

    def train(self, keep_going=lambda: True):
        """Updates up to config.updates, or until keep_going() says no at an update's end."""
        config = self.config
        bar = tqdm(total=config.updates, initial=self.update, desc=self.out.name, disable=not self.progress, mininterval=2)
        while self.update < config.updates:
            try:
                report = self.one()
            except FloatingPointError as error:
                raise FloatingPointError(f"{error}; the last good state is {latest(self.out) or 'none'}") from None
            self.bins.add(report.losses, report.jumps.t1)
            bar.update(1)
            bar.set_postfix_str(str(self.bins), refresh=False)
            stop = not keep_going()
            if stop or self.update % config.checkpoint_every == 0 or self.update == config.updates:
                self.save()
            if config.preview_every and (self.update % config.preview_every == 0 or self.update == config.updates):
                self.preview()
            if stop:
                break
        bar.close()


def speakers_of(config, pictures, device):
    """A new network with its average; or, where a teacher is named, the four speakers of chapter 03."""
    told = LEVELS if config.method == "shortcut" else 0
    network = load_flow(config.teacher) if config.teacher else PictureFlow(config.size, len(pictures.names), told,
                                                                           pictures.pixels.shape[-1])
    network.bf16 = config.precision == "bf16"
    return (FullSpeakers if config.teacher else FlowSpeakers)(network.to(device).train())


@torch.no_grad()
def preview(run, each=4):
    """Writes previews/UPDATE.png, a row per step count from the same noise, and a line of previews/quality.jsonl.

    The line holds, for each of config.preview_steps but the last, the distance to the endpoints of the last: how far few
    steps of this network are from many of its own. No feature network is needed; whether the pictures are good it does not say.
    """
    if not run.accelerator.is_main_process:
        return
    config, network, device = run.config, run.speakers.networks["slow"], run.accelerator.device
    classes, folder = len(run.pictures.names), run.out / "previews"
    labels = torch.arange(each * classes, device=device) % classes
    noise = torch.randn(len(labels), *run.pictures.pixels.shape[1:], generator=keyed_generator(config.seed, 0, stream=3)).to(device)
    ends = [generate(network, labels, noise, n) for n in config.preview_steps]
    folder.mkdir(exist_ok=True)
    grid = make_grid(torch.cat([e[:classes] for e in ends]).cpu().clamp(-1, 1) / 2 + .5, nrow=classes, padding=1)
    to_pil_image(grid).save(folder / f"{run.update:06d}.png")
    line = {"update": run.update, "evaluations": run.evaluations, "loss": [round(v, 4) for v in run.bins.values.tolist()],
            "distance": {n: round(endpoint_distance(e, ends[-1]), 4) for n, e in zip(config.preview_steps, ends[:-1])}}
    with open(folder / "quality.jsonl", "a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")


def raw(run, name):
    """The network of a speaker, without what accelerate wraps around it."""
    return run.accelerator.unwrap_model(run.speakers.networks[name])


def save(run):
    """Writes a checkpoint, and what ships: the average, as flow.safetensors."""
    if run.accelerator.is_main_process:
        networks = {name: raw(run, name).state_dict() for name in run.speakers.networks if name != "teacher"}
        save_checkpoint(run.out, run.update, {
            "update": run.update, "evaluations": run.evaluations, "networks": networks, "bins": [run.bins.total, run.bins.count],
            "optimizer": run.optimizer.state_dict(), "scheduler": run.scheduler.state_dict(),
            "ema_updates": getattr(run.emas, "updates", 0)})
        save_flow(raw(run, "slow"), run.out / "flow.safetensors", notes={"updates": run.update, "evaluations": run.evaluations})


def resume(run):
    """Continues from the newest checkpoint, if there is one; returns the number of updates done."""
    found = latest(run.out)
    if found:
        state = load_checkpoint(found)
        for name, weights in state["networks"].items():
            raw(run, name).load_state_dict(weights)
        run.optimizer.load_state_dict(state["optimizer"])
        run.scheduler.load_state_dict(state["scheduler"])
        run.bins.total, run.bins.count = state["bins"]
        run.update, run.evaluations = state["update"], state["evaluations"]
        if run.config.teacher:
            run.emas.updates = state["ema_updates"]
    return run.update


Pretraining.preview, Pretraining.save, Pretraining.resume = preview, save, resume


def pretrain(config, keep_going=lambda: True, progress=True, pictures=None):
    """`scfm pretrain`: trains up to config.updates, from the newest checkpoint on, and returns the run, or None when it was stopped.

    At the end the average lies in config.out as flow.safetensors and, unless it is told the step size, as a pipeline.
    """
    run = Pretraining(config, progress, pictures)
    if run.resume() > config.updates:
        raise ValueError(f"updates={config.updates}: {run.out} is at {run.update} already")
    run.train(keep_going)
    if run.update < config.updates:
        return None
    if run.accelerator.is_main_process and config.method == "scfm":
        save_pipeline(raw(run, "slow"), run.pictures.names, run.out / "pipeline")
    return run
