#!/usr/bin/env bash
# FLUX.1-dev on two machines of four cards each, which share the folder OUT. Start it on both, with the rank of the machine:
#   MASTER=10.0.0.1 RANK=0 scripts/flux_two_nodes.sh PIPELINE IMAGES OUT       (and RANK=1 on the other)
# IMAGES: a folder that `scfm data` has filled, with its cache. NOT YET TRIED.
set -euo pipefail
pipeline=${1:?say: $0 PIPELINE IMAGES OUT} images=${2:?a folder of images} out=${3:?a folder that both machines see}
accelerate launch --multi_gpu --num_machines 2 --num_processes 8 --machine_rank "${RANK:?0 or 1}" \
    --main_process_ip "${MASTER:?the address of machine 0}" --main_process_port 29500 --mixed_precision no \
    -m scfm.cli distill --config flux-dev-a100 --pretrained_model_name_or_path "$pipeline" --train_data_dir "$images" --output_dir "$out"
