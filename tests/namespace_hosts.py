"""Hosts on a network of their own, as Linux namespaces of this machine: what `ray up` meets when hosts are real.

A host is a process tree with its own network, process ids, host name, /tmp, /run, /dev/shm and users, and nothing but
ssh leads in. All are on one switch, whose links can be cut. Outside of it nothing is changed: switch and links end
with the processes, and these with the process that made them, however it ends.

What hosts share with this machine is its file system (Python with its packages among it), its processors and memory.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import psutil

REPOSITORY = Path(__file__).resolve().parents[1]
NEEDED = ("ip", "nsenter", "setpriv", "unshare", "sshd", "ssh-keygen", "rsync")
USER = "somebody"
HOME = f"/tmp/home/{USER}"  # as the hosts see it; their /tmp is their own
PATH = f"{Path(sys.executable).parent}:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
NETWORK = "10.99.0"
# Ends with the process that started it, and everything in it too.
TIED = ["setpriv", "--pdeathsig", "KILL", "unshare", "--fork", "--kill-child", "--pid", "--mount-proc", "--net"]
# The first process of a host. What it takes from this machine's /tmp (a checkout, a Python) stays where it was.
BOOT = """
set -e
cd /
for path in $KEPT; do
  if [[ $path == /tmp/* ]]; then mkdir -p "$ROOT$path"; mount --rbind "$path" "$ROOT$path"; fi
done
hostname "$NAME"
mount --bind "$ROOT/passwd" /etc/passwd
mount --bind "$ROOT/hosts" /etc/hosts
mount -t tmpfs none /run
mount -t tmpfs none /dev/shm
mount --rbind "$ROOT/tmp" /tmp
mkdir /run/sshd
"$(command -v sshd)" -f /tmp/sshd/config -E /tmp/sshd/log
touch /tmp/booted
while :; do sleep 3600 & wait $!; done
"""
SSHD = f"""
HostKey /tmp/sshd/host_key
AuthorizedKeysFile {HOME}/.ssh/authorized_keys
PasswordAuthentication no
PidFile none
"""


def why_not() -> str | None:
    """Returns why there can be no such hosts here; None if there can."""
    if os.geteuid() != 0:
        return "needs root, for network namespaces"
    if missing := [name for name in NEEDED if shutil.which(name, path=PATH) is None]:
        return f"needs the commands {', '.join(missing)} (Debian: apt-get install iproute2 openssh-server rsync)"
    command = [
        *TIED,
        "--mount",
        "--uts",
        "bash",
        "-c",
        "ip link add name a type veth && ip link add name b type bridge",
    ]
    tried = subprocess.run(command, capture_output=True)
    return None if tried.returncode == 0 else f"no namespaces can be made here: {tried.stderr.decode().strip()}"


class Host:
    """One host; `settings` are environment variables that its sshd gives to everybody."""

    def __init__(self, network: Network, name: str, address: str, **settings: str) -> None:
        self.name, self.address = name, address
        self._network = network
        self._root = network.folder / name
        for folder in ("tmp/sshd", f"{HOME[1:]}/.ssh"):
            (self._root / folder).mkdir(parents=True)
        # uid 0, under which it is found first: it reads what root does, such as this machine's Python.
        (self._root / "passwd").write_text(
            f"{USER}:x:0:0::{HOME}:/bin/bash\nroot:x:0:0::/root:/bin/bash\nsshd:x:100:65534::/run/sshd:/bin/false\n"
        )
        # As Debian installs it: the host's own name is an address that no other host can use.
        (self._root / "hosts").write_text(f"127.0.0.1 localhost\n127.0.1.1 {name}\n")
        environment = "".join(f"SetEnv {key}={value}\n" for key, value in settings.items())
        (self._root / "tmp/sshd/config").write_text(SSHD + environment)
        shutil.copy(network.folder / "host_key", self._root / "tmp/sshd")
        shutil.copy(network.folder / "key.pub", self.home / ".ssh" / "authorized_keys")
        for file in Path("/etc/skel").glob(".*"):
            shutil.copy(file, self.home)
        kept = " ".join(map(str, (REPOSITORY, sys.prefix, sys.base_prefix)))
        boot = {"ROOT": str(self._root), "NAME": name, "KEPT": kept, "PATH": PATH}
        self._process, self._pid = start([*TIED, "--mount", "--uts", "--ipc", "bash", "-c", BOOT], boot)
        network.plug(name, self._pid)
        for line in (
            "link set lo up",
            "link set eth0 up",
            f"address add {address}/24 dev eth0",
            f"route add default via {NETWORK}.254",
        ):
            subprocess.run(["nsenter", f"--net=/proc/{self._pid}/ns/net", "ip", *line.split()], check=True)
        wait_for((self._root / "tmp" / "booted").exists, 30, f"{name} to boot")

    @property
    def home(self) -> Path:
        """Its user's home, as this machine sees it."""
        return self._root / HOME[1:]

    def start(self, command: str, folder: str = HOME, **environment: str) -> subprocess.Popen:
        """Starts a command as its user would on its console; what it prints is one stream."""
        enter = ["nsenter", "--target", str(self._pid), "--mount", "--uts", "--ipc", "--net", "--pid"]
        return subprocess.Popen(
            [*enter, "bash", "-c", f"cd {folder} && {command}"],
            env={"HOME": HOME, "USER": USER, "PATH": PATH} | environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def run(self, command: str, folder: str = HOME, timeout_s: float = 300, **environment: str) -> str:
        """Runs a command and returns what it printed; fails unless it ended well."""
        process = self.start(command, folder, **environment)
        printed, _ = process.communicate(timeout=timeout_s)
        assert process.returncode == 0, f"{self.name}$ {command}\n{printed[-6000:]}"
        return printed

    def cut(self) -> None:
        """Pulls the cable out of the switch."""
        self._network.set_link(self.name, "down")

    def mend(self) -> None:
        """Puts the cable back."""
        self._network.set_link(self.name, "up")

    def processes(self) -> list[str]:
        """Returns the command lines of everything that runs there beside the host itself."""
        found = []
        for process in psutil.Process(self._pid).children(recursive=True):
            with contextlib.suppress(psutil.Error):
                line = " ".join(process.cmdline())
                if line and "sshd" not in line.split()[0] and line != "sleep 3600":
                    found.append(line)
        return found

    def runs(self, what: str) -> bool:
        """Tells whether a process with such a command line is there."""
        return any(what in line for line in self.processes())

    def end(self) -> None:
        """Ends it with all that runs there."""
        self._process.kill()
        self._process.wait()
        # The kernel ends the others when the first has gone.
        wait_for(lambda: not psutil.pid_exists(self._pid), 30, f"{self.name} to end")


class Network:
    """A switch, and the hosts at it."""

    def __init__(self) -> None:
        # A short name: Ray's sockets lie below it.
        self.folder = Path(tempfile.mkdtemp(prefix="h", dir="/tmp"))
        self.hosts: dict[str, Host] = {}
        self._process, pid = start([*TIED, "sleep", "infinity"], {"PATH": PATH})
        self._enter = ["nsenter", f"--net=/proc/{pid}/ns/net", "ip"]
        for name in ("key", "host_key"):
            command = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(self.folder / name)]
            subprocess.run(command, check=True)
        self._ip("link add switch type bridge")
        self._ip(f"address add {NETWORK}.254/24 dev switch")
        self._ip("link set switch up")

    def add(self, name: str, **settings: str) -> Host:
        """Starts a host."""
        self.hosts[name] = Host(self, name, f"{NETWORK}.{len(self.hosts) + 1}", **settings)
        return self.hosts[name]

    def plug(self, name: str, pid: int) -> None:
        """Lays a cable from the switch to the network of a process."""
        self._ip(f"link add {name} type veth peer name eth0 netns {pid}")
        self._ip(f"link set {name} master switch")
        self.set_link(name, "up")

    def set_link(self, name: str, state: str) -> None:
        """Sets the switch's end of a cable up or down."""
        self._ip(f"link set {name} {state}")

    def _ip(self, arguments: str) -> None:
        subprocess.run([*self._enter, *arguments.split()], check=True)

    def end(self) -> None:
        """Ends all hosts and removes what they wrote."""
        for host in self.hosts.values():
            host.end()
        self._process.kill()
        self._process.wait()
        shutil.rmtree(self.folder)


@contextlib.contextmanager
def network() -> Iterator[Network]:
    """A network of which nothing is left afterwards."""
    network = Network()
    try:
        yield network
    finally:
        network.end()


def start(command: list[str], environment: dict[str, str]) -> tuple[subprocess.Popen, int]:
    """Starts a process in namespaces of its own; returns what holds it, and the first process inside."""
    holder = subprocess.Popen(command, env=environment, stdin=subprocess.DEVNULL)
    inside = wait_for(lambda: psutil.Process(holder.pid).children(), 30, "namespaces")
    return holder, inside[0].pid


def wait_for(condition, timeout_s, what):
    end = time.monotonic() + timeout_s
    while not (found := condition()):
        assert time.monotonic() < end, f"waited {timeout_s} s for {what}"
        time.sleep(0.2)
    return found
