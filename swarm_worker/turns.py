"""Which word of the anchor a stage process acts on. Sans-I/O; no stream and no tensor.

A FENCE or a START may come late, or twice: streams break, and what was said on the last one is said again. An epoch that
this process has worked in, or has answered the end of, is over for it, and it begins none that it has not answered for.
"""

from __future__ import annotations


class Turns:
    """The epochs of one process. `epoch` is the newest it has heard of, `began` the newest it has worked in."""

    def __init__(self) -> None:
        self.epoch = 0
        self.began = 0

    def fence(self, epoch: int) -> bool:
        """Whether to stop, and to say what is held. Said again it is answered again, until the epoch begins."""
        if epoch < self.epoch or epoch <= self.began:
            return False
        self.epoch = epoch
        return True

    def start(self, epoch: int, recovery: bool) -> bool:
        """Whether to begin this epoch. One at a version that was asked for is begun by those alone who have answered."""
        if epoch < self.epoch or epoch <= self.began or recovery and epoch != self.epoch:
            return False
        self.epoch = self.began = epoch
        return True
