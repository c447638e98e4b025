"""The three stages of the transfer in PyTorch, for GPUs where MLX trains too slowly."""
