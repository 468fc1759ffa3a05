"""A real Slurm on this machine: one controller, two nodes of two cores each, loopback only.

    python -m tests.slurm.cluster FOLDER     # starts it; SLURM_CONF=FOLDER/slurm.conf; Enter stops it

Needs root and the Debian packages ``slurmctld slurmd slurm-client munge``. Needs neither systemd nor cgroups,
and leaves the machine's own Slurm, if any, alone: own ports, own keys, own folder.
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "squeue", "scontrol")
NODES, CORES, MEMORY = 2, 2, 4000  # of each node, as written to the configuration, whatever the machine has
READY_S = 60.0

CONFIGURATION = """
ClusterName=scivi
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
SwitchType=switch/none
SlurmdParameters=config_overrides
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=2,sched_min_interval=0,bf_interval=2,batch_sched_delay=0,requeue_delay=1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
KillWait=5
MinJobAge=3600
JobRequeue=1
ReturnToService=2
{nodes}
PartitionName=main Nodes=ALL Default=YES MaxTime=60 PriorityTier=1 PreemptMode=REQUEUE GraceTime=2
PartitionName=urgent Nodes=ALL MaxTime=60 PriorityTier=10 PreemptMode=OFF
"""


def missing() -> str:
    """Why no cluster can be started here; empty if it can."""
    if os.name != "posix" or os.geteuid() != 0:
        return "Slurm's daemons have to be started by root"
    if absent := [name for name in PROGRAMS if shutil.which(name) is None]:
        return f"not installed: {', '.join(absent)} (Debian: slurmctld slurmd slurm-client munge)"
    return ""


@contextmanager
def cluster(folder: Path) -> Iterator[dict[str, str]]:
    """While it lasts, the environment in which Slurm's commands find it."""
    host, first = socket.gethostname().split(".")[0], _free_ports(NODES + 1)
    for name in ("state", "spool"):
        (folder / name).mkdir(parents=True)
    folder.chmod(0o755)  # munge insists
    nodes = "\n".join(
        f"NodeName=n{k} NodeHostname={host} NodeAddr=127.0.0.1 Port={first + k} Sockets=1 "
        f"CoresPerSocket={CORES} ThreadsPerCore=1 RealMemory={MEMORY} State=UNKNOWN"
        for k in range(1, NODES + 1)
    )
    conf = folder / "slurm.conf"
    conf.write_text(CONFIGURATION.format(host=host, port=first, folder=folder, nodes=nodes))
    key = folder / "munge.key"
    key.write_bytes(os.urandom(1024))
    key.chmod(0o400)
    environment = {**os.environ, "SLURM_CONF": str(conf)}
    daemons = []
    try:
        munge = [f"--{name}={folder / file}" for name, file in _MUNGE.items()]
        daemons.append(_daemon(["munged", "--foreground", "--force", *munge], folder, environment))
        _wait(lambda: (folder / "munge.socket").exists(), "munged")
        daemons.append(_daemon(["slurmctld", "-D", "-c", "-f", str(conf)], folder, environment))
        for k in range(1, NODES + 1):
            (folder / "spool" / f"n{k}").mkdir()
            daemons.append(_daemon(["slurmd", "-D", "-N", f"n{k}", "-f", str(conf)], folder, environment))
        _wait(lambda: _idle(environment) == NODES, "slurmd")
        yield environment
    finally:
        subprocess.run(["scancel", "--user=root"], env=environment, check=False, capture_output=True)
        for daemon in reversed(daemons):
            daemon.send_signal(signal.SIGTERM)
        for daemon in daemons:
            try:
                daemon.wait(10)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()


_MUNGE = {
    "key-file": "munge.key",
    "socket": "munge.socket",
    "pid-file": "munged.pid",
    "seed-file": "munge.seed",
    "log-file": "munged.log",
}


def _daemon(call: list[str], folder: Path, environment: dict[str, str]) -> subprocess.Popen[bytes]:
    with (folder / "daemons.log").open("a") as log:
        return subprocess.Popen(call, env=environment, stdout=log, stderr=log, start_new_session=True)


def _free_ports(count: int) -> int:
    """The first of some ports in a row that nobody listens on."""
    for first in range(20817, 60000, 64):
        taken = []
        try:
            for port in range(first, first + count):
                taken.append(listening := socket.socket())
                listening.bind(("127.0.0.1", port))
        except OSError:
            continue
        finally:
            for listening in taken:
                listening.close()
        return first
    raise RuntimeError("no free ports")


def _idle(environment: dict[str, str]) -> int:
    call = ["sinfo", "--noheader", "--Node", "--partition=main", "--states=idle", "--format=%N"]
    found = subprocess.run(call, env=environment, capture_output=True, text=True, check=False)
    return len(found.stdout.split())


def _wait(until, what: str) -> None:
    end = time.monotonic() + READY_S
    while not until():
        if time.monotonic() > end:
            raise RuntimeError(f"{what} did not start within {READY_S:.0f} s")
        time.sleep(0.2)


if __name__ == "__main__":
    if reason := missing():
        sys.exit(reason)
    with cluster(Path(sys.argv[1]).absolute()) as found:
        print(f"export SLURM_CONF={found['SLURM_CONF']}", flush=True)
        sys.stdin.readline()
