"""Lower bounds of the layer error: one tier per file, each a certificate that holds for any input."""
