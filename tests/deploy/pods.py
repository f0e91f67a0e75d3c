"""Runs rendered pods without a Kubernetes: each with a network, process ids and a read-only root of its own, from the image.

What a kubelet does for the chart is done here as well: init containers first, environment from fields and Secrets, volumes, the
pod's user, SIGTERM and the grace period at the end. Needs root.
"""

from __future__ import annotations

import base64
import os
import re
import shlex
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from tests.deploy.charts import Object
from tests.deploy.image import SYSTEM, bound, overlay
from tests.support.network import Network, Place

_PATH = "/opt/segue/bin:/usr/bin:/bin"


class Node:
    """A network that pods are plugged into. `claims` are folders that stand for persistent volumes, by claim name."""

    def __init__(self, folder: Path, image: Path, objects: list[Object], claims: dict[str, Path]) -> None:
        self.folder = folder
        self.image = image
        self.claims = claims
        self.network = Network()
        self.config = {one["metadata"]["name"]: one["data"] for one in objects if one["kind"] == "ConfigMap"}
        self.secrets = {one["metadata"]["name"]: one["data"] for one in objects if one["kind"] == "Secret"}
        self._exits = ExitStack()
        # What stands for the cluster's DNS.
        self.hosts = folder / "hosts"
        self.hosts.write_text("127.0.0.1 localhost\n")

    def __enter__(self) -> Node:
        self._exits.enter_context(self.network)
        return self

    def __exit__(self, *_: object) -> None:
        self._exits.close()

    def start(self, template: Object, name: str) -> Pod:
        """A pod of this name and template. It is killed when the node ends."""
        pod = Pod(self, template, name, self.network.plug_in())
        self._exits.callback(pod.kill)
        pod.start()
        return pod

    def name_service(self, name: str, address: str) -> None:
        with self.hosts.open("a") as file:
            file.write(f"{address} {name}\n")


class Pod:
    def __init__(self, node: Node, template: Object, name: str, place: Place) -> None:
        self.node = node
        self.network = place.namespace
        self.name = name
        self.address = place.address
        self.labels: dict[str, str] = template["metadata"]["labels"]
        self.spec: Object = template["spec"]
        self.folder = node.folder / name
        self.log = node.folder / f"{name}.log"
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Returns when the main container runs. Raises CalledProcessError when an init container fails."""
        for container in self.spec.get("initContainers", []):
            with self._launch(container) as process:
                assert process.wait() == 0, self.log.read_text()
        (main,) = self.spec["containers"]
        self._process = self._launch(main)

    def _launch(self, container: Object) -> subprocess.Popen[bytes]:
        root = self.folder / f"{container['name']}-{time.monotonic_ns()}"
        for part in ("upper", "work", "merged"):
            (root / part).mkdir(parents=True)
        script = f"set -e; root={root}/merged; {overlay(root, root / 'work')} "
        script += f"{SYSTEM} {bound(self.node.image)} "
        script += f"touch $root/etc/hosts; mount --bind {self.node.hosts} $root/etc/hosts; "
        mounts = list(self._mounts(container))
        script += "".join(f"mkdir -p $root{path}; " for path, _ in mounts)
        script += "mount -o remount,ro $root; "
        script += "".join(f"{mount} $root{path}; " for path, mount in mounts)
        env = " ".join(f"{name}={shlex.quote(value)}" for name, value in self._environment(container).items())
        user = self.spec["securityContext"]["runAsUser"]
        words = shlex.join([*container.get("command", []), *container.get("args", [])])
        script += f"exec chroot --userspec={user}:{user} $root env -i {env} {words}"
        with self.log.open("ab") as log:
            return subprocess.Popen(
                [
                    "ip",
                    "netns",
                    "exec",
                    self.network,
                    "unshare",
                    "--mount",
                    "--pid",
                    "--fork",
                    "--kill-child",
                    "sh",
                    "-c",
                    script,
                ],
                stdout=log,
                stderr=log,
            )

    def _mounts(self, container: Object) -> Iterator[tuple[str, str]]:
        """Where something is mounted, and the command that mounts it, less that place."""
        volumes = {volume["name"]: volume for volume in self.spec.get("volumes", [])}
        for mount in container.get("volumeMounts", []):
            volume: Object = volumes.get(mount["name"], {"emptyDir": {}})
            if (claim := volume.get("persistentVolumeClaim")) is not None:
                source = self.node.claims[claim["claimName"]]
            else:
                # Lives as long as the pod: init containers leave things there.
                source = self.folder / "volumes" / mount["name"]
                source.mkdir(parents=True, exist_ok=True)
                source.chmod(0o777)
            for file, text in self.node.config.get(volume.get("configMap", {}).get("name"), {}).items():
                (source / file).write_text(text)
            yield mount["mountPath"], f"mount --bind {'-o ro ' if mount.get('readOnly') else ''}{source}"

    def _environment(self, container: Object) -> dict[str, str]:
        env = {"PATH": _PATH}
        for entry in container.get("env", []):
            value = entry["value"] if "value" in entry else self._reference(entry["valueFrom"])
            env[entry["name"]] = re.sub(r"\$\((\w+)\)", lambda found: env[found[1]], value)
        return env

    def _reference(self, source: dict[str, Any]) -> str:
        if "fieldRef" in source:
            return {"metadata.name": self.name, "status.podIP": self.address}[source["fieldRef"]["fieldPath"]]
        secret = source["secretKeyRef"]
        return base64.b64decode(self.node.secrets[secret["name"]][secret["key"]]).decode()

    @property
    def pid(self) -> int:
        """Of the main container's process, as this machine sees it."""
        (child,) = self._children()
        return child

    def _children(self) -> list[int]:
        assert self._process is not None
        return list(map(int, Path(f"/proc/{self._process.pid}/task/{self._process.pid}/children").read_text().split()))

    def terminate(self) -> float:
        """As at a pod's deletion: gives the seconds that its end took, which its grace period has to cover."""
        assert self._process is not None
        began_s = time.monotonic()
        os.kill(self.pid, signal.SIGTERM)
        self._process.wait(self.spec.get("terminationGracePeriodSeconds", 30))
        return time.monotonic() - began_s

    def kill(self) -> None:
        """The first process of the pod, with which all others of it end. (It would outlive unshare: one that changes its user
        is no longer killed with its parent.)"""
        if self._process is not None and self._process.poll() is None:
            for child in self._children():
                os.kill(child, signal.SIGKILL)
            self._process.kill()
            self._process.wait()

    def command(self, *words: str, env: dict[str, str]) -> subprocess.CompletedProcess[str]:
        """Runs a program of the image in the pod's network, as a probe does."""
        python = self.node.image / "opt/segue/bin" / words[0]
        inside = ["ip", "netns", "exec", self.network, "env", *(f"{key}={value}" for key, value in env.items())]
        return subprocess.run([*inside, str(python), *words[1:]], capture_output=True, text=True, check=False)

    def served(self) -> set[tuple[str, int]]:
        """Connections from elsewhere to ports that the pod listens on: address and port."""
        tables = [Path(f"/proc/{self.pid}/net/{name}").read_text() for name in ("tcp", "tcp6")]
        rows = [line.split()[1:4] for table in tables for line in table.splitlines()[1:]]
        listening = {local.split(":")[1] for local, _, state in rows if state == "0A"}
        found = set()
        for local, remote, state in rows:
            address, port = _address(remote), local.split(":")[1]
            if state == "01" and port in listening and address not in {self.address, "127.0.0.1"}:
                found.add((address, int(port, 16)))
        return found


def _address(text: str) -> str:
    """An address as /proc/net/tcp writes it; of one of version 6, the one of version 4 that it holds."""
    return ".".join(map(str, reversed(bytes.fromhex(text.partition(":")[0][-8:]))))


@contextmanager
def requests_of(node: Node, router: str, model: str) -> Iterator[dict[str, int]]:
    """Sends requests, two at a time, from a network that is no pod's, for as long as the block. Afterwards it says how many
    were answered (`answered`) and how many failed (`failed`)."""
    code = _CLIENT.format(url=f"http://{router}:8000/v1/completions", model=model)
    python = ["ip", "netns", "exec", node.network.name, str(node.image / "opt/segue/bin/python"), "-c", code]
    outcome: dict[str, int] = {}
    with subprocess.Popen(python, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as client:
        try:
            yield outcome
        finally:
            said, errors = client.communicate("stop\n")
    answered, failed = map(int, said.split())
    outcome |= {"answered": answered, "failed": failed}
    logs = (f"{log.name}:\n{log.read_text()[-4000:]}" for log in sorted(node.folder.glob("*.log")))
    assert not failed, "\n".join([errors, *logs])


_CLIENT = """
import json, sys, threading, urllib.request
counts, stop = [0, 0], threading.Event()
body = json.dumps({{"model": {model!r}, "prompt": "Hello", "max_tokens": 24, "temperature": 0}}).encode()
def send():
    while not stop.is_set():
        request = urllib.request.Request({url!r}, body, {{"content-type": "application/json"}})
        try:
            answer = json.load(urllib.request.urlopen(request, timeout=60))
            assert answer["usage"]["completion_tokens"] == 24, answer
            counts[0] += 1
        except Exception as error:
            counts[1] += 1
            print(repr(error), getattr(error, "read", bytes)(), file=sys.stderr)
threads = [threading.Thread(target=send) for _ in range(2)]
[thread.start() for thread in threads]
sys.stdin.readline()
stop.set()
[thread.join() for thread in threads]
print(*counts)
"""
