"""Hostile bytes against everything that reads what came over the bus.

``python -m tests.fuzz --count 100000 --seed 1`` is the long form of the slice in the suite;
``python -m tests.fuzz.guided`` lets coverage guide the bytes (needs the package atheris).
"""
