#!/usr/bin/env bash
# The whole pipeline on a folder of photographs: shards, pre-training, pictures and a report.
# usage: demo/run.sh OUT [FOLDER]     OUT: the output folder; FOLDER: your images, instead of the demo's
set -euo pipefail
out=$1
images=${2:-}
here=$(dirname "$0")

title() { printf '\n\033[1m== %s\033[0m\n' "$*"; }
run() { printf '$ %s\n' "$*"; "$@"; }

# Without a GPU, train on the CPU with two processes, as on two GPUs. DS_ACCELERATOR also keeps DeepSpeed's launcher
# from warning that it has detected no GPU.
if nvidia-smi >/dev/null 2>&1; then
  launch=(deepspeed --quiet --num_gpus 1 --module pipeline)
else
  export DS_ACCELERATOR=cpu
  launch=(deepspeed --quiet --num_accelerators 2 --module pipeline)
fi

if [ -e "$out" ] && [ ! -e "$out/.demo" ]; then
  echo "error: $out exists and is not an output folder of the demo; choose another: make demo OUT=DIR" >&2
  exit 2
fi
if [ -n "$images" ] && [[ "$(realpath -m "$images")/" == "$(realpath -m "$out")"/* ]]; then
  echo "error: $images is inside $out, which the demo deletes; move it, or choose another OUT=DIR" >&2
  exit 2
fi
if [ -n "$images" ] && [ ! -d "$images" ]; then
  echo "error: DATA=$images: no such folder" >&2
  exit 2
fi
rm -rf "$out"
mkdir -p "$out"
touch "$out/.demo"
if [ -z "$images" ]; then
  title "Photographs: six from scikit-image and scikit-learn, cut into crops"
  run python "$here/photographs.py" "$out"
  images=$out/crops
  inputs=$out/photographs
  knn=(--set evals.knn_every=400) # needs labels, which your own folder may not have
else
  knn=()
  inputs=$images
fi

title "Build and verify a shard set"
run python -m data_prep folder "$images" "$out/shards"
run python -m data_prep verify "$out/shards"

title "Pre-train EMAE with DeepSpeed"
run "${launch[@]}" pretrain demo_emae --data "$out/shards" --run "$out/run" "${knn[@]}"

title "Visualize what the model learned"
run python -m pipeline reconstruct "$out/run" --images "$inputs" --out "$out/reconstruction.png" --tiles 4 --count 6
run python -m pipeline reconstruct "$out/run" --images "$inputs" --out "$out/pictures" --tiles 4 --count 3 \
  --kind agreement difficulty attention features
run python -m pipeline report "$out/run"

title "Done"
echo "picture: $out/reconstruction.png"
echo "more:    $out/pictures"
echo "report:  $out/run/report.html"
echo "shards:  $out/shards/card.md"
