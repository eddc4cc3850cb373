"""The connection to the server: its address, the embedded one, shared round trips."""
