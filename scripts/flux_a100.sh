#!/usr/bin/env bash
# A night with FLUX.1-dev on one 80 GB card: from captions to a step LoRA with its dial and a report.
#   scripts/flux_a100.sh black-forest-labs/FLUX.1-dev captions.txt runs/flux [held_out.txt [--updates 4000 ...]]
# held_out.txt: captions for the report that the run never saw (without it the report is on captions of the run); what follows it goes to `scfm distill`.
# Can be killed and called again: pictures, updates and the report go on where they were, the choice and the dial begin anew.
# With more --updates on the same folder: rename OUT/report first. NOT YET TRIED on the real weights (see scfm/presets/flux-dev-a100.yaml).
set -euo pipefail
pipeline=${1:?say: $0 PIPELINE CAPTIONS OUT} captions=${2:?captions, one a line} out=${3:?a folder for the results} held_out=${4:-$2}
scfm=(python -m scfm.cli)

"${scfm[@]}" plan --config flux-dev-a100 "${@:5}"                              # memory and hours, before anything is loaded
"${scfm[@]}" data --pipeline "$pipeline" --prompts "$captions" --out "$out/pictures" --sizes 512x512,640x384 --steps 32 --guidance 3.5 \
    --max_tokens 256 --precision bf16
"${scfm[@]}" distill --config flux-dev-a100 --pipeline "$pipeline" --pictures "$out/pictures" --more_sizes 640x384 --out "$out/run" \
    "${@:5}"
"${scfm[@]}" dial --lora "$out/run" --prompts "$captions"
"${scfm[@]}" evaluate --lora "$out/run" --prompts "$held_out" --count 200 --out "$out/report"
