#!/usr/bin/env bash
# A night with SD3.5-Large on one 80 GB card, guidance kept at run time.
#   scripts/sd35_a100.sh stabilityai/stable-diffusion-3.5-large captions.txt runs/sd35 [held_out.txt [--max_train_steps 4000 ...]]
# held_out.txt: captions for the report that the run never saw (without it the report is on captions of the run); what follows it goes to `scfm distill`.
# Can be killed and called again: images, training steps and the report go on where they were, the selection and the LoRA scales begin anew.
# With more --max_train_steps on the same folder: rename OUT/report first. NOT YET TRIED on the real weights.
set -euo pipefail
pipeline=${1:?say: $0 PIPELINE CAPTIONS OUT} captions=${2:?captions, one a line} out=${3:?a folder for the results} held_out=${4:-$2}
scfm=(python -m scfm.cli)

"${scfm[@]}" plan --config sd35-large-a100 "${@:5}"
"${scfm[@]}" data --pretrained_model_name_or_path "$pipeline" --prompts "$captions" --output_dir "$out/images" --sizes 512x512 --teacher_steps 32 --teacher_guidance_scale 4.5 \
    --max_sequence_length 256 --weight_dtype bf16
"${scfm[@]}" distill --config sd35-large-a100 --pretrained_model_name_or_path "$pipeline" --train_data_dir "$out/images" --output_dir "$out/run" "${@:5}"
"${scfm[@]}" dial --lora "$out/run" --prompts "$captions"
"${scfm[@]}" evaluate --lora "$out/run" --prompts "$held_out" --num_images 200 --output_dir "$out/report"
