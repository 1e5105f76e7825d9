"""Whether zstd pays, measured on the stream itself; no clock and no tensor here.

Coefficients of one link and direction look alike from packet to packet, so the last few tell about the next. zstd is
tried on a window of packets; while a window saves enough it stays on, and when one does not it rests for a while and
is then tried again, because training changes the numbers.
"""

from typing import Final

import zstandard

LEVEL: Final = 1  # measured on activations and gradients: smaller *and* faster than 3 and 9
MIN_SAVING: Final = 0.03  # below 3 % the bytes saved are not worth the sender's and the receiver's time
WINDOW_PACKETS: Final = 8  # judged together: one odd microbatch should not flip the decision
REST_PACKETS: Final = 248  # so that a stream that never pays is tried on 8 of 256 packets, 3 %


class ZstdAuto:
    """Offers a smaller form of each payload, or None to store it raw.

    Which packets are compressed depends on the sequence of payloads and on nothing else: the same stream gives the
    same packets. The numbers in a packet never depend on it. One instance belongs to one stream and one thread.
    """

    def __init__(self) -> None:
        self._compressor = zstandard.ZstdCompressor(level=LEVEL, write_content_size=True)
        self._resting_packets = 0
        self._tried_packets = 0
        self._raw_bytes = 0
        self._frame_bytes = 0

    def shrink(self, raw: memoryview | list[memoryview]) -> bytes | None:
        """The payload as one zstd frame if zstd is on and the frame is smaller; None otherwise.

        A list is a payload in parts of different statistics: each gets a block, and so a Huffman table, of its own.
        """
        parts = raw if isinstance(raw, list) else [raw]
        raw_bytes = sum(map(len, parts))
        if not raw_bytes:  # an empty payload says nothing about the stream
            return None
        if self._resting_packets:
            self._resting_packets -= 1
            return None
        frame = self._compressor.compress(parts[0]) if len(parts) == 1 else self._in_blocks(parts, raw_bytes)
        self._judge(raw_bytes, len(frame))
        return frame if len(frame) < raw_bytes else None

    def _in_blocks(self, parts: list[memoryview], raw_bytes: int) -> bytes:
        stream = self._compressor.compressobj(size=raw_bytes)
        blocks = []
        for part in parts[:-1]:
            blocks += [stream.compress(part), stream.flush(zstandard.COMPRESSOBJ_FLUSH_BLOCK)]
        return b"".join((*blocks, stream.compress(parts[-1]), stream.flush(zstandard.COMPRESSOBJ_FLUSH_FINISH)))

    def _judge(self, raw_bytes: int, frame_bytes: int) -> None:
        self._tried_packets += 1
        self._raw_bytes += raw_bytes
        self._frame_bytes += frame_bytes
        if self._tried_packets < WINDOW_PACKETS:
            return
        if self._frame_bytes > (1.0 - MIN_SAVING) * self._raw_bytes:
            self._resting_packets = REST_PACKETS
        self._tried_packets = self._raw_bytes = self._frame_bytes = 0
