#!/usr/bin/env bash
# FLUX.1-dev on all cards of one machine: each generates, encodes and trains its share. The batch (8) must divide by their number.
#   scripts/flux_multi_gpu.sh black-forest-labs/FLUX.1-dev captions.txt runs/flux 4 [--max_train_steps 4000 ...]
# Two processes compute the update of one (tests/training/test_distill_trainer.py, on CPUs); on GPUs NOT YET TRIED.
set -euo pipefail
pipeline=${1:?say: $0 PIPELINE CAPTIONS OUT [CARDS [MORE]]} captions=${2:?captions, one a line} out=${3:?a folder} cards=${4:-2}
launch=(accelerate launch --multi_gpu --num_processes "$cards" --mixed_precision no -m scfm.cli)

"${launch[@]}" data --pretrained_model_name_or_path "$pipeline" --prompts "$captions" --output_dir "$out/images" --sizes 512x512 --max_sequence_length 256 --weight_dtype bf16
"${launch[@]}" distill --config flux-dev-a100 --pretrained_model_name_or_path "$pipeline" --train_data_dir "$out/images" --output_dir "$out/run" "${@:5}"
