# Functions shared by the templates in this directory. The templates source this file; do not submit it.
# shellcheck shell=bash
#
# How a job ends:
#     exit 0         training finished
#     exit 2 or 4    user error or divergence; the message is above; the job is not requeued
#     requeued       stopped early (75: time limit or preemption) or failed (node, rank or network); the job resumes
#                    from its last checkpoint. After RETRIES restarts without a new checkpoint it stays down.
set -euo pipefail

RETRIES=${RETRIES:-3}
SRUN_OPTIONS=()
INSIDE=()
SHARDS="a shard set that python -m data_prep made"
LABELED="an annotated shard set"
ENCODER="a run directory, an exported .safetensors or the official MAE's .pth"
RUN_DIRECTORY="the run directory, on storage that all nodes see"

log() { echo "$(date +%FT%T) job ${SLURM_JOB_ID:-?}: $*" >&2; }

# fail MESSAGE: print an error and exit with code 2 (user error).
fail() {
  log "error: $*"
  exit 2
}

# require NAME DESCRIPTION: fail if the variable NAME is empty.
require() { [ -n "${!1:-}" ] || fail "$1 is not set; give $2, at the top of the template or as: $1=... sbatch ..."; }

# require_choice NAME VALUE CHOICE...: fail if VALUE is not one of the choices.
require_choice() {
  local name=$1 value=$2
  shift 2
  [[ " $* " == *" $value "* ]] || fail "$name=$value: choose one of $*"
}

# Set PYTHON to VENV's interpreter, else to .venv's. In a container it is VENV's (not checked here, because the path
# exists only inside the image), else the image's own python.
find_python() {
  PYTHON=${VENV:-$SHARDMAE/.venv}/bin/python
  if [ ${#INSIDE[@]} -gt 0 ] || [[ " ${SRUN_OPTIONS[*]} " == *" --container"* ]]; then
    [ -n "${VENV:-}" ] || PYTHON=python
  else
    [ -x "$PYTHON" ] || fail "$PYTHON: no Python there; run \`make setup\`, or set VENV in slurm/site.env"
  fi
}

has_gpu_driver() { [ -e /proc/driver/nvidia/version ]; }

# choose_device: train on the CPU if the job has no GPUs. Fail if the node has some that the job did not ask for.
choose_device() {
  [ -z "${SLURM_JOB_GPUS:-}${SLURM_GPUS_ON_NODE:-}${DS_ACCELERATOR:-}" ] || return 0
  ! has_gpu_driver || fail "this node has GPUs, but the job asked for none: add --gres=gpu:8 or --gpus-per-node=8;" \
    "where Slurm does not manage GPUs, export DS_ACCELERATOR=cuda; to train on the CPU, export DS_ACCELERATOR=cpu"
  export DS_ACCELERATOR=cpu
}

# Read the site's settings and export the environment of the job's tasks.
set_up() {
  [[ $RETRIES =~ ^[0-9]+$ ]] || fail "RETRIES=$RETRIES: give a number of starts"
  [ -n "${SLURM_JOB_ID:-}" ] || fail "this is a batch script: submit it with sbatch"
  # shellcheck source=slurm/site.env
  . "$SHARDMAE/slurm/site.env"
  find_python

  local cache=${NODE_CACHE:-${SLURM_TMPDIR:-${TMPDIR:-/tmp}}/shardmae-$(id -un)}
  export TRITON_CACHE_DIR=${TRITON_CACHE_DIR:-$cache/triton}
  export TORCHINDUCTOR_CACHE_DIR=${TORCHINDUCTOR_CACHE_DIR:-$cache/inductor}
  export NCCL_DEBUG=${NCCL_DEBUG:-WARN}
  export PYTHONUNBUFFERED=1 PYTHONPATH=$SHARDMAE${PYTHONPATH:+:$PYTHONPATH}
  # srun does not inherit --cpus-per-task from sbatch since Slurm 22.05.
  [ -n "${SLURM_CPUS_PER_TASK:-}" ] && export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK
  # Memory that torch has freed can be used for blocks of another size, beside that of DALI.
  export PYTORCH_ALLOC_CONF=${PYTORCH_ALLOC_CONF:-expandable_segments:True}

  # The rendezvous address. Looked up here, because a container may not have scontrol.
  local first
  first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | sed -n 1p)
  MASTER_ADDR=${MASTER_ADDR:-$(scontrol --oneliner show node "$first" | sed -n 's/.* NodeAddr=\([^ ]*\).*/\1/p')}
  export MASTER_ADDR MASTER_PORT=${MASTER_PORT:-$((20000 + SLURM_JOB_ID % 12768))}
}

# run_ranks COMMAND...: run a pipeline command with one task per GPU. If one rank fails, the others save and stop by
# themselves; srun kills those that still run a minute later. Consecutive ranks share a socket, as consecutive GPUs do.
run_ranks() {
  srun --kill-on-bad-exit=0 --wait=60 --cpu-bind=cores --distribution=block:block "${SRUN_OPTIONS[@]}" \
    "${INSIDE[@]}" "$PYTHON" -m pipeline "$@"
}

# run_single COMMAND...: run Python in one task. Ends the script if it fails.
run_single() { srun --nodes=1 --ntasks=1 "${SRUN_OPTIONS[@]}" "${INSIDE[@]}" "$PYTHON" "$@"; }

# pretrain MODEL: train RECIPE, or MODEL_METHOD.
pretrain() {
  require_choice METHOD "${METHOD:=emae}" emae efficient_mae mae lomar
  RECIPE=${RECIPE:-$1_$METHOD}
  # A recipe file may name its shard sets itself (data.sources).
  [ -f "$RECIPE" ] || require DATA "$SHARDS"
  require RUN "$RUN_DIRECTORY"
  train pretrain
}

# finetune MODEL: fine-tune with RECIPE, or finetune_MODEL.
finetune() {
  RECIPE=${RECIPE:-finetune_$1}
  require WEIGHTS "$ENCODER"
  require DATA "$LABELED to train on"
  require VAL "$LABELED to evaluate on"
  require RUN "$RUN_DIRECTORY"
  train finetune --weights "$WEIGHTS" --val "$VAL"
}

# evaluate: run k-NN, then train a linear probe in RUN.
evaluate() {
  require WEIGHTS "$ENCODER"
  require DATA "$LABELED to train on"
  require VAL "$LABELED to evaluate on"
  require RUN "a directory for the probe, on storage that all nodes see"
  set_up
  choose_device
  local overrides=() pair code=0 precision=bf16
  [ "${DS_ACCELERATOR:-}" != cpu ] || precision=fp32
  for pair in ${SETS:-}; do overrides+=(--set "$pair"); done
  # Keep the k-NN's features, so that a requeued job does not extract them again.
  set -- --weights "$WEIGHTS" --data "$DATA" --val "$VAL" --precision "${PRECISION:-$precision}" \
    --cache "${RUN%/}-features"
  run_ranks knn "$@" || code=$?
  [ $code -ne 0 ] || run_ranks linprobe "$@" --run "$RUN" "${overrides[@]}" || code=$?
  finish $code
}

# train COMMAND OPTION...: run the preflight check, then train, then end or requeue the job.
train() {
  local command=$1 overrides=() pair code=0
  shift
  set_up
  choose_device
  for pair in ${SETS:-}; do overrides+=(--set "$pair"); done
  set -- "$RECIPE" ${DATA:+--data "$DATA"} --run "$RUN" "$@" "${overrides[@]}"
  log "$RECIPE on ${SLURM_JOB_NUM_NODES} nodes, $SLURM_NTASKS tasks, start $((${SLURM_RESTART_COUNT:-0} + 1))"
  run_ranks preflight "$@" || code=$?
  [ $code -ne 0 ] || run_ranks "$command" "$@" || code=$?
  finish $code
}

# finish CODE: end the job, or requeue it.
finish() {
  local code=$1 checkpoint=none history=$RUN/slurm_restarts starts
  case $code in
    0) log "done" && exit 0 ;;
    2 | 4) log "stopped with exit code $code; see the error above" && exit "$code" ;;
  esac
  [ ! -f "$RUN/checkpoints/latest" ] || checkpoint=$(<"$RUN/checkpoints/latest")
  if [ -f "$RUN/recipe.yaml" ]; then
    # Count the starts at the end of the history that ended at this checkpoint.
    echo "$SLURM_JOB_ID $checkpoint" >>"$history"
    starts=$(awk -v same="$SLURM_JOB_ID $checkpoint" '{ n = $0 == same ? n + 1 : 0 } END { print n }' "$history")
  else
    starts=$((${SLURM_RESTART_COUNT:-0} + 1))
  fi
  if [ "$starts" -gt "$RETRIES" ]; then
    log "error: exit code $code: no progress after checkpoint $checkpoint in $starts starts; not requeued"
    exit "$code"
  fi
  log "exit code $code at checkpoint $checkpoint; requeueing"
  scontrol requeue "$SLURM_JOB_ID" || log "cannot requeue; submit the same command again to resume from $checkpoint"
  sleep 30 # Slurm terminates this script
  exit "$code"
}
