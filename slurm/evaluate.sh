#!/usr/bin/env bash
# Evaluate a frozen encoder with k-NN and a linear probe. Submit from the repository:
#
#     WEIGHTS=/scratch/runs/vith14 DATA=/scratch/imagenet-train VAL=/scratch/imagenet-val \
#         RUN=/scratch/runs/vith14-probe SETS=train.epochs=50 sbatch slurm/evaluate.sh
#
# To start after a pre-training job: --dependency=afterok:JOBID. SETS overrides keys of the probe's recipe, whose 90
# epochs are MAE's setting for ViT-B. PRECISION is the encoder's, bf16 or fp32 (default: bf16 on GPUs). Features are
# cached in RUN-features. The results are in the job's output. Requeueing is as in slurm/pretrain_vith.sh.

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
