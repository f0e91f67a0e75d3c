"""Imported weights, config and files are what the GGUF file holds, bit by bit; an import that fails leaves nothing."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import gguf
import numpy as np
import pytest
from gguf.constants import GGMLQuantizationType as BlockFormat
from safetensors.numpy import load_file

from segue.errors import ModelFileError
from segue.models import gguf_file
from segue.models.config import LinearScaling, Llama3Scaling, ModelConfig
from segue.models.digest import file_digest
from segue.models.gguf_import import import_gguf
from segue.models.model_dir import check_model_dir
from tests.support.gguf_files import (
    CHAT_TEMPLATE,
    CONTEXT,
    HEAD_DIM,
    HEADS,
    HIDDEN,
    INNER,
    KV_HEADS,
    LAYERS,
    TinyGguf,
    vocabulary,
)

ARCHITECTURES = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}
FORMATS = [BlockFormat.F32, BlockFormat.F16, BlockFormat.BF16, BlockFormat.Q8_0, BlockFormat.Q4_1]


def imported(tiny: TinyGguf, tmp_path: Path) -> Path:
    destination = tmp_path / "store" / "tiny"
    import_gguf(tiny.write(tmp_path / "tiny.gguf"), destination)
    return destination


@pytest.mark.parametrize("block_format", FORMATS, ids=lambda block_format: block_format.name)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_weights_are_the_stored_ones(architecture: str, block_format: BlockFormat, tmp_path: Path) -> None:
    tiny = TinyGguf(architecture, block_format)
    found = load_file(imported(tiny, tmp_path) / "model.safetensors")
    assert found.keys() == tiny.weights.keys()
    for name, expected in tiny.weights.items():
        assert found[name].dtype == np.float32
        np.testing.assert_array_equal(found[name], expected, err_msg=name)


def test_weights_do_not_depend_on_the_chunks_they_are_read_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gguf_file, "CHUNK_VALUES", 5 * HIDDEN)
    tiny = TinyGguf("llama", BlockFormat.Q8_0, biases=True)
    found = load_file(imported(tiny, tmp_path) / "model.safetensors")
    for name, expected in tiny.weights.items():
        np.testing.assert_array_equal(found[name], expected, err_msg=name)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_transformers_reads_the_same_model_from_both(architecture: str, tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    tiny = TinyGguf(architecture, tied=False)
    directory = imported(tiny, tmp_path)
    ours = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    # Given our config, since transformers does not read the size of Qwen3's heads; the config has its own tests below.
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, gguf_file="tiny.gguf", config=transformers.AutoConfig.from_pretrained(directory), dtype=torch.float32
    )
    prompt = torch.arange(40).reshape(1, 40)
    with torch.no_grad():
        torch.testing.assert_close(ours(prompt).logits, theirs(prompt).logits, rtol=0, atol=0)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("tied", [True, False])
def test_config_says_what_the_file_says(architecture: str, tied: bool, tmp_path: Path) -> None:
    config = ModelConfig.from_dir(imported(TinyGguf(architecture, tied=tied), tmp_path))
    assert config.architecture == ARCHITECTURES[architecture]
    assert (config.num_layers, config.hidden_size, config.intermediate_size) == (LAYERS, HIDDEN, INNER)
    assert (config.num_heads, config.num_kv_heads, config.head_dim) == (HEADS, KV_HEADS, HEAD_DIM)
    assert (config.max_context, config.vocab_size) == (CONTEXT, len(vocabulary()[0]))
    assert (config.rms_norm_eps, config.rope.theta, config.rope.scaling) == (1e-5, 50_000.0, None)
    assert config.tie_embeddings is tied
    assert (config.attention_bias, config.qk_norm) == (architecture == "qwen2", architecture == "qwen3")
    assert config.bos_token_id == vocabulary()[0].index("<|start|>")
    assert config.eos_token_ids == (vocabulary()[0].index("<|end|>"),)


def test_biases_of_a_llama_network(tmp_path: Path) -> None:
    config = ModelConfig.from_dir(imported(TinyGguf("llama", biases=True), tmp_path))
    assert config.attention_bias
    assert config.attention_output_bias
    assert config.mlp_bias


def test_every_token_that_ends_an_answer_is_kept(tmp_path: Path) -> None:
    tokens, _ = vocabulary()
    keys = {"tokenizer.ggml.eot_token_id": tokens.index("<|pad|>"), "tokenizer.ggml.eom_token_id": tokens.index("<|end|>")}
    config = ModelConfig.from_dir(imported(TinyGguf("llama", keys=keys), tmp_path))
    assert config.eos_token_ids == (tokens.index("<|end|>"), tokens.index("<|pad|>"))


def test_linear_scaling(tmp_path: Path) -> None:
    keys = {"qwen2.rope.scaling.type": "linear", "qwen2.rope.scaling.factor": 4.0}
    assert ModelConfig.from_dir(imported(TinyGguf("qwen2", keys=keys), tmp_path)).rope.scaling == LinearScaling(4.0)


def test_linear_scaling_under_its_first_name(tmp_path: Path) -> None:
    tiny = TinyGguf("llama", keys={"llama.rope.scale_linear": 2.0})
    assert ModelConfig.from_dir(imported(tiny, tmp_path)).rope.scaling == LinearScaling(2.0)


def llama3_divisors(factor: float, original: int) -> np.ndarray:
    """As llama.cpp's converter computes them, frequency by frequency."""
    divisors = []
    for pair in range(HEAD_DIM // 2):
        wavelength = 2 * np.pi * 50_000.0 ** (2 * pair / HEAD_DIM)
        if wavelength < original / 4.0:
            divisors.append(1.0)
        elif wavelength > original / 1.0:
            divisors.append(factor)
        else:
            smooth = (original / wavelength - 1.0) / 3.0
            divisors.append(1 / ((1 - smooth) / factor + smooth))
    return np.array(divisors, dtype=np.float32)


def test_the_scaling_of_llama_3_is_found_again(tmp_path: Path) -> None:
    divisors = llama3_divisors(32.0, 8192)
    assert any(1.0 < divisor < 32.0 for divisor in divisors), "the blended range must be tried"
    tiny = TinyGguf("llama", extra_tensors={"rope_freqs.weight": divisors})
    scaling = ModelConfig.from_dir(imported(tiny, tmp_path)).rope.scaling
    assert scaling == Llama3Scaling(32.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position=8192)


def test_files_of_a_hugging_face_directory(tmp_path: Path) -> None:
    directory = imported(TinyGguf("qwen3"), tmp_path)
    check_model_dir(directory)
    assert sorted(file.name for file in directory.iterdir()) == [
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    config = json.loads((directory / "tokenizer_config.json").read_text())
    assert config["chat_template"] == CHAT_TEMPLATE
    assert (config["bos_token"], config["eos_token"], config["pad_token"]) == ("<|start|>", "<|end|>", "<|pad|>")
    assert config["add_bos_token"] is False
    assert [path.name for path in directory.parent.iterdir()] == ["tiny"]


def test_progress_rises_to_the_end(tmp_path: Path) -> None:
    shares: list[float] = []
    import_gguf(TinyGguf("llama").write(tmp_path / "a.gguf"), tmp_path / "a", lambda _message, share: shares.append(share))
    assert shares == sorted(shares)
    assert (shares[0], shares[-1]) == (0.0, 1.0)


@pytest.mark.parametrize("interruption", [KeyboardInterrupt, MemoryError])
def test_an_interrupted_import_leaves_nothing(interruption: type[BaseException], tmp_path: Path) -> None:
    def interrupt(_message: str, share: float) -> None:
        if share > 0.5:
            raise interruption

    store = tmp_path / "store"
    with pytest.raises(interruption):
        import_gguf(TinyGguf("llama").write(tmp_path / "a.gguf"), store / "a", interrupt)
    assert list(store.iterdir()) == []


def test_a_full_disk_is_said_beforehand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = TinyGguf("llama").write(tmp_path / "a.gguf")
    monkeypatch.setattr(shutil, "disk_usage", lambda _path: SimpleNamespace(free=1000))
    with pytest.raises(ModelFileError, match="MiB free"):
        import_gguf(file, tmp_path / "store" / "a")
    assert list((tmp_path / "store").iterdir()) == []


def test_an_existing_destination_is_left_alone(tmp_path: Path) -> None:
    file = TinyGguf("llama").write(tmp_path / "a.gguf")
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "mine").touch()
    with pytest.raises(ModelFileError, match="exists already"):
        import_gguf(file, tmp_path / "a")
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["mine"]


def test_a_value_that_is_not_finite_is_refused(tmp_path: Path) -> None:
    broken = np.ones(HIDDEN, dtype=np.float32)
    broken[3] = np.nan
    file = TinyGguf("llama", extra_tensors={"output_norm.weight": broken}).write(tmp_path / "a.gguf")
    with pytest.raises(ModelFileError, match=r"output_norm\.weight holds values that are not finite"):
        import_gguf(file, tmp_path / "store" / "a")
    assert list((tmp_path / "store").iterdir()) == []


def test_gguf_package_agrees_on_the_header(tmp_path: Path) -> None:
    """Our strict reader against the format's own, on a file of many kinds of values."""
    path = TinyGguf("llama", BlockFormat.Q4_1, keys={"general.alignment": 64, "a.list": [1, 2], "a.empty": ""}).write(
        tmp_path / "a.gguf"
    )
    ours, theirs = gguf_file.GgufFile(path), gguf.GGUFReader(path)
    fields = {name: item.contents() for name, item in theirs.fields.items() if not name.startswith("GGUF.")}
    assert ours.metadata == fields
    assert [(t.name, t.offset, t.num_bytes, t.block_format) for t in ours.tensors.values()] == [
        (t.name, t.data_offset, t.n_bytes, t.tensor_type) for t in theirs.tensors
    ]


def test_the_real_models_weights(real_model_dir: Path) -> None:
    """The digest of the weights that transformers also reads, bit by bit, from the GGUF file of the pinned package."""
    assert file_digest(real_model_dir / "model.safetensors").startswith("c86d20c23598597e")
