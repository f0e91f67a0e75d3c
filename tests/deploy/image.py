"""The Dockerfile, carried out without a container engine: in a root of its own, an overlay over this machine's.

What its build stage runs is run there as written; only apt-get is not, as this machine has a compiler. What was built then
runs as Kubernetes would run it: read-only, as user 10001, with writable /tmp and /models alone. Needs root, and a kernel that
lets it mount.
"""

from __future__ import annotations

import fnmatch
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

from tests.deploy.charts import ROOT

DOCKERFILE = ROOT / "deploy/docker/Dockerfile"
# The machine's Python may lie in root's home.
SYSTEM = "mount --bind /dev $root/dev; mount -t proc proc $root/proc; chmod o+x $root/root;"


def overlay(folder: Path, work: Path) -> str:
    """Mounts a root over this machine's; `work` has not been used before. Volatile: else a gigabyte would be written out to the
    disk each time that it ends."""
    layers = f"lowerdir=/,upperdir={folder}/upper,workdir={work},volatile"
    return f"mount -t overlay overlay -o {layers} $root;"


def bound(image: Path) -> str:
    """Brings an image's only folder into a root. (As a layer it would overlap with that of this machine.)"""
    return f"mkdir -p $root/opt/segue; mount --bind -o ro {image}/opt/segue $root/opt/segue;"


@dataclass
class Stage:
    """`steps`: pairs of an instruction and its text, in order."""

    base: str
    name: str
    steps: list[tuple[str, str]] = field(default_factory=list)


def stages() -> list[Stage]:
    text = re.sub(r"\\\n", " ", "\n".join(line for line in DOCKERFILE.read_text().splitlines() if not line.startswith("#")))
    found: list[Stage] = []
    for line in filter(None, map(str.strip, text.splitlines())):
        instruction, _, rest = line.partition(" ")
        if instruction == "FROM":
            base, _, name = rest.partition(" AS ")
            found.append(Stage(base, name))
        elif found:
            found[-1].steps.append((instruction, rest.strip()))
    return found


def context_files() -> list[str]:
    """Tracked files that .dockerignore lets into the build, as Docker reads it: the last pattern that matches decides."""
    lines = (ROOT / ".dockerignore").read_text().splitlines()
    patterns = [line for line in lines if line and not line.startswith("#")]
    tracked = subprocess.run(["git", "-C", ROOT, "ls-files"], capture_output=True, text=True, check=True).stdout.splitlines()
    return [file for file in tracked if (ROOT / file).exists() and not _is_ignored(file, patterns)]


def _is_ignored(file: str, patterns: list[str]) -> bool:
    parts = file.split("/")
    above = {"/".join(parts[:end]) for end in range(1, len(parts) + 1)}
    ignored = False
    for pattern in patterns:
        bare = pattern.removeprefix("!").removeprefix("**/")
        if any(fnmatch.fnmatch(path, bare) for path in above) or (
            pattern.startswith("**/") and fnmatch.fnmatch(parts[-1], bare)
        ):
            ignored = not pattern.startswith("!")
    return ignored


class Root:
    """A root file system whose changes lie in `folder`, like a container's."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        for name in ("upper", "merged"):
            (folder / name).mkdir(parents=True)

    @property
    def changes(self) -> Path:
        return self.folder / "upper"

    def build(self) -> None:
        """Carries the build stage out. Raises CalledProcessError with what a step said."""
        (stage,) = [stage for stage in stages() if stage.name == "build"]
        env, place = {"PATH": f"{Path(sys.executable).resolve().parent}:/usr/bin:/bin", "HOME": "/root"}, "/"
        files = context_files()
        for instruction, text in stage.steps:
            match instruction:
                case "ENV":
                    env |= dict(pair.split("=", 1) for pair in shlex.split(text))
                case "WORKDIR":
                    place = text
                    (self.changes / place.lstrip("/")).mkdir(parents=True, exist_ok=True)
                case "COPY":
                    *sources, target = text.split()
                    self._copy([file for file in files if file.split("/")[0] in sources], f"{place}/{target}", sources)
                case "RUN" if "apt-get" not in text:
                    self._run(f"cd {place} && {text}", env)

    def _copy(self, files: list[str], target: str, sources: list[str]) -> None:
        assert files, f"{sources} are not in the build's context"
        for file in files:
            # A folder's content is copied, a file as it is.
            inside = file if file in sources else file.partition("/")[2]
            goal = self.changes / target.strip("/") / inside
            goal.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / file, goal)

    def _run(self, script: str, env: dict[str, str]) -> None:
        self._shell(script, env, mounts=SYSTEM)

    def as_in_kubernetes(self, image: Path, script: str, env: dict[str, str]) -> str:
        """What `script` prints, run on what another root has built, with the environment and user of the final stage, and in a
        network of its own."""
        env = env | {"PATH": "/opt/segue/bin:/usr/bin:/bin", "HOME": "/tmp", "SEGUE_HOME": "/models"}
        writable = "".join(f"mount -t tmpfs -o mode=1777 none $root/{name};" for name in ("tmp", "models"))
        mounts = f"ip link set lo up; mkdir -p $root/models; {SYSTEM} {bound(image)} mount -o remount,ro $root; {writable}"
        return self._shell(script, env, mounts=mounts, user="10001:10001", namespaces=("--net",))

    def _shell(
        self, script: str, env: dict[str, str], *, mounts: str, user: str = "0:0", namespaces: tuple[str, ...] = ()
    ) -> str:
        work = Path(tempfile.mkdtemp(prefix="work-", dir=self.folder))
        start = f"set -e; root={self.folder}/merged; {overlay(self.folder, work)} {mounts}"
        variables = " ".join(f"{name}={shlex.quote(value)}" for name, value in env.items())
        inner = f"exec chroot --userspec={user} $root env -i {variables} sh -e -c {shlex.quote(script)}"
        # Mounts, and processes that are left, end with it.
        words = ["unshare", *namespaces, "--mount", "--pid", "--fork", "--kill-child", "sh", "-c", f"{start} {inner}"]
        done = subprocess.run(words, capture_output=True, text=True, check=False)
        if done.returncode:
            raise AssertionError(f"{script[:200]}\nended with {done.returncode}:\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}")
        return done.stdout
