"""Lets stock mlx-lm load this folder: mlx_lm.generate --trust-remote-code --model ..."""
from hydra_mlx.model import Model, ModelArgs
from hydra_mlx.registry import register

register()
