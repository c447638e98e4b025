"""Makes mlx-lm's stock programs find the HydraHead model, in this process."""

import sys

from .config import MODEL_TYPE

SHIM_NAME = "hydrahead_shim.py"
# mlx-lm runs this file outside sys.modules: no relative imports, no dataclasses in it.
SHIM = '''"""Lets stock mlx-lm load this folder: mlx_lm.generate --trust-remote-code --model ..."""
from hydra_mlx.model import Model, ModelArgs
from hydra_mlx.registry import register

register()
'''


def register() -> None:
    """Put the model where mlx_lm.load, generate, chat, server, convert, lora look for it.

    Safe to call twice. mlx-lm has no plugin entry point; it imports `mlx_lm.models.<model_type>`.
    """
    from mlx_lm.models import cache as stock

    from . import model
    from .kv_cache import HydraKVCache

    stock.HydraKVCache = HydraKVCache  # load_prompt_cache looks for classes there
    name = f"mlx_lm.models.{MODEL_TYPE}"
    if sys.modules.get(name) is model:
        return
    sys.modules[name] = model
    _register_config()
    _trust_own_shim()


def _register_config():
    # Silences transformers' warning about an unknown model type when it loads a tokenizer.
    from transformers import AutoConfig, PretrainedConfig

    config = type("HydraHeadConfig", (PretrainedConfig,), {"model_type": MODEL_TYPE})
    AutoConfig.register(MODEL_TYPE, config, exist_ok=True)


def _trust_own_shim():
    """Let mlx_lm load our folders without --trust-remote-code in this process.

    Their config names SHIM_NAME as model_file, which mlx_lm refuses by default; some of its
    programs have no flag for it. The model is registered here, so the file need not run.
    """
    from mlx_lm import utils

    stock = utils.load_config

    def load_config(model_path):
        config = stock(model_path)
        if config.get("model_type") == MODEL_TYPE and config.get("model_file") == SHIM_NAME:
            del config["model_file"]
        return config

    utils.load_config = load_config
