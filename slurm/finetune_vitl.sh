#!/usr/bin/env bash
# Fine-tune a ViT-L/16 on labels and measure its accuracy. Submit from the repository:
#
#     WEIGHTS=/scratch/runs/vitl16 DATA=/scratch/imagenet-train VAL=/scratch/imagenet-val \
#         RUN=/scratch/runs/vitl16-tuned sbatch slurm/finetune_vitl.sh
#
# WEIGHTS is a run directory, an exported file or an official checkpoint. RECIPE, SETS, RETRIES, SHARDMAE, options of
# sbatch and requeueing are as in slurm/pretrain_vitl.sh. To start after a pre-training job: --dependency=afterok:JOBID.
# The accuracy is in RUN/results.json.

#SBATCH --job-name=finetune-vitl16
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

[ -f "${SHARDMAE:=${SLURM_SUBMIT_DIR:-$PWD}}/slurm/launch.sh" ] ||
  { echo "error: $SHARDMAE is not ShardMAE's repository; set SHARDMAE" >&2; exit 2; }
. "$SHARDMAE/slurm/launch.sh"
finetune vitl16
