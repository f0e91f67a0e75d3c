"""`python quantize_gguf.py SOURCE DESTINATION FORMAT`: writes a GGUF file anew with llama.cpp's own quantizer."""

from __future__ import annotations

import ctypes
import sys

import llama_cpp  # type: ignore[import-not-found]  # only there in the peer's environment


def main(source: str, destination: str, gguf_format: str) -> int:
    params = llama_cpp.llama_model_quantize_default_params()
    name = "ALL_F32" if gguf_format == "f32" else f"MOSTLY_{gguf_format.upper()}"
    params.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_{name}")
    # The source is a quantized file itself.
    params.allow_requantize = True
    result: int = llama_cpp.llama_model_quantize(source.encode(), destination.encode(), ctypes.byref(params))
    return result


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
