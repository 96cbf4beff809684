"""The settings of a distillation, where they come from, and the folder that remembers them."""
import json
import platform
import subprocess
from contextlib import suppress
from dataclasses import asdict, dataclass
from importlib import resources
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
import yaml

import scfm
from scfm.method.consistency import CAST
from scfm.method.distill import DistillConfig, follow, option, whole
from scfm.models.loading import DTYPES


@dataclass
class RunConfig(DistillConfig):
    """Everything that one `scfm distill` needs to know; the defaults are for FLUX.1-dev at 512 px."""
    pipeline: str = option("", "folder of the pre-trained pipeline (diffusers layout), or its name on the hub")
    out: str = option("runs/distill", "folder of checkpoints, previews and results")
    prompts: str = option("", "captions, which the teacher paints first: a text file, JSONL, or datasets:NAME")
    pictures: str = option("", "your own picture folder with metadata.jsonl instead of prompts")
    cache: str = option("", "folder of latents and text embeddings; empty: cache/ in the picture folder")
    height: int = option(512, "picture height in pixels")
    width: int = option(512, "picture width in pixels")
    more_sizes: tuple = option((), "further sizes, HEIGHTxWIDTH, as 640x384,384x640: each picture goes to the nearest shape")
    max_tokens: int = option(512, "length of the text sequence in tokens")
    negative: str = option("", "negative prompt of families with true guidance")
    rank: int = option(64, "rank of the LoRA")
    alpha: int = option(0, "alpha of the LoRA; 0 takes the rank")
    targets: tuple = option((), "endings of the names of the linear layers that get a LoRA; empty: all that the family names")
    guidance: tuple = option((0.0, 7.5), "range of the guidance scale, drawn per row")
    guidance_mode: str = option("kept", "kept: all speakers are guided, and so is inference; distilled: the teacher alone, "
                                "which needs a family with true guidance; the student then samples at guidance scale 1")
    own_share: float = option(0.1, "share of rows at the shift that the stock pipeline itself would use, where it depends on the size")
    teacher_steps: int = option(32, "steps of the teacher's own pictures")
    teacher_guidance: float = option(3.5, "guidance scale of the teacher's pictures, the previews and the choice")
    micro_batch: int = option(0, "rows of one forward at most: less memory, the same update; 0: all that a process has")
    checkpoint_every: int = option(200, "updates between checkpoints")
    keep: int = option(2, "checkpoints kept, the newest ones")
    resume: str = option("auto", "auto: go on from the newest checkpoint in out, if there is one; never; or a checkpoint's folder")
    preview_every: int = option(200, "updates between preview pictures; 0 for none")
    student_steps: tuple = option((3, 4), "step counts of previews and of the choice of what ships")
    sample_shift: float = option(3.0, "time shift of previews and of the choice (inference should use it too)")
    judge: int = option(64, "captions on which student, fast and slow are compared at the end")
    judge_scales: tuple = option((0.25, 0.5, 0.75, 1.0, 1.25), "LoRA strengths at which they are compared, for the dial")
    ship: str = option("best", "which adapter is put on top: best, by that comparison, or student, fast, slow")
    precision: str = option("fp32", "fp32 or bf16: of the frozen base and the encoders (adapters stay in fp32)")
    quantize: str = option("", "nf4: the frozen base in 4 bits, for 24 GB cards (needs pip install 'scfm[nf4]'); empty: as it is")
    gradient_checkpointing: bool = option(False, "recompute activations in backward: less memory, more time")
    tracker: str = option("tensorboard", "where loss, norm and previews go: tensorboard (out/logs), wandb, or none")

    def check(self):
        """ValueError that names the setting, its value and the mend, before anything is loaded."""
        super().check()
        if not self.pipeline:
            raise ValueError("no pipeline: say --pipeline FOLDER")
        if bool(self.prompts) == bool(self.pictures):
            raise ValueError("say either --prompts FILE (the teacher paints) or --pictures FOLDER (your own)")
        follow(self, RUN_RULES)
        if self.guidance_mode == "distilled" and "slow" in CAST[self.algorithm]["teacher"]:
            raise ValueError(f"guidance_mode distilled with algorithm {self.algorithm}: its slow EMA would pull the teacher's rows "
                             "back to no guidance: take --algorithm dual_pure or one_ema")


ROOT = Path(scfm.__file__).parents[1]                 # the checkout, if this is one
PRESETS = Path(str(resources.files("scfm") / "presets"))


def at_least(least, *names):
    return [(n, lambda c, n=n: whole(getattr(c, n), least), f"a whole number of at least {least}") for n in names]


# (field, what must hold, the mend), as in `scfm.method.distill.RULES`
RUN_RULES = [
    *at_least(1, "height", "width", "max_tokens", "rank", "teacher_steps", "checkpoint_every", "keep", "judge"),
    *at_least(0, "alpha", "micro_batch", "preview_every"),
    ("guidance", lambda c: len(c.guidance) == 2 and c.guidance[0] <= c.guidance[1], "a range, low,high"),
    ("guidance_mode", lambda c: c.guidance_mode in ("kept", "distilled"), "kept or distilled"),
    ("own_share", lambda c: 0 <= c.own_share <= 1, "a share of the rows, in [0, 1]"),
    ("teacher_guidance", lambda c: c.teacher_guidance >= 0, "a guidance scale of at least 0"),
    ("student_steps", lambda c: c.student_steps and all(whole(n, 1) for n in c.student_steps), "step counts of 1 or more, as 3,4"),
    ("sample_shift", lambda c: c.sample_shift > 0, "a number above 0; what training saw, 3 for image latents"),
    ("judge_scales", lambda c: c.judge_scales and 0 < min(c.judge_scales) <= max(c.judge_scales) <= 4,
     "LoRA strengths above 0 and up to 4, as .5,1"),
    ("ship", lambda c: c.ship in ("best", "student", "fast", "slow"), "best, student, fast or slow"),
    ("precision", lambda c: c.precision in DTYPES, " or ".join(DTYPES)),
    ("quantize", lambda c: c.quantize in ("", "nf4"), "nf4, or leave it out"),
    ("tracker", lambda c: c.tracker in ("tensorboard", "wandb", "none"), "tensorboard, wandb or none"),
]


def read_settings(path):
    """The settings of a YAML or JSON file as a dict, lists as tuples. A name without a folder also means a preset,
    scfm/presets/NAME.yaml. FileNotFoundError or ValueError when it cannot be read."""
    path, presets = Path(path), {p.stem: p for p in sorted(PRESETS.glob("*.yaml"))}
    if not path.is_file():
        path = presets.get(str(path), path)
    if not path.is_file():
        there = ", ".join(presets)
        raise FileNotFoundError(f"no settings at {path}" + (f"; presets: {there}" if there else ""))
    try:
        told = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is neither YAML nor JSON ({' '.join(str(error).split())})") from None
    if not isinstance(told, dict):
        raise ValueError(f"{path} holds no settings: write one a line, as  rank: 64")
    return {k: tuple(v) if isinstance(v, list) else v for k, v in told.items()}


# What may differ between the runs that share a folder: nothing that changes an update that has been made.
MAY_CHANGE = ("updates", "out", "cache", "checkpoint_every", "keep", "resume", "preview_every", "judge", "judge_scales",
              "student_steps", "ship", "micro_batch", "tracker")


def as_json(config):
    """The settings as a file gives them back: tuples as lists."""
    return json.loads(json.dumps(asdict(config)))


def told_before(out, kind):
    """The settings in a folder's config.json, with the defaults of the dataclass `kind` for those it has not; None without one."""
    path = Path(out) / "config.json"
    return {**as_json(kind()), **json.loads(path.read_text(encoding="utf-8"))} if path.is_file() else None


def begin_folder(out, config):
    """Makes the run's folder with config.json and run.json, or raises ValueError when it was begun with other settings.

    Settings that an older run did not know yet count as their defaults. `updates` may change while the schedule is constant.
    """
    out = Path(out)
    told, old = as_json(config), told_before(out, type(config))
    if old:
        fixed = [k for k in told if k not in MAY_CHANGE or (k == "updates" and config.schedule != "constant")]
        other = [k for k in fixed if told[k] != old[k]]
        if other == ["updates"]:
            raise ValueError(f"{out} is of a run of {old['updates']} updates, over which its learning rate falls ({config.schedule}): "
                             "it cannot go on; take another --out, and --schedule constant to keep that door open")
        if other:
            raise ValueError(f"{out} is of a run with another {', '.join(other)}: take another --out")
    out.mkdir(parents=True, exist_ok=True)
    for name, record in (("config.json", told), ("run.json", surroundings())):
        (out / (name + ".new")).write_text(json.dumps(record, indent=1), encoding="utf-8")
        (out / (name + ".new")).replace(out / name)


def surroundings():
    """What a run depends on beside its settings: versions, git state, machine."""
    record = {"python": platform.python_version(), "machine": platform.machine(),
              "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"}
    for name in ("scfm", "torch", "diffusers", "transformers", "peft", "accelerate"):
        with suppress(PackageNotFoundError):
            record[name] = version(name)
    git = lambda *words: subprocess.run(["git", "-C", str(ROOT), *words], capture_output=True, text=True, check=True)
    with suppress(OSError, subprocess.CalledProcessError):     # installed without git: then there is no state to tell
        record["commit"] = git("rev-parse", "HEAD").stdout.strip()
        record["changed"] = sorted(line[3:] for line in git("status", "--porcelain").stdout.splitlines())[:20]
    return record
