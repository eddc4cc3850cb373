"""How far a bus carries: costs measured on real servers, a model fitted to them, the page drawn."""
