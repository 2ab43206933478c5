"""The sizes both sides agree on before any memory is taken."""

from __future__ import annotations

import msgspec

KIB = 1024
MIB = 1024 * 1024

CHUNK_BYTES = 512 * KIB
"""Size of one chunk: the fastest of those measured between 256 KiB and 4 MiB."""

CHUNK_ABOVE_BYTES = MIB
"""An answer up to this size travels as one message; chunking a smaller one only costs."""

UPLOAD_BYTES = MIB
"""Size of one piece of an upload: images or a student bundle."""

BULK_ABOVE_BYTES = 64 * KIB
"""A request above this size travels on the bulk connection, where nothing small waits behind it."""

MAX_PACKET_BYTES = 2 * MIB
"""The largest MQTT packet either side sends; brokers and clients are configured for it."""


class Limits(msgspec.Struct, frozen=True, kw_only=True):
    """What a device accepts. It announces them in its card and answers 413 beyond them."""

    max_images_per_block: int = 1024
    max_block_bytes: int = 64 * MIB
    max_answer_bytes: int = 256 * MIB
    max_bundle_bytes: int = 256 * MIB
    image_store_bytes: int = 256 * MIB
    answer_cache_bytes: int = 32 * MIB
    answer_cache_s: float = 300.0
    """How long an answer is remembered after it was last asked for."""
    max_outgoing_bytes: int = 512 * MIB
    """All answers on their way together; a worker waits before it would exceed it."""
    max_queued_requests: int = 64
    max_queued_per_coordinator: int = 32

    def within(self, memory_bytes: int) -> Limits:
        """Limits of which everything together fits `memory_bytes`: what a small device can keep.

        A quarter each for images, for answers on their way and for one that is being made; the rest is for
        requests that wait, which have a piece of an upload each, and for the runtime.
        """
        quarter = memory_bytes // 4
        waiting = max(2, quarter // 2 // UPLOAD_BYTES)
        return msgspec.structs.replace(
            self,
            image_store_bytes=min(self.image_store_bytes, quarter),
            max_block_bytes=min(self.max_block_bytes, quarter),
            max_answer_bytes=min(self.max_answer_bytes, quarter),
            max_outgoing_bytes=min(self.max_outgoing_bytes, quarter),
            max_bundle_bytes=min(self.max_bundle_bytes, quarter),
            answer_cache_bytes=min(self.answer_cache_bytes, quarter // 4),
            max_queued_requests=min(self.max_queued_requests, waiting),
        )
