#!/bin/bash
# Run a command inside a real Slurm of this machine's own, and leave nothing behind.
#
#   tests/slurm/private_slurm.sh FOLDER COMMAND [ARGUMENT ...]
#
# Debian's slurmctld, two slurmd that call themselves node1 and node2, and munge run as root in
# private namespaces: their processes, network, mounts, host name and shared memory are invisible
# outside, and when the command ends the kernel kills whatever is left of them. FOLDER holds state,
# logs and slurm.conf. The exit status is the command's; 70 says that Slurm did not come up.
set -euo pipefail

folder=$(realpath -m "$1")
shift
if [[ -z ${INSIDE_NAMESPACES:-} ]]; then
    mkdir -p "$folder"/{state,log,spool.node1,spool.node2}
    INSIDE_NAMESPACES=1 exec unshare --mount --net --pid --uts --ipc --fork --kill-child \
        --mount-proc "$0" "$folder" "$@"
fi
unset INSIDE_NAMESPACES

# --- a machine with two node names -------------------------------------------------------------
ip link set lo up
ip addr add 127.0.0.2/8 dev lo # with 127.0.0.1 alone getaddrinfo takes IPv4 for unconfigured
hostname controller
printf '127.0.0.1 localhost controller node1 node2\n::1 localhost\n' >"$folder/hosts"
mount --bind "$folder/hosts" /etc/hosts
# Without DNS in this network each look-up would wait for its time-out, 12 s at a run's start.
sed 's/^hosts:.*/hosts: files/' /etc/nsswitch.conf >"$folder/nsswitch.conf"
mount --bind "$folder/nsswitch.conf" /etc/nsswitch.conf
# Shared memory of jobs: private, and gone with the mount namespace.
mount -t tmpfs -o size=2g tmpfs /dev/shm
# munge's key and socket: it refuses folders that others cannot enter, or could write to.
mount -t tmpfs -o mode=755 tmpfs /run
mkdir /run/munge

# --- configuration -----------------------------------------------------------------------------
head -c 128 /dev/urandom >/run/munge/key
chmod 400 /run/munge/key
export SLURM_CONF="$folder/slurm.conf"
cat >"$folder/gres.conf" <<GRES
NodeName=node[1-2] Name=gpu File=$folder/gpu[0-7]
GRES
touch "$folder"/gpu{0..7} # any file passes for a device; nothing opens it
cat >"$SLURM_CONF" <<CONF
ClusterName=test
SlurmctldHost=controller(127.0.0.1)
SlurmUser=root
SlurmdUser=root
# cred_expire delays a requeued job: by two minutes unless set, 5 s is the least.
AuthType=auth/munge
AuthInfo=socket=/run/munge/socket,cred_expire=5
CredType=cred/munge
StateSaveLocation=$folder/state
SlurmdSpoolDir=$folder/spool.%n
SlurmctldPidFile=$folder/slurmctld.pid
SlurmdPidFile=$folder/slurmd.%n.pid
SlurmctldLogFile=$folder/log/slurmctld.log
SlurmdLogFile=$folder/log/slurmd.%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/none
SchedulerType=sched/backfill
SchedulerParameters=bf_interval=1,sched_interval=1,batch_sched_delay=0
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
# Jobs of partition "urgent" push those of "main" out: SIGTERM to the tasks, the end 60 s later.
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
KillWait=5
MinJobAge=3600
ReturnToService=2
SlurmdParameters=config_overrides
GresTypes=gpu
NodeName=node[1-2] NodeHostname=controller NodeAddr=127.0.0.1 Port=[17001-17002] CPUs=16 RealMemory=16000 Gres=gpu:8 State=UNKNOWN
PartitionName=main Nodes=node[1-2] Default=YES MaxTime=INFINITE PriorityTier=1 GraceTime=60 PreemptMode=REQUEUE
PartitionName=urgent Nodes=node[1-2] MaxTime=INFINITE PriorityTier=10 PreemptMode=OFF
CONF

# --- start, run, stop --------------------------------------------------------------------------
wait_for() { # wait_for SECONDS COMMAND...
    local deadline=$((SECONDS + $1))
    shift
    until "$@" 2>/dev/null; do
        ((SECONDS < deadline)) || return 1
        sleep 0.1
    done
}
nodes_are_idle() { [[ $(timeout 3 sinfo -h -N -p main -o %T | grep -c idle) == 2 ]]; }
queue_is_empty() { [[ -z $(timeout 3 squeue -h) ]]; }

munged --foreground --key-file=/run/munge/key --socket=/run/munge/socket \
    --pid-file=/run/munge/pid --log-file="$folder/log/munged.log" \
    --seed-file=/run/munge/seed >"$folder/log/munged.out" 2>&1 &
wait_for 10 test -S /run/munge/socket || true
slurmctld -D -c -f "$SLURM_CONF" >"$folder/log/slurmctld.out" 2>&1 &
for node in node1 node2; do
    slurmd -D -N "$node" -f "$SLURM_CONF" >"$folder/log/$node.out" 2>&1 &
done
if ! wait_for 30 nodes_are_idle; then
    echo "Slurm did not come up" >&2
    tail -n 20 "$folder"/log/* >&2
    exit 70
fi

status=0
"$@" || status=$?
scancel --user root || true
wait_for 20 queue_is_empty || true
timeout 10 scontrol shutdown || true
exit $status # the first process of the namespace leaves: the kernel ends the rest
