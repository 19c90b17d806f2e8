#!/usr/bin/env bash
# What a user does, from a folder of photographs to a picture of what the model learned.
# usage: demo/run.sh OUT [FOLDER]     OUT: where everything goes; FOLDER: your images instead of the demo's
set -euo pipefail
out=$1
images=${2:-}
here=$(dirname "$0")

say() { printf '\n\033[1m== %s\033[0m\n' "$*"; }
run() { printf '$ %s\n' "$*"; "$@"; }

# Without a GPU DeepSpeed runs on the CPU: two processes, as on two GPUs.
if nvidia-smi >/dev/null 2>&1; then
  launch=(deepspeed --quiet --num_gpus 1 --module pipeline)
else
  export DS_ACCELERATOR=cpu
  launch=(deepspeed --quiet --num_accelerators 2 --module pipeline)
fi

if [ -e "$out" ] && [ ! -e "$out/.demo" ]; then
  echo "error: $out exists and no demo made it; name another place: make demo OUT=DIR" >&2
  exit 2
fi
if [ -n "$images" ] && [[ "$(realpath -m "$images")/" == "$(realpath -m "$out")"/* ]]; then
  echo "error: $images lies inside $out, which the demo empties; move it, or name another OUT=DIR" >&2
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
  say "Photographs: six that ship with scikit-image and scikit-learn, cut into crops"
  run python "$here/photographs.py" "$out"
  images=$out/crops
  shown=$out/photographs
  watched=(--set evals.knn_every=400)  # they have labels; your folder may have none
else
  watched=()
  shown=$images
fi

say "Build a shard set, and prove that it is whole"
run python -m data_prep folder "$images" "$out/shards"
run python -m data_prep verify "$out/shards"

say "Pre-train EMAE with DeepSpeed"
run "${launch[@]}" pretrain demo_emae --data "$out/shards" --run "$out/run" "${watched[@]}"

say "Look at what it learned"
run python -m pipeline reconstruct "$out/run" --images "$shown" --out "$out/reconstruction.png" --tiles 4 --count 6
run python -m pipeline reconstruct "$out/run" --images "$shown" --out "$out/pictures" --tiles 4 --count 3 \
  --kind agreement difficulty attention features
run python -m pipeline report "$out/run"

say "Done"
echo "picture: $out/reconstruction.png"
echo "more:    $out/pictures"
echo "report:  $out/run/report.html"
echo "shards:  $out/shards/card.md"
