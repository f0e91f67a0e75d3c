"""Real processes and the real model."""

from __future__ import annotations

import random

import pytest

WORDS = {
    "adjective": ["old", "quiet", "green", "sudden", "narrow", "bright", "distant", "careful", "broken", "early"],
    "noun": ["river", "engine", "garden", "letter", "station", "teacher", "window", "harbour", "market", "bridge"],
    "verb": ["follows", "repairs", "remembers", "crosses", "opens", "describes", "carries", "answers", "finds", "builds"],
}


def make_text(num_words: int, seed: int) -> str:
    """Plain sentences, the same for the same seed."""
    chance = random.Random(seed)
    sentences: list[str] = []
    while sum(len(sentence.split()) for sentence in sentences) < num_words:
        picked = [chance.choice(WORDS[kind]) for kind in ("adjective", "noun", "verb", "adjective", "noun")]
        sentences.append("The {} {} {} the {} {}.".format(*picked))
    return " ".join(" ".join(sentences).split()[:num_words])


@pytest.fixture(scope="session")
def prompt_texts() -> list[str]:
    """Twenty prompts of about 5 to 1,500 tokens, questions among them."""
    lengths = (12, 20, 30, 45, 60, 80, 100, 130, 160, 200, 260, 330, 420, 560, 760, 1000, 1320)
    texts = [make_text(num_words, seed) for seed, num_words in enumerate(lengths)]
    return ["The capital of France is", "def fibonacci(n):\n    ", "Once upon a time, in a small", *texts]
