# What the templates share: sourced by them, never submitted.
# shellcheck shell=bash
#
# A job ends in one of four ways. Done: exit 0. Something to mend, said above in one line: exit 2, or 4 where the
# guard gave up. Stopped early (75: time limit, pre-emption) or failed (a node, a rank, a network): it is put back
# into the queue and continues from its last checkpoint, unless RETRIES more starts have come no further.
set -euo pipefail

RETRIES=${RETRIES:-3}
SRUN_OPTIONS=()
INSIDE=()
SHARDS="a shard set that python -m data_prep made"
LABELLED="a labelled shard set"
ENCODER="a run directory, an exported .safetensors or the official MAE's .pth"
RUN_DIRECTORY="the run directory, on storage that all nodes see"

say() { echo "$(date +%FT%T) job ${SLURM_JOB_ID:-?}: $*" >&2; }

stop() {
  say "error: $*"
  exit 2
}

# need NAME WHAT: the variable NAME must be set.
need() { [ -n "${!1:-}" ] || stop "$1 is not set; give $2, at the top of the template or as: $1=... sbatch ..."; }

# choose NAME VALUE CHOICE...: VALUE must be one of the choices.
choose() {
  local name=$1 value=$2
  shift 2
  [[ " $* " == *" $value "* ]] || stop "$name=$value: choose one of $*"
}

# PYTHON: VENV's, also inside a container, where nobody looks for it yet; without VENV .venv's, or the image's own.
interpreter() {
  PYTHON=${VENV:-$SHARDMAE/.venv}/bin/python
  if [ ${#INSIDE[@]} -gt 0 ] || [[ " ${SRUN_OPTIONS[*]} " == *" --container"* ]]; then
    [ -n "${VENV:-}" ] || PYTHON=python
  else
    [ -x "$PYTHON" ] || stop "$PYTHON: no Python there; run \`make setup\`, or set VENV in slurm/site.env"
  fi
}

setup() {
  [[ $RETRIES =~ ^[0-9]+$ ]] || stop "RETRIES=$RETRIES: give a number of starts"
  [ -n "${SLURM_JOB_ID:-}" ] || stop "this is a batch script: submit it with sbatch"
  # shellcheck source=slurm/site.env
  . "$SHARDMAE/slurm/site.env"
  interpreter

  local cache=${NODE_CACHE:-${SLURM_TMPDIR:-${TMPDIR:-/tmp}}/shardmae-$(id -un)}
  export TRITON_CACHE_DIR=${TRITON_CACHE_DIR:-$cache/triton}
  export TORCHINDUCTOR_CACHE_DIR=${TORCHINDUCTOR_CACHE_DIR:-$cache/inductor}
  export NCCL_DEBUG=${NCCL_DEBUG:-WARN}
  export PYTHONUNBUFFERED=1 PYTHONPATH=$SHARDMAE${PYTHONPATH:+:$PYTHONPATH}
  [ -n "${SLURM_CPUS_PER_TASK:-}" ] && export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK  # srun no longer inherits it
  [ -n "${SLURM_JOB_GPUS:-}${SLURM_GPUS_ON_NODE:-}" ] || export DS_ACCELERATOR=${DS_ACCELERATOR:-cpu}

  # Where the ranks meet. Asked here, because a container may have no scontrol.
  local first
  first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | sed -n 1p)
  MASTER_ADDR=${MASTER_ADDR:-$(scontrol --oneliner show node "$first" | sed -n 's/.* NodeAddr=\([^ ]*\).*/\1/p')}
  export MASTER_ADDR MASTER_PORT=${MASTER_PORT:-$((20000 + SLURM_JOB_ID % 12768))}
}

# ranks COMMAND...: one task a GPU. The ranks end together by themselves; who has not after a minute is ended.
ranks() {
  srun --kill-on-bad-exit=0 --wait=60 --cpu-bind=cores "${SRUN_OPTIONS[@]}" \
    "${INSIDE[@]}" "$PYTHON" -m pipeline "$@"
}

# alone COMMAND...: one task, as the last step of a job.
alone() { srun --nodes=1 --ntasks=1 "${SRUN_OPTIONS[@]}" "${INSIDE[@]}" "$PYTHON" "$@"; }

# pretrain MODEL: recipe MODEL_METHOD, or RECIPE.
pretrain() {
  choose METHOD "${METHOD:=emae}" emae efficient_mae mae lomar
  RECIPE=${RECIPE:-$1_$METHOD}
  # A recipe of your own may name its shard sets itself, by data.sources.
  [ -f "$RECIPE" ] || need DATA "$SHARDS"
  need RUN "$RUN_DIRECTORY"
  train pretrain
}

# finetune MODEL: recipe finetune_MODEL, or RECIPE.
finetune() {
  RECIPE=${RECIPE:-finetune_$1}
  need WEIGHTS "$ENCODER"
  need DATA "$LABELLED to learn from"
  need VAL "$LABELLED to be judged on"
  need RUN "$RUN_DIRECTORY"
  train finetune --weights "$WEIGHTS" --val "$VAL"
}

# evaluate: k-NN, then a linear probe, which trains in RUN.
evaluate() {
  need WEIGHTS "$ENCODER"
  need DATA "$LABELLED to learn from"
  need VAL "$LABELLED to be judged on"
  need RUN "a directory for the probe, on storage that all nodes see"
  setup
  local overrides=() pair code=0 precision=bf16
  [ "${DS_ACCELERATOR:-}" != cpu ] || precision=fp32
  for pair in ${SETS:-}; do overrides+=(--set "$pair"); done
  # The features of the k-NN are kept, so that a job that comes back does not extract them again.
  set -- --weights "$WEIGHTS" --data "$DATA" --val "$VAL" --precision "${PRECISION:-$precision}" --cache "${RUN%/}-features"
  ranks knn "$@" || code=$?
  [ $code -ne 0 ] || ranks linprobe "$@" --run "$RUN" "${overrides[@]}" || code=$?
  finish $code
}

# train COMMAND OPTION...: look whether it can begin, then train, and end the job or put it back.
train() {
  local command=$1 overrides=() pair code=0
  shift
  setup
  for pair in ${SETS:-}; do overrides+=(--set "$pair"); done
  set -- "$RECIPE" ${DATA:+--data "$DATA"} --run "$RUN" "$@" "${overrides[@]}"
  say "$RECIPE on ${SLURM_JOB_NUM_NODES} nodes, $SLURM_NTASKS tasks, start $((${SLURM_RESTART_COUNT:-0} + 1))"
  ranks preflight "$@" || code=$?
  [ $code -ne 0 ] || ranks "$command" "$@" || code=$?
  finish $code
}

# finish CODE: end the job, or put it back into the queue.
finish() {
  local code=$1 at=none history=$RUN/slurm_restarts tries
  case $code in
    0) say "done" && exit 0 ;;
    2 | 4) say "stopped with exit code $code, see above" && exit "$code" ;;
  esac
  [ ! -f "$RUN/checkpoints/latest" ] || at=$(<"$RUN/checkpoints/latest")
  if [ -f "$RUN/recipe.yaml" ]; then
    echo "$SLURM_JOB_ID $at" >>"$history"
    tries=$(awk -v same="$SLURM_JOB_ID $at" '{ n = $0 == same ? n + 1 : 0 } END { print n }' "$history")
  else
    tries=$((${SLURM_RESTART_COUNT:-0} + 1))
  fi
  if [ "$tries" -gt "$RETRIES" ]; then
    say "error: exit code $code, and no progress after $at in $tries starts; not putting the job back"
    exit "$code"
  fi
  say "exit code $code at checkpoint $at; back into the queue"
  scontrol requeue "$SLURM_JOB_ID" || say "cannot requeue; submit the same again, it continues at $at"
  sleep 30 # Slurm ends this script
  exit "$code"
}
