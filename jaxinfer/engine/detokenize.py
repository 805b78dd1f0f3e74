"""Text from tokens as they come: each piece of text once, when nothing that follows can change it any more."""

from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

UNDECODABLE = "\ufffd"  # what a decoder puts for bytes that are not UTF-8, or not yet
CONTEXT = 4  # tokens decoded again before new ones, so that a decoder treats those as the middle of a text
PATIENCE = 8  # undecodable tokens that are tried again at each new one; beyond, whenever they have doubled


@lru_cache(maxsize=4)
def _kinds(tokenizer: Any) -> tuple[frozenset[int], frozenset[int], dict[int, str]]:
    """Ids of tokens that make text, of those among them that stand for one byte (SentencePiece's byte fallback), and
    the names of special tokens, which make none."""
    vocabulary = tokenizer.get_vocab()
    special = {token: str(added) for token, added in tokenizer.added_tokens_decoder.items() if added.special}
    single = {vocabulary[piece] for byte in range(256) if (piece := f"<0x{byte:02X}>") in vocabulary}
    return frozenset(vocabulary.values()) - special.keys(), frozenset(single), special


class _Name(NamedTuple):
    """The name of a special token in the text that stop strings are looked for in, where it begins and ends, and which
    output token it is of. It does not show."""

    start: int
    end: int
    place: int


class TextStream:
    """The text of one sequence's output.

    All pieces together are what decoding prompt and output in one go has after the decoded prompt; special tokens
    are left out. Bytes that do not make a character yet are held back, and so is a run of byte-fallback tokens until
    another token ends it, because one wrong byte spoils its whole run. So is the beginning of what may become a stop
    string.

    Stop strings are looked for in the text with the special tokens' names in it, as by transformers' `stop_strings`: a
    stop string may be such a name, or begin, end or go on in it. Among several, the one that is complete first ends the
    text; of those that end at the same character, the longest. What is found does not depend on how the tokens are
    spread over calls of `append`.

    Attributes:
      stopped: the stop string that ended the text, None so far.
      stopped_tokens: how many output tokens it took, the one that completed the stop string included.
    """

    def __init__(self, tokenizer: Any, prompt_ids: Sequence[int] = (), stop: Iterable[str] = ()):
        self._tokenizer = tokenizer
        self._visible, self._single_bytes, self._special = _kinds(tokenizer)
        self._stop = tuple(stop)
        self.stopped: str | None = None
        self.stopped_tokens: int | None = None
        self._parts: list[str] = []
        self._held = ""  # may be the beginning of a stop string
        self._names: list[_Name] = []  # in what is held
        self._unnamed: list[tuple[int, str, int]] = []  # special tokens not read yet: ids before them, name, place
        self._seen = 0  # output tokens
        self._places: list[int] = []  # of the unread ids, counted from 1 in the output
        self._patience = 1  # unread tokens that the next attempt waits for
        self._run = 0  # byte-fallback tokens at the end of the ids
        self._ids: list[int] = []  # context, and from self._read on what is not text yet
        for token in reversed(prompt_ids):
            if len(self._ids) >= CONTEXT and self._run < len(self._ids):
                break
            if token in self._visible:
                if token in self._single_bytes and self._run == len(self._ids):
                    self._run += 1
                self._ids.append(token)
        self._ids.reverse()
        self._read = len(self._ids)
        self._before = self._decode(self._read)

    @property
    def text(self) -> str:
        """All that `append` and `finish` have returned."""
        return "".join(self._parts)

    def is_special(self, token: int) -> bool:
        """Whether it makes no text."""
        return token in self._special

    def append(self, token_ids: Iterable[int]) -> str:
        """Takes the next output tokens and returns the text that is certain now; "" once stopped."""
        if self.stopped is not None:
            return ""
        for token in token_ids:
            self._seen += 1
            if token in self._visible:
                self._ids.append(token)
                self._places.append(self._seen)
                self._run = self._run + 1 if token in self._single_bytes else 0
            elif self._stop and token in self._special:
                self._unnamed.append((len(self._ids), self._special[token], self._seen))
        end, text = self._settled()
        return self._release(end, text, final=False)

    def finish(self) -> str:
        """Returns what was held back: no token follows."""
        if self.stopped is not None:
            return ""
        return self._release(len(self._ids), self._decode(len(self._ids)), final=True)

    def _decode(self, end: int) -> str:
        return self._tokenizer.decode(self._ids[:end], skip_special_tokens=True, clean_up_tokenization_spaces=False)

    def _settled(self) -> tuple[int, str]:
        """How many of the ids have their final text, and that text."""
        last = len(self._ids) - self._run
        if last - self._read < self._patience:
            return self._read, self._before
        # a character has at most 4 bytes: unless the bytes are no text at all, one of these ends with a whole one
        for end in range(last, max(last - 4, self._read), -1):
            if self._ids[end - 1] not in self._single_bytes:
                text = self._decode(end)
                if not text.endswith(UNDECODABLE):
                    self._patience = 1
                    return end, text
        unread = last - self._read
        self._patience = unread + 1 if unread < PATIENCE else 2 * unread
        return self._read, self._before

    def _release(self, end: int, text: str, final: bool) -> str:
        # they differ at the prompt's end only, where the output may complete a character
        known = _common(self._before, text)
        buffer, names = self._named(end, text, known) if self._unnamed else (self._held + text[known:], self._names)
        found = [(at + len(stop), at, stop) for stop in self._stop if (at := buffer.find(stop)) >= 0]
        if found:
            stop_end, keep, self.stopped = min(found)
            inside = [name.place for name in names if name.start < stop_end <= name.end]
            more = len(_shown(buffer[:stop_end], names)) - len(_shown(self._held, self._names))
            self.stopped_tokens = inside[0] if inside else self._place(end, text[: known + more])
        elif final:
            keep = len(buffer)
        else:
            keep = len(buffer) - max((_overlap(buffer, stop) for stop in self._stop), default=0)
        shown = _shown(buffer[:keep], names)
        self._parts.append(shown)
        self._held = buffer[keep:]
        self._names = [_Name(max(0, start - keep), stop - keep, place) for start, stop, place in names if stop > keep]
        self._advance(end)
        return shown

    def _named(self, end: int, text: str, known: int) -> tuple[str, list[_Name]]:
        """What is held and the text after `known`, with the names of the special tokens before `end` in it."""
        buffer, names, at = self._held, list(self._names), known
        while self._unnamed and self._unnamed[0][0] <= end:
            count, name, place = self._unnamed.pop(0)
            # inside a character, before it
            here = len(text) if count == end else max(at, _common(self._decode(count), text))
            buffer += text[at:here]
            names.append(_Name(len(buffer), len(buffer) + len(name), place))
            buffer, at = buffer + name, here
        return buffer + text[at:], names

    def _place(self, end: int, text: str) -> int:
        """The output token with which the ids' text begins with this one."""
        count = next(count for count in range(self._read + 1, end + 1) if self._decode(count).startswith(text))
        return self._places[count - self._read - 1]

    def _advance(self, end: int) -> None:
        if end > self._read:
            del self._places[: end - self._read]
            start = max(0, end - CONTEXT)
            del self._ids[:start]
            self._unnamed = [(count - start, name, place) for count, name, place in self._unnamed]
            self._read = end - start
            self._before = self._decode(self._read)


def _shown(text: str, names: list[_Name]) -> str:
    """What is left of the text without the names in it."""
    for name in reversed(names):
        text = text[: name.start] + text[name.end :]
    return text


def _common(one: str, other: str) -> int:
    """Length of the beginning that both have."""
    if other.startswith(one):
        return len(one)
    return next(place for place in range(len(one)) if one[place] != other[place : place + 1])


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of text that stop begins with, stop itself left aside."""
    return next((size for size in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:size])), 0)
