"""What ComfyUI calls the layers that diffusers' transformers have: its models keep the names, and the fused
layers, of the authors' code.

Keys are diffusers' names with {} for a block's number, values the other name. Several keys with one value are
the rows of one fused layer, in their order. "*" stands for every other name, kept as it is. Held to the
converters of diffusers, which read such checkpoints, by tests/inference/test_comfyui.py.
"""

from collections.abc import Mapping
from typing import NamedTuple


class ComfyNames(NamedTuple):
    """The names of a family.

    layers: {diffusers' name: ComfyUI's}
    swaps_norms: the last norm's modulation is (shift, scale) there, where diffusers has (scale, shift)
    """

    layers: Mapping[str, str]
    swaps_norms: bool = False


def fuse(theirs: str, block: str, *names: str) -> dict[str, str]:
    """The layers of a block that are one there."""
    return {f"{block}.{name}": theirs for name in names}


MIXED, SINGLE = "transformer_blocks.{}", "single_transformer_blocks.{}"
QKV, ADDED = (
    ("attn.to_q", "attn.to_k", "attn.to_v"),
    ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
)

FLUX = ComfyNames(
    {
        "x_embedder": "img_in",
        "context_embedder": "txt_in",
        "time_text_embed.timestep_embedder.linear_1": "time_in.in_layer",
        "time_text_embed.timestep_embedder.linear_2": "time_in.out_layer",
        "time_text_embed.guidance_embedder.linear_1": "guidance_in.in_layer",
        "time_text_embed.guidance_embedder.linear_2": "guidance_in.out_layer",
        "time_text_embed.text_embedder.linear_1": "vector_in.in_layer",
        "time_text_embed.text_embedder.linear_2": "vector_in.out_layer",
        f"{MIXED}.norm1.linear": "double_blocks.{}.img_mod.lin",
        f"{MIXED}.norm1_context.linear": "double_blocks.{}.txt_mod.lin",
        **fuse("double_blocks.{}.img_attn.qkv", MIXED, *QKV),
        **fuse("double_blocks.{}.txt_attn.qkv", MIXED, *ADDED),
        f"{MIXED}.attn.to_out.0": "double_blocks.{}.img_attn.proj",
        f"{MIXED}.attn.to_add_out": "double_blocks.{}.txt_attn.proj",
        f"{MIXED}.ff.net.0.proj": "double_blocks.{}.img_mlp.0",
        f"{MIXED}.ff.net.2": "double_blocks.{}.img_mlp.2",
        f"{MIXED}.ff_context.net.0.proj": "double_blocks.{}.txt_mlp.0",
        f"{MIXED}.ff_context.net.2": "double_blocks.{}.txt_mlp.2",
        f"{SINGLE}.norm.linear": "single_blocks.{}.modulation.lin",
        **fuse("single_blocks.{}.linear1", SINGLE, *QKV, "proj_mlp"),
        f"{SINGLE}.proj_out": "single_blocks.{}.linear2",
        "norm_out.linear": "final_layer.adaLN_modulation.1",
        "proj_out": "final_layer.linear",
    },
    swaps_norms=True,
)

FLUX2 = ComfyNames(
    {
        "x_embedder": "img_in",
        "context_embedder": "txt_in",
        "time_guidance_embed.timestep_embedder.linear_1": "time_in.in_layer",
        "time_guidance_embed.timestep_embedder.linear_2": "time_in.out_layer",
        "time_guidance_embed.guidance_embedder.linear_1": "guidance_in.in_layer",
        "time_guidance_embed.guidance_embedder.linear_2": "guidance_in.out_layer",
        "double_stream_modulation_img.linear": "double_stream_modulation_img.lin",
        "double_stream_modulation_txt.linear": "double_stream_modulation_txt.lin",
        "single_stream_modulation.linear": "single_stream_modulation.lin",
        **fuse("double_blocks.{}.img_attn.qkv", MIXED, *QKV),
        **fuse("double_blocks.{}.txt_attn.qkv", MIXED, *ADDED),
        f"{MIXED}.attn.to_out.0": "double_blocks.{}.img_attn.proj",
        f"{MIXED}.attn.to_add_out": "double_blocks.{}.txt_attn.proj",
        f"{MIXED}.ff.linear_in": "double_blocks.{}.img_mlp.0",
        f"{MIXED}.ff.linear_out": "double_blocks.{}.img_mlp.2",
        f"{MIXED}.ff_context.linear_in": "double_blocks.{}.txt_mlp.0",
        f"{MIXED}.ff_context.linear_out": "double_blocks.{}.txt_mlp.2",
        f"{SINGLE}.attn.to_qkv_mlp_proj": "single_blocks.{}.linear1",
        f"{SINGLE}.attn.to_out": "single_blocks.{}.linear2",
        "norm_out.linear": "final_layer.adaLN_modulation.1",
        "proj_out": "final_layer.linear",
    },
    swaps_norms=True,
)

SD3 = ComfyNames(
    {
        "context_embedder": "context_embedder",
        "time_text_embed.timestep_embedder.linear_1": "t_embedder.mlp.0",
        "time_text_embed.timestep_embedder.linear_2": "t_embedder.mlp.2",
        "time_text_embed.text_embedder.linear_1": "y_embedder.mlp.0",
        "time_text_embed.text_embedder.linear_2": "y_embedder.mlp.2",
        f"{MIXED}.norm1.linear": "joint_blocks.{}.x_block.adaLN_modulation.1",
        f"{MIXED}.norm1_context.linear": "joint_blocks.{}.context_block.adaLN_modulation.1",
        **fuse("joint_blocks.{}.x_block.attn.qkv", MIXED, *QKV),
        **fuse("joint_blocks.{}.context_block.attn.qkv", MIXED, *ADDED),
        **fuse("joint_blocks.{}.x_block.attn2.qkv", MIXED, "attn2.to_q", "attn2.to_k", "attn2.to_v"),
        f"{MIXED}.attn.to_out.0": "joint_blocks.{}.x_block.attn.proj",
        f"{MIXED}.attn2.to_out.0": "joint_blocks.{}.x_block.attn2.proj",
        f"{MIXED}.attn.to_add_out": "joint_blocks.{}.context_block.attn.proj",
        f"{MIXED}.ff.net.0.proj": "joint_blocks.{}.x_block.mlp.fc1",
        f"{MIXED}.ff.net.2": "joint_blocks.{}.x_block.mlp.fc2",
        f"{MIXED}.ff_context.net.0.proj": "joint_blocks.{}.context_block.mlp.fc1",
        f"{MIXED}.ff_context.net.2": "joint_blocks.{}.context_block.mlp.fc2",
        "norm_out.linear": "final_layer.adaLN_modulation.1",
        "proj_out": "final_layer.linear",
    },
    swaps_norms=True,
)

WAN = ComfyNames(
    {
        "condition_embedder.time_embedder.linear_1": "time_embedding.0",
        "condition_embedder.time_embedder.linear_2": "time_embedding.2",
        "condition_embedder.text_embedder.linear_1": "text_embedding.0",
        "condition_embedder.text_embedder.linear_2": "text_embedding.2",
        "condition_embedder.time_proj": "time_projection.1",
        **{
            f"blocks.{{}}.attn{number}.{ours}": f"blocks.{{}}.{kind}_attn.{theirs}"
            for number, kind in ((1, "self"), (2, "cross"))
            for ours, theirs in (("to_q", "q"), ("to_k", "k"), ("to_v", "v"), ("to_out.0", "o"))
        },
        "blocks.{}.ffn.net.0.proj": "blocks.{}.ffn.0",
        "blocks.{}.ffn.net.2": "blocks.{}.ffn.2",
        "proj_out": "head.head",
    }
)

Z_IMAGE_BLOCKS = ("layers.{}", "noise_refiner.{}", "context_refiner.{}")
Z_IMAGE = ComfyNames(
    {
        **{
            f"{block}.attention.{name}": f"{block}.attention.qkv"
            for block in Z_IMAGE_BLOCKS
            for name in ("to_q", "to_k", "to_v")
        },
        **{f"{block}.attention.to_out.0": f"{block}.attention.out" for block in Z_IMAGE_BLOCKS},
        "all_x_embedder.2-1": "x_embedder",
        "all_final_layer.2-1.linear": "final_layer.linear",
        "all_final_layer.2-1.adaLN_modulation.1": "final_layer.adaLN_modulation.1",
        "*": "*",
    }
)

QWEN_IMAGE = ComfyNames({"*": "*"})
