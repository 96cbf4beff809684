"""From prompts, or from a folder of one's own, to images and their cache: `scfm data`, and the first part of a run."""
import gc
import os
from dataclasses import dataclass, fields
from pathlib import Path
from typing import NamedTuple

from diffusers import FlowMatchEulerDiscreteScheduler

from scfm.data.cache import CachePlan, in_threads, inspect_picture
from scfm.data.images import parse_sizes, read_folder
from scfm.data.prompts import read_prompts
from scfm.data.teacher_images import begin, make_pictures, rows_to_paint
from scfm.method.distill import option
from scfm.models.check import LAYERS
from scfm.models.family import family_of, velocities
from scfm.models.loading import DTYPES, can_quantize, load_pipeline
from scfm.models.source import empty_transformer, local_folder, without_weights

PAINTING = ("steps", "guidance", "seed", "count", "batch")    # what only a teacher who paints can obey


@dataclass
class DataConfig:
    """Everything that one `scfm data` needs to know; the defaults are for FLUX.1-dev at 512 px."""
    pipeline: str = option("", "folder of the pre-trained pipeline (diffusers layout)")
    prompts: str = option("", "captions for the teacher to paint: a text file, a .jsonl file, or datasets:NAME[:SPLIT[:COLUMN]]")
    pictures: str = option("", "your own picture folder with metadata.jsonl instead of prompts: it is only cached")
    out: str = option("", "folder of the pictures; with --pictures, of the cache alone (default: the picture folder)")
    sizes: tuple = option(("512x512",), "sizes in pixels, HEIGHTxWIDTH,...: each picture is painted in one of them, at random; your "
                          "own go to the nearest aspect ratio")
    count: int = option(0, "pictures to paint, going round the captions; 0 for one a caption")
    steps: int = option(32, "the teacher's steps")
    guidance: float = option(3.5, "the teacher's guidance scale")
    seed: int = option(0, "seed of noise and sizes")
    batch: int = option(16, "pictures painted together")
    max_tokens: int = option(512, "length of the text sequence in tokens")
    negative: str = option("", "negative prompt, for a family with true guidance (SD3)")
    precision: str = option("fp32", "fp32 or bf16: of the transformer and the encoders")
    quantize: str = option("", "nf4: paint with the transformer in 4 bits, for 24 GB cards (needs pip install 'scfm[nf4]'); empty: as it is")
    cache: bool = option(True, "encode pictures and captions")
    cache_folder: str = option("", "where to; empty: the folder cache beside the pictures")

    def check(self):
        """Raises ValueError or FileNotFoundError for what cannot work, before anything is loaded."""
        if not self.pipeline:
            raise ValueError("no pipeline: say --pipeline FOLDER")
        if bool(self.prompts) == bool(self.pictures):
            raise ValueError("say either --prompts FILE (the teacher paints) or --pictures FOLDER (your own)")
        if self.prompts and not self.out:
            raise ValueError("no folder for the pictures: say --out FOLDER")
        if self.pictures and not self.cache:
            raise ValueError("--pictures with --no-cache leaves nothing to do")
        told = [name for name in PAINTING if self.pictures and getattr(self, name) != default_of(name)]
        if told:
            raise ValueError(f"--{told[0]} says how the teacher paints, but --pictures are painted already: leave one of them out")
        for name, least in {"steps": 1, "batch": 1, "max_tokens": 1, "count": 0, "guidance": 0}.items():
            if not getattr(self, name) >= least:
                raise ValueError(f"{name} is {getattr(self, name)}: give {least} or more")
        if self.precision not in DTYPES:
            raise ValueError(f"precision is {self.precision!r}: take one of {', '.join(DTYPES)}")
        if self.quantize not in ("", "nf4"):
            raise ValueError(f"quantize is {self.quantize!r}: take nf4, or leave it out")
        if self.quantize and self.prompts:
            can_quantize()
        folder = local_folder(self.pipeline)
        family_of(folder)                       # names a folder that is no pipeline
        self.families_of(without_weights(folder))

    def families_of(self, pipe):
        """{(height, width): family}. ValueError for a size, or a number of tokens, that the model cannot take."""
        family_class, more = family_of(local_folder(self.pipeline)), {"negative": self.negative} if self.negative else {}
        if more and not family_class.true_guidance:
            raise ValueError(f"negative {self.negative!r}: this family has no negative prompts: leave it out")
        return {size: family_class(pipe, *size, self.max_tokens, **more) for size in parse_sizes(self.sizes)}


def default_of(name):
    return next(f.default for f in fields(DataConfig) if f.name == name)


class Made(NamedTuple):
    """What `make_data` made or found: the folder, numbers of pictures and captions, the cache's folder ("" for none) and its bytes."""
    folder: Path
    pictures: int
    captions: int
    cache: str
    bytes: int


def make_data(config, state, progress=True):
    """Paints what is missing, then encodes what is missing, shared among processes; returns (`Made`, `CachedRows` or None).

    state: an Accelerator or a PartialState. Every stage loads the parts of the pipeline that it needs, and lets go of them: the
    text encoders are never in memory beside an optimizer. A stage that finds all done loads nothing.
    """
    process, progress = (state.process_index, state.num_processes), progress and state.is_main_process
    load = lambda parts: config.families_of(load_pipeline(config.pipeline, DTYPES[config.precision], state.device, parts,
                                                            config.quantize if parts == "all" else "")[0])
    folder, families = Path(config.pictures or config.out), None
    if config.prompts:
        captions = read_prompts(config.prompts)
        captions = [captions[i % len(captions)] for i in range(config.count or len(captions))]
        told = config.steps, config.guidance, config.seed
        missing = begin(folder, rows_to_paint(unloaded(config), captions, *told), state.is_main_process)
        state.wait_for_everyone()               # all have seen what is missing, before the first picture is new
        if missing:
            families = load("all")
            make_pictures(families, captions, folder, *told, config.batch, progress, process)
        state.wait_for_everyone()
    if not config.cache:
        pairs = read_folder(folder)
        return Made(folder, len(pairs), len({caption for _, caption in pairs}), "", 0), None
    plan = CachePlan(local_folder(config.pipeline), folder, config.cache_folder or Path(config.out or folder) / "cache", parse_sizes(config.sizes), config.max_tokens,
                     DTYPES[config.precision], config.negative)
    if plan.missing():
        plan.encode(families or load("encoders"), process, progress)
    state.wait_for_everyone()                   # outside the if: a late process may find that nothing is missing
    families = None
    gc.collect()                                # what a stage has loaded is not needed by the next one
    rows = plan.open()
    size = sum((plan.folder / shard.name).stat().st_size for shard in plan.shards)
    return Made(folder, len(rows), len(rows.texts), str(plan.folder), size), rows


def unloaded(config):
    """The families as far as configuration files tell: enough to lay out what will be painted."""
    pipe = without_weights(local_folder(config.pipeline))
    pipe.scheduler = FlowMatchEulerDiscreteScheduler.from_pretrained(str(local_folder(config.pipeline)), subfolder="scheduler")
    return config.families_of(pipe)


def check_processes(state):
    """ValueError when accelerate does not see the processes that were launched, so that each would do all the work."""
    launched = int(os.environ.get("WORLD_SIZE", 1))
    if launched != state.num_processes:
        raise ValueError(f"{launched} processes were launched, but accelerate sees {state.num_processes}: without a GPU set "
                         "ACCELERATE_USE_CPU=true")


def data_of(config):
    """The `DataConfig` of a run: what its teacher paints, or the user's own pictures, at the run's sizes."""
    painted = {} if config.pictures else dict(out=str(Path(config.out) / "pictures"), steps=config.teacher_steps,
                                              guidance=config.teacher_guidance, seed=config.seed)
    return DataConfig(pipeline=config.pipeline, prompts=config.prompts, pictures=config.pictures, cache_folder=config.cache,
                      sizes=(f"{config.height}x{config.width}", *config.more_sizes), max_tokens=config.max_tokens,
                      negative=config.negative, precision=config.precision, quantize=config.quantize, **painted)


def check_inputs(config):
    """ValueError or FileNotFoundError for what captions, pictures and the pipeline's configuration rule out: no weight is read."""
    data, folder = data_of(config), local_folder(config.pipeline)
    family_of(folder)
    data.check()
    family = next(iter(data.families_of(without_weights(folder)).values()))
    velocities(family, config.guidance_mode)
    if config.prompts:
        read_prompts(config.prompts)
    else:
        in_threads(inspect_picture, [path for path, _ in read_folder(config.pictures)])
    if config.quantize:
        can_quantize()
    names = [n for n, m in empty_transformer(folder).named_modules() if isinstance(m, LAYERS)] if config.targets else []
    for target in config.targets:
        if not any(f".{name}".endswith(f".{target}") for name in names):
            raise ValueError(f"target {target} is no linear layer (or convolution) of {folder.name}: take endings such as {', '.join(family.lora_targets[:4])}")
