"""Which input channels of each linear layer are large, measured once for a model, so that int8 can smooth them.

    text → float forward pass that records what enters each linear layer → smoothing vectors → a file for load_calibration

SmoothQuant (Xiao et al. 2023, arXiv:2211.10438) balances the largest activation of an input channel against its largest weight,
by exponents that have to be tried. Here both are root mean squares and the exponents one half, s = sqrt(rms(activations) /
rms(weights)): on SmolLM2-135M the layers' outputs then err 14 to 42 % less than with the largest values and the exponent that
is best for each layer, and there is nothing to try. The vectors depend on the model and the text alone.
"""

from __future__ import annotations

import importlib.resources
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from engine.kernels.reference import TorchKernels, TorchLinear
from engine.kv_cache import KVCache
from engine.layout import kv_layout
from engine.linear import Linear
from engine.model import Decoder
from engine.rotary import RotaryTable
from engine.scoring import STEP_TOKENS, cache_for, step_logits
from engine.weights import ModelWeights, WeightFormats, load_weights
from segue.config import EngineSettings
from segue.errors import ModelFileError
from segue.models.config import ModelConfig
from segue.models.model_dir import calibration_file, model_revision

Progress = Callable[[str, float], None]

_TEXT = importlib.resources.files("engine").joinpath("texts", "calibration.txt")
# More would not change the vectors by anything that counts.
_MAX_TOKENS = 2048
# Channels are taken to be at least this share of the largest: those that are never used must not be scaled to infinity.
_LEAST_SHARE = 1e-4
_REVISION = "model_revision"


def ensure_calibrated(model_dir: Path, progress: Progress) -> None:
    """Measures the model and keeps the result, unless a sound one is kept already. Raises ModelFileError.

    Two processes that do so at once do the same work, and either's file is as good.
    """
    try:
        load_calibration(model_dir)
    except ModelFileError:
        message = "measuring activations, for int8"
        progress(message, 0.0)
        smoothing = calibrate(model_dir, calibration_tokens(model_dir), lambda share: progress(message, share))
        save_calibration(model_dir, smoothing)


def load_calibration(model_dir: Path) -> Mapping[str, torch.Tensor]:
    """Smoothing vectors [inputs] float32, positive, of all linear layers by name: `layers.0.qkv`, ..., `head`.

    Raises ModelFileError, naming the file and what to do, when there are none, or other ones than this model's.
    """
    config, revision = ModelConfig.from_dir(model_dir), model_revision(model_dir)
    file = calibration_file(model_dir, revision)
    if not file.exists():
        raise _refused(file, "is missing, and int8 needs it")
    try:
        with safe_open(str(file), framework="pt") as opened:
            # Copies: the file may be made anew while they are in use.
            found = {name: opened.get_tensor(name).clone() for name in opened.keys()}  # noqa: SIM118
            made_for = (opened.metadata() or {}).get(_REVISION)
    except (OSError, SafetensorError) as error:
        raise _refused(file, f"cannot be read ({error})") from None
    if made_for != revision:
        raise _refused(file, "was made for other weights")
    for name, size in _num_inputs(config).items():
        vector = found.get(name)
        if vector is None or vector.dtype != torch.float32 or vector.shape != (size,):
            raise _refused(file, f"lacks {name} as {size} float32 numbers")
        if not bool((vector.isfinite() & (vector > 0)).all()):
            raise _refused(file, f"has numbers in {name} that are not positive")
    return found


def save_calibration(model_dir: Path, smoothing: Mapping[str, torch.Tensor]) -> None:
    """Puts the vectors where load_calibration finds them, complete or not at all. Raises ModelFileError."""
    revision = model_revision(model_dir)
    file = calibration_file(model_dir, revision)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=file.parent, prefix=".calibration-") as folder:
            unfinished = Path(folder) / file.name
            unfinished.write_bytes(save(dict(smoothing), {_REVISION: revision}))
            unfinished.replace(file)
    except OSError as error:
        raise ModelFileError(f"cannot write {file}: {error.strerror or error}; set SEGUE_HOME to another folder") from None


def calibration_tokens(model_dir: Path) -> list[int]:
    """The calibration text in the model's own tokens. Raises ModelFileError for a tokenizer.json that cannot be used."""
    import tokenizers

    file = model_dir / "tokenizer.json"
    try:
        tokenizer = tokenizers.Tokenizer.from_file(str(file))
    except Exception as error:  # noqa: BLE001 - the library raises a plain Exception
        raise ModelFileError(f"{file}: {error}; fetch or import the model again") from None
    return list(tokenizer.encode(_TEXT.read_text(encoding="utf-8")).ids)


def calibrate(
    model_dir: Path, token_ids: list[int], progress: Callable[[float], None] = lambda _share: None
) -> dict[str, torch.Tensor]:
    """The vectors that load_calibration describes, from the leading `token_ids`; in float32, on the calling thread's number of
    torch threads. Raises ModelFileError for weights or token ids that cannot be used."""
    config = ModelConfig.from_dir(model_dir)
    token_ids = token_ids[: min(_MAX_TOKENS, config.max_context)]
    if not token_ids or max(token_ids) >= config.vocab_size:
        raise ModelFileError(
            f"{model_dir / 'tokenizer.json'}: turns text into token ids beyond config.json's vocab_size ({config.vocab_size})"
        )
    weights = load_weights(model_dir, config, WeightFormats())
    linears = named_linears(weights)
    layout = kv_layout(config, EngineSettings(), "calibration")
    rotary = RotaryTable(config.rope, config.head_dim, len(token_ids))
    kernels = RecordingKernels(config, cache_for(len(token_ids), layout), rotary, linears)
    for number, _ in enumerate(step_logits(Decoder(weights, kernels), layout, token_ids), start=1):
        progress(min(1.0, number * STEP_TOKENS / len(token_ids)))
    return {
        name: smoothing_vector(kernels.square_sums[name], linear.weight.values.square().sum(0))
        for name, linear in linears.items()
    }


def smoothing_vector(input_squares: torch.Tensor, weight_squares: torch.Tensor) -> torch.Tensor:
    """[inputs] float32, whose logarithms have a mean of 0, from sums of squares [inputs]: over tokens, of what entered the
    layer; over outputs, of its weights. Only the proportions of each count."""
    logs = torch.zeros(len(input_squares), dtype=torch.float64)
    for squares, sign in ((input_squares, 1), (weight_squares, -1)):
        largest = squares.max()
        if largest > 0:
            # A quarter: from a square to its root, and from the ratio of roots to the root of the ratio.
            logs += sign / 4 * (squares.to(torch.float64) / largest).clamp(min=_LEAST_SHARE**2).log()
    return (logs - logs.mean()).exp().to(torch.float32)


def named_linears(weights: ModelWeights) -> dict[str, Linear]:
    """All linear layers by the names under which their smoothing is kept."""
    linears = {
        f"layers.{index}.{name}": getattr(layer, name)
        for index, layer in enumerate(weights.layers)
        for name in ("qkv", "attention_output", "gate_up", "down")
    }
    return linears | {"head": weights.head}


class RecordingKernels(TorchKernels):
    """Computes as TorchKernels does, and adds up the squares of what enters each linear layer."""

    def __init__(self, config: ModelConfig, cache: KVCache, rotary: RotaryTable, linears: Mapping[str, Linear]) -> None:
        super().__init__(config, cache, rotary)
        self._names = {id(linear): name for name, linear in linears.items()}
        # For each layer, over all tokens so far. [inputs] float64
        self.square_sums = {name: torch.zeros(linear.num_inputs, dtype=torch.float64) for name, linear in linears.items()}

    def linear(self, layer: TorchLinear, inputs: torch.Tensor, *, add_to: torch.Tensor | None = None) -> torch.Tensor:
        entering = self.entering(layer, inputs)
        name = self._names[id(layer.linear)]
        self.square_sums[name] += entering.square().sum(0, dtype=torch.float64)
        if name == "head":
            # The largest layer by far, and nothing follows it.
            return entering.new_empty(len(entering), 0)
        return super().linear(TorchLinear(layer.linear, norm=None, gated=False), entering, add_to=add_to)


def _num_inputs(config: ModelConfig) -> dict[str, int]:
    """Inputs of each linear layer, by name."""
    of_layer = {
        "qkv": config.hidden_size,
        "attention_output": config.num_heads * config.head_dim,
        "gate_up": config.hidden_size,
        "down": config.intermediate_size,
    }
    layers = {f"layers.{index}.{name}": size for index in range(config.num_layers) for name, size in of_layer.items()}
    return layers | {"head": config.hidden_size}


def _refused(file: Path, problem: str) -> ModelFileError:
    return ModelFileError(f"{file} {problem}; segue models import, segue models pull and segue up make it anew")
