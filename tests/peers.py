"""The same networks by another hand: diffusers and transformers models that hold the weights of ours.

Each function builds the peer of one of our modules from its config and copies the weights across by name, strictly.
"""

import re

import torch
from diffusers import AutoencoderKL, ControlNetModel, UNet2DConditionModel
from transformers import BitConfig, CLIPTextConfig, CLIPTextModel, DPTConfig, DPTForDepthEstimation

from minisd.weights.naming import Layout, places

ATTENTION = {".q.": ".to_q.", ".k.": ".to_k.", ".v.": ".to_v.", ".out.": ".to_out.0."}
RESIDUAL = {".time.": ".time_emb_proj.", ".shortcut.": ".conv_shortcut."}
TRANSFORMER = {
    ".block.": ".transformer_blocks.0.",
    ".self_attention.": ".attn1.",
    ".cross_attention.": ".attn2.",
    ".feed_forward.proj_in.": ".ff.net.0.proj.",
    ".feed_forward.proj_out.": ".ff.net.2.",
}


def renamed(name, table):
    for ours, theirs in table.items():
        name = name.replace(ours, theirs)
    return name


def randomise(module, seed=0):
    """Every weight random, so that nothing is hidden behind a zero."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in module.named_parameters():
            spread = torch.randn(p.shape, generator=generator)
            p.copy_(1 + 0.1 * spread if "norm" in name and name.endswith("weight") else 0.1 * spread)
    return module.eval().requires_grad_(False)


def strict_copy(peer, tensors):
    own = peer.state_dict()
    assert set(own) == set(tensors), sorted(set(own) ^ set(tensors))[:10]
    peer.load_state_dict(tensors)
    return peer.eval().requires_grad_(False)


def unet_settings(c):
    """What diffusers' U-Net and ControlNet are both told of a config."""
    return {
        "in_channels": c.in_channels,
        "block_out_channels": c.widths,
        "layers_per_block": c.blocks,
        "down_block_types": ["CrossAttnDownBlock2D" if a else "DownBlock2D" for a in c.attention],
        "cross_attention_dim": c.context_dim,
        # the name is diffusers' mistake: a count
        "attention_head_dim": c.heads or [w // c.head_dim for w in c.widths],
        "norm_num_groups": c.groups,
        "only_cross_attention": [level < c.cross_only for level in range(len(c.widths))],
        "num_class_embeds": c.classes,
    }


def unet_tensors(module, more, linear):
    """Weights of a U-Net by diffusers' names; `more` are names besides. v1's transformers have 1x1 convolutions."""
    c = module.config
    rungs = {"conv_in": "conv_in", "time_embed.0": "time_embedding.linear_1", "time_embed.2": "time_embedding.linear_2"}
    rungs |= {"class_embed": "class_embedding", "norm_out": "conv_norm_out", "conv_out": "conv_out"}
    rungs |= {"middle.0.residual": "mid_block.resnets.0", "middle.0.transformer": "mid_block.attentions.0"}
    rungs |= {"middle.1.residual": "mid_block.resnets.1"}
    for way, blocks, resampled in (("down", c.blocks, "downsamplers"), ("up", c.blocks + 1, "upsamplers")):
        i = 0
        for level in range(len(c.widths)):
            for block in range(blocks):
                rungs[f"{way}.{i}.residual"] = f"{way}_blocks.{level}.resnets.{block}"
                rungs[f"{way}.{i}.transformer"] = f"{way}_blocks.{level}.attentions.{block}"
                i += 1
            rungs[f"{way}.{i}"] = f"{way}_blocks.{level}.{resampled}.0"
            i += level < len(c.widths) - 1
    rungs |= more

    tensors = {}
    for name, tensor in module.state_dict().items():
        rung = max((r for r in rungs if name.startswith(r + ".")), key=len)
        theirs = rungs[rung] + renamed(name[len(rung) :], TRANSFORMER | ATTENTION | RESIDUAL)
        convolved = not linear and re.search(r"attentions\.\d+\.proj_(in|out)\.weight", theirs)
        tensors[theirs] = tensor[..., None, None] if convolved else tensor
    return tensors


def unet_peer(unet, linear=False):
    """diffusers' U-Net with our weights: v1's transformers enter and leave by 1x1 convolutions, v2's by Linear."""
    c = unet.config
    peer = UNet2DConditionModel(
        out_channels=c.out_channels,
        up_block_types=["CrossAttnUpBlock2D" if a else "UpBlock2D" for a in reversed(c.attention)],
        use_linear_projection=linear,
        **unet_settings(c),
    )
    return strict_copy(peer, unet_tensors(unet, {}, linear))


def controlnet_peer(control, widths, linear=False):
    """diffusers' ControlNet with our weights."""
    settings = unet_settings(control.config)
    peer = ControlNetModel(conditioning_embedding_out_channels=widths, use_linear_projection=linear, **settings)
    *zeros, _ = control.zeros
    embedding, last = "controlnet_cond_embedding", 4 * len(widths) - 2
    more = {f"hint.{i}": f"{embedding}.blocks.{i // 2 - 1}" for i in range(2, last, 2)}
    more |= {"hint.0": f"{embedding}.conv_in", f"hint.{last}": f"{embedding}.conv_out"}
    more |= {f"zeros.{i}": f"controlnet_down_blocks.{i}" for i in range(len(zeros))}
    more |= {f"zeros.{len(zeros)}": "controlnet_mid_block"}
    return strict_copy(peer, unet_tensors(control, more, linear))


def vae_peer(vae):
    """diffusers' autoencoder with our weights."""
    c = vae.config
    levels = len(c.widths)
    peer = AutoencoderKL(
        block_out_channels=c.widths,
        layers_per_block=c.blocks,
        latent_channels=c.latent_channels,
        norm_num_groups=c.groups,
        down_block_types=["DownEncoderBlock2D"] * levels,
        up_block_types=["UpDecoderBlock2D"] * levels,
    )
    rungs = {"quant": "quant_conv", "post_quant": "post_quant_conv"}
    for half, blocks, way in (("encoder", c.blocks, "down"), ("decoder", c.blocks + 1, "up")):
        rungs |= {f"{half}.{n}": f"{half}.{n}" for n in ("conv_in", "conv_out")}
        rungs |= {f"{half}.norm_out": f"{half}.conv_norm_out"}
        rungs |= {f"{half}.middle.{i}": f"{half}.mid_block.{n}" for i, n in ((0, "resnets.0"), (2, "resnets.1"))}
        rungs |= {f"{half}.middle.1.norm": f"{half}.mid_block.attentions.0.group_norm"}
        rungs |= {f"{half}.middle.1.attention": f"{half}.mid_block.attentions.0"}
        i = 0
        for level in range(levels):
            for block in range(blocks):
                rungs[f"{half}.{way}.{i}"] = f"{half}.{way}_blocks.{level}.resnets.{block}"
                i += 1
            if level < levels - 1:
                rungs[f"{half}.{way}.{i}"] = f"{half}.{way}_blocks.{level}.{way}samplers.0"
                i += 1

    tensors = {}
    for name, tensor in vae.state_dict().items():
        rung = max((r for r in rungs if name.startswith(r + ".")), key=len)
        tensors[rungs[rung] + renamed(name[len(rung) :], ATTENTION | RESIDUAL)] = tensor
    return strict_copy(peer, tensors)


def text_peer(text):
    """transformers' CLIP text model with our weights."""
    c = text.config
    peer = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=c.vocabulary,
            hidden_size=c.width,
            intermediate_size=4 * c.width,
            num_hidden_layers=c.layers,
            num_attention_heads=c.heads,
            max_position_embeddings=c.places,
            hidden_act="quick_gelu" if c.quick_gelu else "gelu",
        )
    )
    table = {
        "attention.q.": "self_attn.q_proj.", "attention.k.": "self_attn.k_proj.", "attention.v.": "self_attn.v_proj.",
        "attention.out.": "self_attn.out_proj.", "norm1": "layer_norm1", "norm2": "layer_norm2",
        "mlp_in": "mlp.fc1", "mlp_out": "mlp.fc2", "blocks.": "encoder.layers.", "final_norm": "final_layer_norm",
        "token_embedding": "embeddings.token_embedding", "position_embedding": "embeddings.position_embedding",
    }  # fmt: skip
    prefix = re.match(r"(text_model\.)?", next(iter(peer.state_dict()))).group()
    own = {n: t for n, t in text.state_dict().items() if "projection" not in n}
    return strict_copy(peer, {prefix + renamed(n, table): t for n, t in own.items()})


def depth_names(depth):
    """Every tensor of our depth estimator: its names in a checkpoint of SD2 depth and by transformers."""
    ldm, dpt = (places("depth", depth, Layout(single, v2=True)) for single in (True, False))
    return {name: (ldm[name].names[0], dpt[name].names[0]) for name in depth.state_dict()}


def depth_peer(depth):
    """transformers' DPT-hybrid with our weights."""
    c = depth.config
    peer = DPTForDepthEstimation(
        DPTConfig(
            is_hybrid=True,
            image_size=c.size,
            hidden_size=c.width,
            intermediate_size=4 * c.width,
            num_hidden_layers=c.taps[-1] + 1,
            num_attention_heads=c.heads,
            backbone_out_indices=(0, 1, *c.taps),
            layer_norm_eps=1e-6,
            fusion_hidden_size=c.fusion,
            neck_hidden_sizes=(*c.widths[:2], c.width, c.width),
            backbone_featmap_shape=(1, c.widths[-1], c.size // 16, c.size // 16),
            backbone_config=BitConfig(
                embedding_size=c.stem,
                hidden_sizes=c.widths,
                depths=c.blocks,
                num_groups=c.groups,
                layer_type="bottleneck",
                global_padding="same",
                embedding_dynamic_padding=True,
                out_features=["stage1", "stage2", "stage3"],
            ),
        )
    )
    dead = ("dpt.layernorm.", "neck.fusion_stage.layers.0.residual_layer1.")
    tensors = {name: tensor for name, tensor in peer.state_dict().items() if name.startswith(dead)}
    names = depth_names(depth)
    return strict_copy(peer, tensors | {names[name][1]: tensor for name, tensor in depth.state_dict().items()})
