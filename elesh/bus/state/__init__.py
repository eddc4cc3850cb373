"""State beside the streams: blobs, breakers, runs, registry, audit log."""
