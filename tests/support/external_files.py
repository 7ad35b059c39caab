"""Small state dicts as ECG-FM and TimesFM 2.5 are published: the same names, fewer and smaller layers."""

import torch
from torch import Tensor


def ecg_fm(leads: int = 12) -> dict[str, Tensor]:
    """4 channels, 2 convolutions, 24 numbers a token, 2 layers, positions from 6 tokens in 4 groups."""
    shapes: dict[str, tuple[int, ...]] = {
        "mask_emb": (24,),
        "feature_extractor.conv_layers.0.0.weight": (4, leads, 2),
        "feature_extractor.conv_layers.0.2.weight": (4,),
        "feature_extractor.conv_layers.0.2.bias": (4,),
        "feature_extractor.conv_layers.1.0.weight": (4, 4, 2),
        "post_extract_proj.weight": (24, 4),
        "post_extract_proj.bias": (24,),
        "layer_norm.weight": (4,),
        "layer_norm.bias": (4,),
        "conv_pos.pos_conv.0.bias": (24,),
        "conv_pos.pos_conv.0.weight_g": (1, 1, 6),
        "conv_pos.pos_conv.0.weight_v": (24, 6, 6),
        "encoder.layer_norm.weight": (24,),
        "encoder.layer_norm.bias": (24,),
        "quantizer.vars": (1, 640, 8),
        "project_q.weight": (8, 8),
        "final_proj.bias": (8,),
    }
    for number in range(2):
        layer = f"encoder.layers.{number}"
        for name, shape in {
            "self_attn.k_proj": (24, 24),
            "self_attn.v_proj": (24, 24),
            "self_attn.q_proj": (24, 24),
            "self_attn.out_proj": (24, 24),
            "self_attn_layer_norm": (24,),
            "fc1": (40, 24),
            "fc2": (24, 40),
            "final_layer_norm": (24,),
        }.items():
            shapes[f"{layer}.{name}.weight"], shapes[f"{layer}.{name}.bias"] = shape, shape[:1]
    return _random(shapes)


def timesfm() -> dict[str, Tensor]:
    """Patches of 32, 16 numbers a token, 2 layers of 2 heads."""
    shapes: dict[str, tuple[int, ...]] = {
        "tokenizer.hidden_layer.weight": (20, 64),
        "tokenizer.hidden_layer.bias": (20,),
        "tokenizer.output_layer.weight": (16, 20),
        "tokenizer.output_layer.bias": (16,),
        "tokenizer.residual_layer.weight": (16, 64),
        "tokenizer.residual_layer.bias": (16,),
        "output_projection_point.hidden_layer.weight": (16, 16),
        "output_projection_quantiles.output_layer.weight": (8, 16),
    }
    for number in range(2):
        shapes |= {
            f"stacked_xf.{number}.{name}": shape
            for name, shape in {
                "pre_attn_ln.scale": (16,),
                "post_attn_ln.scale": (16,),
                "attn.qkv_proj.weight": (48, 16),
                "attn.out.weight": (16, 16),
                "attn.query_ln.scale": (8,),
                "attn.key_ln.scale": (8,),
                "attn.per_dim_scale.per_dim_scale": (8,),
                "pre_ff_ln.scale": (16,),
                "post_ff_ln.scale": (16,),
                "ff0.weight": (24, 16),
                "ff1.weight": (16, 24),
            }.items()
        }
    return _random(shapes)


def _random(shapes: dict[str, tuple[int, ...]]) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {name: 0.5 * torch.randn(shape, generator=generator) for name, shape in shapes.items()}
