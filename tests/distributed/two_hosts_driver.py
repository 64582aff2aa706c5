"""Two hosts on one machine, for test_two_hosts.py, which starts this inside namespaces of its own.

Makes two network namespaces joined by a pair of virtual interfaces, starts `scripts/launch/multi_node.sh` in each,
kills a rank or cuts the wire once the ranks have trained, and prints as JSON when and how both launchers ended.
Nothing remains: the namespaces go with the last process in them.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
HOSTS = {"a": "10.77.0.1", "b": "10.77.0.2"}


def shell(command: str) -> None:
    done = subprocess.run(command, shell=True, capture_output=True, text=True)
    if done.returncode:
        print(f"no namespaces: `{command}` said {done.stderr.strip()}", file=sys.stderr)
        raise SystemExit(4)


def make_hosts(folder: Path) -> None:
    """`a` and `b`, each with its own address, its own loopback and a name that both can look up."""
    names = "".join(f"{address} host-{host}\n" for host, address in HOSTS.items())
    (folder / "hosts").write_text(f"127.0.0.1 localhost\n{names}")
    shell("mount -t tmpfs tmpfs /run && mkdir -p /run/netns")
    shell(f"mount --bind {folder / 'hosts'} /etc/hosts")
    shell("ip link add wire_a type veth peer name wire_b")
    for host, address in HOSTS.items():
        shell(f"ip netns add {host} && ip link set wire_{host} netns {host}")
        shell(f"ip -n {host} addr add {address}/24 dev wire_{host}")
        shell(f"ip -n {host} link set wire_{host} up && ip -n {host} link set lo up")


def start(host: str, rank: int, folder: Path, mode: str) -> subprocess.Popen:
    environment = {
        **os.environ,
        "NODES": "2", "NODE_RANK": str(rank), "MASTER_ADDR": HOSTS["a"], "MASTER_PORT": "29577",
        "PROCESSES": "1", "INTERFACE": f"wire_{host}", "PYTHON": sys.executable, "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    program = [str(ROOT / "scripts/launch/multi_node.sh"), str(Path(__file__).with_name("two_hosts_work.py"))]
    named = ["unshare", "--uts", "sh", "-c", f'hostname host-{host}; exec bash "$@"', "sh"]
    log = (folder / f"{host}.log").open("w")
    return subprocess.Popen(
        ["nsenter", f"--net=/run/netns/{host}", *named, *program, str(folder), mode],
        stdout=log, stderr=subprocess.STDOUT, env=environment,
    )  # fmt: skip


def main() -> None:
    folder, mode = Path(sys.argv[1]), sys.argv[2]
    make_hosts(folder)
    launchers = {host: start(host, rank, folder, mode) for rank, host in enumerate(HOSTS)}
    ended: dict[str, float] = {}
    struck = None
    limit = time.monotonic() + 240
    while len(ended) < 2 and time.monotonic() < limit:
        if struck is None and (folder / "waiting").exists():
            struck = time.monotonic()
            if mode == "cut":
                shell("ip -n b link set wire_b down")
            else:
                os.kill(int((folder / "process-1").read_text()), signal.SIGKILL)
        for host, launcher in launchers.items():
            if host not in ended and launcher.poll() is not None:
                ended[host] = time.monotonic()
        time.sleep(0.1)
    for launcher in launchers.values():
        launcher.kill()
    report = {
        host: {
            "code": launchers[host].returncode,
            "seconds": None if struck is None or host not in ended else round(ended[host] - struck, 1),
            "log": (folder / f"{host}.log").read_text(),
        }
        for host in HOSTS
    }
    print(json.dumps(report))


if __name__ == "__main__":
    main()
