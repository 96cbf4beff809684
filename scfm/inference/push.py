"""A step LoRA's folder as a repository of the Hugging Face hub: which files, the card, and the upload."""

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from huggingface_hub import CommitOperationAdd, HfApi, get_token
from huggingface_hub.errors import HfHubHTTPError

from scfm.files import expand_user
from scfm.inference.config import InferenceConfig
from scfm.inference.model_card import family_of, is_ours, render_card
from scfm.inference.step_lora import lora_files
from scfm.method.distill import setting
from scfm.models.hub import hub_reachable, unreachable
from scfm.models.lora_file import read_lora_scales

NAME = re.compile(r"\w[\w.-]*/\w[\w.-]*")
TAGS = ("lora", "diffusers", "few-step", "flow-matching", "distillation", "scfm")
RECORDS = ("lora_scales.json", "selection.json")  # which name no path of the machine
IMAGES = "images"
LICENCE_NOTE = """
## Licence

A LoRA is a change of its base's weights: the licence of {base} holds for it too.
"""


@dataclass
class PushConfig:
    """What `scfm push` needs to know."""

    lora: str = setting("", "folder of the LoRA, as scfm distill writes it")
    repo_id: str = setting("", "where to: OWNER/NAME")
    base_model: str = setting(
        "", "name of the base on the hub, for the card; empty: that of the run, where it is one"
    )
    license: str = setting(
        "other", "licence, as the hub names them; other: that of the base, as the card says"
    )
    private: bool = setting(False, "make a new repository private")
    dry_run: bool = setting(False, "show the files and the card, and upload nothing; needs no network")

    def __post_init__(self) -> None:
        expand_user(self)

    def check(self) -> None:
        """ValueError or FileNotFoundError with the setting, its value and the mend."""
        if not self.lora:
            raise ValueError("say --lora FOLDER, as scfm distill writes it")
        if not NAME.fullmatch(self.repo_id):
            raise ValueError(f"--repo_id is {self.repo_id!r}: say OWNER/NAME")
        if self.base_model and not NAME.fullmatch(self.base_model):
            raise ValueError(f"--base_model is {self.base_model!r}: say OWNER/NAME, as the hub has it")


class Repository(NamedTuple):
    """What would lie there. files: {path in the repository: path here}; card: the README.md, as text."""

    files: dict[str, Path]
    card: str


def build_repository(config: PushConfig) -> Repository:
    """The files of a run's folder that others need, and the card; no settings, which name paths of this
    machine.

    FileNotFoundError where there is no LoRA.
    """
    folder = Path(config.lora)
    run = InferenceConfig(lora=config.lora).resolved()
    if not run.weights.is_file():
        raise FileNotFoundError(f"no LoRA at {run.weights}")
    loras = lora_files(run.weights, read_lora_scales(run.weights)).values()
    files = {path.name: path for path in loras}
    files |= {name: folder / name for name in RECORDS if (folder / name).is_file()}
    previews = sorted((folder / "validation").glob("*.png"))
    if previews:
        files[f"{IMAGES}/{previews[-1].name}"] = previews[-1]
    return Repository(files, hub_card(config, run, list(files)))


def hub_card(config: PushConfig, run: InferenceConfig, names: list[str]) -> str:
    """The run's card with the hub's header, an image, and a note on the licence."""
    base = config.base_model or hub_name(run.pretrained_model_name_or_path)
    kind = "text-to-video" if getattr(family_of(run), "makes_videos", False) else "text-to-image"
    header = {
        "license": config.license,
        "library_name": "diffusers",
        "pipeline_tag": kind,
        **({"base_model": base, "base_model_relation": "adapter"} if base else {}),
        "tags": list(TAGS),
    }
    lines = [f"{key}: {json.dumps(value)}" for key, value in header.items()]  # JSON is YAML too
    card = render_card(config.lora, location=config.repo_id)
    images = [f"![The teacher's images, and the student's below them]({n})" for n in names if "/" in n]
    return "\n".join(
        ["---", *lines, "---", card, *images, LICENCE_NOTE.format(base=base or "the base model")]
    )


def hub_name(name: str) -> str:
    """A pipeline's name if it is one of the hub; empty for a folder."""
    return name if NAME.fullmatch(name) and not Path(name).exists() else ""


def push(config: PushConfig, api: Any = None) -> str:
    """Uploads the repository as one commit; returns its address.

    api: a `huggingface_hub.HfApi`; the token is the one that `hf auth login` stored or HF_TOKEN has, and is
        never shown

    ValueError where somebody else's README.md stands there; OSError where the hub does not take it.
    """
    config.check()
    repository = build_repository(config)
    token = get_token()
    if api is None:
        if not token:
            raise ValueError(
                "no token of the hub: run `hf auth login`, or set HF_TOKEN; --dry_run needs none"
            )
        if not hub_reachable():
            raise OSError(f"{unreachable()}: nothing was uploaded; --dry_run shows what would be")
        api = HfApi(token=token)
    operations = [CommitOperationAdd(name, str(path)) for name, path in repository.files.items()]
    operations.append(CommitOperationAdd("README.md", repository.card.encode()))
    try:
        url = api.create_repo(config.repo_id, private=config.private, exist_ok=True)
        refuse_foreign_card(api, config.repo_id)
        api.create_commit(config.repo_id, operations, commit_message="A step LoRA, by scfm push")
    except HfHubHTTPError as error:
        text = " ".join(str(error).split())
        raise OSError(
            f"{config.repo_id}: the hub refused ({hide(text, token)}); is the token's role write?"
        ) from None
    return str(url)


def refuse_foreign_card(api: Any, repo_id: str) -> None:
    """ValueError where the repository has a README.md that scfm did not write."""
    if not api.file_exists(repo_id, "README.md"):
        return
    if not is_ours(Path(api.hf_hub_download(repo_id, "README.md"))):
        raise ValueError(
            f"{repo_id} has a README.md that scfm did not write, which would be lost: name another "
            "repository, or delete that file there"
        )


def hide(text: str, token: str | None) -> str:
    """A message without the token, should one be in it."""
    return text.replace(token, "...") if token else text
