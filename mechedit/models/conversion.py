"""A HookedTransformer (TransformerLens 3.9) of a Hugging Face model: its configuration, weights and rotary angles.

TransformerLens reads a configuration by architecture, some sizes by name, and leaves out what a field of its own is missing
for. Here its reading is completed: head and MLP widths, biases, windows, activation and epsilon are set from Hugging Face's
configuration, and the angles of rotary embeddings are computed from Hugging Face's own frequencies (`inv_freq`), whatever kind
of scaling they come from. What a HookedTransformer cannot compute is a ModelError that names the field.

Weights are not copied where the layout allows: the hooked model's parameters are views of Hugging Face's, which has to be given
up. So there is one copy of the weights at a time.
"""

from __future__ import annotations

import copy
import threading
from functools import partial
from typing import Any

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor

from mechedit.models.surface import HookedModel, ModelError

__all__ = ["FOREIGN", "because", "convert", "give_zero_biases", "reason"]

TEMPLATES = {  # the architectures that TransformerLens has by name and size only: one name is taken, and resized
    "GemmaForCausalLM": "google/gemma-2b",
    "Gemma2ForCausalLM": "google/gemma-2-2b",
    "Gemma3ForCausalLM": "google/gemma-3-270m",
    "OlmoForCausalLM": "allenai/OLMo-7B-hf",
    "Olmo2ForCausalLM": "allenai/OLMo-2-1124-7B",
}
ANY = "gpt2"  # a name that TransformerLens knows and that says nothing: the configuration decides
ACTIVATIONS = {
    **dict.fromkeys(("gelu_new", "gelu_pytorch_tanh", "gelu_accurate", "gelu_fast"), "gelu_pytorch_tanh"),
    **dict.fromkeys(("silu", "swish"), "silu"),
    **dict.fromkeys(("gelu", "gelu_python"), "gelu"),
    **{name: name for name in ("relu", "relu2", "xielu")},
}
"""Hugging Face's names of activations, and TransformerLens's of the same functions, in one kernel where there is one."""
CANNOT = {  # a field, and what of it a HookedTransformer cannot compute
    "mlp_bias": lambda value: bool(value),
    "qk_layernorm": lambda value: bool(value),
    "use_bidirectional_attention": lambda value: bool(value),
    "layer_types": lambda value: bool(set(value or ()) - {"full_attention", "sliding_attention"}),
}
FOREIGN = (
    AttributeError,
    AssertionError,
    IndexError,
    KeyError,
    TypeError,
    ValueError,
    RuntimeError,
)  # what TransformerLens raises where a model is not what it expects
_READING = threading.Lock()


def convert(hf_model: Any, tokenizer: Any, name: str, device: str, dtype: torch.dtype) -> HookedModel:
    """The HookedTransformer that computes what Hugging Face's model does. It takes the weights: `hf_model` is not to be used again.

    Raises:
        ModelError: an architecture that TransformerLens does not know, or a field that a HookedTransformer cannot compute.
    """
    from transformer_lens import HookedTransformer, HookedTransformerConfig
    from transformer_lens.loading_from_pretrained import get_pretrained_state_dict

    _check_fields(hf_model.config, name)
    rotary = _frequencies(hf_model)
    try:
        fields = _fields(hf_model.config, rotary)
        fields |= {"device": device, "dtype": dtype, "init_weights": False, "tokenizer_name": None, "model_name": name}
        cfg = HookedTransformerConfig.from_dict(fields)
        give_zero_biases(hf_model)
        with torch.no_grad():
            state = get_pretrained_state_dict(ANY, cfg, hf_model, dtype=dtype)
            state |= _biases(hf_model, cfg)
        model = HookedTransformer(cfg, tokenizer, move_to_device=False)
        _fill(model, model.fill_missing_keys(state))
    except NotImplementedError as error:
        raise ModelError(
            f"HookedTransformer does not know the architecture {_architecture(hf_model.config)} of {name}."
        ) from error
    except FOREIGN as error:
        raise ModelError(
            f"no HookedTransformer can be made of {name}{because(hf_model.config)} ({reason(error)}). "
            "TransformerLens 4 may take it."
        ) from error
    _set_rotary(model, rotary, getattr(hf_model.config, "layer_types", None))
    return model.to(device, print_details=False)


def _unusual(config: Any) -> list[str]:
    """The fields of a configuration that are not what its class has by default and may change what is computed, as `field=value`."""
    plain = _plain_of(type(config))
    found = {name: value for name, value in config.to_dict().items() if name not in SIZES and "drop" not in name}
    if found.get("word_embed_proj_dim") == getattr(config, "hidden_size", None):  # embeddings are as wide as the model
        found.pop("word_embed_proj_dim", None)
    return [f"{name}={_short(value)}" for name, value in sorted(found.items()) if value != plain.get(name)]


SIZES = {  # fields that say how large a model is, or how it was made, written and trained, as those of dropout do
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    *("n_embd", "n_layer", "n_head", "n_positions", "n_ctx", "max_position_embeddings", "num_layers", "num_heads"),
    *("architectures", "dtype", "torch_dtype", "transformers_version", "_name_or_path", "initializer_range", "bos_token_id"),
    *("eos_token_id", "pad_token_id", "model_type", "use_cache", "tie_word_embeddings", "task_specific_params", "max_length"),
    *("id2label", "label2id", "_attn_implementation", "summary_first_dropout", "ffn_dim", "init_std"),
}  # fmt: skip


def _plain_of(kind: Any) -> dict[str, Any]:
    try:
        return dict(kind().to_dict())
    except (TypeError, ValueError, AttributeError, KeyError):  # a class that has no defaults
        return {}


def _short(value: Any, most: int = 60) -> str:
    text = str(value)
    return text if len(text) <= most else text[: most - 3] + "..."


def because(config: Any) -> str:
    """The fields that may be why, for an error's sentence."""
    return f", whose configuration has {', '.join(found)}" if (found := _unusual(config)[:8]) else ""


def reason(error: Exception, most: int = 60) -> str:
    """A foreign error in one short line, of its first `most` letters."""
    return f"{type(error).__name__}: {_short(' '.join(str(error).split()), most) or 'no reason given'}"


def _architecture(config: Any) -> str:
    return str((config.architectures or ["no architecture"])[0])


def _check_fields(config: Any, name: str) -> None:
    """Raise where a field asks for what no HookedTransformer computes."""
    wrong = [field for field, cannot in CANNOT.items() if cannot(getattr(config, field, None))]
    activation = _activation(config)
    if activation is not None and activation not in ACTIVATIONS:
        wrong.append(_activation_field(config))
    if getattr(config, "word_embed_proj_dim", None) not in (None, getattr(config, "hidden_size", None)):
        wrong.append("word_embed_proj_dim")
    if wrong:
        field = wrong[0]
        raise ModelError(
            f"a HookedTransformer cannot compute {field}={_short(getattr(config, field))} of {name}. "
            "Take TransformerLens 4, whose models can, or a model without it."
        )


def _activation_field(config: Any) -> str:
    names = ("hidden_activation", "hidden_act", "activation_function")
    return next((name for name in names if getattr(config, name, None) is not None), "")


def _activation(config: Any) -> str | None:
    field = _activation_field(config)
    return str(getattr(config, field)) if field else None


# --- configuration ----------------------------------------------------------------------------------------------------


def _fields(config: Any, rotary: dict[str, tuple[Tensor, float]]) -> dict[str, Any]:
    """TransformerLens's configuration fields: its own reading, completed."""
    architecture = _architecture(config)
    fields = _as_read(config, TEMPLATES.get(architecture, ANY))
    if architecture in TEMPLATES:
        fields |= _sizes(config, architecture)
    fields |= _attention(config) | _windows(config)
    width = next((getattr(config, name, None) for name in ("intermediate_size", "n_inner", "ffn_dim")
                  if getattr(config, name, None) is not None), None)  # fmt: skip
    if width is not None:
        fields["d_mlp"] = int(width)
    for name in ("layer_norm_epsilon", "layer_norm_eps", "rms_norm_eps"):
        if getattr(config, name, None) is not None:
            fields["eps"] = float(getattr(config, name))
    if (activation := _activation(config)) is not None:
        fields["act_fn"] = ACTIVATIONS[activation]
    if rotary:
        fields["rotary_dim"] = 2 * len(next(iter(rotary.values()))[0])
    return fields


def _as_read(config: Any, name: str) -> dict[str, Any]:
    """TransformerLens's own reading of a configuration, which it else takes from a path, whose words it also reads."""
    from transformer_lens import loading_from_pretrained as reading

    class Given:
        @staticmethod
        def from_pretrained(*_: Any, **__: Any) -> Any:
            return given

    given = copy.deepcopy(config)
    if hasattr(config, "n_positions"):
        given.n_ctx = config.n_positions  # TransformerLens reads the older name
    if getattr(config, "head_dim", 0) is None:
        given.head_dim = config.hidden_size // config.num_attention_heads
    rope = getattr(config, "rope_parameters", None) or {}
    if "partial_rotary_factor" in rope and not hasattr(config, "partial_rotary_factor"):
        given.partial_rotary_factor = rope["partial_rotary_factor"]
    with _READING:
        own, reading.AutoConfig = reading.AutoConfig, Given
        try:
            return dict(reading.convert_hf_model_config(name))
        finally:
            reading.AutoConfig = own


def _sizes(config: Any, architecture: str) -> dict[str, Any]:
    """What a reading by name has fixed."""
    kv, heads = config.num_key_value_heads, config.num_attention_heads
    always = architecture.startswith("Gemma")  # whose weights TransformerLens always converts as grouped
    return {
        "d_model": config.hidden_size,
        "n_heads": heads,
        "n_key_value_heads": kv if always or kv != heads else None,
        "n_layers": config.num_hidden_layers,
        "n_ctx": min(config.max_position_embeddings, 8192),
        "d_vocab": config.vocab_size,
        "attn_types": ["global"] * config.num_hidden_layers,
        "clip_qkv": getattr(config, "clip_qkv", None),
        "attn_scores_soft_cap": getattr(config, "attn_logit_softcapping", None) or -1.0,
        "output_logits_soft_cap": getattr(config, "final_logit_softcapping", None) or -1.0,
    }


def _attention(config: Any) -> dict[str, Any]:
    """The width of a head, and what scores are divided by."""
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    scalar = getattr(config, "query_pre_attn_scalar", None)
    return {"d_head": width} | ({} if scalar is None else {"attn_scale": float(scalar) ** 0.5})


def _windows(config: Any) -> dict[str, Any]:
    """Which layers look back a window only, where the configuration says so layer by layer."""
    kinds = getattr(config, "layer_types", None)
    if not kinds:
        return {}
    window = getattr(config, "sliding_window", None)
    local = [kind == "sliding_attention" and bool(window) for kind in kinds]
    types = {"attn_types": ["local" if each else "global" for each in local], "use_local_attn": any(local)}
    return types | {"window_size": window if any(local) else None}


# --- rotary angles ----------------------------------------------------------------------------------------------------


def _frequencies(hf_model: Any) -> dict[str, tuple[Tensor, float]]:
    """Hugging Face's rotary frequencies and the factor of sine and cosine, by kind of layer; "" where all layers have the same."""
    found = {}
    for module in hf_model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            if name.endswith("inv_freq") and "original" not in name:
                kind = name.removesuffix("inv_freq")
                factor = float(getattr(module, f"{kind}attention_scaling", 1.0))
                found[kind.removesuffix("_")] = buffer.detach().float().clone(), factor
    return found


def _set_rotary(model: HookedModel, rotary: dict[str, tuple[Tensor, float]], kinds: list[str] | None) -> None:
    """Let each block compute its angles, now and for longer prompts, from Hugging Face's frequencies."""
    made: dict[str, tuple[Tensor, Tensor]] = {}
    for layer, block in enumerate(model.blocks):
        kind = "" if "" in rotary or not kinds else kinds[layer]
        if kind not in rotary or not hasattr(block.attn, "rotary_sin"):
            continue
        own = partial(_angles, *rotary[kind])
        block.attn.calculate_sin_cos_rotary = own
        if kind not in made:
            made[kind] = own(0, len(block.attn.rotary_sin), dtype=model.cfg.dtype)
        block.attn.rotary_sin, block.attn.rotary_cos = (table.clone() for table in made[kind])


def _angles(
    frequencies: Float[Tensor, " half"], factor: float, rotary_dim: int, n_ctx: int, base: float = 0.0,
    dtype: torch.dtype = torch.float32,
) -> tuple[Float[Tensor, "n_ctx dim"], Float[Tensor, "n_ctx dim"]]:  # fmt: skip
    """Sine and cosine of every position's angles, as Hugging Face computes them, in the place of TransformerLens's own function."""
    angles = torch.arange(n_ctx, device=frequencies.device)[:, None].float() * frequencies
    angles = torch.cat((angles, angles), dim=-1)
    return (angles.sin() * factor).to(dtype), (angles.cos() * factor).to(dtype)


# --- weights ----------------------------------------------------------------------------------------------------------


def give_zero_biases(hf_model: Any) -> None:
    """Give layers without a bias one of zeros, where TransformerLens expects one."""
    if _architecture(hf_model.config) not in ("GPTNeoXForCausalLM", "OPTForCausalLM"):
        return
    for module in hf_model.modules():
        if isinstance(module, torch.nn.Linear) and module.bias is None:
            module.bias = torch.nn.Parameter(module.weight.new_zeros(module.out_features))


def _biases(hf_model: Any, cfg: Any) -> dict[str, Tensor]:
    """The biases that TransformerLens takes for absent in architectures which can have them."""
    found: dict[str, Tensor] = {}
    grouped = "_" if cfg.n_key_value_heads is not None else ""
    own = {"q_proj": "b_Q", "k_proj": f"{grouped}b_K", "v_proj": f"{grouped}b_V"}
    for layer, block in enumerate(getattr(getattr(hf_model, "model", None), "layers", ())):
        attention, mlp = getattr(block, "self_attn", None), getattr(block, "mlp", None)
        for name, bias in own.items():
            if (value := getattr(getattr(attention, name, None), "bias", None)) is not None:
                found[f"blocks.{layer}.attn.{bias}"] = value.view(-1, cfg.d_head)
        for module, name, bias in ((attention, "o_proj", "attn.b_O"), (mlp, "down_proj", "mlp.b_out")):
            if (value := getattr(getattr(module, name, None), "bias", None)) is not None:
                found[f"blocks.{layer}.{bias}"] = value
    return found


def _fill(model: HookedModel, state: dict[str, Tensor]) -> None:
    """Make the state's tensors the model's parameters, uncopied where they are laid out as they are multiplied by.

    Two parameters that Hugging Face keeps as one (tied embeddings, one norm for two branches) become two.
    """
    taken: set[tuple[Any, Any]] = set()
    own = dict(model.named_parameters())
    for name in list(state):
        tensor = state.pop(name).detach()
        if (parameter := own.get(name)) is None:
            continue
        if tensor.shape != parameter.shape:
            raise ValueError(f"{name} has shape {tuple(tensor.shape)} for {tuple(parameter.shape)}")
        tensor = tensor.to(parameter.dtype)
        place = (tensor.untyped_storage().data_ptr(), tensor.storage_offset())
        parameter.data = _laid_out(name, tensor.clone() if place in taken else tensor, gated=bool(model.cfg.gated_mlp))
        taken.add(place)


def _laid_out(name: str, weight: Float[Tensor, ...], *, gated: bool) -> Float[Tensor, ...]:
    """The weight stored the way TransformerLens multiplies by it. Shape and values stay; strides change.

    HookedTransformer transposes and copies these weights in every forward pass (`W.T.contiguous()`), which costs more than the
    arithmetic on few rows: the copy of Gemma's unembedding alone takes half a second. Stored transposed, they need no copy.
    """
    stored = {"W_O": ("head d_head d_model", "d_model head d_head"), "W_U": ("read written", "written read")}
    if gated:
        stored |= dict.fromkeys(("W_in", "W_gate", "W_out"), ("read written", "written read"))
    seen, kept = stored.get(name.rsplit(".", 1)[-1], ("", ""))
    if not seen or weight.ndim != len(seen.split()):
        return weight
    return rearrange(rearrange(weight, f"{seen} -> {kept}").contiguous(), f"{kept} -> {seen}")
