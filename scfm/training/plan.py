"""What `scfm plan` prints: memory and hours of a run, counted on a transformer without weights."""

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from diffusers import FluxTransformer2DModel, SD3Transformer2DModel
from torch.utils.flop_counter import FlopCounterMode

from scfm.method.distill import STEP_SCALED
from scfm.models.blocks import first_blocks
from scfm.models.family import FAMILIES, velocities
from scfm.models.flux import Flux
from scfm.models.loading import DTYPES
from scfm.models.lora import COPIES, adapter_parameters, add_adapters
from scfm.models.scaled_lora import ScaledLoraModels
from scfm.models.sd3 import SD3
from scfm.models.source import PipelineSource
from scfm.models.video import frame_options
from scfm.training.attention import fused_attention
from scfm.training.config import DistillConfig, refuse_for_guidance
from scfm.training.memory import PASSES, count_base, count_training, numbers
from scfm.training.validators import refuse_for_shard

GIB = 2**30
FACTOR = 8  # pixels to a latent, where a family does not say otherwise
# The published configurations of the transformers: (family, class, settings), so that nothing need be
# downloaded. Families that are not made in a notebook have theirs in `published`.
SHAPES: dict[str, tuple[Any, Any, Any]] = {
    "flux-dev": (
        Flux,
        FluxTransformer2DModel,
        dict(
            patch_size=1,
            in_channels=64,
            num_layers=19,
            num_single_layers=38,
            attention_head_dim=128,
            num_attention_heads=24,
            joint_attention_dim=4096,
            pooled_projection_dim=768,
            guidance_embeds=True,
            axes_dims_rope=(16, 56, 56),
        ),
    ),
    "sd35-large": (
        SD3,
        SD3Transformer2DModel,
        dict(
            sample_size=128,
            patch_size=2,
            in_channels=16,
            out_channels=16,
            num_layers=38,
            attention_head_dim=64,
            num_attention_heads=38,
            joint_attention_dim=4096,
            caption_projection_dim=2432,
            pooled_projection_dim=2048,
            pos_embed_max_size=192,
            qk_norm="rms_norm",
        ),
    ),
}
SHAPES |= {
    name: (family, published.transformer_class, published.settings)
    for family in FAMILIES.values()
    for name, published in getattr(family, "published", {}).items()
}
# Dense bf16 operations a second as their makers state them, and GiB of memory.
GPUS = {
    "a100": (312e12, 80),
    "h100": (989e12, 80),
    "h200": (989e12, 141),
    "l40s": (362e12, 48),
    "rtx4090": (165e12, 24),
    "rtx3090": (71e12, 24),
    "rtx4070": (58e12, 12),
    "rtx4060": (30e12, 8),
}
TOGETHER = 16  # images that are generated in one forward
HOST_LINK = 32e9  # bytes a second from the host, of PCIe 4.0 x16 as it is stated, one way


def shape_of(
    config: DistillConfig, shape: str = "", change: dict[str, int] | None = None
) -> tuple[Any, torch.nn.Module]:
    """(family bound to the config's size, transformer on the meta device) of a published shape's name, or of
    the pipeline.

    change: settings of the shape to replace, as {"num_layers": 48}. ValueError for an unknown shape or
    setting.
    """
    if shape:
        if shape not in SHAPES:
            raise ValueError(
                f"shape {shape!r} is not known: take one of {', '.join(SHAPES)}, or say "
                "--pretrained_model_name_or_path FOLDER"
            )
        family_class, model_class, settings = SHAPES[shape]
        unknown = sorted(set(change or {}) - set(settings))
        if unknown:
            raise ValueError(f"{shape} has no setting {', '.join(unknown)}: it has {', '.join(settings)}")
        with torch.device("meta"):
            transformer = model_class(**{**settings, **(change or {})})
        published = family_class.published.get(shape)
        pipe = SimpleNamespace(transformer=transformer, vae_scale_factor=FACTOR, config={})
        if published:
            pipe.vae_scale_factor = published.vae_scale_factor
            pipe.vae_scale_factor_temporal = published.vae_scale_factor_temporal
    else:
        if change:
            raise ValueError("a change needs a shape to be made to: say --shape NAME too")
        source = PipelineSource(config.pretrained_model_name_or_path, configs_only=True)
        family_class: Any = source.family
        transformer = source.empty_transformer()
        pipe = source.skeleton
        pipe.transformer = transformer
    # diffusers' own `to` warns of layers it knows better
    torch.nn.Module.to(transformer, DTYPES[config.weight_dtype])
    frames = frame_options(family_class, config.num_frames)
    return family_class(pipe, config.height, config.width, config.max_sequence_length, **frames), transformer


class Count(NamedTuple):
    """Of one example. forward: operations; student: of its forward and backward; saved: bytes that the
    backward has to keep."""

    forward: float
    student: float
    saved: float


def count_example(family: Any, transformer: Any, guidance: float, dtype: torch.dtype) -> Count:
    """`Count` for one example of a transformer with an active LoRA, without gradient checkpointing. Nothing
    is computed.

    Blocks that are alike cost the same, so of each row of them at most three are called: the first, which may
    get no gradient from below, the second, and a third for what each further one adds.

    ValueError for a family that does not say what its text inputs are.
    """
    inputs = meta_inputs(family, transformer, guidance, dtype)
    lists = [name for name, part in transformer.named_children() if isinstance(part, torch.nn.ModuleList)]
    rows = {(name, i): row for name in lists for i, row in enumerate(alike(getattr(transformer, name)))}
    few = {key: min(2, len(row)) for key, row in rows.items()}

    def count(lengths: dict[tuple[str, int], int]) -> Count:
        kept = {
            name: [b for key in rows if key[0] == name for b in rows[key][: lengths[key]]] for name in lists
        }
        with blocks_replaced(transformer, kept):
            return count_called(family, transformer, *inputs)

    total = least = count(few)
    for key, row in rows.items():
        if len(row) > 2:
            more = zip(total, count(few | {key: 3}), least, strict=True)
            total = Count(*(a + (len(row) - 2) * (b - c) for a, b, c in more))
    return total


def alike(blocks: torch.nn.ModuleList) -> list[list[torch.nn.Module]]:
    """The blocks in rows of neighbours that are of one class and have tensors of the same shapes."""

    def kind(block: torch.nn.Module) -> tuple[type, list[tuple[str, torch.Size]]]:
        return type(block), [(name, tensor.shape) for name, tensor in block.named_parameters()]

    return [list(row) for _, row in itertools.groupby(blocks, kind)]


@contextmanager
def blocks_replaced(transformer: torch.nn.Module, kept: dict[str, list[torch.nn.Module]]) -> Iterator[None]:
    """The transformer with other lists of blocks, by the lists' names; its own again afterwards."""
    own = {name: getattr(transformer, name) for name in kept}
    for name, blocks in kept.items():
        setattr(transformer, name, torch.nn.ModuleList(blocks))
    try:
        yield
    finally:
        for name, blocks in own.items():
            setattr(transformer, name, blocks)


def count_called(
    family: Any, transformer: Any, x: torch.Tensor, t: torch.Tensor, cond: dict[str, torch.Tensor]
) -> Count:
    """`Count` of the transformer as it is, every block called."""
    saved: list[torch.Tensor] = []
    seen = {id(p) for p in transformer.parameters()}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if id(tensor) not in seen and not isinstance(tensor, torch.nn.Parameter):
            seen.add(id(tensor))
            saved.append(tensor)  # held, so that no other gets its id
        return tensor

    with FlopCounterMode(display=False) as counter:
        saving = torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor)
        with saving, fused_attention(keep):
            prediction = family.velocity(transformer, x, t, cond)
        forward = counter.get_total_flops()
        prediction.square().mean().backward()
    return Count(forward, counter.get_total_flops(), sum(v.numel() * v.element_size() for v in saved))


def meta_inputs(
    family: Any, transformer: Any, guidance: float, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
    """(x, t, cond) of one example without content."""
    shapes = getattr(family, "text_shapes", None)
    if not shapes:
        raise ValueError(
            f"the plan does not know how text enters {type(transformer).__name__}: "
            f"{type(family).__name__} has no text_shapes"
        )
    text = {name: text_input(name, shape, dtype) for name, shape in shapes.items()}
    if family.uses_cfg:
        text |= {"empty_" + name: part for name, part in text.items()}
    scale = torch.full((1,), float(guidance))  # on the CPU where it decides which examples are guided
    cond = {**text, "guidance": scale if family.uses_cfg else scale.to("meta")}
    return torch.zeros(1, *family.latent_shape, device="meta"), torch.zeros(1, device="meta"), cond


def text_input(name: str, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """A text input (1, *shape) without content; a mask, of which lengths are read, is of ones on the CPU."""
    if name == "mask":
        return torch.ones(1, *shape, dtype=torch.bool)
    return torch.zeros(1, *shape, device="meta", dtype=dtype)


def make_plan(
    config: DistillConfig,
    shape: str = "",
    change: dict[str, int] | None = None,
    gpu: str = "a100",
    efficiency: float = 0.4,
    images: int = 0,
) -> dict[str, Any]:
    """What a run would cost: a dict of parameters, GiB by part, operations a training step and hours on a
    GPU, or on each of config.shard GPUs that share the base.

    config: its pipeline may be empty when a shape is named. efficiency: share of the stated operations a
    second that is assumed to be reached. images: how many the teacher is to generate first. The hours and
    the activations are guesses, the rest is counted from tensors without content. ValueError for an unknown
    shape or GPU.
    """
    if gpu not in GPUS:
        raise ValueError(f"gpu {gpu!r} is not known: take one of {', '.join(GPUS)}")
    refuse_for_guidance(config)
    if config.shard:
        refuse_for_shard(config)
    family, transformer = shape_of(config, shape, change)
    parameters, base = numbers(transformer), count_base(config, transformer)
    processes = config.shard or 1
    bytes_each, batch = DTYPES[config.weight_dtype].itemsize, config.global_batch_size
    blocks = sum(len(m) for _, m in transformer.named_children() if isinstance(m, torch.nn.ModuleList))
    lora, adapters = give_adapters(config, family, transformer)
    one, guided = count_both(config, family, transformer)
    halves = 2 * (one.forward + share_of_teacher(config) * (guided.forward - one.forward))
    operations, activations = batch * (halves + one.student), one.saved
    # saved: the inputs of the blocks that are recomputed, and what the others need
    if config.gradient_checkpointing:
        share = len(first_blocks(transformer, config.checkpoint_blocks)) / blocks  # is computed a second time
        operations += round(batch * one.forward * share)
        tokens = family.tokens + family.max_sequence_length + family.extra_text_tokens
        inputs = share * blocks * tokens * inner_width(transformer) * bytes_each
        # the later blocks' own are gone when the first ones are computed again, one at a time
        activations = inputs + max((1 - share) * one.saved, one.saved / blocks)
    examples = -(-batch // processes)  # of one process
    forward_size = min(config.micro_batch_size or examples, examples)
    memory = {
        **base.held,
        **count_training(config, lora, adapters),
        "activations, guessed": activations * forward_size,
    }
    speed, room = GPUS[gpu]
    passes = PASSES * -(-examples // forward_size)
    fetched = passes * base.on_host
    computing, generating = (
        operations / (speed * efficiency * processes),
        images * config.teacher_steps * guided.forward / (speed * efficiency * processes),
    )
    generating += -(-images // TOGETHER) * config.teacher_steps * base.on_host / HOST_LINK
    seconds = computing + fetched / HOST_LINK  # the GPU waits for it
    return {
        "transformer, parameters": parameters,
        "LoRA, parameters": lora,
        "GiB": {k: v / GIB for k, v in memory.items()},
        "GiB in all": sum(memory.values()) / GIB,
        "GiB of the GPU": room,
        "operations of an example's forward": one.forward,
        "operations of a step": operations,
        "forward passes a step": 3 * batch,
        "processes": processes,
        "examples of a forward": forward_size,
        "GiB received a step": passes * (processes - 1) / processes * base.whole / GIB,
        "GiB on the host": base.on_host / GIB,
        "GiB fetched a step": fetched / GIB,
        "seconds a step": seconds,
        "hours of training": config.max_train_steps * seconds / 3600,
        "hours of generating": generating / 3600,
        "gpu": gpu,
        "efficiency": efficiency,
        "steps": config.max_train_steps,
        "images": images,
    }


def count_both(config: DistillConfig, family: Any, transformer: Any) -> tuple[Count, Count]:
    """`Count` of an example of the student, and of the teacher, which alone is guided where guidance is
    distilled."""
    dtype = DTYPES[config.weight_dtype]
    guided = count_example(family, transformer, max(config.guidance_range), dtype)
    if config.guidance_mode == "kept":
        return guided, guided
    return count_example(family, transformer, 1.0, dtype), guided


def share_of_teacher(config: DistillConfig) -> float:
    """The share of the examples whose target is the teacher's."""
    if config.algorithm != STEP_SCALED:
        return config.teacher_ratio
    return config.step_scale.by_teacher()


def give_adapters(config: DistillConfig, family: Any, transformer: Any) -> tuple[int, int]:
    """(parameters that are trained, of all adapters) of a transformer on the meta device, which gets them."""
    targets, alpha = config.lora_layers or family.lora_targets, config.lora_alpha or None
    with torch.device("meta"):
        if config.algorithm == STEP_SCALED:
            velocity, teachers = velocities(family, config.guidance_mode)
            models = ScaledLoraModels(
                transformer,
                velocity,
                targets,
                config.rank,
                alpha,
                config.scale_order,
                teacher_velocity=teachers if config.guidance_mode == "distilled" else None,
            )
            trained, copies = models.adapters["student"], 1
        else:
            # one adapter stands for its copies, which have its size
            add_adapters(transformer, targets, config.rank, alpha, {"student": ()})
            trained, copies = ["student"], len(COPIES["student"])
    count = sum(p.numel() for name in trained for p in adapter_parameters(transformer, name))
    return count, (1 + copies) * count


def inner_width(transformer: Any) -> int:
    """Numbers in the hidden state of a token."""
    config = transformer.config
    return config.get("dim") or config.num_attention_heads * config.attention_head_dim
