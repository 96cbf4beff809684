"""A frozen base that does not fit one GPU, shared by several processes with FSDP2: each holds its slices, and
a block is whole only while it computes. The adapters stay as they are: whole in every process."""

import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from safetensors import safe_open
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from scfm.models.blocks import blocks_of
from scfm.models.loading import TEXT_PARTS, no_loading_bars
from scfm.models.source import PipelineSource
from scfm.models.weight_files import weights_in


def check_sharding(shard: int, processes: int) -> None:
    """ValueError when the processes cannot form groups of `shard`; 0 is no group at all."""
    if shard and (processes == 1 or processes % shard):
        raise ValueError(
            f"shard is {shard}, but {processes} process{'es were' * (processes > 1) or ' was'} launched: say "
            f"accelerate launch --multi_gpu --num_processes {shard} -m scfm.cli distill ... (or a multiple), "
            "or leave --shard out"
        )


def check_slices(source: PipelineSource) -> None:
    """ValueError when the transformer's weights lie in files that cannot be read in slices."""
    other = [path.name for path in weight_files(source) if path.suffix != ".safetensors"]
    if other:
        raise ValueError(
            f"shard reads slices of safetensors, and the transformer in {source.folder} lies in {other[0]}: "
            "load and save it once with diffusers, or leave --shard out"
        )


def check_rows(family: Any) -> None:
    """ValueError for a family whose models are evaluated apart (`LoraModels.can_mix`): processes with other
    examples would make other numbers of forwards, and wait for each other for ever."""
    if getattr(family, "forward_rows", None) is None:
        raise ValueError(
            f"{type(family).__name__} does not say which example each row of a forward is of: give it "
            "forward_rows, or leave --shard out"
        )


def weight_files(source: PipelineSource) -> list[Path]:
    """The files with the transformer's weights; the safetensors alone where there are some."""
    variant = source.variant_of("transformer") or ""
    files = [path for path, its in weights_in(source.folder / "transformer") if its == variant]
    return [path for path in files if path.suffix == ".safetensors"] or files


def load_sharded(source: PipelineSource, dtype: torch.dtype, device: torch.device, shard: int) -> Any:
    """The stock pipeline of a source without VAE and encoders, whose transformer `shard` processes share.

    To be called by all processes; neighbouring ranks are a group, so with as many as a machine has GPUs the
    weights never travel between machines. No process reads more than its slices. The transformer is frozen;
    adapters that are given to it afterwards, within `full_shapes`, are not shared.

    From then on each forward and backward of it is one of the whole group: all its processes must call it
    equally often, in the same order.
    """
    mesh = group_mesh(device, shard)
    transformer = hollow_transformer(source).requires_grad_(False)
    absent = [name for name in source.index if name.startswith(("vae", *TEXT_PARTS))]
    empty = [name for name, part in source.index.items() if part == [None, None]]
    parts: dict[str, Any] = {**dict.fromkeys([*absent, *empty]), "transformer": transformer}
    source.check_files(without=absent)
    pipeline_class: Any = source.family
    with no_loading_bars():
        pipe = pipeline_class.pipeline_class.from_pretrained(
            str(source.folder), dtype=dtype, variant=source.variant or None, **parts
        )
    pipe.vae_scale_factor = source.skeleton.vae_scale_factor  # without a VAE it has a guess
    # of outputs that are views: wrong where they are changed in place, and no family's transformer does
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
    for module in (*blocks_of(transformer), transformer):
        fully_shard(module, mesh=mesh, reshard_after_forward=True)
    read_slices(transformer, weight_files(source), dtype, device)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@contextmanager
def full_shapes(transformer: torch.nn.Module) -> Iterator[None]:
    """Within the block the weights of a sharded transformer have their full shapes and no content, so that
    PEFT, which would go by this process's slice, gives the layers adapters that fit."""
    named = [(module, *item) for module in transformer.modules() for item in module._parameters.items()]
    sharded = [(module, name, p) for module, name, p in named if isinstance(p, DTensor)]
    for module, name, p in sharded:
        one = torch.zeros((), dtype=p.dtype, device=p.to_local().device)  # at every place: no memory
        module.register_parameter(name, torch.nn.Parameter(one.expand(p.shape), requires_grad=False))
    try:
        yield
    finally:
        for module, name, p in sharded:
            module.register_parameter(name, p)


def group_mesh(device: torch.device, shard: int) -> DeviceMesh:
    """The group of `shard` neighbouring ranks to which this process belongs."""
    groups = torch.distributed.get_world_size() // shard
    return init_device_mesh(device.type, (groups, shard), mesh_dim_names=("group", "slice"))["slice"]


def hollow_transformer(source: PipelineSource) -> torch.nn.Module:
    """The transformer with its parameters on the meta device. What it computes when it is made, buffers and
    tables that no file holds, is there."""
    model_class: Any = source.part_class("transformer")
    with init_empty_weights(include_buffers=False):
        config = model_class.load_config(str(source.folder), subfolder="transformer")
        return model_class.from_config(config).eval()


def read_slices(
    transformer: torch.nn.Module, files: Iterable[Path], dtype: torch.dtype, device: torch.device
) -> None:
    """Gives a sharded transformer on the meta device the weights of safetensors files, this process's slices
    of them. ValueError for a tensor that is missing or has another shape."""
    wanted, state = transformer.state_dict(), {}
    for path in files:
        with safe_open(str(path), framework="pt") as file:
            for name in [name for name in file.keys() if name in wanted]:  # noqa: SIM118
                part, shape = file.get_slice(name), wanted[name].shape
                if list(shape) != part.get_shape():
                    raise ValueError(f"{path}: {name} is {part.get_shape()}, and the model has {list(shape)}")
                state[name] = as_slice(part, wanted[name], dtype_of(transformer, name, dtype), device)
    missing = sorted(set(wanted) - set(state))
    if missing:
        raise ValueError(
            f"the weights of {type(transformer).__name__} lack {missing[0]}"
            f"{f' and {len(missing) - 1} more' * (len(missing) > 1)}: download or save the pipeline again"
        )
    transformer.load_state_dict(state, assign=True)
    for module in transformer.modules():
        for name, buffer in list(module.named_buffers(recurse=False)):
            setattr(module, name, buffer.to(device))


def as_slice(part: Any, like: torch.Tensor, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """A tensor of a file as `like` has it: whole for a buffer, else this process's rows.

    part: what safetensors' `get_slice` gives: nothing is read before it is indexed
    """
    if not isinstance(like, DTensor):
        return part[:].to(device, dtype if like.is_floating_point() else like.dtype)
    mesh = like.device_mesh
    first, last = slice_bounds(like.shape[0], mesh.get_local_rank(), mesh.size())
    rows = part[first:last] if last > first else torch.empty(0, *like.shape[1:])
    local = like.to_local()
    if rows.shape != local.shape:
        raise RuntimeError(f"FSDP's slice is {list(local.shape)}, and ours {list(rows.shape)}")
    return DTensor.from_local(
        rows.to(device, dtype), mesh, like.placements, shape=like.shape, stride=like.stride()
    )


def slice_bounds(rows: int, index: int, count: int) -> tuple[int, int]:
    """[first, last) of the rows that process `index` of `count` holds, as FSDP2 deals them out: equally many,
    the last ones fewer or none."""
    each = -(-rows // count)
    return min(index * each, rows), min((index + 1) * each, rows)


def dtype_of(transformer: Any, name: str, dtype: torch.dtype) -> torch.dtype:
    """The dtype in which diffusers loads the tensor of this name."""
    kept = getattr(transformer, "_keep_in_fp32_modules", None) or []
    return torch.float32 if any(part in name.split(".") for part in kept) else dtype


def held_bytes(transformer: torch.nn.Module) -> tuple[int, int]:
    """(of the base in this process, of the whole base)."""
    base = [p for p in transformer.parameters() if isinstance(p, DTensor)]
    here = sum(p.to_local().numel() * p.element_size() for p in base)
    return here, sum(p.numel() * p.element_size() for p in base)


def split_into(parts: list[torch.Tensor], count: int) -> list[torch.Tensor]:
    """The same examples, in the same order, in `count` micro-batches: the largest are halved until there are
    so many. ValueError for more than there are examples."""
    if not len(parts) <= count <= sum(map(len, parts)):
        raise ValueError(f"{sum(map(len, parts))} examples in {len(parts)} parts cannot become {count} parts")
    parts = list(parts)
    while len(parts) < count:
        i = max(range(len(parts)), key=lambda i: len(parts[i]))
        parts[i : i + 1] = parts[i].tensor_split(2)
    return parts
