#!/usr/bin/env bash
# FLUX.2-dev (32 B) on two machines of eight cards, which see the same folder OUT. Start it on both, with the rank of the machine:
#   MASTER=10.0.0.1 RANK=0 scripts/flux2_two_nodes.sh PIPELINE IMAGES OUT [MORE]       (and RANK=1 on the other)
# IMAGES: a folder that `scfm data` has filled, with its cache. --shard 8: the cards of a machine share a copy of the base, whose weights never travel
# between the machines; the LoRA's gradients do (docs/scale.md). Two groups of two have loaded a tiny Flux on CPUs; on GPUs NOT YET TRIED.
set -euo pipefail
pipeline=${1:?say: $0 PIPELINE IMAGES OUT [MORE]} images=${2:?a folder of images} out=${3:?a folder that both machines see}
accelerate launch --multi_gpu --num_machines 2 --num_processes 16 --machine_rank "${RANK:?0 or 1}" \
    --main_process_ip "${MASTER:?the address of machine 0}" --main_process_port 29500 --mixed_precision no \
    -m scfm.cli distill --config flux2-dev-step-scaled --pretrained_model_name_or_path "$pipeline" --train_data_dir "$images" --output_dir "$out" \
    --shard 8 --global_batch_size 16 "${@:4}"
