"""The three stages that turn a migrated model into one that works (spec section 4).

losses -> steps -> loop, with state (resuming), evaluate and plot beside them. Nothing here parses
flags or prints; `hydra_mlx.transfer` does.
"""
