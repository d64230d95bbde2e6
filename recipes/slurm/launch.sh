# launch RECIPE [OPTIONS]: the body of every job here. It checks the nodes, runs the recipe with a
# rank a GPU, and requeues the job when a signal has stopped it, at whatever point.
#
# The run then resumes from its newest checkpoint, since a recipe with the same options does. Logs:
# runs/logs/JOB-ID/rank_0000.log and so on, continued by each start of the job.

set -uo pipefail
. "${TRIDENT_SITE:-recipes/slurm/site.sh}"

launch() {
    local recipe=$1 status=0
    shift
    local logs="runs/logs/$SLURM_JOB_NAME-$SLURM_JOB_ID"
    local nodes
    mapfile -t nodes < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
    echo "$(date -Is) start $((${SLURM_RESTART_COUNT:-0} + 1)) on ${#nodes[@]} nodes: ${nodes[*]}"
    mkdir -p "$logs"

    # Where the ranks meet: on the first node, at a port that no other job of ours takes and that
    # Linux hands to no connection (it does so from 32768 on).
    export MASTER_ADDR=${nodes[0]}
    export PYTHONPATH=$PWD PYTHONUNBUFFERED=1
    export OMP_NUM_THREADS=${OMP_NUM_THREADS:-4}
    # Compiled kernels stay on the node, in a folder of this job's that its end removes: on a shared
    # file system a rank that reads a file which another replaces ends with a stale file handle. What
    # the site sets is kept. CUDA_DEVICE_MAX_CONNECTIONS is not set here: a recipe sets it to 1 where
    # it has tensor parallelism, and leaves the driver's number, with which copies overlap, elsewhere
    # (engine/environment.py).
    local caches=/tmp/trident-$(id -u)-$SLURM_JOB_ID
    export TRITON_CACHE_DIR=${TRITON_CACHE_DIR:-$caches/triton}
    export TORCHINDUCTOR_CACHE_DIR=${TORCHINDUCTOR_CACHE_DIR:-$caches/torchinductor}
    export CUDA_CACHE_PATH=${CUDA_CACHE_PATH:-$caches/cuda}
    # One process a rank compiles; by default it is 32.
    export TORCHINDUCTOR_COMPILE_THREADS=${TORCHINDUCTOR_COMPILE_THREADS:-1}

    MASTER_PORT=$((10000 + SLURM_JOB_ID % 10000)) \
        step "$logs/preflight.log" recipes/slurm/preflight.py \
        --nodes "${nodes[@]}" --directory runs "${PREFLIGHT_OPTIONS[@]}" || status=$?
    if [ "$status" != 0 ]; then
        remove_caches "$caches" "${#nodes[@]}"
        requeue_if_stopped "$status"
        echo "$(date -Is) the preflight failed with status $status: see $logs/preflight.log" >&2
        grep '^preflight: ' "$logs/preflight.log" | sort -u >&2
        exit "$status"
    fi

    MASTER_PORT=$((20000 + SLURM_JOB_ID % 10000)) \
        step "$logs/rank_%4t.log" "$recipe" "$@" || status=$?
    echo "$(date -Is) $recipe ended with status $status"
    remove_caches "$caches" "${#nodes[@]}"
    requeue_if_stopped "$status"
    exit "$status"
}

# requeue_if_stopped STATUS: start the job again where a signal has ended its ranks. 75: noted by
# engine/stop.py, and a checkpoint saved; 138 and 143: SIGUSR1 and SIGTERM, noted by nobody, for they
# came in the preflight or before Python could. A signal before the time limit or a preemption finds
# the job RUNNING; a job that was cancelled is not, and stays away.
requeue_if_stopped() {
    case $1 in
        75 | 138 | 143) ;;
        *) return ;;
    esac
    if [ "$(squeue -h -j "$SLURM_JOB_ID" -o %T)" = RUNNING ]; then
        scontrol requeue "$SLURM_JOB_ID" && exit 0
    fi
}

# remove_caches FOLDER NUM_NODES: a job that is killed leaves them to whoever clears /tmp.
remove_caches() {
    timeout 60 srun --nodes="$2" --ntasks="$2" --ntasks-per-node=1 --kill-on-bad-exit=0 \
        rm -rf -- "$1" || echo "the caches in $1 could not be removed" >&2
}

# step LOG SCRIPT [OPTIONS]: run a script on every rank.
step() {
    local log=$1
    shift
    # The first rank to end must not end those that still write (kill-on-bad-exit); when one has
    # failed, the others wait for it in vain, and --wait ends them. A rank may use all cores.
    srun --kill-on-bad-exit=0 --wait=300 --cpu-bind=none --open-mode=append --output="$log" \
        "${SRUN_OPTIONS[@]}" "$PYTHON" "$@"
}
