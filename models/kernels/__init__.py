"""Native CPU kernels: plain C, compiled on first use; without them PyTorch does the same."""
