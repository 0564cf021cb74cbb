"""Configs: ours, and the JSON files of a diffusers folder."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..config import DepthConfig, ModelConfig, ScheduleConfig, TextConfig, UNetConfig, VAEConfig
from ..tokenizer import Tokenizer

UNET_KEYS = {
    "in_channels": "in_channels",
    "out_channels": "out_channels",
    "widths": "block_out_channels",
    "blocks": "layers_per_block",
    "context_dim": "cross_attention_dim",
    "groups": "norm_num_groups",
    "classes": "num_class_embeds",
}
UNET_FIXED = {  # what our U-Net always is; where it is None, anything false or 0 is the same
    "act_fn": "silu",
    "center_input_sample": False,
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "downsample_padding": 1,
    "mid_block_scale_factor": 1,
    "norm_eps": 1e-5,
    "transformer_layers_per_block": 1,
    "mid_block_type": "UNetMidBlock2DCrossAttn",
    "time_embedding_type": "positional",
    "resnet_time_scale_shift": "default",
    "resnet_out_scale_factor": 1.0,
    "attention_type": "default",
    **dict.fromkeys(("time_embedding_act_fn", "timestep_post_act", "time_cond_proj_dim", "class_embed_type")),
    **dict.fromkeys(("addition_embed_type", "encoder_hid_dim_type", "cross_attention_norm", "dual_cross_attention")),
    **dict.fromkeys(("resnet_skip_time_act", "class_embeddings_concat", "mid_block_only_cross_attention")),
}
VAE_KEYS = {
    "image_channels": "in_channels",
    "latent_channels": "latent_channels",
    "widths": "block_out_channels",
    "blocks": "layers_per_block",
    "groups": "norm_num_groups",
    "scaling": "scaling_factor",
}
VAE_FIXED = {
    "act_fn": "silu",
    **dict.fromkeys(("mid_block_add_attention", "use_quant_conv", "use_post_quant_conv"), True),
    **dict.fromkeys(("shift_factor", "latents_mean", "latents_std")),
}
TEXT_KEYS = {
    "vocabulary": "vocab_size",
    "width": "hidden_size",
    "layers": "num_hidden_layers",
    "heads": "num_attention_heads",
    "places": "max_position_embeddings",
}
TEXT_FIXED = {"layer_norm_eps": 1e-5}
DEPTH_KEYS = {
    "size": "image_size",
    "width": "hidden_size",
    "heads": "num_attention_heads",
    "fusion": "fusion_hidden_size",
}
BACKBONE_KEYS = {"stem": "embedding_size", "widths": "hidden_sizes", "blocks": "depths", "groups": "num_groups"}
DEPTH_FIXED = {"is_hybrid": True, "layer_norm_eps": 1e-6, "readout_type": "project", "hidden_act": "gelu"}
BACKBONE_FIXED = {"layer_type": "bottleneck", "global_padding": "same", "embedding_dynamic_padding": True}
SCHEDULERS = (  # whose forward process is one of betas; they differ in how they go back, which a call chooses
    "DDIMScheduler DDPMScheduler PNDMScheduler LMSDiscreteScheduler EulerDiscreteScheduler "
    "EulerAncestralDiscreteScheduler HeunDiscreteScheduler KDPM2DiscreteScheduler KDPM2AncestralDiscreteScheduler "
    "DPMSolverMultistepScheduler DPMSolverSinglestepScheduler DPMSolverSDEScheduler UniPCMultistepScheduler "
    "DEISMultistepScheduler SASolverScheduler LCMScheduler TCDScheduler DDPMParallelScheduler DDIMParallelScheduler"
).split()
CLIPPING = "DDIMScheduler DDPMScheduler DDIMParallelScheduler DDPMParallelScheduler".split()  # unless told not to
SCHEDULER_FIXED = dict.fromkeys(("trained_betas", "clip_sample", "thresholding", "use_flow_sigmas"))
SPACINGS = ("leading", "linspace", "trailing")
DOWN, UP = ("DownBlock2D", "CrossAttnDownBlock2D"), ("UpBlock2D", "CrossAttnUpBlock2D")
ACTIVATIONS = {"gelu": False, "quick_gelu": True}
PREDICTIONS = {"epsilon": "eps", "v_prediction": "v", "sample": "x0"}
BETAS = {"scaled_linear": "scaled_linear", "linear": "linear", "squaredcos_cap_v2": "cosine"}
ENDS = {"scaled_linear": (0.00085, 0.012), "linear": (1e-4, 0.02)}  # the schedules' own


def is_v2(config: ModelConfig) -> bool:
    """Whether a model is written as v2's are: v1 has OpenAI's text tower, whose GELU is the quick one."""
    return not config.text.quick_gelu


def to_diffusers(config: ModelConfig) -> dict[str, dict[str, Any]]:
    """The JSON of each folder of a diffusers model."""
    unet, vae, text, depth = config.unet, config.vae, config.text, config.depth
    levels = range(len(unet.widths))
    return (to_depth_estimator(depth) if depth else {}) | {
        "unet": {
            "_class_name": "UNet2DConditionModel",
            **{theirs: getattr(unet, ours) for ours, theirs in UNET_KEYS.items()},
            **UNET_FIXED,
            "down_block_types": [DOWN[attention] for attention in unet.attention],
            "up_block_types": [UP[attention] for attention in reversed(unet.attention)],
            "attention_head_dim": unet.heads or [width // unet.head_dim for width in unet.widths],  # it means heads
            "only_cross_attention": [level < unet.cross_only for level in levels],
            "use_linear_projection": is_v2(config),
            "sample_size": config.size // vae.factor,
        },
        "vae": {
            "_class_name": "AutoencoderKL",
            **{theirs: getattr(vae, ours) for ours, theirs in VAE_KEYS.items()},
            **VAE_FIXED,
            "out_channels": vae.image_channels,
            "down_block_types": ["DownEncoderBlock2D"] * len(vae.widths),
            "up_block_types": ["UpDecoderBlock2D"] * len(vae.widths),
            "sample_size": config.size,
        },
        "text_encoder": {
            "architectures": ["CLIPTextModel"],
            "model_type": "clip_text_model",
            **{theirs: getattr(text, ours) for ours, theirs in TEXT_KEYS.items()},
            **TEXT_FIXED,
            "hidden_act": "quick_gelu" if text.quick_gelu else "gelu",
            "intermediate_size": 4 * text.width,
            "bos_token_id": text.vocabulary - 2,
            "eos_token_id": text.vocabulary - 1,
            "pad_token_id": text.vocabulary - 1 if text.pad == "end" else 0,
        },
        "scheduler": to_scheduler(config),
    }


def to_scheduler(config: ModelConfig) -> dict[str, Any]:
    """The JSON of a scheduler: the forward process, what is predicted, and where runs begin."""
    schedule = config.schedule
    first, last = schedule.ends or ENDS.get(schedule.name, ENDS["linear"])
    return {
        "_class_name": "DDIMScheduler",
        "num_train_timesteps": schedule.steps,
        "beta_schedule": {ours: theirs for theirs, ours in BETAS.items()}[schedule.name],
        "beta_start": first,
        "beta_end": last,
        "prediction_type": {ours: theirs for theirs, ours in PREDICTIONS.items()}[config.prediction],
        "clip_sample": False,
        "set_alpha_to_one": False,
        "steps_offset": 1,
        "rescale_betas_zero_snr": schedule.zero_terminal_snr,
        "timestep_spacing": "trailing" if config.spacing == "trailing" else "leading",
    }


def to_depth_estimator(config: DepthConfig) -> dict[str, dict[str, Any]]:
    """The JSON of the folders of a depth estimator, and of what prepares its pictures."""
    side = config.size
    backbone = {theirs: getattr(config, ours) for ours, theirs in BACKBONE_KEYS.items()}
    return {
        "depth_estimator": {
            "architectures": ["DPTForDepthEstimation"],
            "model_type": "dpt",
            **{theirs: getattr(config, ours) for ours, theirs in DEPTH_KEYS.items()},
            **DEPTH_FIXED,
            "intermediate_size": 4 * config.width,
            "num_hidden_layers": config.taps[-1] + 1,
            "backbone_out_indices": [0, 1, *config.taps],
            "backbone_featmap_shape": [1, config.widths[-1], side // 16, side // 16],
            "neck_hidden_sizes": [*config.widths[:2], config.width, config.width],
            "backbone_config": {
                "model_type": "bit", **backbone, **BACKBONE_FIXED, "out_features": ["stage1", "stage2", "stage3"],
            },
        },
        "feature_extractor": {
            "image_processor_type": "DPTImageProcessor",
            "size": {"height": side, "width": side},
            "image_mean": [0.5] * 3,
            "image_std": [0.5] * 3,
        },
    }  # fmt: skip


def to_tokenizer(tokenizer: Tokenizer) -> dict[str, dict[str, Any]]:
    """The JSON files of a diffusers model's `tokenizer` folder; the merges lie beside them."""
    end, pad = tokenizer.tokens[tokenizer.end], tokenizer.tokens[tokenizer.pad]
    special = {"bos_token": tokenizer.tokens[tokenizer.start], "eos_token": end, "unk_token": end, "pad_token": pad}
    settings = {"tokenizer_class": "CLIPTokenizer", "model_max_length": tokenizer.places, **special}
    return {"vocab": tokenizer.ids, "special_tokens_map": special, "tokenizer_config": settings}


def known(theirs: Mapping[str, Any], keys: Mapping[str, str], fixed: Mapping[str, Any]) -> dict[str, Any]:
    """Our settings from theirs, by the names in `keys`; ValueError for one that is not what it always is here."""
    told = {key: theirs.get(key, value) for key, value in fixed.items()}
    odd = [f"{key} {v!r:.200}" for key, v in told.items() if (v != fixed[key] if fixed[key] is not None else v)]
    if odd:
        raise ValueError(f"no network and no schedule here has {', '.join(odd)}")
    values = {ours: theirs[key] for ours, key in keys.items() if key in theirs}
    return {ours: tuple(value) if isinstance(value, list) else value for ours, value in values.items()}


def one_of(choices: Mapping[str, Any], theirs: Mapping[str, Any], key: str, default: str) -> Any:
    """What a setting of theirs is called here; ValueError names what is read, where it is none of that."""
    value = theirs.get(key, default)
    if value not in list(choices):
        raise ValueError(f"{key} is {value!r:.200}; read are {', '.join(choices)}")
    return choices[value]


def from_diffusers(name: str, files: Mapping[str, Mapping[str, Any]]) -> ModelConfig:
    """The config that a diffusers folder's JSON files describe: of `unet`, `vae`, `text_encoder`, `scheduler`, and of
    `depth_estimator` where the U-Net is shown depths.

    Raises ValueError, TypeError or KeyError where they describe what our modules are not.
    """
    vae, text = files["vae"], files["text_encoder"]
    vae_config = VAEConfig(**known(vae, VAE_KEYS, VAE_FIXED))
    quick = one_of(ACTIVATIONS, text, "hidden_act", "quick_gelu")
    return ModelConfig(
        name=name,
        size=files["unet"]["sample_size"] * vae_config.factor,
        **from_scheduler(files["scheduler"]),
        unet=from_unet(files["unet"]),
        vae=vae_config,
        text=TextConfig(**known(text, TEXT_KEYS, TEXT_FIXED), quick_gelu=quick, pad="end" if quick else "zero"),
        depth=from_depth_estimator(files["depth_estimator"]) if files["unet"]["in_channels"] == 5 else None,
    )


def from_unet(unet: Mapping[str, Any]) -> UNetConfig:
    """The noise predictor's sizes."""
    attention = tuple(bool(DOWN.index(kind)) for kind in unet["down_block_types"])
    if list(unet["up_block_types"]) != [UP[attends] for attends in reversed(attention)]:
        raise ValueError(f"up_block_types {unet['up_block_types']} don't mirror down_block_types")
    heads, head_dim = unet.get("num_attention_heads") or unet.get("attention_head_dim", 8), None
    if isinstance(heads, list):
        (head_dim,) = {width // count for width, count in zip(unet["block_out_channels"], heads, strict=True)}
        heads = None
    cross_only = unet.get("only_cross_attention") or [False] * len(attention)
    finest = sum(map(bool, cross_only)) if isinstance(cross_only, list) else 0
    # A level without attention may say either.
    if not isinstance(cross_only, list) or any(
        attends and bool(only) != (level < finest)
        for level, (only, attends) in enumerate(zip(cross_only, attention, strict=True))
    ):
        raise ValueError(f"only_cross_attention is {cross_only}; it must be true in the first levels alone, or nowhere")
    settings = known(unet, UNET_KEYS, UNET_FIXED)
    return UNetConfig(**settings, attention=attention, heads=heads, head_dim=head_dim, cross_only=finest)


def from_depth_estimator(dpt: Mapping[str, Any]) -> DepthConfig:
    """The depth estimator's sizes."""
    backbone = known(dpt["backbone_config"], BACKBONE_KEYS, BACKBONE_FIXED)
    backbone["widths"] = backbone["widths"][: len(backbone["blocks"])]
    return DepthConfig(**known(dpt, DEPTH_KEYS, DEPTH_FIXED), **backbone, taps=tuple(dpt["backbone_out_indices"][2:]))


def from_scheduler(scheduler: Mapping[str, Any]) -> dict[str, Any]:
    """What a scheduler's settings say of the model: what is predicted, the forward process, and where runs must begin.

    Which sampler goes back, and its settings, a call of ours chooses; but a run begins at the last step ("trailing")
    where that is told, or where the last step is pure noise, which no other spacing of timesteps meets.
    """
    kind = scheduler.get("_class_name", "DDIMScheduler")
    if kind not in SCHEDULERS:
        raise ValueError(
            f"its scheduler is {kind!r:.200}, not of noise added by betas; read are {', '.join(SCHEDULERS)}"
        )
    known({"clip_sample": kind in CLIPPING, **scheduler}, {}, SCHEDULER_FIXED)
    name = one_of(BETAS, scheduler, "beta_schedule", "linear")
    ends = scheduler.get("beta_start", 1e-4), scheduler.get("beta_end", 0.02)
    ends = None if ends == ENDS.get(name, ends) else ends
    zero = bool(scheduler.get("rescale_betas_zero_snr", False))
    spacing = one_of({spacing: spacing for spacing in SPACINGS}, scheduler, "timestep_spacing", "leading")
    return {
        "prediction": one_of(PREDICTIONS, scheduler, "prediction_type", "epsilon"),
        "schedule": ScheduleConfig(name, scheduler.get("num_train_timesteps", 1000), ends, zero),
    } | ({"spacing": "trailing"} if zero or spacing == "trailing" else {})
