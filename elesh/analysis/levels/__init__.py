"""The levels of analysis: channels, heads, layers; shards of a level; iterative rounds."""
