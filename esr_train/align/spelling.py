"""Token boundaries of a batch on the marks of a ruler, a mark for each byte of the texts."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain

import numpy as np

from esr_train.align.byte_tokenizer import ByteTokenizer

LOST = -1


class Spelled:
    """Tokens of a batch, one row after another, on their bytes.

    starts, ends: [n] int64, marks of each token's first byte and of the one behind its last; -1
    where it has none. Bytes of its own row until the row is placed.
    """

    def __init__(self, tokenizer: ByteTokenizer, rows: Sequence[Sequence[int]]) -> None:
        self.lengths = np.array([len(row) for row in rows], dtype=np.int64)
        self.ids = np.fromiter(chain.from_iterable(rows), np.int64, count=self.lengths.sum())
        spelling, self.widths = tokenizer.spell(self.ids)
        self._bytes = spelling.tobytes()
        self._first_token = np.append(0, np.cumsum(self.lengths))
        ends = np.cumsum(self.widths)
        self._first_byte = np.append(0, ends)[self._first_token]
        self.ends = ends - np.repeat(self._first_byte[:-1], self.lengths)
        self.starts = self.ends - self.widths
        # Special tokens: no place in the text.
        self.empty = self.widths == 0
        self.sequence_ids = np.repeat(np.arange(len(rows)), self.lengths)

    def raw(self, row: int) -> bytes:
        return self._bytes[self._first_byte[row] : self._first_byte[row + 1]]

    def place(self, row: int, mark: int, marks: np.ndarray | None = None) -> None:
        """Put the row's first byte at `mark`. marks: of its bytes [len(raw) + 1] from there, where
        they are not just one after another; -1 for none."""
        tokens = self._tokens(row)
        for side in (self.starts, self.ends):
            moved = side[tokens] if marks is None else marks[side[tokens]]
            moved = np.where(moved >= 0, moved + mark, LOST)
            side[tokens] = np.where(self.empty[tokens], LOST, moved)

    def close(self, row: int, mark: int) -> None:
        """The row's last token is EOS, at `mark`."""
        last = self._first_token[row + 1] - 1
        self.starts[last], self.ends[last] = mark, mark + 1
        self.empty[last] = False

    def place_by_claims(
        self,
        row: int,
        mark: int,
        text: str,
        offsets: np.ndarray,
        prefixed: bool,
        changed: np.ndarray,
    ) -> None:
        """Place a row, closed by EOS, that does not spell `text`, which begins at `mark`.

        offsets: [tokens, 2], the letters that each token says to come from. Tokens that share
        letters are taken together. What is said counts where the bytes are the same; elsewhere only
        the two ends of the stretch do, and `changed` is set on its marks.
        prefixed: the first token begins with a dummy prefix.
        """
        tokens = slice(self._first_token[row], self._first_token[row + 1] - 1)
        full = np.frombuffer(b" " + text.encode(), dtype=np.uint8)  # with the dummy's place
        here = changed[mark - 1 : mark - 1 + len(full)]
        if len(offsets) == 0:
            here[:] = True
            return
        raw, widths = np.frombuffer(self.raw(row), dtype=np.uint8), self.widths[tokens]
        firsts, stops = (1 + _letter_bytes(text))[offsets].T
        if prefixed:
            firsts[0] = 0
            if widths[0] == 1:  # the dummy alone
                stops[0] = 1

        before = np.maximum.accumulate(np.append(0, stops[:-1]))
        leads = before <= np.minimum.accumulate(firsts[::-1])[::-1]
        heads, group = np.flatnonzero(leads), np.cumsum(leads) - 1
        low, high = np.minimum.reduceat(firsts, heads), np.maximum.reduceat(stops, heads)
        ends = np.cumsum(widths)
        shift = low - (ends - widths)[heads]  # from the row's bytes to those of `full`
        byte_group = np.repeat(group, widths)
        places = np.arange(len(raw)) + shift[byte_group]
        differs = full[np.minimum(places, len(full) - 1)] != raw
        wrong = np.bincount(byte_group, differs, minlength=len(heads)) > 0
        kept = ~wrong & (np.add.reduceat(widths, heads) == high - low)
        lost = np.ones(len(full), dtype=bool)
        lost[places[kept[byte_group]]] = False
        here |= lost

        lasts = np.append(leads[1:], True)
        edges = (np.where(leads, low[group], LOST), np.where(lasts, high[group], LOST))
        for side, own, edge in zip(
            (self.starts, self.ends), (ends - widths, ends), edges, strict=True
        ):
            placed = np.where(kept[group], own + shift[group], edge)
            side[tokens] = np.where(placed >= 0, placed + mark - 1, LOST)

    def padded(self, fill: int) -> np.ndarray:
        """The ids, [rows, longest]."""
        width = int(self.lengths.max(initial=0))
        ids = np.full((len(self.lengths), width), fill, dtype=np.int64)
        ids[np.arange(width) < self.lengths[:, None]] = self.ids
        return ids

    def _tokens(self, row: int) -> slice:
        return slice(self._first_token[row], self._first_token[row + 1])


def _letter_bytes(text: str) -> np.ndarray:
    """[len(text) + 1]: the byte that each letter begins at, and the end."""
    points = np.frombuffer(text.encode("utf-32-le"), dtype=np.uint32)
    widths = 1 + sum((points >= first).astype(np.int64) for first in (0x80, 0x800, 0x10000))
    return np.append(0, np.cumsum(widths))


def readable(raw: bytes, cut: bool) -> tuple[str, np.ndarray | None, list[tuple[int, int]]]:
    """Bytes as the text that a reader gets: U+FFFD for what is no UTF-8.

    cut: an unfinished character at the end is left out.

    Returns the text; for each byte boundary of `raw`, [len(raw) + 1], its place in the text's
    bytes, -1 inside of what is not kept, or None if it is all kept; and the replaced (first, stop).
    """
    try:
        return raw.decode(), None, []
    except UnicodeDecodeError:
        pass
    places = np.full(len(raw) + 1, LOST, dtype=np.int64)
    texts: list[str] = []
    replaced: list[tuple[int, int]] = []
    done = size = 0
    while True:
        rest = raw[done:]
        good, bad, unfinished = rest, b"", False
        try:
            rest.decode()
        except UnicodeDecodeError as error:
            good, bad = rest[: error.start], rest[error.start : error.end]
            unfinished = cut and error.reason == "unexpected end of data"
        # The boundary between two replaced stretches is none.
        if good or not bad or unfinished or done == 0:
            places[done : done + len(good) + 1] = np.arange(size, size + len(good) + 1)
        texts.append(good.decode())
        done, size = done + len(good) + len(bad), size + len(good)
        if not bad or unfinished:
            return "".join(texts), places, replaced
        texts.append("\ufffd")
        replaced.append((size, size + 3))
        size += 3
