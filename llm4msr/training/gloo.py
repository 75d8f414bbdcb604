"""Which network gloo uses between hosts: the one that Ray uses.

Left to itself gloo asks for the address of the host's own name. Debian's installer writes that down as 127.0.1.1, which
no other host can reach, and a group then waits for its workers until it times out. NCCL chooses by itself, and well.
"""

from __future__ import annotations

import fcntl
import os
import socket
import struct
from typing import Any

import ray
from ray.train.torch import TorchConfig

_SIOCGIFADDR = 0x8915  # of Linux: the IPv4 address of a network interface


class GlooConfig(TorchConfig):
    """Ray Train's configuration of a process group, over the interface that Ray's own address belongs to.

    A GLOO_SOCKET_IFNAME that is set already stays.
    """

    @property
    def backend_cls(self) -> Any:
        """The class that starts the group."""
        return _Backend


class _Backend(TorchConfig().backend_cls):  # type: ignore[misc]
    def on_start(self, worker_group: Any, backend_config: TorchConfig) -> None:
        worker_group.execute(_choose_interface)
        super().on_start(worker_group, backend_config)


def _choose_interface() -> None:
    name = interface_of(ray.util.get_node_ip_address())
    if name is not None:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", name)


def interface_of(address: str) -> str | None:
    """Returns the name of the network interface of this machine that has an IPv4 address; None if none has."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asking:
        for _, name in socket.if_nameindex():
            try:
                answer = fcntl.ioctl(asking, _SIOCGIFADDR, struct.pack("256s", name.encode()))
            except OSError:  # it has no address
                continue
            if socket.inet_ntoa(answer[20:24]) == address:
                return name
    return None
