"""The settings of a distillation, and where they come from."""

import json
from dataclasses import asdict, dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import yaml

from scfm.data.prepare import DataConfig
from scfm.files import expand_user
from scfm.method.consistency import TARGET_MODELS
from scfm.method.distill import STEP_SCALED, SCFMConfig, setting, validate
from scfm.models.quantize import HELP as QUANTIZE_HELP
from scfm.training.validators import DISTILL_VALIDATORS, refuse_for_shard

PRESETS = Path(str(resources.files("scfm") / "presets"))


@dataclass
class DistillConfig(SCFMConfig):
    """Everything that one `scfm distill` needs to know; the defaults are for FLUX.1-dev at 512 px."""

    pretrained_model_name_or_path: str = setting(
        "", "folder of the pre-trained pipeline (diffusers layout), or its name on the hub"
    )
    algorithm: str = setting(
        STEP_SCALED,
        "step_scaled: the LoRA scale is the step size, one student for 1 to 16 steps (chapter "
        "06_step_scale); the paper's: dual (Algorithm 2), one_ema (Algorithm 1), or dual_pure: dual with "
        "teacher examples whose targets are the teacher's alone",
    )
    output_dir: str = setting("runs/distill", "folder of checkpoints, previews and results")
    prompts: str = setting(
        "",
        "captions, an image of each of which the teacher makes first: a text file, JSONL, or datasets:NAME",
    )
    train_data_dir: str = setting("", "your own image folder with metadata.jsonl instead of prompts")
    cache_dir: str = setting("", "folder of latents and text embeddings; empty: cache/ in the image folder")
    height: int = setting(512, "image height in pixels")
    width: int = setting(512, "image width in pixels")
    more_sizes: tuple = setting(
        (), "further sizes, HEIGHTxWIDTH, as 640x384,384x640: each image goes to the nearest shape"
    )
    num_frames: int = setting(1, "frames of a video, for a family that makes videos; 1: images")
    max_sequence_length: int = setting(512, "length of the text sequence in tokens")
    negative_prompt: str = setting("", "negative prompt of families with classifier-free guidance")
    rank: int = setting(64, "rank of the LoRA")
    lora_alpha: int = setting(0, "alpha of the LoRA; 0 takes the rank")
    lora_layers: tuple = setting(
        (), "endings of the names of the layers that get a LoRA; empty: all that the family names"
    )
    guidance_scale_range: tuple = setting(
        (0.0, 7.5),
        "range of the guidance scale, drawn per example; of no meaning where guidance is distilled",
    )
    guidance_mode: str = setting(
        "kept",
        "kept: all models are guided, and so is inference; distilled: the teacher alone, at "
        "teacher_guidance_scale, which needs a family with classifier-free guidance; the student then "
        "samples at guidance scale 1, at half the cost",
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
    eval_num_steps: tuple = setting(
        (1, 2, 4, 8), "step counts of validation and of the selection of what is saved"
    )
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
    use_8bit_adam: bool = setting(
        False,
        "AdamW's moments in 8 bits, a quarter of the memory, by bitsandbytes (pip install 'scfm[adam8bit]')",
    )
    quantize: str = setting("", f"the frozen base in {QUANTIZE_HELP}; empty: as it is")
    blocks_to_swap: int = setting(
        0,
        "how many of the transformer's blocks keep their frozen weights on the host, and are on the GPU only "
        "while they compute: less memory, more time",
    )
    shard: int = setting(
        0,
        "processes that share one copy of the frozen base, for one that does not fit a GPU: as many as a "
        "machine has GPUs; 0: each process holds it whole",
    )
    gradient_checkpointing: bool = setting(False, "recompute activations in backward: less memory, more time")
    checkpoint_blocks: int = setting(
        0, "with gradient_checkpointing: how many of the transformer's blocks are recomputed; 0: all"
    )
    compile_blocks: bool = setting(
        False, "compile the transformer's blocks: some minutes at the start, then faster steps"
    )
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
    def guidance_range(self) -> tuple[float, float]:
        """Between which guidance scales an example's is drawn: where guidance is distilled there is one, for
        the student is not told and would learn the mean of all."""
        if self.guidance_mode == "distilled":
            return self.teacher_guidance_scale, self.teacher_guidance_scale
        low, high = self.guidance_scale_range
        return low, high

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
        refuse_for_algorithm(self)
        if self.shard:
            refuse_for_shard(self)
        if self.blocks_to_swap and self.compile_blocks:
            raise ValueError(
                f"blocks_to_swap={self.blocks_to_swap} with compile_blocks: a compiled block does not wait "
                "for its weights: take one of the two"
            )
        refuse_for_guidance(self)
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
            num_frames=self.num_frames,
            max_sequence_length=self.max_sequence_length,
            negative_prompt=self.negative_prompt,
            weight_dtype=self.weight_dtype,
            quantize=self.quantize,
            blocks_to_swap=self.blocks_to_swap,
            **generated,
        )


def as_json(config: Any) -> dict[str, Any]:
    """The settings as a file gives them back: tuples as lists."""
    return json.loads(json.dumps(asdict(config)))


# settings that one kind of algorithm has and the other has not
OF_THE_PAPERS = (
    "teacher_ratio",
    "teacher_grid",
    "self_grids",
    "t_skip",
    "ema_decay_fast",
    "ema_decay_slow",
    "restart_every",
    "ema_target_scale",
    "dynamic_shift_prob",
    "eval_lora_scales",
)
OF_STEP_SCALED = (
    "scale_exponent",
    "scale_order",
    "step_counts",
    "step_weights",
    "finest_steps",
    "ema_decay",
    "difference_lr",
)


def refuse_for_algorithm(config: DistillConfig) -> None:
    """ValueError for settings that mean nothing to the algorithm, and for what step_scaled cannot do."""
    is_scaled = config.algorithm == STEP_SCALED
    strangers = OF_THE_PAPERS if is_scaled else OF_STEP_SCALED
    usual, mine = as_json(type(config)()), as_json(config)  # a settings file has lists for tuples
    changed = [name for name in strangers if mine[name] != usual[name]]
    if changed:
        raise ValueError(
            f"{changed[0]}={getattr(config, changed[0])!r} means nothing to algorithm {config.algorithm}: "
            f"leave it out, or take {'--algorithm dual' if is_scaled else '--algorithm step_scaled'}"
        )
    if is_scaled:
        refuse_for_step_scaled(config)


def refuse_for_step_scaled(config: DistillConfig) -> None:
    """ValueError for what the algorithm step_scaled cannot do."""
    if config.non_shortcut_ratio:
        raise ValueError(
            f"non_shortcut_ratio={config.non_shortcut_ratio} with algorithm step_scaled: at scale 0 the base "
            "would have to learn, and it is frozen: take 0"
        )
    low, high = config.shift_range
    if not low <= config.inference_shift <= high:
        raise ValueError(
            f"shift {low:g} to {high:g} with algorithm step_scaled and inference_shift "
            f"{config.inference_shift:g}: it trains on the grids that are sampled: leave --shift out"
        )


def refuse_for_guidance(config: DistillConfig) -> None:
    """ValueError where the guidance cannot be distilled as the settings have it."""
    if config.guidance_mode != "distilled":
        return
    if config.teacher_guidance_scale <= 1:
        raise ValueError(
            f"guidance_mode distilled with teacher_guidance_scale={config.teacher_guidance_scale:g}: up to 1 "
            "there is no guidance to distil: give the scale that the student shall have in it"
        )
    if "ema_slow" in TARGET_MODELS.get(config.algorithm, {}).get("teacher", ()):
        raise ValueError(
            f"guidance_mode distilled with algorithm {config.algorithm}: its slow EMA would pull the "
            "teacher's examples back to no guidance: take --algorithm dual_pure or one_ema"
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
