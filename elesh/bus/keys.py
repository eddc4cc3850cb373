"""The names of everything in Redis: one prefix and one hash tag a partition, so that Redis Cluster
holds a partition on one node and scripts may touch several of its keys."""

from __future__ import annotations

from dataclasses import dataclass

from leyline.streams import Stream

__all__ = ["Keys"]


@dataclass(frozen=True, slots=True)
class Keys:
    """The keys of one partition."""

    partition: str

    def stream(self, stream: Stream) -> str:
        """The key of a stream."""
        return stream.key(self.partition)

    def named(self, *parts: str) -> str:
        """Any other key."""
        return f"elesh:{{{self.partition}}}:" + ":".join(parts)
