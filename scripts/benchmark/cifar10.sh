#!/usr/bin/env bash
# Every method that learns from images alone, with one small ViT and one budget of steps, on CIFAR-10: trained, then
# measured by kNN and a linear probe on the whole test set, with all labelled training images as the bank.
#
#     bash scripts/benchmark/cifar10.sh DATA [METHOD...]
#     CIFAR10_STEPS=2000 bash scripts/benchmark/cifar10.sh DATA simclr    # longer than the configs' 500 steps
#
# DATA holds cifar10_train.parquet and cifar10_test.parquet. About ten minutes a method on one CPU core; start it twice
# with different methods to use two (OMP_NUM_THREADS=1). What is there is not run again.
set -euo pipefail
cd "$(dirname "$0")/../.."

data=${1:?name the folder of cifar10_train.parquet and cifar10_test.parquet}; shift
configs=recipes/configs/cifar10 out=${CIFAR10_DIR:-runs/cifar10${CIFAR10_STEPS:+_$CIFAR10_STEPS}}
[ $# -gt 0 ] || set -- $(python -m mllm_vision.objectives.registry images)

for method in "$@"; do
  grep -qs '"missing": \[\]' "$out/$method/run.json" || python recipes/pretrain_images.py --config "$configs/$method.yaml" \
    --dataset_name "$data/cifar10_train.parquet" --eval_dataset_name "$data/cifar10_test.parquet" \
    ${CIFAR10_STEPS:+--max_steps "$CIFAR10_STEPS"} --final_evaluators knn --output_dir "$out/$method" --overwrite
  [ -f "$out/$method.json" ] || python scripts/evaluate.py --model "$out/$method/encoder" --task knn probe \
    --dataset_name "$data/cifar10_test.parquet" --training_dataset_name "$data/cifar10_train.parquet" --output "$out/$method.json"
done
