#!/usr/bin/env bash
# Pre-train a ViT-H/14. Submit from the repository:
#
#     DATA=/scratch/imagenet-train RUN=/scratch/runs/vith14 sbatch slurm/pretrain_vith.sh
#
# Environment; all but the first two are optional:
#     DATA, RUN      shard set and run directory (below)
#     METHOD         emae (default), efficient_mae, mae or lomar
#     RECIPE         a recipe's name or file, instead of vith14_METHOD
#     SETS           recipe keys to override: SETS="train.epochs=100 data.crop_scale=[0.35,1.0]" (no spaces in a value)
#     RETRIES        restarts without a new checkpoint before the job gives up (default: 3)
#     SHARDMAE       this repository, if you submit from another directory
# Options of sbatch override those below: sbatch --nodes=8 --time=48:00:00 slurm/pretrain_vith.sh. On a cluster without
# GPUs: --gres=none. Site settings (partition, account, modules, container) are in slurm/site.env.
#
# The job saves five minutes before its time limit and on preemption. Then, and after a node failure, it is requeued and
# resumes, until training is complete. A job that needs the result can use --dependency=afterok:ID.

#SBATCH --job-name=vith14
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=8
#SBATCH --gres=gpu:8
#SBATCH --cpus-per-task=12
#SBATCH --time=24:00:00
#SBATCH --signal=USR1@300
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.out

# ==== Set these two, here or in the environment =============================================================
DATA=${DATA:-}
RUN=${RUN:-}
# =============================================================================================================

[ -f "${SHARDMAE:=${SLURM_SUBMIT_DIR:-$PWD}}/slurm/launch.sh" ] ||
  { echo "error: $SHARDMAE is not ShardMAE's repository; set SHARDMAE" >&2; exit 2; }
. "$SHARDMAE/slurm/launch.sh"
pretrain vith14
