#!/usr/bin/env bash
# Train semantic segmentation on a ViT-B/16 and measure its mIoU. Submit from the repository:
#
#     WEIGHTS=/scratch/runs/vitb16 DATA=/scratch/ade20k-train VAL=/scratch/ade20k-val \
#         RUN=/scratch/runs/vitb16-ade20k sbatch slurm/segment_vitb.sh
#
# WEIGHTS is a run directory, an exported file or an official checkpoint. RECIPE, SETS, RETRIES, SHARDMAE, options of
# sbatch and requeueing are as in slurm/pretrain_vitl.sh. To start after a pre-training job: --dependency=afterok:JOBID.
# The scores are in RUN/results.json.

#SBATCH --job-name=segment-vitb16
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=8
#SBATCH --gres=gpu:8
#SBATCH --cpus-per-task=12
#SBATCH --time=24:00:00
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

RECIPE=${RECIPE:-segment_vitb16}
[ -f "${SHARDMAE:=${SLURM_SUBMIT_DIR:-$PWD}}/slurm/launch.sh" ] ||
  { echo "error: $SHARDMAE is not ShardMAE's repository; set SHARDMAE" >&2; exit 2; }
. "$SHARDMAE/slurm/launch.sh"
finetune vitb16
