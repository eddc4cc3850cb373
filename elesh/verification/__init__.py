"""Measuring cuts on held-out data, in the compute child: needs torch, which nothing above asks for
before there is a network to measure."""
