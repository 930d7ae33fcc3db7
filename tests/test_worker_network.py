"""Workers talk by the interface of the address that Ray has of their node."""

from __future__ import annotations

import fcntl
import os
import socket
import struct
import sys

import pytest
from ray.util import get_node_ip_address

from rsllm.cluster import prepare_worker

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


def test_gloo_is_told_the_interface_of_the_node(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GLOO_SOCKET_IFNAME")
    prepare_worker()
    assert address_of(os.environ["GLOO_SOCKET_IFNAME"]) == get_node_ip_address()


def test_the_users_choice_stays() -> None:
    prepare_worker()
    assert os.environ["GLOO_SOCKET_IFNAME"] == "chosen"
