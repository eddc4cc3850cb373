"""What happened, read once for cli and console: status, events, replay, capture, explain."""
