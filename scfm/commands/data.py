"""`scfm data`: the teacher's images, or a folder of one's own, and the cache of latents and text embeddings
beside them."""

from collections.abc import Sequence

from accelerate import PartialState
from accelerate.utils import parse_flag_from_env

from scfm.commands.options import make_parser, parse_config
from scfm.data.prepare import DataConfig, check_processes, make_data, read_inputs
from scfm.models.source import PipelineSource


def main(argv: Sequence[str]) -> int:
    """`scfm data`: a flag for every field of DataConfig."""
    parser = make_parser(
        "scfm data",
        "Let a pipeline generate an image for each caption into a folder "
        "with metadata.jsonl, then "
        "encode images and captions once, so that distilling needs neither the VAE nor "
        "the text encoders. Run "
        "the same command again to go on after a kill. Several GPUs share the work: "
        "accelerate launch "
        "--multi_gpu --num_processes 8 -m scfm.cli data ...",
        "scfm data --pretrained_model_name_or_path PIPELINE --prompts captions.txt --output_dir images",
    )
    config = parse_config(
        parser, argv, DataConfig, "YAML or JSON file of the settings below; flags override it"
    )
    config.check()
    source = PipelineSource(config.pretrained_model_name_or_path)
    inputs = read_inputs(config, source)
    state = PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU"))
    check_processes(state)
    made, _ = make_data(config, source, inputs, state)
    if state.is_main_process:
        cached = (
            f"; latents and embeddings in {made.cache}, {made.bytes / 2**20:.1f} MiB" if made.cache else ""
        )
        print(f"{made.images} images of {made.captions} different captions in {made.folder}{cached}")
    state.destroy_process_group()
    return 0
