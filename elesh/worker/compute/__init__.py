"""The compute child: starting, watching and killing it; the frames of its protocol."""
