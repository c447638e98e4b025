"""Bytes of keys, values and states, from the config alone; nothing heavy is imported."""

from .config import HydraArgs, layer_heads


def kv_bytes_per_token(args: HydraArgs, itemsize: float = 2.0) -> float:
    """Key and value bytes a token adds, all layers.

    Args:
        itemsize: Of a number: 2 for bf16, 0.5625 for 4 bit; for keys and values in different
            numbers of bits the mean of two cache.bytes_per_number.
    """
    heads = sum(len(layer_heads(args, i).kv) for i in range(args.num_hidden_layers))
    if heads == 0:
        heads = 1
    return 2 * heads * args.head_dim * itemsize


def state_bytes(args: HydraArgs, itemsize: int = 2, sequences: int = 1) -> int:
    """Bytes of the recurrent states (float32) and conv tails (itemsize), any context length."""
    D = args.head_dim
    la = sum(args.num_attention_heads - len(fa) for fa in args.full_attention_heads)
    tail = max(args.la_conv_kernel - 1, 0)
    return sequences * la * (4 * D * D + tail * 3 * D * itemsize)
