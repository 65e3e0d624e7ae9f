# How all batch files start a run; they source this file from the repository root.
# shellcheck shell=bash

# kernels/ in the repository would shadow a package of that name; see the Makefile.
export PYTHONSAFEPATH=1
# Where the processes meet: the first node, and a port that jobs on one node do not share. It is
# below the ports that the system hands out to programs that ask for any.
MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
MASTER_PORT=$((10000 + SLURM_JOB_ID % 20000)) # tasks of an array have job numbers of their own
export MASTER_ADDR MASTER_PORT
# srun no longer takes this from sbatch by itself (since Slurm 22.05).
if [[ -n ${SLURM_CPUS_PER_TASK:-} ]]; then
    export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK
fi

case ${MODE_LAUNCHER:-srun} in
srun | deepspeed) ;;
*)
    echo "error: MODE_LAUNCHER is '$MODE_LAUNCHER'; accepted: srun or deepspeed" >&2
    exit 2
    ;;
esac

# Run launch/pretrain.py with the given arguments in all processes of the job; set `status`.
# MODE_LAUNCHER chooses: srun (default), or deepspeed, which calls srun itself.
start_training() {
    status=0
    case ${MODE_LAUNCHER:-srun} in
    srun)
        # A failed process ends the others too: they would wait for it in a collective.
        srun --kill-on-bad-exit=1 python -u launch/pretrain.py "$@" || status=$?
        ;;
    deepspeed)
        # Without a hostfile deepspeed runs one process on this node, which the run refuses; without
        # --force_multi one node's processes are not Slurm's, and get no signals from it.
        local hostfile
        hostfile=$(mktemp)
        scontrol show hostnames "$SLURM_JOB_NODELIST" |
            sed "s/$/ slots=$((SLURM_NTASKS / SLURM_JOB_NUM_NODES))/" >"$hostfile"
        deepspeed --hostfile "$hostfile" --force_multi --no_ssh_check --launcher slurm \
            --launcher_args="--kill-on-bad-exit=1" \
            --master_addr "$MASTER_ADDR" --master_port "$MASTER_PORT" launch/pretrain.py "$@" ||
            status=$?
        rm -f "$hostfile"
        ;;
    esac
}

# Exit with `status`. 75 (stopped early, saved): requeue the job first. 0: finished. Anything else
# needs a person (2: a mistake, reported above).
leave_or_requeue() {
    if [[ $status == 75 ]] && ! scontrol requeue "$1"; then
        echo "note: Slurm does not requeue this job; submit it again and it resumes" >&2
    fi
    exit "$status"
}
