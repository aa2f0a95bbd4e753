"""Records that cross actor boundaries, and the packing of token ids. No torch, no I/O."""
