"""One decision a checkpoint: levels joined, verified on data, shortened, explained."""
