"""`python -m bench.perplexity`: what quantized weights cost in quality, on a text that calibration has not seen.

    perplexity_<format>                  of the evaluation text (bench/texts), which was written for this purpose
    perplexity_<format>_over_float32     1.01: the model is one percent more perplexed
    perplexity_<format>_excess           the same in percent
    same_likeliest_<format>              share of the text's places at which the likeliest next token is float32's
    same_greedy_<format>                 share of 64 greedy tokens before an answer parts from float32's, mean of some prompts

An answer that parts from another goes its own way from there on, whichever of both is better; so the last says how alike two
formats are, not how good.
"""

from __future__ import annotations

import asyncio
import importlib.resources
from collections.abc import Sequence as List
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console

from bench.machine import commit, machine_facts
from bench.report import Report, Row, print_report, ratio_row, write_json
from engine.block_pool import BlockPool
from engine.calibration import ensure_calibrated, load_calibration
from engine.engine import Engine
from engine.kernels.choice import make_kernels
from engine.layout import kv_layout
from engine.model import Decoder
from engine.rotary import RotaryTable
from engine.scoring import Score, cache_for, score
from engine.sequence import Sequence
from engine.step import Chunk
from engine.weights import WeightFormats, load_weights
from router.text.chat_template import ChatMessage
from router.text.tokenizer import Tokenizer
from segue.config import DEFAULT_MODEL, EngineSettings
from segue.errors import SegueError
from segue.models.config import ModelConfig
from segue.models.store import resolve
from segue.sampling import SamplingParams

BASE = "float32"
QUANTIZATIONS = {BASE: "none", "int8": "int8", "int4": "int4"}
ANSWER_TOKENS = 64
QUESTIONS = (
    "Why do leaves change their colour in autumn?",
    "Write a function in Python that tells whether a word reads the same backwards.",
    "Tell me a short story about a lighthouse keeper and a fox.",
    "List five things to pack for a weekend in the mountains.",
    "What is the difference between weather and climate?",
    "A shirt costs 40 dollars and is reduced by a quarter. What is its new price?",
)


@dataclass(frozen=True, slots=True)
class Measured:
    """One format's results."""

    score: Score
    # Greedy continuations of the prompts.
    answers: List[List[int]]


def evaluation_text() -> str:
    return importlib.resources.files("bench").joinpath("texts", "evaluation.txt").read_text(encoding="utf-8")


def measure(
    model_dir: Path, settings: EngineSettings, text: list[int], prompts: List[list[int]], *, kernels: str = "auto"
) -> Measured:
    """Scores the tokens `text` and answers the prompts with weights held as `settings` say."""
    config = ModelConfig.from_dir(model_dir)
    layout = kv_layout(config, settings, "perplexity")
    num_tokens = max(len(text), max(map(len, prompts)) + ANSWER_TOKENS)
    threads = settings.threads or torch.get_num_threads()
    cache = cache_for(num_tokens, layout)
    rotary = RotaryTable(config.rope, config.head_dim, num_tokens)
    backend = make_kernels(config, cache, rotary, threads=threads, device=settings.device, kernels=kernels)
    decoder = Decoder(load_weights(model_dir, config, _formats(model_dir, settings)), backend)
    scored = score(decoder, layout, text)
    with closing(Engine(config, layout, BlockPool(cache.num_blocks), decoder, threads=threads)) as engine:
        return Measured(scored, [asyncio.run(answer(engine, prompt)) for prompt in prompts])


def _formats(model_dir: Path, settings: EngineSettings) -> WeightFormats:
    is_quantized = settings.quantization != "none"
    return WeightFormats(
        dtype=getattr(torch, settings.dtype),
        quantization=settings.quantization,
        keep_float=frozenset(settings.keep_float),
        smoothing=load_calibration(model_dir) if is_quantized else {},
    )


async def answer(engine: Engine, prompt: list[int]) -> list[int]:
    """The ANSWER_TOKENS likeliest tokens after the prompt, whatever they are."""
    sequence = Sequence("answer", list(prompt), SamplingParams(max_tokens=ANSWER_TOKENS, temperature=0.0))
    lease = engine.pool.lease(engine.layout.num_blocks_for(len(prompt) + ANSWER_TOKENS))
    if lease is None:
        raise ValueError(f"the engine's {engine.pool.num_total} KV blocks do not hold the prompt and its answer")
    sequence.lease = lease
    try:
        for _ in range(ANSWER_TOKENS):
            (token,) = await engine.run([Chunk(sequence, sequence.num_uncomputed)])
            if token is not None:
                sequence.append(token)
    finally:
        engine.pool.release(lease)
    return sequence.token_ids[len(prompt) :]


def share_before_parting(answers: List[List[int]], others: List[List[int]]) -> float:
    """Mean, over pairs of answers of equal length, of the share of tokens before the first at which they differ."""
    shares = []
    for ours, theirs in zip(answers, others, strict=True):
        differing = [mine != other for mine, other in zip(ours, theirs, strict=True)]
        shares.append(differing.index(True) / len(differing) if any(differing) else 1.0)
    return sum(shares) / len(shares)


def rows(measured: dict[str, Measured]) -> list[Row]:
    """The metrics of all formats; BASE is one of them."""
    base = measured[BASE]
    table = [Row(f"perplexity_{name}", result.score.perplexity, "1") for name, result in measured.items()]
    for name, result in measured.items():
        if name == BASE:
            continue
        ratio = ratio_row(f"perplexity_{name}_over_{BASE}", [result.score.perplexity], [base.score.perplexity])
        same = float((result.score.likeliest == base.score.likeliest).double().mean())
        table += [
            ratio,
            Row(f"perplexity_{name}_excess", 100 * (ratio.value - 1), "%"),
            Row(f"same_likeliest_{name}", same, "share"),
            Row(f"same_greedy_{name}", share_before_parting(result.answers, base.answers), "share"),
        ]
    return table


def run(model: str, *, flags: dict[str, object], kernels: str, console: Console) -> Report:
    """`flags` are engine settings that all formats share."""
    handle = resolve(model)
    tokenizer = Tokenizer.from_dir(handle.path)
    text = tokenizer.encode(evaluation_text())[: ModelConfig.from_dir(handle.path).max_context]
    prompts = [tokenizer.encode_chat([ChatMessage("user", question)], now_unix_s=0) for question in QUESTIONS]
    measured = {}
    with console.status("") as state:
        ensure_calibrated(handle.path, lambda message, _share: state.update(message))
        for name, quantization in QUANTIZATIONS.items():
            state.update(f"{name}: {len(text)} tokens of text, {len(prompts)} answers")
            settings = EngineSettings.load(flags={**flags, "quantization": quantization}, env={})
            measured[name] = measure(handle.path, settings, text, prompts, kernels=kernels)
    facts = {**machine_facts(), "model": handle.name, "tokens": len(text), **flags}
    return Report(facts, commit(), rows(measured))


def main(
    keep_float: Annotated[str, typer.Option(help="Linear layers left as they are, such as head,down.")] = "",
    kv_dtype: Annotated[str, typer.Option(help="Number format of the KV cache: auto, float32, bfloat16 or int8.")] = "auto",
    threads: Annotated[int, typer.Option(min=1, help="Compute threads.")] = 1,
    kernels: Annotated[str, typer.Option(help="auto, torch, or an instruction set of the native kernels.")] = "auto",
    model: Annotated[str, typer.Option(help="What `segue up --model` takes.")] = DEFAULT_MODEL,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the report there as well.")] = None,
) -> None:
    """Measure what int8 and int4 weights cost in quality. About a minute."""
    console = Console(highlight=False, soft_wrap=True)
    torch.set_num_threads(threads)
    kept = [name for name in keep_float.split(",") if name]
    try:
        flags: dict[str, object] = {"keep_float": kept, "kv_dtype": kv_dtype, "threads": threads}
        report = run(model, flags=flags, kernels=kernels, console=console)
    except SegueError as error:
        console.print(f"error: {error.message}", style="red", markup=False)
        raise typer.Exit(1) from None
    print_report(report, console)
    if json_file is not None:
        write_json(report, json_file)


if __name__ == "__main__":
    typer.run(main)
