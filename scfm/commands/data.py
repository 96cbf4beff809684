"""`scfm data`: the teacher's images, or a folder of one's own, and the cache of latents and text embeddings beside them."""
import argparse

from accelerate import PartialState
from accelerate.utils import parse_flag_from_env

from scfm.commands import add_options, from_file
from scfm.data.prepare import DataConfig, check_processes, make_data


def main(argv):
    """`scfm data`: a flag for every field of DataConfig."""
    parser = argparse.ArgumentParser(
        prog="scfm data", formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        description="Let a pipeline generate captions into a folder with metadata.jsonl, then encode images and captions once, so "
                    "that distilling needs neither the VAE nor the text encoders. Run the same command again to go on after "
                    "a kill. Several GPUs share the work: accelerate launch --multi_gpu --num_processes 8 -m scfm.cli data ...")
    parser.add_argument("--config", metavar="FILE", help="YAML or JSON file of the settings below; flags override it")
    add_options(parser, DataConfig)
    settings = vars(from_file(parser, argv).parse_args(argv))
    config = DataConfig(**{k: v for k, v in settings.items() if k != "config"})
    config.check()
    state = PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU"))
    check_processes(state)
    made, _ = make_data(config, state)
    if state.is_main_process:
        cached = f"; latents and embeddings in {made.cache}, {made.bytes / 2**20:.1f} MiB" if made.cache else ""
        print(f"{made.images} images of {made.captions} different captions in {made.folder}{cached}")
    state.destroy_process_group()
    return 0
