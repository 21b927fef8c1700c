"""Names of attention's parameters in other models, for messages that say how to rename them."""

from collections.abc import Iterable

# The last part of the name of a projection: BERT, DistilBERT, T5, Llama and Qwen, Diffusers, Mistral's own, DeBERTa.
_ALIASES = {
    "q_proj": ("q_proj", "query", "q_lin", "q", "to_q", "wq", "query_proj"),
    "k_proj": ("k_proj", "key", "k_lin", "k", "to_k", "wk", "key_proj"),
    "v_proj": ("v_proj", "value", "v_lin", "v", "to_v", "wv", "value_proj"),
    "out_proj": ("out_proj", "o_proj", "out_lin", "o", "to_out.0", "wo", "dense", "proj", "c_proj", "out"),
}
# GPT-2, timm, ModernBERT, GPT-NeoX, Phi-3: the three projections in one matrix.
_PACKED = ("c_attn", "qkv", "Wqkv", "query_key_value", "qkv_proj")
_KINDS = ("weight", "bias")


def how_to_rename(names: Iterable[str]) -> str:
    """Return the end of a message that says which of these names are probably which parameters."""
    names = sorted(names)
    said = []
    for kind in _KINDS:
        for name in names:
            if any(_ends_with(name, f"{part}.{kind}") for part in _PACKED):
                transposed = ".T" if kind == "weight" and _ends_with(name, "c_attn.weight") else ""
                said.append(f"'in_proj_{kind}': state_dict['{name}']{transposed}")
                break
    for own, aliases in _ALIASES.items():
        for kind in _KINDS:
            matches = [name for alias in aliases for name in names if _ends_with(name, f"{alias}.{kind}")]
            if matches:
                transposed = ".T" if kind == "weight" and _ends_with(matches[0], "c_proj.weight") else ""
                said.append(f"'{own}.{kind}': state_dict['{matches[0]}']{transposed}")
    if said:
        return f"; to rename them, pass from_torch {{{', '.join(said)}}}"
    own_names = ", ".join(f"{own}.weight" for own in _ALIASES)
    return f"; rename them to {own_names}, each (out_features, in_features), and .bias beside them"


def _ends_with(name: str, ending: str) -> bool:
    return name == ending or name.endswith(f".{ending}")
