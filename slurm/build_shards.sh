#!/usr/bin/env bash
# Build a shard set with many tasks, and make it whole at the end. Submit from the repository:
#
#     SOURCE=imagenet SRC=/scratch/downloads OUT=/scratch/imagenet-train OPTIONS="--split train" \
#         sbatch slurm/build_shards.sh
#
# It runs `python -m data_prep SOURCE SRC OUT OPTIONS`. As many tasks as you like: sbatch --array=0-63 ...
# The first task submits the last step, which waits for all tasks, finds out whether every share is there, and writes
# the manifest. A task that failed is repeated alone, with the number of tasks of the whole build:
#
#     TASKS=32 SOURCE=... SRC=... OUT=... OPTIONS="..." sbatch --array=7 slurm/build_shards.sh
#
# It may be killed, repeated and run in any order: the bytes of the result do not change.

#SBATCH --job-name=build-shards
#SBATCH --array=0-31
#SBATCH --ntasks=1
#SBATCH --cpus-per-task=8
#SBATCH --time=12:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%A.%a.out

# ==== Set these, here or in the environment =================================================================
SOURCE=${SOURCE:-} # folder, imagenet, imagenet21k, openimages, coco
SRC=${SRC:-}
OUT=${OUT:-}
OPTIONS=${OPTIONS:-}
# =============================================================================================================

[ -f "${SHARDMAE:=${SLURM_SUBMIT_DIR:-$PWD}}/slurm/launch.sh" ] ||
  { echo "error: $SHARDMAE is not ShardMAE's repository; set SHARDMAE" >&2; exit 2; }
. "$SHARDMAE/slurm/launch.sh"
choose SOURCE "$SOURCE" folder imagenet imagenet21k openimages coco
need SRC "where the archives or images are"
need OUT "the shard set's directory, on storage that all nodes see"
setup
if [ -n "${FINALIZE:-}" ]; then
  alone -m data_prep finalize "$OUT"
  exit
fi
[ -n "${SLURM_ARRAY_TASK_ID:-}" ] || stop "this is a job array: submit it with --array=0-N"
# shellcheck disable=SC2153 # set by Slurm
if [ "$SLURM_ARRAY_TASK_ID" = "$SLURM_ARRAY_TASK_MIN" ]; then
  # After all tasks, however they end: where one failed, the last step says which shards are missing. A task that was
  # put back does not know whether it came to this before and submits it again: a second one, after the first, finds
  # the set whole.
  export SHARDMAE SOURCE SRC OUT
  limit=$(squeue --noheader --job "${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID" --format %l) || limit=
  FINALIZE=yes sbatch --array=0 --dependency="afterany:$SLURM_ARRAY_JOB_ID,singleton" \
    --job-name="finalize-shards-$SLURM_ARRAY_JOB_ID" --cpus-per-task=1 --output=%x-%A.out \
    ${SLURM_JOB_ACCOUNT:+--account="$SLURM_JOB_ACCOUNT"} ${SLURM_JOB_PARTITION:+--partition="$SLURM_JOB_PARTITION"} \
    ${SLURM_JOB_QOS:+--qos="$SLURM_JOB_QOS"} ${limit:+--time="$limit"} "$SHARDMAE/slurm/build_shards.sh" ||
    say "error: cannot submit the last step; when all tasks are done: $PYTHON -m data_prep finalize $OUT"
fi
read -ra options <<<"$OPTIONS"
alone -m data_prep "$SOURCE" "$SRC" "$OUT" "${options[@]}" --workers "${SLURM_CPUS_PER_TASK:-1}" \
  --task-index "$SLURM_ARRAY_TASK_ID" --num-tasks "${TASKS:-$((SLURM_ARRAY_TASK_MAX + 1))}"
