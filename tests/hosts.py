"""Hosts on one machine: namespaces with a network, processes, a home folder and sshd of their own.

Making them needs root. Everything that runs on a host ends with it.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil

LINK = "rsllm"
SSHD = "/usr/sbin/sshd"
RAY = f"{tempfile.gettempdir()}/ray"
INSIDE = """
mkdir -p /run/sshd "$3"
for file in passwd hosts; do mount --bind "$1/$file" /etc/$file; done
for folder in /run/sshd "$3"; do mount -t tmpfs -o mode=755 none "$folder"; done
hostname "$2"
exec /usr/sbin/sshd -D -e -f /dev/null -o HostKey="$1/host_key" -o PidFile=none -o UsePAM=no \
    -o PermitRootLogin=prohibit-password -o PasswordAuthentication=no
"""
"""What makes a process the first of a host: its folder, its name and Ray's folder."""
CONNECT = "import socket; socket.create_connection(('127.0.0.1', 22), 1)"


def may_make_networks() -> str:
    """Why not, or nothing."""
    if os.geteuid():
        return "making network namespaces needs root"
    try:
        done = subprocess.run(["unshare", "--net", "--mount", "ip", "link"], capture_output=True)
    except FileNotFoundError as error:
        return f"{error.filename} is not installed"
    return "" if done.returncode == 0 else f"unshare: {done.stderr.decode().strip()}"


def may_serve_ssh() -> str:
    """Why not, or nothing."""
    packages = {SSHD: "openssh-server", "ssh": "openssh-client", "rsync": "rsync"}
    missing = [package for tool, package in packages.items() if shutil.which(tool) is None]
    return may_make_networks() or (f"not installed: {', '.join(missing)}" if missing else "")


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True)


@contextmanager
def namespace(name: str) -> Iterator[str]:
    """A network of its own, and the end of all processes in it."""
    whole = f"{LINK}-{os.getpid()}-{name}"
    ip("netns", "add", whole)
    try:
        ip("-n", whole, "link", "set", "lo", "up")
        yield whole
    finally:
        pids = subprocess.run(["ip", "netns", "pids", whole], capture_output=True, text=True)
        for pid in pids.stdout.split():
            subprocess.run(["kill", "-9", pid])
        ip("netns", "delete", whole)


def join(spaces: Mapping[str, str]) -> None:
    """Lay a cable between two networks, {address: namespace}, which each also routes by."""
    first, second = spaces.values()
    ends = ["netns", first, "type", "veth", "peer", "name", LINK, "netns", second]
    ip("link", "add", LINK, *ends)
    for address, space in spaces.items():
        ip("-n", space, "address", "add", f"{address}/24", "dev", LINK)
        ip("-n", space, "link", "set", LINK, "up")
        ip("-n", space, "route", "add", "default", "dev", LINK)


@dataclass(frozen=True)
class Host:
    """A host that runs, seen as its root."""

    pid: int
    """Of its first process, sshd."""
    home: Path

    def command(self, words: list[str]) -> list[str]:
        """What runs `words` there."""
        spaces = ["--net", "--mount", "--pid", "--uts"]
        return ["nsenter", f"--target={self.pid}", *spaces, "--", *words]

    def environment(self) -> dict[str, str]:
        """A fresh login's, with this test's Ray on the path.

        Ray keeps notes of a cluster in a temporary folder. With another one than the host's Ray has
        it knows as little of that as on another machine.
        """
        path = f"{Path(sys.executable).parent}:/usr/sbin:/usr/bin:/sbin:/bin"
        return {"HOME": str(self.home), "PATH": path, "TMPDIR": str(self.home), "TERM": "dumb"}

    def runs(self, name: str) -> bool:
        """Whether a process of that name is there."""
        words = self.command(["pgrep", "--exact", name])
        return subprocess.run(words, stdout=subprocess.DEVNULL).returncode == 0


@contextmanager
def host(name: str, space: str, folder: Path, key: Path) -> Iterator[Host]:
    """Start a host in a network; whoever has the key may log in, and find the wheels installed.

    Its Python finds what this one has installed, since it cannot reach a package index. Its own
    name leads to 127.0.1.1, as Debian and Ubuntu write it.
    """
    home = folder / "home"
    for part in (".ssh", ".config/pip", ".rsllm/venv/bin"):
        (home / part).mkdir(mode=0o700, parents=True)
    shutil.copy(f"{key}.pub", home / ".ssh" / "authorized_keys")
    python = Path(os.path.realpath(sys.executable)).parent
    (home / ".bashrc").write_text(f"export PATH={python}:$PATH RAY_USAGE_STATS_ENABLED=0\n")
    (home / ".config/pip/pip.conf").write_text(
        "[global]\nno-index = true\nno-build-isolation = 0\n"
    )
    _lend_packages(home / ".rsllm" / "venv")
    users = Path("/etc/passwd").read_text().replace(f":{Path.home()}:", f":{home}:")
    (folder / "passwd").write_text(users)
    (folder / "hosts").write_text(f"127.0.0.1 localhost\n127.0.1.1 {name}\n")
    make_key(folder / "host_key")
    own = ["unshare", "--mount", "--propagation=private", "--pid", "--fork", "--kill-child"]
    own += ["--mount-proc", "--uts", "sh", "-ec", INSIDE, "sh", str(folder), name, RAY]
    with (folder / "sshd.log").open("wb") as log:
        outside = subprocess.Popen(["ip", "netns", "exec", space, *own], stdout=log, stderr=log)
    try:
        started = Host(_child(outside), home)
        _wait_for_ssh(started, folder / "sshd.log")
        yield started
    finally:
        outside.kill()
        outside.wait()


def make_key(path: Path) -> None:
    """An ssh key without a passphrase, and `path`.pub."""
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(path)], check=True)


def _lend_packages(venv: Path) -> None:
    """Let the environment that a setup will make there see this one's packages, pip among them."""
    lent = sysconfig.get_path("purelib")
    packages = venv / Path(lent).relative_to(sys.prefix)
    packages.mkdir(parents=True)
    (packages / "lent.pth").write_text(f"{lent}\n")
    for name, module in {"ray": "ray.scripts.scripts", "pip": "pip._internal.cli.main"}.items():
        script = venv / "bin" / name
        script.write_text(
            f"#!{venv}/bin/python\nfrom {module} import main\n\nraise SystemExit(main())\n"
        )
        script.chmod(0o755)


def _child(process: subprocess.Popen[bytes]) -> int:
    """The process id of the first child; it comes soon."""
    while process.poll() is None:
        for child in psutil.Process(process.pid).children():
            return child.pid
        time.sleep(0.1)
    raise RuntimeError("the host did not start")


def _wait_for_ssh(started: Host, log: Path) -> None:
    deadline = time.monotonic() + 30
    probe = started.command([sys.executable, "-c", CONNECT])
    while subprocess.run(probe, capture_output=True).returncode:
        if time.monotonic() > deadline:
            raise TimeoutError(f"no sshd: {log.read_text()}")
        time.sleep(0.2)
