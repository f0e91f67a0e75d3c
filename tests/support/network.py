"""Networks of a test's own: hosts with addresses, plugged into one bridge, apart from this machine's. Needs root."""

from __future__ import annotations

import itertools
import os
import subprocess
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Self

_PREFIX = "10.77.0"


@dataclass(frozen=True, slots=True)
class Place:
    """Where the processes of one host live: a network namespace with an address, and the bridge's end of its cable."""

    namespace: str
    address: str
    plug: str


class Network:
    """A bridge in a namespace of its own, which also has an address. All is gone when the block ends."""

    def __init__(self) -> None:
        self.name = f"segue-{os.getpid()}"
        self._numbers = itertools.count(2)
        self._exits = ExitStack()

    def __enter__(self) -> Self:
        self._add_namespace(self.name)
        _ip("-n", self.name, "link", "add", "bridge", "type", "bridge")
        _ip("-n", self.name, "link", "set", "bridge", "up")
        _ip("-n", self.name, "address", "add", f"{_PREFIX}.1/24", "dev", "bridge")
        return self

    def __exit__(self, *_: object) -> None:
        self._exits.close()

    def plug_in(self) -> Place:
        number = next(self._numbers)
        place = Place(f"{self.name}-{number}", f"{_PREFIX}.{number}", f"plug{number}")
        self._add_namespace(place.namespace)
        veth = ("link", "add", place.plug, "type", "veth", "peer", "name", "eth0", "netns", place.namespace)
        _ip("-n", self.name, *veth)
        _ip("-n", self.name, "link", "set", place.plug, "master", "bridge", "up")
        _ip("-n", place.namespace, "address", "add", f"{place.address}/24", "dev", "eth0")
        _ip("-n", place.namespace, "link", "set", "eth0", "up")
        return place

    def cut_off(self, place: Place) -> None:
        """Nothing goes in or out any more, and nobody is told."""
        _ip("-n", self.name, "link", "set", place.plug, "nomaster")

    def take_back(self, place: Place) -> None:
        _ip("-n", self.name, "link", "set", place.plug, "master", "bridge")

    def _add_namespace(self, name: str) -> None:
        _ip("netns", "add", name)
        self._exits.callback(_ip, "netns", "delete", name)
        _ip("-n", name, "link", "set", "lo", "up")


def _ip(*words: str) -> None:
    subprocess.run(("ip", *words), check=True, capture_output=True)
