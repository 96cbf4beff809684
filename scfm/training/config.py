"""The settings of a distillation, where they come from, and the folder that remembers them."""

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import yaml

from scfm.data.prepare import DataConfig
from scfm.files import atomic_write, expand_user
from scfm.method.consistency import TARGET_MODELS
from scfm.method.distill import STEP_SCALED, SCFMConfig, is_int, setting, validate
from scfm.models.loading import DTYPES
from scfm.training.environment import environment_info

PRESETS = Path(str(resources.files("scfm") / "presets"))


@dataclass
class DistillConfig(SCFMConfig):
    """Everything that one `scfm distill` needs to know; the defaults are for FLUX.1-dev at 512 px."""

    pretrained_model_name_or_path: str = setting(
        "", "folder of the pre-trained pipeline (diffusers layout), or its name on the hub"
    )
    output_dir: str = setting("runs/distill", "folder of checkpoints, previews and results")
    prompts: str = setting(
        "", "captions, whose images the teacher generates first: a text file, JSONL, or datasets:NAME"
    )
    train_data_dir: str = setting("", "your own image folder with metadata.jsonl instead of prompts")
    cache_dir: str = setting("", "folder of latents and text embeddings; empty: cache/ in the image folder")
    height: int = setting(512, "image height in pixels")
    width: int = setting(512, "image width in pixels")
    more_sizes: tuple = setting(
        (), "further sizes, HEIGHTxWIDTH, as 640x384,384x640: each image goes to the nearest shape"
    )
    max_sequence_length: int = setting(512, "length of the text sequence in tokens")
    negative_prompt: str = setting("", "negative prompt of families with classifier-free guidance")
    rank: int = setting(64, "rank of the LoRA")
    lora_alpha: int = setting(0, "alpha of the LoRA; 0 takes the rank")
    lora_layers: tuple = setting(
        (), "endings of the names of the layers that get a LoRA; empty: all that the family names"
    )
    guidance_scale_range: tuple = setting((0.0, 7.5), "range of the guidance scale, drawn per example")
    guidance_mode: str = setting(
        "kept",
        "kept: all models are guided, and so is inference; distilled: the "
        "teacher alone, "
        "which needs a family with classifier-free guidance; the student then "
        "samples at guidance scale 1",
    )
    dynamic_shift_prob: float = setting(
        0.1,
        "share of examples at the shift that the stock pipeline "
        "itself would use, where it depends on the size",
    )
    teacher_steps: int = setting(32, "steps of the teacher's own images")
    teacher_guidance_scale: float = setting(
        3.5, "guidance scale of the teacher's images, of validation and of the selection"
    )
    shift: tuple[float, ...] = setting(
        (),
        "range of the time shift, drawn per example; empty: 2.5 to 4.5; with step_scaled, which trains on "
        "the grids that are sampled, within a tenth of inference_shift",
    )
    micro_batch_size: int = setting(
        0, "examples of one forward at most: less memory, the same step; 0: all that a process has"
    )
    checkpointing_steps: int = setting(200, "training steps between checkpoints")
    checkpoints_total_limit: int = setting(2, "checkpoints that stay, the newest ones")
    resume_from_checkpoint: str = setting(
        "auto",
        "auto: go on from the newest checkpoint in output_dir, "
        "if there is one; never; or a checkpoint's folder",
    )
    validation_steps: int = setting(200, "training steps between validation images; 0 for none")
    eval_num_steps: tuple = setting((3, 4), "step counts of validation and of the selection of what is saved")
    inference_shift: float = setting(
        3.0, "time shift of validation and of the selection (inference should use it too)"
    )
    num_eval_prompts: int = setting(
        64, "captions on which student, fast and slow EMA are compared at the end"
    )
    eval_lora_scales: tuple = setting((0.25, 0.5, 0.75, 1.0, 1.25), "LoRA scales at which they are compared")
    select_adapter: str = setting(
        "best",
        "which model is saved on top: best, by that comparison, or student, ema_fast, ema_slow (step_scaled: "
        "student, ema)",
    )
    weight_dtype: str = setting(
        "fp32", "fp32 or bf16: of the frozen base and the encoders (adapters stay in fp32)"
    )
    quantize: str = setting(
        "", "nf4: the frozen base in 4 bits, for 24 GB cards (needs pip install 'scfm[nf4]'); empty: as it is"
    )
    gradient_checkpointing: bool = setting(False, "recompute activations in backward: less memory, more time")
    report_to: str = setting(
        "tensorboard",
        "where loss, norm and validation images go: tensorboard (output_dir/logs), wandb, or none",
    )

    def __post_init__(self) -> None:
        expand_user(self)

    @property
    def shift_range(self) -> tuple[float, float]:
        """Between which shifts an example's is drawn."""
        if self.shift:
            low, high = self.shift
            return low, high
        if self.algorithm == STEP_SCALED:
            return 0.9 * self.inference_shift, 1.1 * self.inference_shift
        return 2.5, 4.5

    @property
    def model_names(self) -> tuple[str, ...]:
        """The models that are trained, of which one is saved on top."""
        return ("student", "ema") if self.algorithm == STEP_SCALED else ("student", "ema_fast", "ema_slow")

    def check(self) -> None:
        """ValueError that names the setting, its value and the mend. Looks at nothing but the settings."""
        super().check()
        if not self.pretrained_model_name_or_path:
            raise ValueError("no pipeline: say --pretrained_model_name_or_path FOLDER")
        if bool(self.prompts) == bool(self.train_data_dir):
            raise ValueError(
                "say either --prompts FILE (the teacher generates) or --train_data_dir FOLDER (your own)"
            )
        validate(self, DISTILL_VALIDATORS)
        refuse_for_step_scaled(self)
        if self.guidance_mode == "distilled" and "ema_slow" in TARGET_MODELS.get(self.algorithm, {}).get(
            "teacher", ()
        ):
            raise ValueError(
                f"guidance_mode distilled with algorithm {self.algorithm}: its slow EMA would "
                f"pull the teacher's "
                "examples back to no guidance: take --algorithm dual_pure or one_ema"
            )
        self.data_config().check()

    def data_config(self) -> DataConfig:
        """What the run's teacher generates, or the user's own images, at the run's sizes."""
        generated: dict[str, Any] = (
            {}
            if self.train_data_dir
            else dict(
                output_dir=str(Path(self.output_dir) / "images"),
                teacher_steps=self.teacher_steps,
                teacher_guidance_scale=self.teacher_guidance_scale,
                seed=self.seed,
            )
        )
        return DataConfig(
            pretrained_model_name_or_path=self.pretrained_model_name_or_path,
            prompts=self.prompts,
            train_data_dir=self.train_data_dir,
            cache_dir=self.cache_dir,
            sizes=(f"{self.height}x{self.width}", *self.more_sizes),
            max_sequence_length=self.max_sequence_length,
            negative_prompt=self.negative_prompt,
            weight_dtype=self.weight_dtype,
            quantize=self.quantize,
            **generated,
        )


def refuse_for_step_scaled(config: DistillConfig) -> None:
    """ValueError for what the algorithm step_scaled cannot do."""
    if config.algorithm != STEP_SCALED:
        return
    if config.guidance_mode == "distilled":
        raise ValueError(
            "guidance_mode distilled with algorithm step_scaled: at small scales the student is its teacher, "
            "and a guided one is not the base: take --guidance_mode kept"
        )
    low, high = config.shift_range
    if not low <= config.inference_shift <= high:
        raise ValueError(
            f"shift {low:g} to {high:g} with algorithm step_scaled and inference_shift "
            f"{config.inference_shift:g}: it trains on the grids that are sampled: leave --shift out"
        )


def at_least(least: int, *names: str) -> list[tuple[str, Callable[[Any], bool], str]]:
    """Validators of whole numbers."""
    return [
        (n, lambda c, n=n: is_int(getattr(c, n), least), f"a whole number of at least {least}") for n in names
    ]


# (field, what must hold, the mend), as in `scfm.method.distill.VALIDATORS`
DISTILL_VALIDATORS = [
    *at_least(
        1,
        "height",
        "width",
        "max_sequence_length",
        "rank",
        "teacher_steps",
        "checkpointing_steps",
        "checkpoints_total_limit",
        "num_eval_prompts",
    ),
    *at_least(0, "lora_alpha", "micro_batch_size", "validation_steps"),
    (
        "guidance_scale_range",
        lambda c: len(c.guidance_scale_range) == 2 and c.guidance_scale_range[0] <= c.guidance_scale_range[1],
        "a range, low,high",
    ),
    ("guidance_mode", lambda c: c.guidance_mode in ("kept", "distilled"), "kept or distilled"),
    ("dynamic_shift_prob", lambda c: 0 <= c.dynamic_shift_prob <= 1, "a share of the examples, in [0, 1]"),
    ("teacher_guidance_scale", lambda c: c.teacher_guidance_scale >= 0, "a guidance scale of at least 0"),
    (
        "eval_num_steps",
        lambda c: c.eval_num_steps and all(is_int(n, 1) for n in c.eval_num_steps),
        "step counts of 1 or more, as 3,4",
    ),
    (
        "inference_shift",
        lambda c: c.inference_shift > 0,
        "a number above 0; what training saw, 3 for image latents",
    ),
    (
        "eval_lora_scales",
        lambda c: c.eval_lora_scales and 0 < min(c.eval_lora_scales) <= max(c.eval_lora_scales) <= 4,
        "LoRA scales above 0 and up to 4, as .5,1",
    ),
    (
        "select_adapter",
        lambda c: c.select_adapter in ("best", *c.model_names),
        "best, student, ema_fast or ema_slow; with step_scaled best, student or ema",
    ),
    ("weight_dtype", lambda c: c.weight_dtype in DTYPES, " or ".join(DTYPES)),
    ("quantize", lambda c: c.quantize in ("", "nf4"), "nf4, or leave it out"),
    ("report_to", lambda c: c.report_to in ("tensorboard", "wandb", "none"), "tensorboard, wandb or none"),
]

# What may differ between the runs that share a folder: nothing that changes a step that has been made.
# Paths are compared by what lies there (inputs.json), not by how they are written.
PATHS = ("pretrained_model_name_or_path", "prompts", "train_data_dir", "cache_dir", "output_dir", "teacher")
OURS = ("images", "cache", "logs")  # what may lie in a run's folder before its config.json
RESUMABLE = (
    "pretrained_model_name_or_path",
    "prompts",
    "train_data_dir",
    "max_train_steps",
    "output_dir",
    "cache_dir",
    "checkpointing_steps",
    "checkpoints_total_limit",
    "resume_from_checkpoint",
    "validation_steps",
    "num_eval_prompts",
    "eval_lora_scales",
    "eval_num_steps",
    "select_adapter",
    "micro_batch_size",
    "report_to",
)


def load_settings(path: str | Path) -> dict[str, Any]:
    """The settings of a YAML or JSON file, lists as tuples. A name without a folder also means a preset.

    FileNotFoundError or ValueError when it cannot be read.
    """
    path, presets = Path(path), {p.stem: p for p in sorted(PRESETS.glob("*.yaml"))}
    if not path.is_file():
        path = presets.get(str(path), path)
    if not path.is_file():
        raise FileNotFoundError(f"no settings at {path}; presets: {', '.join(presets)}")
    try:
        settings = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is neither YAML nor JSON ({' '.join(str(error).split())})") from None
    if not isinstance(settings, dict):
        raise ValueError(f"{path} holds no settings: write one a line, as  rank: 64")
    return {name: tuple(value) if isinstance(value, list) else value for name, value in settings.items()}


def as_json(config: Any) -> dict[str, Any]:
    """The settings as a file gives them back: tuples as lists."""
    return json.loads(json.dumps(asdict(config)))


def load_saved_config(folder: str | Path, config_class: type) -> dict[str, Any] | None:
    """The settings in a folder's config.json, with the defaults of the dataclass for those it lacks; None
    without one."""
    path = Path(folder) / "config.json"
    if not path.is_file():
        return None
    return {**as_json(config_class()), **json.loads(path.read_text(encoding="utf-8"))}


def with_full_paths(config: Any) -> dict[str, Any]:
    """The settings as they are saved: the paths that exist here in full, so that they mean the same from any
    folder."""
    settings = as_json(config)
    for name in PATHS:
        value = settings.get(name)
        if value and Path(value).exists():
            settings[name] = str(Path(value).resolve())
    return settings


def init_output_dir(folder: str | Path, config: Any, inputs: dict[str, str] | None = None) -> None:
    """Makes the run's folder with config.json, run.json and inputs.json.

    ValueError when it was begun with other settings or other inputs.
    Settings that an
    older run did not know yet count as their defaults. `max_train_steps` may change while the learning rate
    is constant.
    inputs: fingerprints of what the settings name (transformer, data).
    """
    folder, new, old = Path(folder), with_full_paths(config), load_saved_config(folder, type(config))
    if old:
        refuse_other_settings(folder, config, old, new)
        refuse_other_inputs(folder, inputs or {})
    for name, record in (
        ("config.json", new),
        ("run.json", environment_info()),
        ("inputs.json", inputs or {}),
    ):
        text = json.dumps(record, indent=1)
        atomic_write(folder / name, lambda path, text=text: path.write_text(text, encoding="utf-8"))


def refuse_strangers(folder: Path) -> None:
    """ValueError when a folder without a run's config.json holds files: they may be somebody's."""
    if not folder.is_dir() or (folder / "config.json").is_file():
        return
    strangers = [path.name for path in folder.glob("*") if path.name not in OURS and path.name[0] != "."]
    if strangers:
        names = ", ".join(sorted(strangers)[:3])
        raise ValueError(f"{folder} holds {names}, but no config.json of a run: take a folder of its own")


def refuse_other_settings(folder: Path, config: Any, old: dict[str, Any], new: dict[str, Any]) -> None:
    """ValueError when a setting that changes a step that has been made differs; old and new values are
    shown."""
    falls = config.lr_scheduler != "constant"
    fixed = [k for k in new if k not in RESUMABLE or (k == "max_train_steps" and falls)]
    changed = [k for k in fixed if new[k] != old[k]]
    if changed == ["max_train_steps"]:
        raise ValueError(
            f"{folder} is of a run of {old['max_train_steps']} steps, over which its learning rate falls "
            f"({config.lr_scheduler}): it cannot go on; take another --output_dir, and "
            "--lr_scheduler constant to keep that door open"
        )
    if changed:
        values = "; ".join(f"{k} {old[k]!r} before, {new[k]!r} now" for k in changed[:3])
        raise ValueError(
            f"{folder} is of a run with another {', '.join(changed)} ({values}): take another --output_dir"
        )


def refuse_other_inputs(folder: Path, inputs: dict[str, str]) -> None:
    """ValueError when a file that the settings name is not what it was when the run began."""
    path = folder / "inputs.json"
    old = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    changed = [name for name, mark in inputs.items() if old.get(name, mark) != mark]
    if changed:
        raise ValueError(
            f"{folder} is of a run with another {', '.join(changed)}: what the settings name was changed "
            f"since it began; "
            "put it back, or take another --output_dir"
        )
