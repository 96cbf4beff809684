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

from scfm.data.labelled_images import load_labelled_images
from scfm.method.consistency import keyed_generator
from scfm.method.distill import (
    SCFMConfig,
    CopiedModels,
    TimeBins,
    sample_batch,
    validate,
    make_emas,
    make_optimizer,
    train_step,
    setting,
    is_int,
)
from scfm.method.ema import EMA
from scfm.method.metrics import endpoint_distance
from scfm.models.pixels import save_pipeline
from scfm.models.unet import SIZES, UNetFlow, drop_labels, generate, load_flow, save_flow
from scfm.training.checkpoint import latest, load_checkpoint, save_checkpoint
from scfm.training.config import init_output_dir


@dataclass
class FlowConfig(SCFMConfig):
    """Everything that one `scfm pretrain` needs to know; the defaults are for CIFAR-10 on one GPU."""
    train_data_dir: str = setting("", "folder of parquet files with the columns img and label, or hub:OWNER/NAME")
    output_dir: str = setting("runs/pretrain", "folder of checkpoints, previews and the result, flow.safetensors")
    size: str = setting("full", f"of the network: {', '.join(SIZES)}")
    method: str = setting("scfm", "scfm, or shortcut: a network that is told the step size (arXiv 2410.12557)")
    teacher: str = setting("", "flow.safetensors of a finished run: distil it instead of starting from nothing")
    max_train_steps: int = setting(200_000, "updates of the student")
    global_batch_size: int = setting(128, "rows of one update, over all processes")
    learning_rate: float = setting(3e-4, "learning rate of AdamW, after the warm-up")
    lr_warmup_steps: int = setting(1000, "updates over which the learning rate rises in a straight line; 0 for none")
    max_grad_norm: float = setting(1.0, "largest gradient norm; inf for no clipping")
    non_shortcut_ratio: float = setting(0.75, "share of rows of plain flow matching, 1 for nothing else; the others are self rows")
    teacher_ratio: float = setting(0.0, "share of those others on which the teacher speaks; 0 without a teacher")
    shift: tuple = setting((1.0, 2.0), "range of the time shift, drawn per row")
    algorithm: str = setting("one_ema", "one_ema: one average speaks; dual and dual_pure only with a teacher")
    ema_decay_slow: float = setting(0.999, "decay of the EMA, per update: the targets are its, and it is what is saved")
    label_dropout: float = setting(0.1, "share of rows whose label is hidden, so that guidance is possible")
    random_flip: bool = setting(True, "mirror every other image")
    weight_dtype: str = setting("fp32", "fp32, or bf16: autocast of the networks (weights and averages stay in fp32)")
    checkpointing_steps: int = setting(2000, "updates between checkpoints")
    validation_steps: int = setting(2000, "updates between preview images; 0 for none")
    eval_num_steps: tuple = setting((1, 2, 4, 8, 64), "step counts of the previews, rising; the others are compared with the last")

    def check(self):
        """ValueError with the field, its value and the mend, before anything is loaded."""
        super().check()
        validate(self, FLOW_VALIDATORS)


LEVELS = 8                                                        # the step sizes 1, 1/2, ..., 1/128 of a Shortcut Model
SHORTCUT = {"method": "shortcut", "non_shortcut_ratio": .75, "shift": (1., 1.), "self_grids": tuple(2 ** k for k in range(1, LEVELS))}
FLOW_VALIDATORS = [
    ("train_data_dir", lambda c: c.train_data_dir, "say --train_data_dir FOLDER, with files such as train-00000-of-00001.parquet"),
    ("size", lambda c: c.size in SIZES, f"one of {', '.join(SIZES)}"),
    ("method", lambda c: c.method in ("scfm", "shortcut"), "scfm or shortcut"),
    ("method", lambda c: c.method == "scfm" or (c.shift, c.self_grids, c.t_skip, c.teacher) == (*list(SHORTCUT.values())[2:], 2, ""),
     f"needs --shift 1,1 --self_grids {','.join(map(str, SHORTCUT['self_grids']))} --t_skip 2 and no teacher"),
    ("teacher_ratio", lambda c: c.teacher or c.teacher_ratio == 0, "there is no teacher: take 0, or name one with --teacher"),
    ("algorithm", lambda c: c.teacher or c.algorithm == "one_ema", "without a teacher there is one average: take one_ema"),
    ("label_dropout", lambda c: 0 <= c.label_dropout < 1, "a share of the rows, in [0, 1)"),
    ("lr_warmup_steps", lambda c: is_int(c.lr_warmup_steps, 0), "a whole number of updates; 0 for none"),
    ("weight_dtype", lambda c: c.weight_dtype in ("fp32", "bf16"), "fp32 or bf16"),
    ("checkpointing_steps", lambda c: is_int(c.checkpointing_steps, 1), "a whole number of at least 1"),
    ("validation_steps", lambda c: is_int(c.validation_steps, 0), "a whole number of updates; 0 for none"),
    ("eval_num_steps", lambda c: c.eval_num_steps and all(is_int(n, 1) for n in c.eval_num_steps), "step counts of 1 or more, as 1,4,64"),
]


def batch_of(config, update, images, part=(0, 1)):
    """(data (n, 3, H, W) in [-1, 1], labels (n,)) of this part of an update: drawn with replacement, mirrored, labels hidden."""
    generator = keyed_generator(config.seed, update, stream=1)
    rows = torch.randint(len(images.labels), (config.global_batch_size,), generator=generator)
    mirrored = torch.rand(config.global_batch_size, generator=generator) < .5 * config.random_flip
    labels = drop_labels(images.labels[rows], config.label_dropout, len(images.names), generator)
    n = config.global_batch_size // part[1]
    mine = slice(part[0] * n, (part[0] + 1) * n)
    data = images.pixels[rows[mine]].float() / 127.5 - 1
    return torch.where(mirrored[mine, None, None, None], data.flip(-1), data), labels[mine]


class FlowModels:
    """The two models of pre-training: the student, and `slow`, its average, which the targets come from and which is saved.

    A network that is told the step size (labels and levels, (B, 2)) is told half of it as a speaker: one level more.
    """

    def __init__(self, network):
        self.networks = {"student": network, "ema_slow": copy.deepcopy(network).eval().requires_grad_(False)}
        self.half = network.levels > 0

    def student(self, x, t, cond=None):
        return self.networks["student"](x, t, cond)

    @torch.no_grad()
    def ema_slow(self, x, t, cond=None):
        return self.networks["ema_slow"](x, t, cond + torch.tensor([0, 1], device=cond.device) if self.half else cond)

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


class FlowTrainer:
    """One run: prepare, train, save. Everything that it writes lies under config.out. `images`: what config.data would give."""

    def __init__(self, config, progress=True, images=None):
        config.check()
        self.config, self.progress, self.out = config, progress, Path(config.output_dir)
        self.images = images or load_labelled_images(config.train_data_dir)
        self.accelerator = Accelerator()
        torch.manual_seed(config.seed)
        with self.accelerator.main_process_first():
            init_output_dir(self.out, config)
        self.models = make_models(config, self.images, self.accelerator.device)
        self.optimizer, self.scheduler = make_optimizer(self.models, config)
        if config.teacher:
            self.emas = make_emas(self.models, config)
        else:
            self.emas = EMA(self.models.parameters("ema_slow"), self.models.parameters("student"), config.ema_decay_slow)
        self.models.networks["student"] = self.accelerator.prepare(self.models.networks["student"])
        self.bins, self.update, self.evaluations = TimeBins(), 0, 0

    def one(self):
        """The next update; returns its report."""
        config, accelerator = self.config, self.accelerator
        part = accelerator.process_index, accelerator.num_processes
        data, labels = batch_of(config, self.update, self.images, part)
        noise, jumps = sample_batch(config, self.update, config.global_batch_size, tuple(data.shape[1:]), part=part)
        cond = with_level(labels, jumps) if config.method == "shortcut" else labels
        for group in self.optimizer.param_groups:
            group["lr"] = self.scheduler.get_last_lr()[0] * min(1, (self.update + 1) / max(1, config.lr_warmup_steps))
        report = train_step(self.models, self.emas, self.optimizer, data.to(accelerator.device), noise, jumps, config,
                            cond.to(accelerator.device), backward=accelerator.backward)
        self.scheduler.step()
        self.update += 1
        spent = torch.tensor(evaluations(jumps), device=accelerator.device)
        self.evaluations += int(accelerator.reduce(spent))
        return report

    def train(self, keep_going=lambda: True):
        """Updates up to config.updates, or until keep_going() says no at an update's end."""
        config = self.config
        bar = tqdm(total=config.max_train_steps, initial=self.update, desc=self.out.name, disable=not self.progress, mininterval=2)
        while self.update < config.max_train_steps:
            try:
                report = self.one()
            except FloatingPointError as error:
                raise FloatingPointError(f"{error}; the last good state is {latest(self.out) or 'none'}") from None
            self.bins.add(report.losses, report.jumps.t1)
            bar.update(1)
            bar.set_postfix_str(str(self.bins), refresh=False)
            stop = not keep_going()
            if stop or self.update % config.checkpointing_steps == 0 or self.update == config.max_train_steps:
                self.save()
            if config.validation_steps and (self.update % config.validation_steps == 0 or self.update == config.max_train_steps):
                self.preview()
            if stop:
                break
        bar.close()


def make_models(config, images, device):
    """A new network with its average; or, where a teacher is named, the four models of chapter 03."""
    told = LEVELS if config.method == "shortcut" else 0
    network = load_flow(config.teacher) if config.teacher else UNetFlow(config.size, len(images.names), told,
                                                                           images.pixels.shape[-1])
    network.bf16 = config.weight_dtype == "bf16"
    return (CopiedModels if config.teacher else FlowModels)(network.to(device).train())


@torch.no_grad()
def preview(run, each=4):
    """Writes previews/UPDATE.png, a row per step count from the same noise, and a line of previews/quality.jsonl.

    The line holds, for each of config.eval_num_steps but the last, the distance to the endpoints of the last: how far few
    steps of this network are from many of its own. No feature network is needed; whether the images are good it does not say.
    """
    if not run.accelerator.is_main_process:
        return
    config, network, device = run.config, run.models.networks["ema_slow"], run.accelerator.device
    classes, folder = len(run.images.names), run.out / "previews"
    labels = torch.arange(each * classes, device=device) % classes
    noise = torch.randn(len(labels), *run.images.pixels.shape[1:], generator=keyed_generator(config.seed, 0, stream=3)).to(device)
    ends = [generate(network, labels, noise, n) for n in config.eval_num_steps]
    folder.mkdir(exist_ok=True)
    grid = make_grid(torch.cat([e[:classes] for e in ends]).cpu().clamp(-1, 1) / 2 + .5, nrow=classes, padding=1)
    to_pil_image(grid).save(folder / f"{run.update:06d}.png")
    line = {"update": run.update, "evaluations": run.evaluations, "loss": [round(v, 4) for v in run.bins.values.tolist()],
            "distance": {n: round(endpoint_distance(e, ends[-1]), 4) for n, e in zip(config.eval_num_steps, ends[:-1])}}
    with open(folder / "quality.jsonl", "a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")


def raw(run, name):
    """The network of a speaker, without what accelerate wraps around it."""
    return run.accelerator.unwrap_model(run.models.networks[name])


def save(run):
    """Writes a checkpoint, and what is saved: the average, as flow.safetensors."""
    if run.accelerator.is_main_process:
        networks = {name: raw(run, name).state_dict() for name in run.models.networks if name != "teacher"}
        save_checkpoint(run.out, run.update, {
            "update": run.update, "evaluations": run.evaluations, "networks": networks, "bins": [run.bins.total, run.bins.count],
            "optimizer": run.optimizer.state_dict(), "scheduler": run.scheduler.state_dict(),
            "ema_updates": getattr(run.emas, "updates", 0)})
        save_flow(raw(run, "ema_slow"), run.out / "flow.safetensors", notes={"updates": run.update, "evaluations": run.evaluations})


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


FlowTrainer.preview, FlowTrainer.save, FlowTrainer.resume = preview, save, resume


def pretrain(config, keep_going=lambda: True, progress=True, images=None):
    """`scfm pretrain`: trains up to config.updates, from the newest checkpoint on, and returns the run, or None when it was stopped.

    At the end the average lies in config.out as flow.safetensors and, unless it is told the step size, as a pipeline.
    """
    run = FlowTrainer(config, progress, images)
    if run.resume() > config.max_train_steps:
        raise ValueError(f"updates={config.max_train_steps}: {run.out} is at {run.update} already")
    run.train(keep_going)
    if run.update < config.max_train_steps:
        return None
    if run.accelerator.is_main_process and config.method == "scfm":
        save_pipeline(raw(run, "ema_slow"), run.images.names, run.out / "pipeline")
    return run
