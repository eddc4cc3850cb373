"""One pass over calibration samples: accumulators, losses, gates, and the bundle made from them."""
