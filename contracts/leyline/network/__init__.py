"""The network as the contracts see it: layers, groups, blocks, a checkpoint's statistics."""
