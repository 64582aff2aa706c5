#!/usr/bin/env bash
# What an encoder that learnt from images alone is worth to a language model: the quickstart's chain with another stage
# zero. Each method trains the quickstart's tower on the quickstart's images, without a word, for as many steps; then
# the quickstart's own stages one and two, and its test questions.
#
#     make quickstart-ablations
#     bash scripts/benchmark/quickstart_images.sh [METHOD...]
#
# About twenty minutes a method on one thread (OMP_NUM_THREADS=1; two methods side by side on two cores). What is there is
# not run again.
set -euo pipefail
cd "$(dirname "$0")/../.."

quickstart=${QUICKSTART_DIR:-runs/quickstart} out=${QUICKSTART_IMAGES_DIR:-runs/quickstart_images}
configs=recipes/configs data=$quickstart/data
export TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1 PYTHONUNBUFFERED=1
[ -f "$quickstart/language_model/config.json" ] || { echo "error: $quickstart holds no quickstart; make quickstart" >&2; exit 2; }
[ $# -gt 0 ] || set -- $(cd "$configs/quickstart_images" && ls ./*.yaml | sed 's#^\./##; s#\.yaml$##')

recipe() {  # recipe NAME CONFIG FOLDER flags...: unless its run.json misses nothing
  local name=$1 config=$2 folder=$out/$3; shift 3
  grep -qs '"missing": \[\]' "$folder/run.json" || python "recipes/$name.py" --config "$configs/$config.yaml" --output_dir "$folder" \
    --overwrite --dataset_name "$data/train.parquet" "$@"
}

for method in "$@"; do
  recipe pretrain_images "quickstart_images/$method" "$method/pretrain"
  recipe align quickstart/align "$method/align" --encoder "$out/$method/pretrain/encoder" \
    --llm "$quickstart/language_model" --eval_dataset_name "$data/validation.parquet"
  recipe instruct quickstart/instruct "$method/instruct" --model "$out/$method/align/model" \
    --eval_dataset_name "$data/validation.parquet"
  [ -f "$out/$method.json" ] || python scripts/evaluate.py --model "$out/$method/instruct/model" --batch_size 256 \
    --training_dataset_name "$data/train.parquet" --output "$out/$method.json" \
    --task vqa="$data/test.parquet" unseen/vqa="$data/unseen_test.parquet"
done
