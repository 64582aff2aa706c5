#!/usr/bin/env bash
# The published CIFAR-10 protocols, one after the other, on one GPU: a ResNet-18 for 32 px, 200 epochs, kNN at every
# epoch (k = 200, temperature 0.1). What each should reach stands in the first lines of its config. Two views an image
# are 3.4e16 operations in 200 epochs: by that estimate, not by a measurement, half an hour to an hour on a GPU that
# does 10 to 20 TFLOP/s of it.
#
#     bash scripts/benchmark/cifar10_resnet18.sh DATA [METHOD...]
#
# DATA holds cifar10_train.parquet and cifar10_test.parquet. A run that was cut off goes on from its last epoch.
set -euo pipefail
cd "$(dirname "$0")/../.."

data=${1:?name the folder of cifar10_train.parquet and cifar10_test.parquet}; shift
configs=recipes/configs/cifar10_resnet18
[ $# -gt 0 ] || set -- $(cd "$configs" && ls ./*.yaml | sed 's#^\./##; s#\.yaml$##')
out=${CIFAR10_DIR:-runs/cifar10_resnet18}

run() {  # run NAME CONFIG flags...
  local folder=$out/$1 config=$2; shift 2
  ! grep -qs '"missing": \[\]' "$folder/run.json" || return 0
  local how=(--overwrite)
  ! compgen -G "$folder/checkpoint-*" >/dev/null || how=(--resume_from_checkpoint true)
  python recipes/pretrain_images.py --config "$configs/$config.yaml" --output_dir "$folder" "${how[@]}" \
    --dataset_name "$data/cifar10_train.parquet" --eval_dataset_name "$data/cifar10_test.parquet" "$@"
}

for method in "$@"; do
  run "$method" "$method"
  [ "$method" != moco_v1_notebook ] || run moco_v1_notebook_symmetric "$method" --symmetric true
done
