"""One training script, several ways to a smaller network: accuracy against MACs and latency."""
