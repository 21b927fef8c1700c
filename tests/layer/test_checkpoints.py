"""Parameters of attention in other libraries: real modules where they are installed, documented names everywhere."""

import json
import pickle

import numpy as np
import pytest

import numba_attention as na

D, H, E = 16, 4, 4
MultiHeadAttention = na.MultiHeadAttention


@pytest.fixture
def x():
    return np.random.default_rng(1).standard_normal((2, 6, D), dtype=np.float32)


def rename(layer, family):
    """The parameters of a layer with the names and the layout of a family."""
    p = layer.parameters()
    names, packed, kernel, transposed = {
        "numba_attention": ("q_proj k_proj v_proj out_proj", 0, "weight", 0),
        "Llama": ("q_proj k_proj v_proj o_proj", 0, "weight", 0),
        "BERT": ("self.query self.key self.value output.dense", 0, "weight", 0),
        "ViT": ("attention.query attention.key attention.value output.dense", 0, "weight", 0),
        "DistilBERT": ("q_lin k_lin v_lin out_lin", 0, "weight", 0),
        "Diffusers": ("to_q to_k to_v to_out.0", 0, "weight", 0),
        "Meta's Llama": ("wq wk wv wo", 0, "weight", 0),
        "T5": ("q k v o", 0, "weight", 0),
        "GPT-2": ("c_attn c_proj", 1, "weight", 1),
        "timm": ("qkv proj", 1, "weight", 0),
        "ModernBERT": ("Wqkv Wo", 1, "weight", 0),
        "Phi-3": ("qkv_proj o_proj", 1, "weight", 0),
        "Keras": ("query key value attention_output", 0, "kernel", 0),
        "Flax": ("query key value out", 0, "kernel", 0),
    }[family]
    *inputs, out = names.split()
    weights = [p[f"{name}.weight"] for name in ("q_proj", "k_proj", "v_proj")]
    biases = [p[f"{name}.bias"] for name in ("q_proj", "k_proj", "v_proj")]
    if packed:
        weights, biases = [np.concatenate(weights)], [np.concatenate(biases)]
    out_weight = p["out_proj.weight"]
    if transposed:
        weights, out_weight = [w.T for w in weights], out_weight.T
    if kernel == "kernel":
        weights = [w.T.reshape(D, -1, E) for w in weights]
        biases = [b.reshape(-1, E) for b in biases]
        out_weight = out_weight.T.reshape(H, E, D)
    result = {f"{name}.{kernel}": w for name, w in zip(inputs, weights, strict=True)}
    result |= {f"{name}.bias": b for name, b in zip(inputs, biases, strict=True)}
    return result | {f"{out}.{kernel}": out_weight, f"{out}.bias": p["out_proj.bias"]}


FAMILIES = [
    "numba_attention", "Llama", "BERT", "ViT", "DistilBERT", "Diffusers", "Meta's Llama", "T5", "GPT-2", "timm",
    "ModernBERT", "Phi-3", "Keras", "Flax",
]  # fmt: skip


def own_layer(kv=None, seed=0):
    layer = MultiHeadAttention(D, H, num_kv_heads=kv, rng=seed)
    rng = np.random.default_rng(seed)
    for name, array in layer.parameters().items():
        if name.endswith("bias"):
            array[...] = rng.standard_normal(array.shape)
    return layer


def same(a, b):
    for name, array in a.parameters().items():
        np.testing.assert_array_equal(b.parameters()[name], array, err_msg=name)


@pytest.mark.parametrize("prefix", ["", "encoder.layer.3.attention."])
@pytest.mark.parametrize("kv", [4, 2])
@pytest.mark.parametrize("family", FAMILIES)
def test_documented_names(family, kv, prefix):
    if family == "GPT-2" and kv == 2:
        pytest.skip("has no grouped heads")
    layer = own_layer(kv)
    state = {prefix + name: array for name, array in rename(layer, family).items()}
    loaded = MultiHeadAttention.from_torch(state, H)
    same(layer, loaded)
    assert loaded.loaded.family == family
    assert loaded.loaded.prefix == prefix
    assert set(loaded.loaded.names) == set(layer.parameters())
    assert set(loaded.loaded.names.values()) == set(state)
    assert pickle.loads(pickle.dumps(loaded)).loaded == loaded.loaded
    other = MultiHeadAttention(D, H, num_kv_heads=kv, rng=5)
    other.load_parameters(state)
    same(layer, other)
    same(layer, MultiHeadAttention.from_torch(state, H, prefix=prefix, names=family))


def test_nested_names_and_slashes():
    layer = own_layer()
    flat = rename(layer, "Flax")
    nested = {}
    for name, array in flat.items():
        stem, kind = name.split(".")
        nested.setdefault("params", {}).setdefault(stem, {})[kind] = array
    same(layer, MultiHeadAttention.from_torch(nested, H))
    paths = {f"multi_head_attention/{name.replace('.', '/')}": a for name, a in rename(layer, "Keras").items()}
    same(layer, MultiHeadAttention.from_torch(paths, H))
    with pytest.raises(ValueError, match=r"num_heads must be that of .*, 4, got 2"):
        MultiHeadAttention.from_torch(paths, 2)


def test_a_map_of_names():
    layer = own_layer()
    p = layer.parameters()
    state = {f"w.{name}": array for name, array in p.items() if not name.startswith("out")}
    state |= {"w.o": p["out_proj.weight"].T, "w.ob": p["out_proj.bias"], "lstm.weight": np.ones(3)}
    names = {
        "q_proj": "w.q_proj", "k_proj": "w.k_proj", "v_proj": "w.v_proj", "out_proj.weight": ("w.o", np.transpose),
        "out_proj.bias": "w.ob",
    }  # fmt: skip
    loaded = MultiHeadAttention.from_torch(state, H, names=names)
    same(layer, loaded)
    assert loaded.loaded.family == "names"
    assert loaded.loaded.names["out_proj.weight"] == "w.o"
    joined = {"fused": np.concatenate([p[f"{n}_proj.weight"] for n in "qkv"]), "o": p["out_proj.weight"]}
    loaded = MultiHeadAttention.from_torch(joined, H, names={"in_proj.weight": "fused", "out_proj.weight": "o"})
    np.testing.assert_array_equal(loaded.parameters()["v_proj.weight"], p["v_proj.weight"])


@pytest.mark.parametrize(
    ("names", "error", "message"),
    [
        (3, TypeError, "names must be a mapping, the name of a family or None"),
        ("GPT-7", ValueError, "names must be one of .*BERT.*, got 'GPT-7'"),
        ({"q_proj": 3}, TypeError, "names must map names to names"),
        ({"q_proj": "lstm"}, ValueError, "there is no 'lstm.weight', for 'q_proj.weight'"),
        ({"q_proj": "q_proj"}, ValueError, "names must say which is the weight of k_proj, v_proj, out_proj"),
        ({"gate": "q_proj.weight"}, ValueError, "a layer has no gate; it has q_proj"),
    ],
)
def test_wrong_maps(names, error, message):
    with pytest.raises(error, match=message):
        MultiHeadAttention.from_torch(own_layer().parameters(), H, names=names)


def test_layers_of_a_file(tmp_path):
    numpy = pytest.importorskip("safetensors.numpy")
    layers = [own_layer(seed=n) for n in range(12)]
    state = {f"bert.layer.{n}.attention.{k}": np.ascontiguousarray(a)
             for n, layer in enumerate(layers) for k, a in rename(layer, "BERT").items()}  # fmt: skip
    more = {f"bert.layer.{n}.output.dense.weight": np.ones((2, 2), np.float32) for n in range(12)}
    numpy.save_file(state | more, tmp_path / "model.safetensors")
    loaded = MultiHeadAttention.load_layers(tmp_path / "model.safetensors", num_heads=H)
    assert list(loaded) == [f"bert.layer.{n}.attention" for n in range(12)]
    for layer, again in zip(layers, loaded.values(), strict=True):
        same(layer, again)
    some = MultiHeadAttention.load_layers(tmp_path / "model.safetensors", "bert.layer.1?.attention", num_heads=H)
    assert list(some) == ["bert.layer.10.attention", "bert.layer.11.attention"]
    names = {"q_proj": "self.query", "k_proj": "self.key", "v_proj": "self.value", "out_proj": "output.dense"}
    mapped = MultiHeadAttention.load_layers(tmp_path / "model.safetensors", num_heads=H, names=names)
    assert list(mapped) == list(loaded)
    with pytest.raises(
        ValueError, match=r"no attention layer is named like 'gpt\*'; there are: bert.layer.0.attention"
    ):
        MultiHeadAttention.load_layers(tmp_path / "model.safetensors", "gpt*", num_heads=H)
    with pytest.raises(IsADirectoryError, match=r"is a folder; pass the path of its file, such as "):
        MultiHeadAttention.load_layers(tmp_path, num_heads=H)
    with pytest.raises(TypeError, match=r"path must be a string or path-like, got builtins.dict; from_torch takes"):
        MultiHeadAttention.load_layers({}, num_heads=H)
    # In several files, with an index.
    halves = {f"part{n}": dict(list(state.items())[n::2]) for n in range(2)}
    for name, half in halves.items():
        numpy.save_file(half, tmp_path / name)
    index = {"weight_map": {name: part for part, half in halves.items() for name in half}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    again = MultiHeadAttention.load_layers(tmp_path / "model.safetensors.index.json", num_heads=H)
    same(layers[7], again["bert.layer.7.attention"])
    (tmp_path / "bad.json").write_text("[]")
    with pytest.raises(ValueError, match=r"bad\.json is no index of safetensors files"):
        MultiHeadAttention.load_layers(tmp_path / "bad.json", num_heads=H)


# Real modules.


@pytest.mark.peer
@pytest.mark.parametrize("sizes", [{}, {"kdim": 8, "vdim": 12}], ids=["packed", "separate"])
def test_torch(torch, x, sizes):
    module = torch.nn.MultiheadAttention(D, H, batch_first=True, **sizes)
    torch.nn.init.normal_(module.in_proj_bias)
    k, v = (
        (np.random.default_rng(2).standard_normal((2, 5, n), dtype=np.float32) for n in (8, 12) if sizes)
        if sizes
        else (x, x)
    )
    layer = MultiHeadAttention.from_torch(module.state_dict(), H)
    with torch.no_grad():
        expected = module(*map(torch.from_numpy, (x, k, v)))[0].numpy()
    np.testing.assert_allclose(layer(x, k, v), expected, atol=1e-5)


@pytest.fixture
def transformers():
    return pytest.importorskip("transformers")


TRANSFORMERS = {
    "bert": ("BertModel", {}, "encoder.layer.1.attention.", "BERT", {}),
    "gpt2": ("GPT2Model", {"n_embd": D, "n_head": H, "n_layer": 2}, "h.1.attn.", "GPT-2", {"is_causal": True}),
    "gpt_bigcode": (
        "GPTBigCodeModel", {"n_embd": D, "n_head": H, "n_layer": 2}, "h.1.attn.", "GPT-2", {"is_causal": True},
    ),
    "vit": ("ViTModel", {}, None, None, {}),
    "distilbert": (
        "DistilBertModel",
        {"dim": D, "n_heads": H, "n_layers": 2, "hidden_dim": 24}, "transformer.layer.1.attention.", "DistilBERT", {},
    ),
    "whisper": (
        "WhisperModel",
        {"d_model": D, "encoder_layers": 2, "decoder_layers": 1, "encoder_attention_heads": H, "vocab_size": 70,
         "decoder_attention_heads": H, "encoder_ffn_dim": 24, "decoder_ffn_dim": 24, "pad_token_id": 0},
        "encoder.layers.1.self_attn.", "numba_attention", {},
    ),
    "t5": (
        "T5EncoderModel",
        {"d_model": D, "d_kv": E, "num_heads": H, "num_layers": 2, "d_ff": 24},
        "encoder.block.1.layer.0.SelfAttention.", "T5", {"scale": 1.0},
    ),
    "llama": ("LlamaModel", {"num_key_value_heads": 2}, "layers.1.self_attn.", "Llama", {"is_causal": True}),
    "phi3": (
        "Phi3Model",
        {"num_key_value_heads": 2, "pad_token_id": 0}, "layers.1.self_attn.", "Phi-3", {"is_causal": True},
    ),
    "modernbert": ("ModernBertModel", {"pad_token_id": 0}, "layers.1.attn.", "ModernBERT", {}),
}  # fmt: skip
SIZES = {"hidden_size": D, "num_attention_heads": H, "num_hidden_layers": 2, "intermediate_size": 24, "vocab_size": 70}


@pytest.mark.peer
@pytest.mark.parametrize("model", TRANSFORMERS)
def test_transformers(torch, transformers, x, model):
    """The output of the layer is what enters the residual stream behind the real module."""
    kind, sizes, prefix, family, options = TRANSFORMERS[model]
    of_model = getattr(transformers, kind)
    own_sizes = {"num_attention_heads", "d_model", "n_embd", "dim"} & sizes.keys()
    config = of_model.config_class(**({} if own_sizes else SIZES) | sizes, attn_implementation="eager")
    torch.manual_seed(0)
    whole = of_model(config).eval()
    with torch.no_grad():
        for parameter in whole.parameters():
            parameter.normal_(std=0.3)
        if model == "t5":  # the bias of positions is an argument of each call, and no parameter of a layer
            whole.encoder.block[0].layer[0].SelfAttention.relative_attention_bias.weight.zero_()
    state = whole.state_dict()
    if prefix is None:  # whichever names this release has
        with pytest.raises(ValueError, match="2 attention layers") as caught:
            MultiHeadAttention.from_torch(state, H)
        prefix = str(caught.value).split("'")[3]
    of_layer = {name: a for name, a in state.items() if name.startswith(prefix)}
    rotary = {"llama": True, "phi3": True, "modernbert": True}.get(model)
    layer = MultiHeadAttention.from_torch(state, H, prefix=prefix, rotary=rotary)
    assert family in (None, layer.loaded.family)
    assert set(layer.loaded.names.values()) | {prefix + name for name in layer.loaded.ignored} == set(of_layer)

    got = {}
    out_name = layer.loaded.names["out_proj.weight"].rpartition(".")[0]
    in_name = layer.loaded.names["q_proj.weight"].rpartition(".")[0]
    whole.get_submodule(in_name).register_forward_pre_hook(lambda module, given: got.__setitem__("x", given[0]))
    whole.get_submodule(out_name).register_forward_hook(lambda module, given, out: got.__setitem__("out", out))
    with torch.no_grad():
        if model == "whisper":
            whole.encoder(torch.randn(1, 80, 3000))
        elif model == "vit":
            whole(torch.randn(1, 3, 224, 224))
        else:
            whole(torch.randint(1, 70, (2, 9)))
    result = layer(got["x"].numpy(), **options)
    expected = got["out"].numpy()
    if model == "modernbert":  # its second layer has a window, and another base
        assert config.layer_types[1] == "sliding_attention"
        layer = MultiHeadAttention.from_torch(state, H, prefix=prefix, rotary=True)
        result = layer(got["x"].numpy(), window=(64, 64))
    np.testing.assert_allclose(result, expected, atol=2e-5 * np.abs(expected).max(), rtol=0)


FUSED = {
    "gpt_neox": ("GPTNeoXModel", {"rotary_pct": 1.0}, "layers.1.attention.", H),
    "bloom": ("BloomModel", {"n_layer": 2, "n_head": H}, "h.1.self_attention.", H),
    "falcon 40b": (
        "FalconModel", {"new_decoder_architecture": True, "num_kv_heads": 2, "bias": True}, "h.1.self_attention.", 2,
    ),
    "falcon 7b": ("FalconModel", {"multi_query": True}, "h.1.self_attention.", 1),
    "falcon rw": ("FalconModel", {"multi_query": False, "bias": True}, "h.1.self_attention.", H),
}  # fmt: skip


def together(x, heads, kv_heads):
    """As in docs/checkpoints.md."""
    groups = x.reshape(kv_heads, heads // kv_heads + 2, -1, *x.shape[1:])
    parts = groups[:, :-2], groups[:, -2], groups[:, -1]
    return np.concatenate([part.reshape(-1, *x.shape[1:]) for part in parts])


@pytest.mark.peer
@pytest.mark.parametrize("model", FUSED)
def test_orders_that_a_name_does_not_tell(torch, transformers, model):
    """The message recommends no order, and with the right one the output is that of the real module."""
    kind, sizes, prefix, kv_heads = FUSED[model]
    of_model = getattr(transformers, kind)
    torch.manual_seed(0)
    whole = of_model(of_model.config_class(**SIZES | sizes, attn_implementation="eager")).eval()
    with torch.no_grad():
        for parameter in whole.parameters():
            parameter.normal_(std=0.3)
    state = whole.state_dict()
    with pytest.raises(ValueError, match="does not say in which order"):
        MultiHeadAttention.from_torch(state, H, prefix=prefix)
    names = {"in_proj": ("query_key_value", lambda x: together(x, H, kv_heads)), "out_proj": "dense"}
    rotary = None if model == "bloom" else whole.config
    layer = MultiHeadAttention.from_torch(state, H, prefix=prefix, names=names, rotary=rotary)
    assert layer.num_kv_heads == kv_heads
    got = {}
    fused, dense = (whole.get_submodule(prefix + name) for name in ("query_key_value", "dense"))
    fused.register_forward_pre_hook(lambda module, given: got.__setitem__("x", given[0]))
    dense.register_forward_hook(lambda module, given, out: got.__setitem__("out", out))
    with torch.no_grad():
        whole(torch.randint(1, 70, (2, 9)))
    slopes = {"alibi_slopes": 2.0 ** (-8 / H * np.arange(1, H + 1))} if model == "bloom" else {}
    expected = got["out"].numpy()
    result = layer(got["x"].numpy(), is_causal=True, **slopes)
    np.testing.assert_allclose(result, expected, atol=2e-5 * np.abs(expected).max(), rtol=0)


@pytest.mark.peer
def test_keras(x, monkeypatch):
    pytest.importorskip("jax")
    monkeypatch.setenv("KERAS_BACKEND", "jax")
    keras = pytest.importorskip("keras")
    module = keras.layers.MultiHeadAttention(H, E, bias_initializer="normal")
    expected = np.asarray(module(x, x))
    layer = MultiHeadAttention.from_torch({w.path: np.asarray(w) for w in module.weights}, H)
    assert layer.loaded.family == "Keras"
    np.testing.assert_allclose(layer(x), expected, atol=1e-5)


@pytest.mark.peer
@pytest.mark.parametrize("kind", ["linen", "nnx"])
def test_flax(x, kind):
    jax = pytest.importorskip("jax")
    flax = pytest.importorskip(f"flax.{kind}")
    if kind == "linen":
        module = flax.MultiHeadDotProductAttention(num_heads=H)
        state = module.init(jax.random.key(0), x)
        expected = module.apply(state, x)
    else:
        module = flax.MultiHeadAttention(num_heads=H, in_features=D, decode=False, rngs=flax.Rngs(0))
        expected = module(x)
        state = flax.to_pure_dict(flax.state(module, flax.Param))
    layer = MultiHeadAttention.from_torch(jax.tree.map(np.asarray, state), H)
    assert layer.loaded.family == "Flax"
    np.testing.assert_allclose(layer(x), np.asarray(expected), atol=1e-5)
