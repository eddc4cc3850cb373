"""One reading of what happened, for cli and console: status, events, replay, capture, explain."""
