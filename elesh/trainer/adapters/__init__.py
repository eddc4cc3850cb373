"""Elesh in other training loops: callbacks for Lightning and for the Hugging Face Trainer.

Each is a module of its own, since each needs its framework: ``elesh.trainer.adapters.lightning``
and ``elesh.trainer.adapters.hugging_face``.
"""
