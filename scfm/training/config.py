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
from scfm.method.consistency import TARGET_MODELS
from scfm.method.distill import SCFMConfig, validate, setting, is_int
from scfm.models.loading import DTYPES


@dataclass
class DistillConfig(SCFMConfig):
    """Everything that one `scfm distill` needs to know; the defaults are for FLUX.1-dev at 512 px."""
    pretrained_model_name_or_path: str = setting("", "folder of the pre-trained pipeline (diffusers layout), or its name on the hub")
    output_dir: str = setting("runs/distill", "folder of checkpoints, previews and results")
    prompts: str = setting("", "captions, which the teacher generates first: a text file, JSONL, or datasets:NAME")
    train_data_dir: str = setting("", "your own image folder with metadata.jsonl instead of prompts")
    cache_dir: str = setting("", "folder of latents and text embeddings; empty: cache/ in the image folder")
    height: int = setting(512, "image height in pixels")
    width: int = setting(512, "image width in pixels")
    more_sizes: tuple = setting((), "further sizes, HEIGHTxWIDTH, as 640x384,384x640: each image goes to the nearest shape")
    max_sequence_length: int = setting(512, "length of the text sequence in tokens")
    negative_prompt: str = setting("", "negative prompt of families with true guidance")
    rank: int = setting(64, "rank of the LoRA")
    lora_alpha: int = setting(0, "alpha of the LoRA; 0 takes the rank")
    lora_layers: tuple = setting((), "endings of the names of the linear layers that get a LoRA; empty: all that the family names")
    guidance_scale_range: tuple = setting((0.0, 7.5), "range of the guidance scale, drawn per row")
    guidance_mode: str = setting("kept", "kept: all models are guided, and so is inference; distilled: the teacher alone, "
                                "which needs a family with true guidance; the student then samples at guidance scale 1")
    dynamic_shift_prob: float = setting(0.1, "share of rows at the shift that the stock pipeline itself would use, where it depends on the size")
    teacher_steps: int = setting(32, "steps of the teacher's own images")
    teacher_guidance_scale: float = setting(3.5, "guidance scale of the teacher's images, the previews and the choice")
    micro_batch_size: int = setting(0, "rows of one forward at most: less memory, the same update; 0: all that a process has")
    checkpointing_steps: int = setting(200, "updates between checkpoints")
    checkpoints_total_limit: int = setting(2, "checkpoints kept, the newest ones")
    resume_from_checkpoint: str = setting("auto", "auto: go on from the newest checkpoint in out, if there is one; never; or a checkpoint's folder")
    validation_steps: int = setting(200, "updates between preview images; 0 for none")
    eval_num_steps: tuple = setting((3, 4), "step counts of previews and of the selection of what is saved")
    inference_shift: float = setting(3.0, "time shift of previews and of the choice (inference should use it too)")
    num_eval_prompts: int = setting(64, "captions on which student, fast and slow are compared at the end")
    eval_lora_scales: tuple = setting((0.25, 0.5, 0.75, 1.0, 1.25), "LoRA strengths at which they are compared, for the dial")
    select_adapter: str = setting("best", "which adapter is put on top: best, by that comparison, or student, fast, slow")
    weight_dtype: str = setting("fp32", "fp32 or bf16: of the frozen base and the encoders (adapters stay in fp32)")
    quantize: str = setting("", "nf4: the frozen base in 4 bits, for 24 GB cards (needs pip install 'scfm[nf4]'); empty: as it is")
    gradient_checkpointing: bool = setting(False, "recompute activations in backward: less memory, more time")
    report_to: str = setting("tensorboard", "where loss, norm and previews go: tensorboard (out/logs), wandb, or none")

    def check(self):
        """ValueError that names the setting, its value and the mend, before anything is loaded."""
        super().check()
        if not self.pretrained_model_name_or_path:
            raise ValueError("no pipeline: say --pretrained_model_name_or_path FOLDER")
        if bool(self.prompts) == bool(self.train_data_dir):
            raise ValueError("say either --prompts FILE (the teacher generates) or --train_data_dir FOLDER (your own)")
        validate(self, DISTILL_VALIDATORS)
        if self.guidance_mode == "distilled" and "ema_slow" in TARGET_MODELS[self.algorithm]["teacher"]:
            raise ValueError(f"guidance_mode distilled with algorithm {self.algorithm}: its slow EMA would pull the teacher's rows "
                             "back to no guidance: take --algorithm dual_pure or one_ema")


ROOT = Path(scfm.__file__).parents[1]                 # the checkout, if this is one
PRESETS = Path(str(resources.files("scfm") / "presets"))


def at_least(least, *names):
    return [(n, lambda c, n=n: is_int(getattr(c, n), least), f"a whole number of at least {least}") for n in names]


# (field, what must hold, the mend), as in `scfm.method.distill.VALIDATORS`
DISTILL_VALIDATORS = [
    *at_least(1, "height", "width", "max_sequence_length", "rank", "teacher_steps", "checkpointing_steps",
               "checkpoints_total_limit", "num_eval_prompts"),
    *at_least(0, "lora_alpha", "micro_batch_size", "validation_steps"),
    ("guidance_scale_range", lambda c: len(c.guidance_scale_range) == 2 and c.guidance_scale_range[0] <= c.guidance_scale_range[1], "a range, low,high"),
    ("guidance_mode", lambda c: c.guidance_mode in ("kept", "distilled"), "kept or distilled"),
    ("dynamic_shift_prob", lambda c: 0 <= c.dynamic_shift_prob <= 1, "a share of the rows, in [0, 1]"),
    ("teacher_guidance_scale", lambda c: c.teacher_guidance_scale >= 0, "a guidance scale of at least 0"),
    ("eval_num_steps", lambda c: c.eval_num_steps and all(is_int(n, 1) for n in c.eval_num_steps), "step counts of 1 or more, as 3,4"),
    ("inference_shift", lambda c: c.inference_shift > 0, "a number above 0; what training saw, 3 for image latents"),
    ("eval_lora_scales", lambda c: c.eval_lora_scales and 0 < min(c.eval_lora_scales) <= max(c.eval_lora_scales) <= 4,
     "LoRA strengths above 0 and up to 4, as .5,1"),
    ("select_adapter", lambda c: c.select_adapter in ("best", "student", "ema_fast", "ema_slow"), "best, student, fast or slow"),
    ("weight_dtype", lambda c: c.weight_dtype in DTYPES, " or ".join(DTYPES)),
    ("quantize", lambda c: c.quantize in ("", "nf4"), "nf4, or leave it out"),
    ("report_to", lambda c: c.report_to in ("tensorboard", "wandb", "none"), "tensorboard, wandb or none"),
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
RESUMABLE = ("max_train_steps", "output_dir", "cache_dir", "checkpointing_steps", "checkpoints_total_limit",
             "resume_from_checkpoint", "validation_steps", "num_eval_prompts", "eval_lora_scales", "eval_num_steps",
             "select_adapter", "micro_batch_size", "report_to")


def as_json(config):
    """The settings as a file gives them back: tuples as lists."""
    return json.loads(json.dumps(asdict(config)))


def load_saved_config(out, kind):
    """The settings in a folder's config.json, with the defaults of the dataclass `kind` for those it has not; None without one."""
    path = Path(out) / "config.json"
    return {**as_json(kind()), **json.loads(path.read_text(encoding="utf-8"))} if path.is_file() else None


def init_output_dir(out, config):
    """Makes the run's folder with config.json and run.json, or raises ValueError when it was begun with other settings.

    Settings that an older run did not know yet count as their defaults. `updates` may change while the schedule is constant.
    """
    out = Path(out)
    told, old = as_json(config), load_saved_config(out, type(config))
    if old:
        fixed = [k for k in told if k not in RESUMABLE or (k == "max_train_steps" and config.lr_scheduler != "constant")]
        other = [k for k in fixed if told[k] != old[k]]
        if other == ["max_train_steps"]:
            raise ValueError(f"{out} is of a run of {old['max_train_steps']} updates, over which its learning rate falls ({config.lr_scheduler}): "
                             "it cannot go on; take another --output_dir, and --lr_scheduler constant to keep that door open")
        if other:
            raise ValueError(f"{out} is of a run with another {', '.join(other)}: take another --output_dir")
    out.mkdir(parents=True, exist_ok=True)
    for name, record in (("config.json", told), ("run.json", environment_info())):
        (out / (name + ".new")).write_text(json.dumps(record, indent=1), encoding="utf-8")
        (out / (name + ".new")).replace(out / name)


def environment_info():
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
