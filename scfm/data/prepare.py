"""From prompts, or from a folder of one's own, to images and their cache: `scfm data`, and the first part of
a run."""

import gc
import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, NamedTuple

from scfm.data.cache import CachedDataset, CachedText, CachePlan
from scfm.data.fingerprint import PARTS, fingerprint
from scfm.data.images import ListedImage, Size, list_images, parse_sizes, read_folder
from scfm.data.prompts import read_prompts
from scfm.data.teacher_images import begin_listing, generate_images, listing_rows
from scfm.data.videos import list_videos
from scfm.files import check_writable, expand_user
from scfm.method.distill import setting
from scfm.models.blocks import first_blocks
from scfm.models.loading import DTYPES, Parts, load_pipeline
from scfm.models.quantize import HELP as QUANTIZE_HELP
from scfm.models.quantize import KINDS, is_known, require_quantizer
from scfm.models.source import PipelineSource
from scfm.models.video import frame_options
from scfm.types import Family

GENERATION_SETTINGS = ("teacher_steps", "teacher_guidance_scale", "seed", "num_images", "batch_size")


@dataclass
class DataConfig:
    """Everything that one `scfm data` needs to know; the defaults are for FLUX.1-dev at 512 px."""

    pretrained_model_name_or_path: str = setting(
        "", "folder of the pre-trained pipeline (diffusers layout), or its name on the hub"
    )
    prompts: str = setting(
        "",
        "captions for the teacher to generate: a text file, a .jsonl file, or datasets:NAME[:SPLIT[:COLUMN]]",
    )
    train_data_dir: str = setting(
        "", "your own image folder with metadata.jsonl instead of prompts: it is only cached"
    )
    output_dir: str = setting(
        "", "folder of the images; with --train_data_dir, of the cache alone (default: the image folder)"
    )
    sizes: tuple = setting(
        ("512x512",),
        "sizes in pixels, HEIGHTxWIDTH,...: each image is generated in "
        "one of them, at random; "
        "your own go to the nearest aspect ratio",
    )
    num_images: int = setting(0, "images to generate, going round the captions; 0 for one a caption")
    teacher_steps: int = setting(32, "the teacher's steps")
    teacher_guidance_scale: float = setting(3.5, "the teacher's guidance scale")
    seed: int = setting(0, "seed of noise and sizes")
    batch_size: int = setting(16, "images generated together; videos: fewer, by the frames of their latents")
    num_frames: int = setting(1, "frames of a video, for a family that makes videos; 1: images")
    max_sequence_length: int = setting(512, "length of the text sequence in tokens")
    negative_prompt: str = setting("", "negative prompt, for a family with classifier-free guidance (SD3)")
    weight_dtype: str = setting("fp32", "fp32 or bf16: of the transformer and the encoders")
    quantize: str = setting("", f"generate with the transformer in {QUANTIZE_HELP}; empty: as it is")
    blocks_to_swap: int = setting(
        0, "generate with the weights of so many of the transformer's blocks on the host, see scfm distill"
    )
    cache: bool = setting(True, "encode images and captions")
    cache_dir: str = setting("", "where to; empty: the folder cache beside the images")

    def __post_init__(self) -> None:
        expand_user(self)

    def check(self) -> None:
        """ValueError for values that cannot work. Looks at nothing but the settings."""
        if not self.pretrained_model_name_or_path:
            raise ValueError("no pipeline: say --pretrained_model_name_or_path FOLDER")
        if bool(self.prompts) == bool(self.train_data_dir):
            raise ValueError(
                "say either --prompts FILE (the teacher generates) or --train_data_dir FOLDER (your own)"
            )
        if self.prompts and not self.output_dir:
            raise ValueError("no folder for the images: say --output_dir FOLDER")
        if self.train_data_dir and not self.cache:
            raise ValueError("--train_data_dir with --no-cache leaves nothing to do")
        useless = [
            name
            for name in GENERATION_SETTINGS
            if self.train_data_dir and getattr(self, name) != default_of(name)
        ]
        if useless:
            raise ValueError(
                f"--{useless[0]} says how the teacher generates, but the images of "
                f"--train_data_dir are there "
                "already: leave one of them out"
            )
        for name, least in {
            "teacher_steps": 1,
            "batch_size": 1,
            "max_sequence_length": 1,
            "num_frames": 1,
            "num_images": 0,
            "blocks_to_swap": 0,
            "teacher_guidance_scale": 0,
        }.items():
            if not getattr(self, name) >= least:
                raise ValueError(f"{name} is {getattr(self, name)}: give {least} or more")
        if self.weight_dtype not in DTYPES:
            raise ValueError(f"weight_dtype is {self.weight_dtype!r}: take one of {', '.join(DTYPES)}")
        if not is_known(self.quantize):
            raise ValueError(f"quantize is {self.quantize!r}: take {KINDS}, or leave it out")
        parse_sizes(self.sizes)


def default_of(name: str) -> Any:
    """The default of a setting of `DataConfig`."""
    return next(f.default for f in fields(DataConfig) if f.name == name)


def make_families(config: DataConfig, source: PipelineSource, pipe: Any = None) -> dict[Size, Any]:
    """{(height, width): family} of the config's sizes, on a loaded pipeline, or on what the configuration
    files say (None).

    ValueError for a size, a number of tokens or of frames, or a negative prompt that the model cannot take.
    """
    more: dict[str, Any] = {"negative_prompt": config.negative_prompt} if config.negative_prompt else {}
    family_class: Any = source.family
    if more and not family_class.uses_cfg:
        raise ValueError(
            f"negative_prompt {config.negative_prompt!r}: this family has no negative prompts: leave it out"
        )
    more |= frame_options(family_class, config.num_frames)
    pipe = source.skeleton if pipe is None else pipe
    return {
        size: family_class(pipe, *size, config.max_sequence_length, **more)
        for size in parse_sizes(config.sizes)
    }


class Inputs(NamedTuple):
    """What the user brings, read once. captions: one for each image to generate; images: the user's own, []
    with prompts."""

    captions: list[str]
    images: list[ListedImage]


def read_inputs(config: DataConfig, source: PipelineSource) -> Inputs:
    """Reads captions, or looks at every image of the user's folder. No weight is read.

    FileNotFoundError or ValueError that name the line, the image, or the size that the model cannot take.
    """
    make_families(config, source)
    source.check_files()
    if config.prompts:
        require_quantizer(config.quantize)
        if config.blocks_to_swap:
            first_blocks(source.empty_transformer(), config.blocks_to_swap, "blocks_to_swap")
    if config.train_data_dir:
        return Inputs([], listed(config, config.train_data_dir))
    captions = read_prompts(config.prompts)
    return Inputs([captions[i % len(captions)] for i in range(config.num_images or len(captions))], [])


def listed(config: DataConfig, folder: str | Path) -> list[ListedImage]:
    """The images that a folder lists, or its videos, each opened once."""
    return list_images(folder) if config.num_frames == 1 else list_videos(folder, config.num_frames)


def fingerprint_of(inputs: Inputs) -> str:
    """A hash of captions, and of images by their bytes, in their order."""
    content = [inputs.captions, [(image.caption, image.digest) for image in inputs.images]]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:24]


class Made(NamedTuple):
    """What `make_data` made or found. folder: of the images; images, captions: how many; cache: its folder
    ("" for none)."""

    folder: Path
    images: int
    captions: int
    cache: str
    bytes: int


def make_data(
    config: DataConfig, source: PipelineSource, inputs: Inputs, state: Any, progress: bool = True
) -> tuple[Made, CachedDataset | None]:
    """Generates what is missing, then encodes what is missing, shared among processes; the dataset is None
    without a cache.

    state: an Accelerator or a PartialState. Every stage loads the parts of the pipeline that it needs, and
    lets go of them: the text encoders are never in memory beside the transformer. A stage that finds all done
    loads nothing.
    """
    progress = progress and state.is_main_process
    folder = Path(config.train_data_dir or config.output_dir)
    families = generate_missing(config, source, inputs, state, progress) if config.prompts else None
    if not config.cache:
        pairs = read_folder(folder)
        return Made(folder, len(pairs), len({caption for _, caption in pairs}), "", 0), None
    images = inputs.images or listed(config, folder)
    plan = CachePlan(
        source,
        images,
        cache_folder(config),
        parse_sizes(config.sizes),
        config.max_sequence_length,
        DTYPES[config.weight_dtype],
        config.negative_prompt,
        num_frames=config.num_frames,
    )
    missing = plan.missing()
    if missing:
        check_writable(plan.folder, "say --cache_dir FOLDER")
        if families is None or any(shard.kind != "latents" for shard in missing):
            families = load_families(config, source, state, "encoders")
        plan.encode(families, (state.process_index, state.num_processes), progress)
    # outside the if: a late process may find that nothing is missing
    state.wait_for_everyone()
    del families
    gc.collect()  # what a stage has loaded is not needed by the next one
    dataset = plan.open()
    size = sum((plan.folder / shard.name).stat().st_size for shard in plan.shards)
    return Made(folder, len(dataset), len(dataset.texts), str(plan.folder), size), dataset


def generate_missing(
    config: DataConfig, source: PipelineSource, inputs: Inputs, state: Any, progress: bool
) -> Mapping[Size, Family] | None:
    """The teacher's images that are not there yet. Returns the families with the VAE loaded, None where
    nothing was missing.

    The captions are encoded first, all of them, into the cache; the transformer is loaded when their encoders
    are gone.
    """
    how = config.teacher_steps, config.teacher_guidance_scale, config.seed
    skeleton = source.skeleton
    skeleton.scheduler = source.scheduler()
    pipeline = fingerprint(source, *PARTS)
    rows = listing_rows(make_families(config, source, skeleton), inputs.captions, *how, pipeline)
    missing = begin_listing(Path(config.output_dir), rows)
    state.wait_for_everyone()  # all have seen what is missing, before the first image is new
    if not missing:
        return None
    # before the hours of generating
    check_writable(config.output_dir, "take another --output_dir")
    if config.cache:
        check_writable(cache_folder(config), "say --cache_dir FOLDER")
    text = cached_text(config, source, inputs.captions, state, progress)
    families = load_families(config, source, state, "images")
    for family in families.values():
        family.encode_text = text.text_of
    generate_images(
        families,
        inputs.captions,
        config.output_dir,
        *how,
        config.batch_size,
        progress,
        (state.process_index, state.num_processes),
        pipeline,
    )
    state.wait_for_everyone()
    if not config.cache and state.is_main_process:
        for path in text_folder(config).glob("*.safetensors"):
            path.unlink()
        text_folder(config).rmdir()
    return families


def cached_text(
    config: DataConfig, source: PipelineSource, captions: Sequence[str], state: Any, progress: bool
) -> CachedText:
    """The embeddings of captions, encoded where they are missing, shared among processes. When it returns,
    no text encoder is in memory."""
    plan = CachePlan(
        source,
        [],
        text_folder(config),
        parse_sizes(config.sizes),
        config.max_sequence_length,
        DTYPES[config.weight_dtype],
        config.negative_prompt,
        captions,
    )
    if plan.missing():
        families = load_families(config, source, state, "encoders")
        plan.encode(families, (state.process_index, state.num_processes), progress)
        del families
        gc.collect()
    state.wait_for_everyone()
    return plan.open_text()


def text_folder(config: DataConfig) -> Path:
    """Where the text embeddings lie while images are made: in the cache, or where none is kept, in a folder
    that goes again."""
    return cache_folder(config) if config.cache else Path(config.output_dir) / "text"


def cache_folder(config: DataConfig) -> Path:
    """Where the latents and text embeddings of a config go."""
    return Path(config.cache_dir or Path(config.output_dir or config.train_data_dir) / "cache")


def load_families(config: DataConfig, source: PipelineSource, state: Any, parts: Parts) -> dict[Size, Any]:
    """The families with these parts of the pipeline in memory."""
    quantize, swap = (config.quantize, config.blocks_to_swap) if parts == "images" else ("", 0)
    pipe, _ = load_pipeline(source, DTYPES[config.weight_dtype], state.device, parts, quantize, swap)
    return make_families(config, source, pipe)


def check_processes(state: Any) -> None:
    """ValueError when accelerate does not see the processes that were launched, so that each would do all the
    work, or when the launch asks for what is not done here, so that it would be left out in silence."""
    for engine in ("FSDP", "DEEPSPEED", "MEGATRON_LM"):
        if os.environ.get(f"ACCELERATE_USE_{engine}", "").lower() in ("1", "true", "yes"):
            raise ValueError(
                f"accelerate was set up for {engine}, which is not done here: every process holds the whole "
                "base, and the gradients of the LoRA are added up. Launch without it; where the base does "
                "not fit, scfm distill --shard N shares it out, and --quantize int8 or nf4 makes it smaller"
            )
    launched = int(os.environ.get("WORLD_SIZE", 1))
    if launched != state.num_processes:
        raise ValueError(
            f"{launched} processes were launched, but accelerate sees {state.num_processes}: "
            f"without a GPU set "
            "ACCELERATE_USE_CPU=true"
        )
