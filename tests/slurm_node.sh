#!/usr/bin/env bash
# A Slurm of one node for tests: munge, slurmctld and slurmd of Debian (packages slurm-wlm and munge), in one folder, as
# root. The ids of what runs are in FOLDER/*.pid. Jobs begin with a clean environment, so the configuration has to lie in
# /etc/slurm; another one there is left alone, and the script ends.
set -euo pipefail
folder=${1:?folder}
host=$(hostname -s)
memory=$(awk '/MemTotal/ {print int($2 / 1024 * 0.9)}' /proc/meminfo)
if [ -e /etc/slurm/slurm.conf ] && ! grep -q "^ClusterName=nonn-test$" /etc/slurm/slurm.conf; then
  echo "/etc/slurm/slurm.conf: belongs to another cluster" >&2
  exit 1
fi
mkdir -p "$folder"/{state,spool,log} /run/munge
if ! munge --no-input >/dev/null 2>&1; then
  [ -e /etc/munge/munge.key ] || mungekey --create
  chown munge: /etc/munge/munge.key /run/munge
  runuser -u munge -- munged --force
  cp /run/munge/munged.pid "$folder/munged.pid"
fi
# Without an accounting database squeue has to remember what has ended: MinJobAge.
install -D /dev/stdin /etc/slurm/slurm.conf <<CONFIGURATION
ClusterName=nonn-test
SlurmctldHost=$host(127.0.0.1)
SlurmUser=root
AuthType=auth/munge
SlurmctldPort=16817
SlurmdPort=16818
StateSaveLocation=$folder/state
SlurmdSpoolDir=$folder/spool
SlurmctldPidFile=$folder/slurmctld.pid
SlurmdPidFile=$folder/slurmd.pid
SlurmctldLogFile=$folder/log/slurmctld.log
SlurmdLogFile=$folder/log/slurmd.log
ProctrackType=proctrack/pgid
TaskPlugin=task/none
SchedulerType=sched/builtin
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
ReturnToService=1
MinJobAge=3600
MpiDefault=none
NodeName=$host NodeAddr=127.0.0.1 CPUs=$(nproc) RealMemory=$memory State=UNKNOWN
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP
CONFIGURATION
slurmctld
slurmd
for _ in $(seq 60); do
  sinfo --noheader --format %T | grep -q idle && exit
  sleep 0.5
done
echo "the node does not come up: see $folder/log" >&2
exit 1
