#!/usr/bin/env bash
# Build a shard set with a job array. Submit from the repository:
#
#     SOURCE=imagenet SRC=/scratch/downloads OUT=/scratch/imagenet-train OPTIONS="--split train" \
#         sbatch slurm/build_shards.sh
#
# Runs `python -m data_prep SOURCE SRC OUT OPTIONS`. Any number of tasks: sbatch --array=0-63 ...
# The first task submits a last job, which waits for all tasks, checks that every shard exists, and writes the manifest.
# To repeat one failed task, give the number of tasks of the whole build:
#
#     TASKS=32 SOURCE=... SRC=... OUT=... OPTIONS="..." sbatch --array=7 slurm/build_shards.sh
#
# Tasks can be killed, repeated and run in any order: the result is byte-identical.

#SBATCH --job-name=build-shards
#SBATCH --array=0-31
#SBATCH --ntasks=1
#SBATCH --cpus-per-task=8
#SBATCH --time=12:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%A.%a.out

# ==== Set these, here or in the environment =================================================================
SOURCE=${SOURCE:-} # a command of data_prep that builds a set; or adopt, which indexes the tars in OUT
SRC=${SRC:-}
OUT=${OUT:-}
OPTIONS=${OPTIONS:-}
# =============================================================================================================

[ -f "${SHARDMAE:=${SLURM_SUBMIT_DIR:-$PWD}}/slurm/launch.sh" ] ||
  { echo "error: $SHARDMAE is not ShardMAE's repository; set SHARDMAE" >&2; exit 2; }
. "$SHARDMAE/slurm/launch.sh"
require_choice SOURCE "$SOURCE" folder imagenet imagenet21k openimages coco ade20k webdataset parquet adopt
[ "$SOURCE" = adopt ] || require SRC "the folder of archives or images"
require OUT "the shard set's directory, on storage that all nodes see"
paths=("$SRC" "$OUT")
[ "$SOURCE" != adopt ] || paths=("$OUT")
set_up
if [ -n "${FINALIZE:-}" ]; then
  run_single -m data_prep finalize "$OUT"
  exit
fi
[ -n "${SLURM_ARRAY_TASK_ID:-}" ] || fail "this is a job array: submit it with --array=0-N"
# shellcheck disable=SC2153 # set by Slurm
if [ "$SLURM_ARRAY_TASK_ID" = "$SLURM_ARRAY_TASK_MIN" ]; then
  # afterany: if a task failed, the last job reports which shards are missing. A requeued first task submits the last
  # job a second time; singleton runs it after the first, and it finds the set complete.
  export SHARDMAE SOURCE SRC OUT
  limit=$(squeue --noheader --job "${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID" --format %l) || limit=
  FINALIZE=yes sbatch --array=0 --dependency="afterany:$SLURM_ARRAY_JOB_ID,singleton" \
    --job-name="finalize-shards-$SLURM_ARRAY_JOB_ID" --cpus-per-task=1 --output=%x-%A.out \
    ${SLURM_JOB_ACCOUNT:+--account="$SLURM_JOB_ACCOUNT"} ${SLURM_JOB_PARTITION:+--partition="$SLURM_JOB_PARTITION"} \
    ${SLURM_JOB_QOS:+--qos="$SLURM_JOB_QOS"} ${limit:+--time="$limit"} "$SHARDMAE/slurm/build_shards.sh" ||
    log "error: cannot submit the last job; when all tasks are done, run: $PYTHON -m data_prep finalize $OUT"
fi
read -ra options <<<"$OPTIONS"
run_single -m data_prep "$SOURCE" "${paths[@]}" "${options[@]}" --workers "${SLURM_CPUS_PER_TASK:-1}" \
  --task-index "$SLURM_ARRAY_TASK_ID" --num-tasks "${TASKS:-$((SLURM_ARRAY_TASK_MAX + 1))}"
