"""Prompt lookup: what followed the last time that the text ended like this.

An index of all that was read and written, kept up to date token by token. Positions with the same
last `least` tokens form a chain from the latest to the earliest; the longest match among the last
few of the chain is taken. A step costs the same at any length of the text.
"""

from array import array
from collections.abc import Sequence

CANDIDATES = 24  # of a chain that are compared
LONGEST = 32  # tokens compared; longer matches count as this long


class Ngrams:
    """The index.

    Args:
        least: Tokens that must match, 1 or more.

    Attributes:
        tokens: All of them, an array.
    """

    def __init__(self, tokens: Sequence = (), least: int = 2):
        self.tokens, self.least = array("i"), least
        self._last = {}  # the last `least` tokens -> where the text went on
        self._before = array("i")  # place -> the next earlier one of its chain, -1 at the end
        self._source = -1  # where the last match goes on, if the text does too
        self.extend(tokens)

    def __len__(self) -> int:
        return len(self.tokens)

    def extend(self, tokens: Sequence):
        """Add tokens at the end."""
        n, last = self.least, self._last
        for token in tokens:
            at = len(self.tokens)
            # Not the end itself: its place is entered when the next token is known.
            if at >= n:
                key = self._key()
                self._before.append(last.get(key, -1))
                last[key] = at
            else:
                self._before.append(-1)
            if self._source >= 0:
                same = self.tokens[self._source] == token
                self._source = self._source + 1 if same else -1
            self.tokens.append(token)

    def _key(self) -> int:
        key = 0
        for token in self.tokens[-self.least :]:
            key = key << 24 | token  # one number takes a third of a tuple's memory
        return key

    def _match(self, place: int) -> int:
        """How many tokens before `place` are those at the end."""
        tokens, end, n = self.tokens, len(self.tokens), 0
        most = min(LONGEST, place)
        while n < most and tokens[place - 1 - n] == tokens[end - 1 - n]:
            n += 1
        return n

    def find(self) -> tuple:
        """(place, length): the longest match, the latest of equals, goes on there; or (-1, 0).

        The source of the last match is compared too, however far back it is, so that a passage
        once found is followed to its end.
        """
        if len(self.tokens) < self.least:
            return -1, 0
        best, length = -1, self.least - 1
        places, place = [], self._last.get(self._key(), -1)
        while place >= 0 and len(places) < CANDIDATES:
            places.append(place)
            place = self._before[place]
        if self._source >= 0:
            places.insert(0, self._source)
        for place in places:
            n = self._match(place)
            if n > length:
                best, length = place, n
                if n == LONGEST:
                    break
        return (best, length) if best >= 0 else (-1, 0)

    def follow(self, place: int, n: int) -> list:
        """n tokens from a place that find() gave; what runs over the end repeats itself.

        Fewer where an unknown token (below 0) comes.
        """
        self._source = place
        end, out = len(self.tokens), []
        for i in range(place, place + n):
            token = self.tokens[i] if i < end else out[i - end]
            if token < 0:
                break
            out.append(token)
        return out
