"""Stop strings over a stream of text pieces, however the text was cut into pieces.

The stop string that is *complete first* ends the text, just before its own start; of several that end on the same character
the longest counts. Each stop string is followed by a Knuth-Morris-Pratt matcher: its state is how many last
characters may be the beginning of that stop string, and the largest state is how much is held back.
"""

from __future__ import annotations

from collections.abc import Sequence


class _Matcher:
    def __init__(self, pattern: str) -> None:
        self.pattern = pattern
        # How many of the last characters seen are a prefix of the pattern.
        self.state = 0
        self._fallback = _fallbacks(pattern)

    def advance(self, character: str) -> bool:
        """True when the pattern ends at this character; nothing may be fed after that."""
        while self.state and self.pattern[self.state] != character:
            self.state = self._fallback[self.state - 1]
        if self.pattern[self.state] == character:
            self.state += 1
        return self.state == len(self.pattern)


def _fallbacks(pattern: str) -> list[int]:
    """For each prefix of the pattern, the length of its longest proper prefix that is also its suffix."""
    table = [0] * len(pattern)
    length = 0
    for place in range(1, len(pattern)):
        while length and pattern[place] != pattern[length]:
            length = table[length - 1]
        if pattern[place] == pattern[length]:
            length += 1
        table[place] = length
    return table


class StopStrings:
    """Invariant: until `found`, text given out + held-back text == text pushed; after it, nothing more is given out."""

    def __init__(self, stop: Sequence[str]) -> None:
        """`stop` holds no empty string."""
        self._matchers = [_Matcher(pattern) for pattern in stop]
        self._held = ""
        self.found = False

    def push(self, text: str) -> str:
        """The text that can be shown now: no stop string can still begin in it."""
        if self.found:
            return ""
        if not self._matchers:
            return text
        buffer = self._held + text
        for end, character in enumerate(text, start=len(self._held) + 1):
            complete = [len(matcher.pattern) for matcher in self._matchers if matcher.advance(character)]
            if complete:
                self.found = True
                self._held = ""
                return buffer[: end - max(complete)]
        num_held = max(matcher.state for matcher in self._matchers)
        shown = len(buffer) - num_held
        self._held = buffer[shown:]
        return buffer[:shown]

    def finish(self) -> str:
        """What was held back, once the text has ended without a stop string."""
        held, self._held = self._held, ""
        return held
