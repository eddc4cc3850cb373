"""The chaos driver: a fleet under crashes, stalls, cuts and poison, and an audit of every key.

``python -m tests.chaos --seed S --minutes M`` starts a server, producers and workers, breaks them
by a seeded schedule, heals them, waits until nothing is left to do, and audits all streams.
"""
