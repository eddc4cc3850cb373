"""Count-Min sketches: importance of single parameters in bounded memory, and masks made from it."""
