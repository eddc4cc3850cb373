"""The worker: a small supervisor that talks to the bus, and a compute child that may be killed."""

from .supervisor import Worker, serve, worker_name

__all__ = ["Worker", "serve", "worker_name"]
