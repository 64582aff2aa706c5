#!/usr/bin/env bash
# The whole chain on two CPU cores in about ten minutes: from image-text pairs to a model that answers
# questions about images, and a report, all under ./runs/quickstart. `mllm-vision quickstart` (in a checkout: `make
# quickstart`) runs it; --ablations adds the blind run and the run with an untrained encoder. A stage whose result is
# there is not run again.
set -euo pipefail

out=${QUICKSTART_DIR:-runs/quickstart}   # where everything goes
data=$out/data stages=$out/stages configs=$(cd "$(dirname "$0")" && pwd)/configs/quickstart
python=${PYTHON:-python}                 # whose environment holds mllm_vision
export TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1 PYTHONUNBUFFERED=1
began=$SECONDS

say() { printf '\n=== %s  (%d:%02d since the start)\n' "$1" $(((SECONDS - began) / 60)) $(((SECONDS - began) % 60)); }
publish() { ln -sfn "stages/$1" "$out/$2"; }   # the artifact of a stage, under the name users know it by
recipe() {  # recipe NAME CONFIG FOLDER flags...: run a stage unless its run.json misses nothing; a broken run starts again
  local name=$1 config=$2 folder=$stages/$3; shift 3
  grep -qs '"missing": \[\]' "$folder/run.json" || "$python" -m mllm_vision "$name" --config "$configs/$config.yaml" --output_dir "$folder" --overwrite "$@"
}
evaluate() {  # evaluate FILE flags...
  local file=$out/evaluations/$1; shift
  [ -f "$file" ] || "$python" -m mllm_vision evaluate --output "$file" --batch_size 256 "$@"
}

mkdir -p "$stages" "$out/evaluations"

say "Scenes: images with captions, questions and answers"
[ -f "$data/text.txt" ] || "$python" -m mllm_vision.data.scenes --output_dir "$data" --train 20000 --validation 500 --test 1000

say "A language model that has read, but never seen"
recipe language_model language_model language_model --text_files "$data/text.txt"
publish language_model/model language_model

say "Stage zero: an image tower and a text tower learn one space by contrast"
recipe pretrain pretrain pretrain --dataset_name "$data/train.parquet" --tokenizer "$out/language_model" \
  --eval_dataset_name "$data/validation.parquet" --zero_shot_dataset_name "$data/single_validation.parquet"
publish pretrain/encoder encoder
publish pretrain/dual dual

say "Stage one: a connector joins the frozen encoder to the frozen language model"
recipe align align align --encoder "$out/encoder" --llm "$out/language_model" \
  --dataset_name "$data/train.parquet" --eval_dataset_name "$data/validation.parquet"
publish align/model align

say "Stage two: the model learns to answer"
recipe instruct instruct instruct --model "$out/align" \
  --dataset_name "$data/train.parquet" --eval_dataset_name "$data/validation.parquet"
publish instruct/model instruct

say "Evaluation on scenes that no stage has seen"
evaluate stage_zero.json --model "$out/dual" --untrained --templates "a {}" \
  --distinct --captions_each 1 --max_images 200 --task zero_shot="$data/single_test.parquet" \
  unseen/zero_shot="$data/single_unseen.parquet" retrieval="$data/test.parquet" geometry="$data/test.parquet" maps="$data/test.parquet"
evaluate stage_two.json --model "$out/instruct" --training_dataset_name "$data/train.parquet" \
  --task vqa="$data/test.parquet" unseen/vqa="$data/unseen_test.parquet" maps="$data/test.parquet"

runs=("$stages/language_model" "$stages/pretrain" "$stages/align" "$stages/instruct")
evaluations=("stage_zero=$out/evaluations/stage_zero.json" "stage_two=$out/evaluations/stage_two.json")

if [ "${1:-}" = --ablations ]; then
  say "Ablation: the same training without images"
  recipe align align blind_align --blind --encoder "$out/encoder" --llm "$out/language_model" \
    --dataset_name "$data/train.parquet" --eval_dataset_name "$data/validation.parquet"
  recipe instruct instruct blind_instruct --blind --model "$stages/blind_align/model" \
    --dataset_name "$data/train.parquet" --eval_dataset_name "$data/validation.parquet"
  evaluate blind.json --blind --model "$stages/blind_instruct/model" --task vqa="$data/test.parquet"

  say "Ablation: the same chain on an encoder that was never trained"
  [ -d "$stages/untrained_encoder" ] || "$python" - "$out/encoder" "$stages/untrained_encoder" <<'PYTHON'
import sys

from mllm_vision import VisionEncoder
from mllm_vision.encoder.build import build_backbone

trained = VisionEncoder.from_pretrained(sys.argv[1])
backbone, processor = build_backbone(f"{sys.argv[1]}/config.json")
fresh = VisionEncoder.from_backbone(
    backbone, processor, select_layer=trained.select_layer, select_feature=trained.select_feature
)
fresh.save_pretrained(sys.argv[2])
PYTHON
  recipe align align untrained_align --encoder "$stages/untrained_encoder" --llm "$out/language_model" \
    --dataset_name "$data/train.parquet" --eval_dataset_name "$data/validation.parquet"
  recipe instruct instruct untrained_instruct --model "$stages/untrained_align/model" \
    --dataset_name "$data/train.parquet" --eval_dataset_name "$data/validation.parquet"
  evaluate untrained_encoder.json --model "$stages/untrained_instruct/model" --task vqa="$data/test.parquet"
fi
for ablation in blind untrained_encoder; do
  [ ! -f "$out/evaluations/$ablation.json" ] || evaluations+=("stage_two/$ablation=$out/evaluations/$ablation.json")
done

say "Report"
"$python" -m mllm_vision report --runs "${runs[@]}" --evaluations "${evaluations[@]}" \
  --output "$out/report.html" --results "$out/results.json"
say "Done: open $out/report.html; ask it yourself: mllm-vision chat --model $out/instruct --image IMAGE"
