"""Tests of hydra_mlx."""
