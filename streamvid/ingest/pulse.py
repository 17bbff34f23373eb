"""A count that rises whenever reading gets anywhere, so that somebody else can see that it does not."""

from __future__ import annotations


class Pulse:
    """Signs of life of this process's decoding; every thread adds to it, one watches."""

    def __init__(self) -> None:
        self.beats = 0

    def beat(self) -> None:
        """Something came in or went out: a packet, a block of bytes, a picture."""
        self.beats += 1  # two threads may lose a beat to each other; that it rises is all that counts


PULSE = Pulse()
