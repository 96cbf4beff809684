"""From prompts, or from a folder of one's own, to images and their cache: `scfm data`, and the first part of a run."""
import gc
import os
from dataclasses import dataclass, fields
from pathlib import Path
from typing import NamedTuple

from diffusers import FlowMatchEulerDiscreteScheduler

from scfm.data.cache import CachePlan, in_threads, inspect_image
from scfm.data.images import parse_sizes, read_folder
from scfm.data.prompts import read_prompts
from scfm.data.teacher_images import begin, generate_images, listing_rows
from scfm.method.distill import setting
from scfm.models.check import LAYERS
from scfm.models.family import family_of, velocities
from scfm.models.loading import DTYPES, require_bitsandbytes, load_pipeline
from scfm.models.source import empty_transformer, resolve_folder, without_weights

GENERATION_SETTINGS = ("teacher_steps", "teacher_guidance_scale", "seed", "num_images", "batch_size")    # what only a teacher who generates can obey


@dataclass
class DataConfig:
    """Everything that one `scfm data` needs to know; the defaults are for FLUX.1-dev at 512 px."""
    pretrained_model_name_or_path: str = setting("", "folder of the pre-trained pipeline (diffusers layout)")
    prompts: str = setting("", "captions for the teacher to generate: a text file, a .jsonl file, or datasets:NAME[:SPLIT[:COLUMN]]")
    train_data_dir: str = setting("", "your own image folder with metadata.jsonl instead of prompts: it is only cached")
    output_dir: str = setting("", "folder of the images; with --train_data_dir, of the cache alone (default: the image folder)")
    sizes: tuple = setting(("512x512",), "sizes in pixels, HEIGHTxWIDTH,...: each image is generated in one of them, at random; your "
                          "own go to the nearest aspect ratio")
    num_images: int = setting(0, "images to generate, going round the captions; 0 for one a caption")
    teacher_steps: int = setting(32, "the teacher's steps")
    teacher_guidance_scale: float = setting(3.5, "the teacher's guidance scale")
    seed: int = setting(0, "seed of noise and sizes")
    batch_size: int = setting(16, "images generated together")
    max_sequence_length: int = setting(512, "length of the text sequence in tokens")
    negative_prompt: str = setting("", "negative prompt, for a family with true guidance (SD3)")
    weight_dtype: str = setting("fp32", "fp32 or bf16: of the transformer and the encoders")
    quantize: str = setting("", "nf4: generate with the transformer in 4 bits, for 24 GB cards (needs pip install 'scfm[nf4]'); empty: as it is")
    cache: bool = setting(True, "encode images and captions")
    cache_dir: str = setting("", "where to; empty: the folder cache beside the images")

    def check(self):
        """Raises ValueError or FileNotFoundError for what cannot work, before anything is loaded."""
        if not self.pretrained_model_name_or_path:
            raise ValueError("no pipeline: say --pretrained_model_name_or_path FOLDER")
        if bool(self.prompts) == bool(self.train_data_dir):
            raise ValueError("say either --prompts FILE (the teacher generates) or --train_data_dir FOLDER (your own)")
        if self.prompts and not self.output_dir:
            raise ValueError("no folder for the images: say --output_dir FOLDER")
        if self.train_data_dir and not self.cache:
            raise ValueError("--train_data_dir with --no-cache leaves nothing to do")
        told = [name for name in GENERATION_SETTINGS if self.train_data_dir and getattr(self, name) != default_of(name)]
        if told:
            raise ValueError(f"--{told[0]} says how the teacher generates, but --train_data_dir are generated already: leave one of them out")
        for name, least in {"teacher_steps": 1, "batch_size": 1, "max_sequence_length": 1, "num_images": 0,
                            "teacher_guidance_scale": 0}.items():
            if not getattr(self, name) >= least:
                raise ValueError(f"{name} is {getattr(self, name)}: give {least} or more")
        if self.weight_dtype not in DTYPES:
            raise ValueError(f"weight_dtype is {self.weight_dtype!r}: take one of {', '.join(DTYPES)}")
        if self.quantize not in ("", "nf4"):
            raise ValueError(f"quantize is {self.quantize!r}: take nf4, or leave it out")
        if self.quantize and self.prompts:
            require_bitsandbytes()
        folder = resolve_folder(self.pretrained_model_name_or_path)
        family_of(folder)                       # names a folder that is no pipeline
        self.families_of(without_weights(folder))

    def families_of(self, pipe):
        """{(height, width): family}. ValueError for a size, or a number of tokens, that the model cannot take."""
        family_class, more = family_of(resolve_folder(self.pretrained_model_name_or_path)), {"negative_prompt": self.negative_prompt} if self.negative_prompt else {}
        if more and not family_class.uses_cfg:
            raise ValueError(f"negative_prompt {self.negative_prompt!r}: this family has no negative prompts: leave it out")
        return {size: family_class(pipe, *size, self.max_sequence_length, **more) for size in parse_sizes(self.sizes)}


def default_of(name):
    return next(f.default for f in fields(DataConfig) if f.name == name)


class Made(NamedTuple):
    """What `make_data` made or found: the folder, numbers of images and captions, the cache's folder ("" for none) and its bytes."""
    folder: Path
    images: int
    captions: int
    cache: str
    bytes: int


def make_data(config, state, progress=True):
    """Generates what is missing, then encodes what is missing, shared among processes; returns (`Made`, `CachedDataset` or None).

    state: an Accelerator or a PartialState. Every stage loads the parts of the pipeline that it needs, and lets go of them: the
    text encoders are never in memory beside an optimizer. A stage that finds all done loads nothing.
    """
    process, progress = (state.process_index, state.num_processes), progress and state.is_main_process
    load = lambda parts: config.families_of(load_pipeline(config.pretrained_model_name_or_path, DTYPES[config.weight_dtype], state.device, parts,
                                                            config.quantize if parts == "all" else "")[0])
    folder, families = Path(config.train_data_dir or config.output_dir), None
    if config.prompts:
        captions = read_prompts(config.prompts)
        captions = [captions[i % len(captions)] for i in range(config.num_images or len(captions))]
        told = config.teacher_steps, config.teacher_guidance_scale, config.seed
        missing = begin(folder, listing_rows(unloaded(config), captions, *told), state.is_main_process)
        state.wait_for_everyone()               # all have seen what is missing, before the first image is new
        if missing:
            families = load("all")
            generate_images(families, captions, folder, *told, config.batch_size, progress, process)
        state.wait_for_everyone()
    if not config.cache:
        pairs = read_folder(folder)
        return Made(folder, len(pairs), len({caption for _, caption in pairs}), "", 0), None
    plan = CachePlan(resolve_folder(config.pretrained_model_name_or_path), folder, config.cache_dir or Path(config.output_dir or folder) / "cache", parse_sizes(config.sizes), config.max_sequence_length,
                     DTYPES[config.weight_dtype], config.negative_prompt)
    if plan.missing():
        plan.encode(families or load("encoders"), process, progress)
    state.wait_for_everyone()                   # outside the if: a late process may find that nothing is missing
    families = None
    gc.collect()                                # what a stage has loaded is not needed by the next one
    rows = plan.open()
    size = sum((plan.folder / shard.name).stat().st_size for shard in plan.shards)
    return Made(folder, len(rows), len(rows.texts), str(plan.folder), size), rows


def unloaded(config):
    """The families as far as configuration files tell: enough to lay out what will be generated."""
    pipe = without_weights(resolve_folder(config.pretrained_model_name_or_path))
    pipe.scheduler = FlowMatchEulerDiscreteScheduler.from_pretrained(str(resolve_folder(config.pretrained_model_name_or_path)), subfolder="scheduler")
    return config.families_of(pipe)


def check_processes(state):
    """ValueError when accelerate does not see the processes that were launched, so that each would do all the work."""
    launched = int(os.environ.get("WORLD_SIZE", 1))
    if launched != state.num_processes:
        raise ValueError(f"{launched} processes were launched, but accelerate sees {state.num_processes}: without a GPU set "
                         "ACCELERATE_USE_CPU=true")


def data_of(config):
    """The `DataConfig` of a run: what its teacher generates, or the user's own images, at the run's sizes."""
    generated = {} if config.train_data_dir else dict(output_dir=str(Path(config.output_dir) / "images"), teacher_steps=config.teacher_steps,
                                              teacher_guidance_scale=config.teacher_guidance_scale, seed=config.seed)
    return DataConfig(pretrained_model_name_or_path=config.pretrained_model_name_or_path, prompts=config.prompts, train_data_dir=config.train_data_dir, cache_dir=config.cache_dir,
                      sizes=(f"{config.height}x{config.width}", *config.more_sizes), max_sequence_length=config.max_sequence_length,
                      negative_prompt=config.negative_prompt, weight_dtype=config.weight_dtype, quantize=config.quantize, **generated)


def check_inputs(config):
    """ValueError or FileNotFoundError for what captions, images and the pipeline's configuration rule out: no weight is read."""
    data, folder = data_of(config), resolve_folder(config.pretrained_model_name_or_path)
    family_of(folder)
    data.check()
    family = next(iter(data.families_of(without_weights(folder)).values()))
    velocities(family, config.guidance_mode)
    if config.prompts:
        read_prompts(config.prompts)
    else:
        in_threads(inspect_image, [path for path, _ in read_folder(config.train_data_dir)])
    if config.quantize:
        require_bitsandbytes()
    names = [n for n, m in empty_transformer(folder).named_modules() if isinstance(m, LAYERS)] if config.lora_layers else []
    for target in config.lora_layers:
        if not any(f".{name}".endswith(f".{target}") for name in names):
            raise ValueError(f"target {target} is no linear layer (or convolution) of {folder.name}: take endings such as {', '.join(family.lora_targets[:4])}")
