"""`scfm push`: a step LoRA with its card to the Hugging Face hub."""

from collections.abc import Sequence

from scfm.commands.options import add_options, make_parser
from scfm.inference.push import PushConfig, build_repository, push


def main(argv: Sequence[str]) -> int:
    """`scfm push`: a flag for every field of PushConfig."""
    parser = make_parser(
        "scfm push",
        "Uploads a step LoRA to the Hugging Face hub: its file or files, the scales, an image, and a card "
        "with tags, base model and licence note. Settings stay here, as they name paths of this machine. The "
        "token is the one that `hf auth login` stored, or HF_TOKEN.",
        "scfm push --lora runs/mine --repo_id me/flux-steps --dry_run\n"
        "scfm push --lora runs/mine --repo_id me/flux-steps --private",
    )
    add_options(parser, PushConfig)
    config = PushConfig(**vars(parser.parse_args(argv)))
    config.check()
    if not config.dry_run:
        print(push(config))
        return 0
    repository = build_repository(config)
    for name, path in repository.files.items():
        print(f"{path.stat().st_size / 1e6:9.2f} MB  {name}")
    print(f"{len(repository.card.encode()) / 1e6:9.2f} MB  README.md\n\n{repository.card}")
    if "base_model:" not in repository.card:
        print("the card names no base model, since the run's is a folder: say --base_model OWNER/NAME")
    print(f"nothing was uploaded; without --dry_run it goes to {config.repo_id}")
    return 0
