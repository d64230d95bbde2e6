# What a site sets, and the only file here that it edits. It is sourced where a job is submitted and
# again in the job; TRIDENT_SITE names another file in its place.
#
#   . recipes/slurm/site.sh && sbatch recipes/slurm/sft_6b.sbatch --data.train demonstrations.jsonl

# Where jobs go. sbatch reads these variables itself, before the job file's #SBATCH lines.
#export SBATCH_PARTITION=batch
#export SBATCH_ACCOUNT=research
#export SBATCH_QOS=normal
# Seconds before the time limit at which a run is signalled, in place of the job files' own: longer
# than an iteration and a checkpoint together, since a run stops between two iterations. A running
# one has them as time/step_seconds in its metrics.jsonl; before the first, recipes/plan.py estimates
# them, to be doubled. A checkpoint takes its bytes over what the file system writes a second. Slurm
# may send the signal a minute early.
#export SBATCH_SIGNAL=USR1@3600
# Where jobs are preempted: the partition's GraceTime must be longer than a step and a checkpoint, or
# the run falls back to the checkpoint before.
export SBATCH_GPUS_PER_NODE=8 # the job files start eight ranks a node; unset it where nodes go whole

# Software: what makes $PYTHON run the project, on every node.
#module load cuda/13.0
PYTHON="$PWD/.venv/bin/python"

# The network, where NCCL and gloo do not find it by themselves.
#export NCCL_SOCKET_IFNAME=ib0 GLOO_SOCKET_IFNAME=ib0
#export NCCL_IB_HCA=mlx5

# Further options of srun: a container (pyxis), the MPI plugin.
SRUN_OPTIONS=()
#SRUN_OPTIONS=(--container-image="$PWD/trident.sqsh" --container-mounts="$PWD:$PWD,/data:/data")

# What the nodes must have before a job starts (recipes/slurm/preflight.py --help).
PREFLIGHT_OPTIONS=(--min-free-gib 70 --min-disk-gib 100 --timeout-s 600)
