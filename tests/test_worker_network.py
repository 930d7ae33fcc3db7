"""Workers talk by the interface of the address that Ray has of their node, and wait patiently."""

from __future__ import annotations

import fcntl
import os
import socket
import struct
import subprocess
import sys

import pytest
from ray.util import get_node_ip_address

from rsllm.compute.start import prepare_worker

SIOCGIFADDR = 0x8915


def address_of(interface: str) -> str:
    """Its IPv4 address, from the kernel."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        request = struct.pack("256s", interface.encode())
        return socket.inet_ntoa(fcntl.ioctl(any_socket, SIOCGIFADDR, request)[20:24])


@pytest.fixture(autouse=True)
def a_process_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "unraisablehook", sys.unraisablehook)
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "chosen")
    monkeypatch.setenv("OMP_WAIT_POLICY", "active")


def test_gloo_is_told_the_interface_of_the_node(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GLOO_SOCKET_IFNAME")
    prepare_worker()
    assert address_of(os.environ["GLOO_SOCKET_IFNAME"]) == get_node_ip_address()


def test_the_users_choice_stays() -> None:
    prepare_worker()
    assert os.environ["GLOO_SOCKET_IFNAME"] == "chosen"
    assert os.environ["OMP_WAIT_POLICY"] == "active"


@pytest.mark.parametrize(
    "start",
    [
        "from rsllm.compute.start import prepare_worker; prepare_worker(); import torch",
        "from rsllm.cli import run_script; run_script(lambda: __import__('torch'))",
    ],
)
def test_torchs_threads_wait_without_spinning(start: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """OpenMP itself says so, as it is loaded with torch."""
    monkeypatch.delenv("OMP_WAIT_POLICY")
    monkeypatch.setenv("OMP_DISPLAY_ENV", "true")
    done = subprocess.run([sys.executable, "-c", start], capture_output=True, text=True, check=True)
    assert "OMP_WAIT_POLICY = 'PASSIVE'" in done.stderr
