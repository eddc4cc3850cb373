"""The connection to the server: where it is, the bundled one, shared round trips."""
