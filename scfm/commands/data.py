"""`scfm data`: the teacher's pictures, or a folder of one's own, and the cache of latents and text embeddings beside them."""
import argparse
import os
from dataclasses import dataclass, fields
from pathlib import Path
from typing import NamedTuple

from accelerate import PartialState
from accelerate.utils import parse_flag_from_env
from diffusers import FlowMatchEulerDiscreteScheduler

from scfm.cache import CachePlan
from scfm.commands import add_options, from_file
from scfm.config import DTYPES
from scfm.distill import option
from scfm.families import family_of, load_pipeline, local_folder, without_weights
from scfm.teacher_data import begin, make_pictures, parse_sizes, read_folder, read_prompts, rows_to_paint

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
    cache: bool = option(True, "encode pictures and captions, into the folder cache beside them")

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
        parse_sizes(self.sizes)
        folder = local_folder(self.pipeline)
        family_class = family_of(folder)
        if self.negative and not family_class.true_guidance:
            raise ValueError(f"--negative {self.negative!r}: this family has no negative prompts: leave it out")
        self.families_of(without_weights(folder))

    def families_of(self, pipe):
        """{(height, width): family}. ValueError for a size, or a number of tokens, that the model cannot take."""
        family_class, more = family_of(local_folder(self.pipeline)), {"negative": self.negative} if self.negative else {}
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


def make_data(config, progress=True):
    """`scfm data`: paints what is missing, then encodes what is missing, shared among the processes that were launched."""
    state = processes()
    process, progress = (state.process_index, state.num_processes), progress and state.is_main_process
    load = lambda parts: config.families_of(load_pipeline(config.pipeline, DTYPES[config.precision], state.device, parts)[0])
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
        return Made(folder, len(pairs), len({caption for _, caption in pairs}), "", 0)
    plan = CachePlan(config.pipeline, folder, Path(config.out or folder) / "cache", parse_sizes(config.sizes), config.max_tokens,
                     DTYPES[config.precision], config.negative)
    if plan.missing():
        plan.encode(families or load("encoders"), process, progress)
    state.wait_for_everyone()                   # outside the if: a late process may find that nothing is missing
    rows = plan.open()
    return Made(folder, len(rows), len(rows.texts), str(plan.folder), sum((plan.folder / s.name).stat().st_size for s in plan.shards))


def unloaded(config):
    """The families as far as configuration files tell: enough to lay out what will be painted."""
    pipe = without_weights(local_folder(config.pipeline))
    pipe.scheduler = FlowMatchEulerDiscreteScheduler.from_pretrained(str(local_folder(config.pipeline)), subfolder="scheduler")
    return config.families_of(pipe)


def processes():
    """accelerate's state. ValueError when it does not see the processes that were launched, so that each would do all the work."""
    state = PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU"))
    launched = int(os.environ.get("WORLD_SIZE", 1))
    if launched != state.num_processes:
        raise ValueError(f"{launched} processes were launched, but accelerate sees {state.num_processes}: without a GPU set "
                         "ACCELERATE_USE_CPU=true")
    return state


def main(argv):
    """`scfm data`: a flag for every field of DataConfig."""
    parser = argparse.ArgumentParser(
        prog="scfm data", formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        description="Let a pipeline paint captions into a folder with metadata.jsonl, then encode pictures and captions once, so "
                    "that distilling needs neither the VAE nor the text encoders. Run the same command again to go on after "
                    "a kill. Several GPUs share the work: accelerate launch --multi_gpu --num_processes 8 -m scfm.cli data ...")
    parser.add_argument("--config", metavar="FILE", help="JSON file of the settings below; flags override it")
    add_options(parser, DataConfig)
    settings = vars(from_file(parser, argv).parse_args(argv))
    config = DataConfig(**{k: v for k, v in settings.items() if k != "config"})
    config.check()
    made = make_data(config)
    state = PartialState()
    if state.is_main_process:
        cached = f"; latents and embeddings in {made.cache}, {made.bytes / 2**20:.1f} MiB" if made.cache else ""
        print(f"{made.pictures} pictures of {made.captions} different captions in {made.folder}{cached}")
    state.destroy_process_group()
    return 0
