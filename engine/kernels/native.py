"""The C++ backend for CPUs (csrc/): a shared library without torch in it, called through ctypes.

Weights are packed into panels of 16 outputs, KV is read where it lies, and results go into buffers that steps reuse. ctypes
lets go of the interpreter's lock during each call.
"""

from __future__ import annotations

import ctypes
import importlib.util
import weakref
from ctypes import c_char_p, c_float, c_int32, c_int64, c_void_p
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch

from engine.kernels.arena import Arena
from engine.kernels.base import DecoderLayer
from engine.kv_cache import KVCache
from engine.linear import INT4_GROUP, FloatWeight, Int4Weight, Int8Weight, Linear, Weight
from engine.rotary import RotaryTable
from engine.step import StepInputs
from segue.errors import ConfigError
from segue.models.config import ModelConfig

LIBRARY_MODULE = "engine.kernels._native"
# Outputs in a panel; kLanes in csrc/abi.h.
PANEL = 16
_FORMATS = {"float32": 0, "bfloat16": 1, "int8": 2, "int4": 3}


class _Linear(ctypes.Structure):
    """struct Linear of csrc/abi.h"""

    _fields_ = (
        ("panels", c_void_p),
        ("scales", c_void_p),
        ("sums", c_void_p),
        ("bias", c_void_p),
        ("input_scales", c_void_p),
        ("format", c_int32),
        ("num_inputs", c_int32),
        ("num_outputs", c_int32),
        ("is_gated", c_int32),
        ("has_norm", c_int32),
        ("norm_eps", c_float),
    )


class _Layer(ctypes.Structure):
    """struct Layer of csrc/abi.h"""

    _fields_ = tuple((name, c_void_p) for name in ("qkv", "attention_output", "gate_up", "down", "qk_norm"))


class _Cache(ctypes.Structure):
    """struct Cache of csrc/abi.h"""

    _fields_ = (
        ("memory", c_void_p),
        ("rotary", c_void_p),
        ("layer_bytes", c_int64),
        ("slab_bytes", c_int64),
        ("num_heads", c_int32),
        ("num_kv_heads", c_int32),
        ("head_dim", c_int32),
        ("block_size", c_int32),
        ("format", c_int32),
        ("norm_eps", c_float),
    )


class _Piece(ctypes.Structure):
    """struct Piece of csrc/abi.h"""

    _fields_ = (("blocks", c_void_p), ("first_row", c_int64), ("start", c_int64), ("end", c_int64))


@dataclass(frozen=True, slots=True)
class NativeLinear:
    struct: _Linear
    address: int
    num_outputs: int
    # What the struct points to.
    tensors: tuple[torch.Tensor | None, ...]


@dataclass(frozen=True, slots=True)
class NativeLayers:
    # ctypes array of _Layer, and its address.
    array: Any
    address: int
    # Outputs of qkv and of gate_up.
    qkv_width: int
    gate_up_width: int
    # What the array points to.
    layers: tuple[DecoderLayer[NativeLinear], ...]


@dataclass(frozen=True, slots=True)
class NativeStep:
    # ctypes array of _Piece, and its address: handing over the array itself costs each call 0.6 microseconds more.
    pieces: Any
    address: int
    num_pieces: int


def open_library(path: str) -> ctypes.CDLL:
    """The library at `path`, with the types of its functions. Raises ConfigError when it cannot be loaded."""
    try:
        library = ctypes.CDLL(path)
    except OSError as error:
        raise ConfigError(f"cannot load the native kernels: {error}; install Segue again") from None
    library.segue_instruction_set.argtypes = (c_int64,)
    library.segue_instruction_set.restype = c_char_p
    library.segue_open.argtypes = (c_int64, c_int64)
    library.segue_open.restype = c_void_p
    library.segue_close.argtypes = (c_void_p,)
    library.segue_linear.argtypes = (c_void_p, c_void_p, c_void_p, c_int64, c_void_p, c_int64)
    heads = (c_void_p, c_void_p, c_int64, c_void_p, c_void_p, c_void_p, c_int64)
    library.segue_rotate_and_write.argtypes = heads
    library.segue_attend.argtypes = heads
    library.segue_run_layers.argtypes = (*(c_void_p,) * 3, c_int64, c_void_p, c_int64, *(c_void_p,) * 4, c_int64)
    for function in (
        library.segue_close,
        library.segue_linear,
        library.segue_rotate_and_write,
        library.segue_attend,
        library.segue_run_layers,
    ):
        function.restype = None
    return library


@cache
def built_library() -> ctypes.CDLL | None:
    """The library that was built with this package; None where that was not possible."""
    spec = importlib.util.find_spec(LIBRARY_MODULE)
    return None if spec is None or spec.origin is None else open_library(spec.origin)


def instruction_sets(library: ctypes.CDLL | None) -> list[str]:
    """Those that the library has and this processor can run, the best first; none without a library."""
    names: list[str] = []
    while library is not None and (name := library.segue_instruction_set(len(names))) is not None:
        names.append(name.decode())
    return names


class NativeKernels:
    def __init__(
        self,
        library: ctypes.CDLL,
        instruction_set: str,
        config: ModelConfig,
        cache: KVCache,
        rotary: RotaryTable,
        *,
        threads: int,
    ) -> None:
        """`instruction_set` is one of `instruction_sets(library)`."""
        self.name = f"native ({instruction_set})"
        self.device = torch.device("cpu")
        self._library = library
        self._context = library.segue_open(instruction_sets(library).index(instruction_set), threads)
        # Ends the threads when the last reference goes.
        self._close = weakref.finalize(self, library.segue_close, self._context)
        self._config = config
        self.cache = cache
        self._rotary = rotary
        self._cache = _describe_cache(config, cache, rotary)
        self._cache_address = ctypes.addressof(self._cache)
        self._arena = Arena()
        self._attended_width = config.num_heads * config.head_dim
        # Results by (operation, width): [rows, width] float32, of as many rows as were ever needed; and views of their first
        # rows with their addresses, which would cost more to make anew than the call that they are for.
        self._buffers: dict[tuple[str, int], torch.Tensor] = {}
        self._views: dict[tuple[str, int, int], tuple[torch.Tensor, int]] = {}

    def pack(self, linear: Linear, *, norm: torch.Tensor | None = None, gated: bool = False) -> NativeLinear:
        scales, sums = None, None
        if isinstance(linear.weight, Int8Weight):
            scales, sums = linear.weight.scales, linear.weight.values.sum(1, dtype=torch.int32)
        input_scales = norm if linear.input_scales is None else linear.input_scales * (1 if norm is None else norm)
        numbers = (_pack_weight(linear.weight), scales, sums, linear.bias, input_scales)
        tensors = tuple(None if tensor is None else self._arena.place(tensor) for tensor in numbers)
        struct = _Linear(
            *(None if tensor is None else tensor.data_ptr() for tensor in tensors),
            format=_format_of(linear.weight),
            num_inputs=linear.num_inputs,
            num_outputs=linear.num_outputs,
            is_gated=gated,
            has_norm=norm is not None,
            norm_eps=self._config.rms_norm_eps,
        )
        return NativeLinear(struct, ctypes.addressof(struct), linear.num_outputs, tensors)

    def prepare(self, step: StepInputs) -> NativeStep:
        pieces = (_Piece * len(step.pieces))(
            *(_Piece(piece.lease.block_ids.buffer_info()[0], piece.first_row, piece.start, piece.end) for piece in step.pieces)
        )
        return NativeStep(pieces, ctypes.addressof(pieces), len(pieces))

    def linear(self, layer: NativeLinear, inputs: torch.Tensor, *, add_to: torch.Tensor | None = None) -> torch.Tensor:
        rows = inputs.shape[0]
        if add_to is not None:
            self._library.segue_linear(self._context, layer.address, inputs.data_ptr(), rows, add_to.data_ptr(), 1)
            return add_to
        outputs, address = self._result("linear", rows, layer.num_outputs)
        self._library.segue_linear(self._context, layer.address, inputs.data_ptr(), rows, address, 0)
        return outputs

    def rotate_and_write(self, layer: int, heads: torch.Tensor, qk_norm: torch.Tensor | None, step: NativeStep) -> None:
        norm = None if qk_norm is None else qk_norm.data_ptr()
        self._library.segue_rotate_and_write(
            self._context, self._cache_address, layer, heads.data_ptr(), norm, step.address, step.num_pieces
        )

    def attend(self, layer: int, heads: torch.Tensor, step: NativeStep) -> torch.Tensor:
        outputs, address = self._result("attend", heads.shape[0], self._attended_width)
        self._library.segue_attend(
            self._context, self._cache_address, layer, heads.data_ptr(), address, step.address, step.num_pieces
        )
        return outputs

    def join_layers(self, layers: tuple[DecoderLayer[NativeLinear], ...]) -> NativeLayers:
        array = (_Layer * len(layers))(
            *(
                _Layer(
                    layer.qkv.address,
                    layer.attention_output.address,
                    layer.gate_up.address,
                    layer.down.address,
                    None if layer.qk_norm is None else layer.qk_norm.data_ptr(),
                )
                for layer in layers
            )
        )
        first = layers[0]
        return NativeLayers(array, ctypes.addressof(array), first.qkv.num_outputs, first.gate_up.num_outputs, layers)

    def run_layers(self, layers: NativeLayers, hidden: torch.Tensor, step: NativeStep) -> None:
        rows = len(hidden)
        self._library.segue_run_layers(
            self._context,
            self._cache_address,
            layers.address,
            len(layers.layers),
            hidden.data_ptr(),
            rows,
            self._result("linear", rows, layers.qkv_width)[1],
            self._result("attend", rows, self._attended_width)[1],
            self._result("linear", rows, layers.gate_up_width)[1],
            step.address,
            step.num_pieces,
        )

    def _result(self, operation: str, rows: int, width: int) -> tuple[torch.Tensor, int]:
        """Memory for a result [rows, width] and its address: the same again for the same shape."""
        key = (operation, rows, width)
        if (view := self._views.get(key)) is None:
            buffer = self._buffers.get((operation, width))
            if buffer is None or len(buffer) < rows:
                # Views of the smaller buffer would keep it alive.
                self._views.clear()
                buffer = self._buffers[operation, width] = torch.empty(rows, width)
            view = self._views[key] = buffer[:rows], buffer.data_ptr()
        return view


def _describe_cache(config: ModelConfig, cache: KVCache, rotary: RotaryTable) -> _Cache:
    layout = cache.layout
    return _Cache(
        memory=cache.layers[0].data_ptr(),
        rotary=rotary.table.data_ptr(),
        layer_bytes=cache.num_blocks * layout.region_bytes,
        slab_bytes=layout.slab_bytes,
        num_heads=config.num_heads,
        num_kv_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        block_size=layout.block_size,
        format=_FORMATS[layout.dtype],
        norm_eps=config.rms_norm_eps,
    )


def _format_of(weight: Weight) -> int:
    match weight:
        case FloatWeight(values):
            return _FORMATS["float32" if values.dtype == torch.float32 else "bfloat16"]
        case Int8Weight():
            return _FORMATS["int8"]
        case Int4Weight():
            return _FORMATS["int4"]


def _pack_weight(weight: Weight) -> torch.Tensor:
    """The panels that struct Linear describes, for any format."""
    match weight:
        case FloatWeight(values):
            return _panels(values).transpose(1, 2).contiguous()
        case Int8Weight(values, _):
            missing = -values.shape[1] % 4
            panels = _panels(torch.nn.functional.pad(values, (0, missing)))
            return panels.view(len(panels), PANEL, -1, 4).transpose(1, 2).contiguous()
        case Int4Weight(values, scales, minimums):
            # [panel, output, group, octet, half, 4] → [panel, group, octet, output, 4]
            halves = _panels(values).view(-1, PANEL, scales.shape[1], INT4_GROUP // 8, 2, 4).permute(0, 2, 3, 4, 1, 5)
            nibbles = (halves[:, :, :, 0] | halves[:, :, :, 1] << 4).flatten(2)
            numbers = [_panels(part).transpose(1, 2).contiguous().view(torch.uint8) for part in (scales, minimums)]
            return torch.cat([*numbers, nibbles], -1).contiguous()


def _panels(values: torch.Tensor) -> torch.Tensor:
    """[outputs, ...] → [panels, PANEL, ...], filled up with zeros."""
    padded = torch.nn.functional.pad(values, (0, 0, 0, -len(values) % PANEL))
    return padded.view(-1, PANEL, values.shape[1])
