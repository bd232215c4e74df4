"""Small models of every family that `wrap` accepts, and of every kind that differs under merging."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor

from tome_core import MergedViT

VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "class token": ("vit_tiny_patch16_224", {}),
    "distillation token": ("deit_tiny_distilled_patch16_224", {}),
    "LayerScale": ("deit3_small_patch16_224", {}),
    "registers": ("vit_small_patch14_reg4_dinov2", {"img_size": 84}),
    "norm before the blocks": ("vit_base_patch16_clip_224", {}),
    "q/k norm": ("vit_tiny_patch16_224", {"qk_norm": True}),
    "norm inside attention": ("beit3_base_patch16_224", {}),
    "gated attention": ("vit_tiny_patch16_224", {}),
    "gated MLP": ("aimv2_large_patch14_224", {"img_size": 84}),
    "any image size": ("vit_tiny_patch16_224", {"dynamic_img_size": True}),
    "avg pool": ("vit_medium_patch16_gap_240", {}),
    "avg pool, register, fc_norm": ("vit_medium_patch16_reg1_gap_256", {}),
    "avg pool, prefix pooled": ("vit_tiny_patch16_224", {"global_pool": "avg", "pool_include_prefix": True}),
    "max pool": ("vit_tiny_patch16_224", {"global_pool": "max"}),
    "avgmax pool": ("vit_tiny_patch16_224", {"global_pool": "avgmax", "fc_norm": False}),
    "map pool": ("vit_base_patch16_siglip_224", {}),
    "map pool, registers": ("vit_so150m_patch16_reg4_map_256", {}),
    "map pool, prefix pooled": ("test_vit3", {}),
    "two attentions": ("vit_small_patch16_18x2_224", {}),
    "norm after attention": ("vit_base_patch16_rpn_224", {}),
    "attention and MLP in parallel": ("vit_base_patch16_xp_224", {}),
    "parallel, no qkv bias": ("vit_pwee_patch16_reg1_gap_256", {"qkv_bias": False}),
    "differential attention": ("vit_dwee_patch16_reg1_gap_256", {"num_heads": 2}),
    "differential attention in parallel": ("vit_dpwee_patch16_reg1_gap_256", {"num_heads": 2}),
    "EVA": ("eva_giant_patch14_224", {"img_size": 84}),
    "EVA-02: rotary, SwiGLU": ("eva02_base_patch14_448", {"img_size": 84}),
    "EVA, norm after attention": ("eva02_enormous_patch14_clip_224", {"img_size": 84}),
    "rotary, one table a head": ("vit_small_patch16_rope_mixed_224", {}),
    "rotary, class token pooled": ("vit_small_patch16_rope_ape_224", {"global_pool": "token"}),
    "rotary, map pool": ("vit_pe_core_base_patch16_224", {}),
    "DINOv3": ("vit_small_patch16_dinov3", {}),
    "DINOv3, qkv bias": ("vit_small_patch16_dinov3_qkvb", {}),
    "separate q, k and v": ("eva02_small_patch14_224", {"img_size": 84, "qkv_fused": False}),
    "grouped queries": ("vit_base_patch16_sapiens2", {"num_heads": 4, "num_kv_heads": 2}),
    "NaFlex": ("naflexvit_base_patch16_gap", {}),
    "NaFlex, map pool": ("naflexvit_base_patch16_map", {}),
    "NaFlex, rotary": ("naflexvit_base_patch16_gap", {"rope_type": "axial"}),
    "NaFlex, one rotary table a head": ("naflexvit_base_patch16_gap", {"rope_type": "mixed"}),
    "relative positions": ("vit_relpos_small_patch16_224", {}),
    "relative positions, shared": ("vit_srelpos_small_patch16_224", {}),
    "relative positions, class token": ("vit_relpos_base_patch16_clsgap_224", {}),
    "relative positions, class token pooled": ("vit_relpos_base_patch16_cls_224", {}),
    "relative positions, norm after attention": ("vit_relpos_medium_patch16_rpn_224", {}),
    "BEiT": ("beit_base_patch16_224", {}),
    "BEiT, bias shared too": ("beit_base_patch16_224", {"use_shared_rel_pos_bias": True, "use_abs_pos_emb": True}),
    "BEiT, SwiGLU": ("beitv2_base_patch16_224", {"swiglu_mlp": True, "global_pool": "token"}),
    "Qwen": ("qwen3_vit_88m", {}),
    "DeepSeek": ("deepseek_vit_412m", {"img_size": 84}),
}


class Case(NamedTuple):
    """A small model of one variant, wrapped, and two images for it."""

    model: Any
    merged: MergedViT
    images: Tensor
