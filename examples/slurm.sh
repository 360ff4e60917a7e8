#!/bin/bash
#SBATCH --job-name=softlabels
#SBATCH --nodes=8
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=12
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=B:TERM@300
#
# sbatch examples/slurm.sh imagenet.yaml --output /shared/runs/mine
#
# One process for each GPU, started by srun itself. Five minutes before the time is up, and when the
# job is to make room for another one, this script gets SIGTERM and hands it on; the run stores its
# state and ends with status 143; the job goes back into the queue, and goes on from there.

MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
MASTER_PORT=$((10000 + SLURM_JOB_ID % 20000))
export MASTER_ADDR MASTER_PORT
export WORLD_SIZE=$SLURM_NTASKS LOCAL_WORLD_SIZE=$SLURM_NTASKS_PER_NODE

# In the background: a shell that waits for a command in the foreground hears no signal.
srun bash -c 'RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID exec softlabels train "$@"' bash "$@" &
run=$!
trap 'kill -TERM $run' TERM
wait $run
status=$?
while kill -0 $run 2> /dev/null; do # the signal ended the wait, not the run
    wait $run
    status=$?
done
if [ "$status" -eq 143 ]; then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
