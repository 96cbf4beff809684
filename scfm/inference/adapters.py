"""LoRA files of any origin: where they lie, what they change, how they join a pipeline."""

import logging
import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

from peft.utils import get_peft_model_state_dict
from safetensors import SafetensorError, safe_open

from scfm.files import short_path
from scfm.models.lora import WEIGHT_NAME

# how the name of a text encoder's tensor begins: as diffusers writes it, or as kohya's trainer does
TEXT_ENCODER = re.compile(r"text_encoder(?:_(?P<diffusers>\d))?\.|lora_te(?P<kohya>\d)?_")
LAYER = re.compile(r"\.(?:lora|alpha|dora_scale).*")  # what follows the name of a layer in that of a tensor
# they remark on text encoders that a step LoRA leaves alone, and name every tensor of `partial_fit`
REMARKING = [
    logging.getLogger(f"diffusers.{part}")
    for part in ("loaders.lora_base", "loaders.lora_pipeline", "loaders.peft", "utils.peft_utils")
]
log = logging.getLogger(__name__)
LOST: WeakKeyDictionary[Any, dict[str, str]] = WeakKeyDictionary()  # {pipeline: {adapter: its partial_fit}}


def lora_file(path: str | Path) -> Path:
    """The safetensors file of a LoRA, by file or folder.

    FileNotFoundError when there is none; ValueError for other formats, which may hold code, and for other
    tensors.
    """
    path = Path(path)
    if path.is_dir():
        files = sorted(path.glob("*.safetensors"))
        path = files[0] if len(files) == 1 else path / WEIGHT_NAME
    if not path.is_file():
        raise FileNotFoundError(
            f"no LoRA and no pipeline at {path}: give a .safetensors file, or a folder with one"
        )
    names = tensor_names(path)
    if not any("lora" in name.lower() for name in names):
        raise ValueError(f"{path} holds no LoRA: none of its {len(names)} tensors is named so")
    return path


def tensor_names(path: str | Path) -> list[str]:
    """The names of the tensors in a safetensors file; none is read. ValueError for another format."""
    try:
        with safe_open(str(path), framework="pt") as opened:
            return list(opened.keys())
    except SafetensorError as error:
        raise ValueError(f"{path} is no safetensors file ({error}); pickles are not opened") from None


def changed_text_encoders(path: str | Path) -> list[str]:
    """The text encoders that a LoRA file changes, by their names in the pipeline."""
    matches = [TEXT_ENCODER.match(name) for name in tensor_names(path)]
    numbers = {match["diffusers"] or match["kohya"] or "1" for match in matches if match}
    return ["text_encoder" if number == "1" else f"text_encoder_{number}" for number in sorted(numbers)]


def require_fit(path: str | Path, transformer: Any, pipeline: str) -> None:
    """ValueError where a layer that a LoRA in diffusers' spelling changes has another shape: it is for
    another pipeline. Only the file's header is read.

    transformer: may be without weights. pipeline: what it is of, for the message
    """
    shapes = {f"transformer.{name}": tuple(p.shape) for name, p in transformer.named_parameters()}
    with safe_open(str(path), framework="pt") as opened:
        for key in opened.keys():  # noqa: SIM118 (no dict)
            part = key.rsplit(".lora_", 1)
            wanted = shapes.get(f"{part[0]}.weight")
            if len(part) < 2 or wanted is None:
                continue
            a, shape = part[1].startswith("A."), tuple(opened.get_slice(key).get_shape())
            found, own = (shape[1:], wanted[1:]) if a else (shape[:1], wanted[:1])
            if found != own:
                raise ValueError(
                    f"{short_path(Path(path))} is for another pipeline than {pipeline}: its "
                    f"{part[0]} has {found[0]} {'inputs' if a else 'outputs'}, there it has {own[0]}; say "
                    "--pretrained_model_name_or_path of the one that it was made for"
                )


def load_adapter(pipe: Any, path: str | Path, name: str) -> None:
    """Loads a LoRA file into a pipeline as adapter `name`.

    ValueError when nothing in it fits the transformer; a warning when a part of it fits nowhere.
    """
    path, kind = Path(path), type(pipe).__name__
    try:
        with silenced(REMARKING), warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="While injecting the PEFT adapters")
            warnings.filterwarnings("ignore", message="Already found a `peft_config`")  # a pair, on purpose
            pipe.load_lora_weights(
                str(path.parent), weight_name=path.name, adapter_name=name, use_safetensors=True
            )
    except (ValueError, TypeError, KeyError, RuntimeError, IndexError) as error:  # whatever does not fit
        raise ValueError(f"{path} does not fit this {kind} ({' '.join(str(error).split())[:200]})") from None
    if name not in pipe.get_list_adapters().get("transformer", []):
        raise ValueError(f"{path} has nothing for the transformer of this {kind}")
    LOST.setdefault(pipe, {})[name] = partial_fit(pipe, path, name)
    if LOST[pipe][name]:
        log.warning("%s", LOST[pipe][name])


def partial_fit(pipe: Any, path: str | Path, name: str) -> str:
    """How much of a LoRA file, loaded as adapter `name`, fits nowhere in the pipeline, in a sentence; "" when
    it all fits.

    So it is with a LoRA for a deeper model of the same kind, or for a text encoder that no LoRA joins.
    """
    path = Path(path)
    held = [f"{part}.{key}" for part, module in adapted(pipe, name) for key in state_names(module, name)]
    layers, names = {layer_of(key) for key in held}, tensor_names(path)
    dropped = [key for key in names if "dora_scale" in key and not any("magnitude" in k for k in held)]
    if any(layer_of(key) not in layers for key in names):
        names = converted_names(pipe, path) + dropped  # other trainers spell the names otherwise
    lost = [key for key in names if layer_of(key) not in layers or key in dropped]
    if not lost:
        return ""
    kind = type(pipe).__name__
    shown = list(dict.fromkeys(key if key in dropped else layer_of(key) for key in sorted(lost)))
    some = ", ".join(shown[:3]) + ", ..." * (len(shown) > 3)
    return (
        f"{len(lost)} of {len(names)} tensors of {short_path(path)} fit nowhere in this {kind} "
        f"and are left out ({some}): what is left is not the LoRA that its makers tried; take the pipeline "
        "that it was made for"
    )


def partial_fits(pipe: Any) -> list[str]:
    """What `partial_fit` said of the adapters that were loaded into a pipeline, where it said something."""
    return [lost for lost in LOST.get(pipe, {}).values() if lost]


def require_whole_fit(pipe: Any) -> None:
    """ValueError when a part of a pipeline's LoRAs fits nowhere: for results in which nobody would see it any
    more."""
    for lost in partial_fits(pipe):
        raise ValueError(f"{lost}, or a copy of the file without these tensors")


def adapted(pipe: Any, name: str) -> list[tuple[str, Any]]:
    """[(part, module)] of a pipeline that hold an adapter of this name."""
    return [
        (part, module)
        for part, module in pipe.components.items()
        if name in (getattr(module, "peft_config", None) or ())
    ]


def state_names(module: Any, name: str) -> list[str]:
    """The names of an adapter's tensors in a module, as files have them."""
    return list(get_peft_model_state_dict(module, adapter_name=name))


def layer_of(name: str) -> str:
    """The part and the layer that a tensor of a LoRA belongs to."""
    return LAYER.sub("", name).replace(".text_model.", ".")  # a level that transformers 5 gave up


def converted_names(pipe: Any, path: Path) -> list[str]:
    """The names of a LoRA file's tensors in the spelling of diffusers."""
    with silenced(REMARKING):
        state = pipe.lora_state_dict(str(path.parent), weight_name=path.name, use_safetensors=True)
    return list(state[0] if isinstance(state, tuple) else state)


@contextmanager
def silenced(loggers: Sequence[logging.Logger]) -> Iterator[None]:
    """Loggers that say nothing within the block."""
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
