#!/usr/bin/env bash
# The published experiment, from the prompts to a table beside the published figures, for those who have the weights:
#
#   benchmarks/published.sh                  eight GPUs; 23 GPU-hours, computed from the rates of an H200 in docs/performance.md
#   GPUS=4 benchmarks/published.sh           another number of them
#   benchmarks/published.sh --rehearse       every step on the bundled model: under two minutes on two CPU cores
#
# Stop it at any moment and start it again: it goes on. Everything lies in runs/published, or where OUT says.
set -euo pipefail
cd "$(dirname "$0")/.."

rehearse=no
case "${1:-}" in
    "") ;;
    --rehearse) rehearse=yes ;;
    *) echo "There is no flag $1: give --rehearse or nothing." >&2; exit 2 ;;
esac

OUT=${OUT:-runs/published}
if [ $rehearse = yes ]; then
    OUT=$OUT-rehearsal
    run="torchrun --nproc_per_node=2"
    epochs="2 5 10"
    training=(--preset tiny-published --total-pairs-per-epoch 32 --num-epochs 10 --save-freq 1)
    figures=("tiny_heldout 24 2 scene pixel_diversity" "tiny 32 1 scene_clip")
else
    run="torchrun --nproc_per_node=${GPUS:-8}"
    epochs="20 50 100"
    training=(--num-epochs 100)
    figures=("hpdv2 3200 4 hpsv2 clip_h14 clip_l14 dreamsim_diversity" "pickscore_train 4096 1 pickscore vlm_alignment")
    if [ ! -e prompt_sets/pickscore_train.txt ]; then
        curl -L -o prompt_sets/pickscore_train.txt https://raw.githubusercontent.com/yifan123/flow_grpo/9745241cf1101407e9b518dd4f10498092150522/dataset/pickscore/train.txt
    fi
fi

$run train.py "${training[@]}" --runs-dir "$OUT" --resume-from auto

run_folder=$(ls -d "$OUT"/0*/ | tail -n 1)
for epoch in $epochs; do
    checkpoint=${run_folder}checkpoints/epoch-$(printf %07d "$epoch")
    for figure in "${figures[@]}"; do
        read -r set prompts repeats metrics <<< "$figure"
        result=$OUT/metrics-$set-$epoch.json
        if [ ! -e "$result" ]; then
            $run metrics.py --checkpoint "$checkpoint" --prompt-set "$set" --num-prompts "$prompts" --num-repeats "$repeats" \
                --metrics $metrics --as-published --out "$result"
        fi
    done
done
python benchmarks/published_table.py "$OUT"
