"""The settings that every use of a LoRA shares; what is left open is read from the folder of its run."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from safetensors import SafetensorError

from scfm.data.images import is_image, read_folder
from scfm.data.prompts import read_prompts
from scfm.data.videos import is_video
from scfm.files import expand_user
from scfm.inference.adapters import lora_file
from scfm.method.distill import setting
from scfm.models.loading import DTYPES
from scfm.models.lora import WEIGHT_NAME
from scfm.models.lora_file import read_lora_scales
from scfm.models.quantize import HELP as QUANTIZE_HELP
from scfm.models.quantize import require_quantizer
from scfm.training.config import DistillConfig, as_json, load_settings
from scfm.training.output_dir import load_saved_config

Config = TypeVar("Config", bound="InferenceConfig")

# settings that are read from the run's config.json under the same name, where they have their default here
FROM_RUN = (
    "pretrained_model_name_or_path",
    "height",
    "width",
    "num_frames",
    "max_sequence_length",
    "inference_shift",
    "negative_prompt",
    "weight_dtype",
    "quantize",
)


@dataclass
class InferenceConfig:
    """What `scfm sample`, `dial`, `evaluate` and `export` share.

    What is empty or negative is left open; `resolved` fills it in from the LoRA's run.
    """

    lora: str = setting("", "folder of the LoRA, as scfm distill writes it")
    pretrained_model_name_or_path: str = setting(
        "", "folder of the pipeline, or its name on the hub; empty: the one that the LoRA was made for"
    )
    height: int = setting(0, "image height in pixels; 0: that of the run")
    width: int = setting(0, "image width in pixels; 0: that of the run")
    num_frames: int = setting(0, "frames of a video, 1 for images; 0: as many as in the run")
    max_sequence_length: int = setting(0, "length of the text sequence; 0: that of the run")
    guidance_scale: float = setting(
        -1.0, "guidance scale; below 0: that of the run's own images, or 1 if it is in the weights"
    )
    teacher_guidance_scale: float = setting(
        -1.0,
        "guidance scale of the teacher, which the LoRA is compared with; below 0: the same, or that of the "
        "run's own images if it is in the weights",
    )
    inference_shift: float = setting(
        0.0, "time shift of the sampling grid; 0: the one at which the run was validated"
    )
    negative_prompt: str = setting(
        "", "negative prompt, for families with classifier-free guidance; empty: that of the run"
    )
    weight_dtype: str = setting("", "fp32 or bf16; empty: that of the run")
    quantize: str = setting("", f"the base in {QUANTIZE_HELP}; none: as it is; empty: as in the run")
    seed: int = setting(0, "of the noise")

    is_resolved = False  # no annotation: an attribute, not a setting
    guidance_inside = False  # whether the student has learned to do without guidance

    def __post_init__(self) -> None:
        expand_user(self)

    @property
    def weights(self) -> Path:
        """The file of the LoRA."""
        return Path(self.lora) / WEIGHT_NAME

    def resolved(self: Config) -> Config:
        """A new config in which everything that was left open is filled in; the same object if it has been.

        Settings are changed before: `dataclasses.replace` of the result gives one that is not resolved.
        """
        if self.is_resolved:
            return self
        config = replace(self)
        config.fill_in()
        config.is_resolved = True
        return config

    def fill_in(self) -> None:
        """Fills in, in place, what the run's config.json says; `resolved` calls it on a copy."""
        run = load_saved_config(self.lora, DistillConfig) or as_json(DistillConfig())
        for name in FROM_RUN:
            if getattr(self, name) == getattr(InferenceConfig, name):
                setattr(self, name, run[name])
        self.pretrained_model_name_or_path = found_above(self.pretrained_model_name_or_path, Path(self.lora))
        teachers, self.guidance_inside = self.guidance_of(run)
        if self.guidance_scale < 0:
            self.guidance_scale = 1.0 if self.guidance_inside else teachers
        if self.teacher_guidance_scale < 0:
            self.teacher_guidance_scale = teachers if self.guidance_inside else self.guidance_scale
        if self.quantize == "none":
            self.quantize = ""

    def guidance_of(self, run: dict[str, Any]) -> tuple[float, bool]:
        """(the teacher's guidance scale, whether the student has learned to do without it), by the header of
        the LoRA, which a copied file keeps, else by the run's settings."""
        try:
            header = read_lora_scales(self.weights) if self.weights.is_file() else None
        except SafetensorError:
            header = None  # `check` says so
        if header is not None and header.guidance:
            return header.guidance, True
        return run["teacher_guidance_scale"], run["guidance_mode"] == "distilled"

    def check(self) -> None:
        """FileNotFoundError or ValueError names what is missing, before anything is loaded.

        Changes nothing: of a config that is not resolved, that is checked which it resolves to.
        """
        config = self.resolved()
        if not config.lora or not config.weights.is_file():
            raise FileNotFoundError(
                f"no LoRA at {config.weights}: say --lora FOLDER, a folder that scfm distill wrote"
            )
        lora_file(config.weights)
        if not config.pretrained_model_name_or_path:
            raise ValueError(
                f"{config.lora} does not say which pipeline it is for: "
                "say --pretrained_model_name_or_path FOLDER"
            )
        if config.weight_dtype not in DTYPES:
            raise ValueError(f"weight_dtype is {config.weight_dtype!r}: take one of {', '.join(DTYPES)}")
        require_quantizer(config.quantize, "--quantize none")
        if not config.inference_shift > 0:
            raise ValueError(f"inference_shift is {config.inference_shift}: give a number above 0")


def found_above(name: str, lora: Path) -> str:
    """The pipeline's name, or its folder where a relative one is found from the LoRA's folder upwards: the
    run may have been made from another place than where its LoRA is used."""
    if not name or Path(name).is_absolute() or Path(name).exists():
        return name
    above = (folder / name for folder in lora.resolve().parents)
    return next((str(folder) for folder in above if (folder / "model_index.json").is_file()), name)


def load_captions(prompts: str, lora: str, count: int) -> list[str]:
    """`count` captions of a file, going round if it has fewer.

    prompts: the file; empty: those of the run in the folder `lora`
    FileNotFoundError or ValueError when there are none.
    """
    captions = read_prompts(prompts) if prompts else run_captions(lora)
    return (captions * -(-count // len(captions)))[:count]


def run_captions(folder: str | Path) -> list[str]:
    """The captions that a run was made with: its prompts, or those of its images. ValueError when it names
    neither."""
    path = Path(folder) / "config.json"
    settings = load_settings(path) if path.is_file() else {}
    if settings.get("prompts"):
        return read_prompts(settings["prompts"])
    if settings.get("train_data_dir"):
        counts = is_video if settings.get("num_frames", 1) > 1 else is_image
        return [caption for _, caption in read_folder(settings["train_data_dir"], counts)]
    raise ValueError(f"{folder} does not name its captions: say --prompts FILE")
