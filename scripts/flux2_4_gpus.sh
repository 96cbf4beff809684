#!/usr/bin/env bash
# FLUX.2-dev (32 B) on one machine of four cards that share the frozen base (docs/scale.md). The batch (8) must divide by their number.
#   scripts/flux2_4_gpus.sh black-forest-labs/FLUX.2-dev captions.txt runs/flux2 [--max_train_steps 4000 ...]
# The images come first: each card generates its share, with a base of its own, in int8 where it does not fit otherwise. Can be killed and called again.
# Two processes that share the base of a tiny Flux compute the update of one (tests/training/test_sharding.py, on CPUs); on GPUs NOT YET TRIED.
set -euo pipefail
pipeline=${1:?say: $0 PIPELINE CAPTIONS OUT [MORE]} captions=${2:?captions, one a line} out=${3:?a folder}
launch=(accelerate launch --multi_gpu --num_processes 4 --mixed_precision no -m scfm.cli)

python -m scfm.cli plan --config flux2-dev-step-scaled --gpu h100 --shard 4 "${@:4}"    # memory, hours and traffic, before anything is loaded
"${launch[@]}" data --pretrained_model_name_or_path "$pipeline" --prompts "$captions" --output_dir "$out/images" --sizes 512x512 --max_sequence_length 512 \
    --teacher_guidance_scale 4 --weight_dtype bf16 --quantize int8
"${launch[@]}" distill --config flux2-dev-step-scaled --pretrained_model_name_or_path "$pipeline" --train_data_dir "$out/images" --output_dir "$out/run" --shard 4 "${@:4}"
