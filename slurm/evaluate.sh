#!/usr/bin/env bash
# Judge an encoder by its nearest neighbours and a linear probe, on frozen features. Submit from the repository:
#
#     WEIGHTS=/scratch/runs/vith14 DATA=/scratch/imagenet-train VAL=/scratch/imagenet-val RUN=/scratch/runs/vith14-probe \
#         SETS=train.epochs=50 sbatch slurm/evaluate.sh
#
# After a pre-training that is still at work: sbatch --dependency=afterok:JOBID slurm/evaluate.sh. SETS replaces keys of
# the probe's recipe, whose 90 epochs are MAE's for ViT-B; PRECISION is the encoder's, bf16 or fp32 (default: bf16 on
# GPUs). Features are kept in RUN-features. The figures are in the job's output; an interrupted job comes back as
# slurm/pretrain_vith.sh says.

#SBATCH --job-name=evaluate
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=8
#SBATCH --gres=gpu:8
#SBATCH --cpus-per-task=12
#SBATCH --time=12:00:00
#SBATCH --signal=USR1@300
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.out

# ==== Set these, here or in the environment =================================================================
WEIGHTS=${WEIGHTS:-}
DATA=${DATA:-}
VAL=${VAL:-}
RUN=${RUN:-}
# =============================================================================================================

[ -f "${SHARDMAE:=${SLURM_SUBMIT_DIR:-$PWD}}/slurm/launch.sh" ] ||
  { echo "error: $SHARDMAE is not ShardMAE's repository; set SHARDMAE" >&2; exit 2; }
. "$SHARDMAE/slurm/launch.sh"
evaluate
