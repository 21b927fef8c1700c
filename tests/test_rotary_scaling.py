"""Scaled rotary embeddings: configs against Transformers' own functions, and formulas where it is not installed."""

import pickle

import numpy as np
import pytest

import numba_attention as na
from numba_attention.frequencies import of_config, scaled

E, B, H, L, D = 16, 2, 2, 6, 32
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 64}  # fmt: skip
LONG = {
    "rope_type": "longrope", "short_factor": [1.0 + 0.1 * n for n in range(8)],
    "long_factor": [2.0 + n for n in range(8)], "original_max_position_embeddings": 64,
}  # fmt: skip
CONFIGS = {
    "default": {"rope_type": "default"},
    "linear": {"rope_type": "linear", "factor": 4.0},
    "dynamic": {"rope_type": "dynamic", "factor": 2.0},
    "llama3": LLAMA3,
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64},
    "yarn, all": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "beta_fast": 16.0,
                  "beta_slow": 2.0, "mscale": 0.7, "mscale_all_dim": 1.0, "truncate": False},
    "yarn, attention": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64,
                        "attention_factor": 0.8},
    "longrope": LONG,
    "longrope, factor": LONG | {"factor": 5.0},
    "longrope, attention": LONG | {"attention_factor": 1.3},
}  # fmt: skip


@pytest.fixture
def rope_utils():
    pytest.importorskip("torch")
    pytest.importorskip("transformers", minversion="5.20")
    from transformers import modeling_rope_utils

    return modeling_rope_utils


def config_of(parameters, theta=10000.0, part=1.0):
    import transformers

    return transformers.LlamaConfig(
        hidden_size=H * E, num_attention_heads=H, num_key_value_heads=H, head_dim=E, max_position_embeddings=256,
        rope_parameters={"rope_theta": theta, "partial_rotary_factor": part, **parameters},
    )  # fmt: skip


@pytest.mark.peer
@pytest.mark.parametrize("length", [8, 64, 65, 256, 300, 1000])
@pytest.mark.parametrize("theta", [10000.0, 500.0])
@pytest.mark.parametrize("name", CONFIGS)
def test_frequencies_of_configs(rope_utils, name, theta, length):
    config = config_of(CONFIGS[name], theta)
    kind = CONFIGS[name]["rope_type"]
    if kind == "default":
        expected, attention = theta ** (-np.arange(0, E, 2) / E), 1.0
    else:
        expected, attention = rope_utils.ROPE_INIT_FUNCTIONS[kind](config, "cpu", seq_len=length)
        expected = expected.numpy()
    options = of_config(config, E)
    assert options["base"] == theta
    got = scaled(options.get("scaling"), theta, E)
    np.testing.assert_allclose(got.of_length(length), expected, rtol=2e-6)
    assert got.attention_factor == pytest.approx(attention, rel=1e-6)
    assert of_config(config.to_dict(), E) == options
    assert of_config(dict(config.rope_parameters) | {"max_position_embeddings": 256}, E)["base"] == theta


@pytest.mark.peer
@pytest.mark.parametrize("name", CONFIGS)
def test_a_layer_of_a_config(rope_utils, name):
    """Queries and keys of a Llama, rotated by its own embedding, through a layer that is given its config."""
    torch = pytest.importorskip("torch")
    from transformers.models.llama.modeling_llama import LlamaAttention, LlamaRotaryEmbedding

    config = config_of(CONFIGS[name])
    config._attn_implementation = "eager"
    torch.manual_seed(0)
    module, rotary = LlamaAttention(config, 0), LlamaRotaryEmbedding(config)
    x = torch.randn(B, L, D)
    for start in (0, 400):
        positions = torch.stack([torch.arange(L), 3 * torch.arange(L) + 2]) + start
        with torch.no_grad():
            expected = module(x, position_embeddings=rotary(x, positions), attention_mask=None)[0].numpy()
        layer = na.MultiHeadAttention.from_torch(module.state_dict(), H, rotary=config)
        got = layer(x.numpy(), positions=positions.numpy())
        np.testing.assert_allclose(got, expected, atol=1e-5 if start == 0 else 1e-4)


@pytest.mark.peer
@pytest.mark.parametrize("interleaved", [False, True])
def test_three_positions(rope_utils, interleaved):
    """Qwen2-VL's and Qwen3-VL's embeddings of time, height and width."""
    torch = pytest.importorskip("torch")
    import transformers

    name = "qwen3_vl" if interleaved else "qwen2_vl"
    module = pytest.importorskip(f"transformers.models.{name}.modeling_{name}")
    kind = transformers.Qwen3VLTextConfig if interleaved else transformers.Qwen2VLTextConfig
    parameters = {"rope_type": "default", "rope_theta": 100.0, "mrope_section": [3, 3, 2]}
    if interleaved:
        parameters["mrope_interleaved"] = True
    config = kind(
        hidden_size=H * E, num_attention_heads=H, num_key_value_heads=H, head_dim=E, rope_parameters=parameters
    )
    embedding = (module.Qwen3VLTextRotaryEmbedding if interleaved else module.Qwen2VLRotaryEmbedding)(config)
    x = torch.randn(B, H, L, E)
    positions = torch.randint(0, 50, (3, B, L))
    cos, sin = embedding(x, positions)
    half = torch.cat([-x[..., E // 2 :], x[..., : E // 2]], -1)
    expected = (x * cos[:, None] + half * sin[:, None]).numpy()
    options = of_config(config, E)
    got = na.apply_rotary(x.numpy(), positions.numpy()[:, :, None], **options)
    np.testing.assert_allclose(got, expected, atol=2e-5)
    same = np.broadcast_to(np.arange(L), (3, B, 1, L))
    np.testing.assert_array_equal(
        na.apply_rotary(x.numpy(), same, **options), na.apply_rotary(x.numpy(), np.arange(L), base=100.0)
    )


def test_given_frequencies_and_attention_factor():
    x = np.random.default_rng(0).standard_normal((H, L, E))
    frequencies = np.linspace(1, 0.01, E // 2)
    got = na.apply_rotary(x, np.arange(L), scaling={"frequencies": frequencies, "attention_factor": 1.5})
    turned = (x[..., : E // 2] + 1j * x[..., E // 2 :]) * np.exp(1j * np.arange(L)[:, None] * frequencies) * 1.5
    np.testing.assert_allclose(got, np.concatenate([turned.real, turned.imag], -1), atol=1e-12)


def test_llama3_by_formula():
    """Wavelengths below 64 / 4 stay, those above 64 / 1 are 8 times as long."""
    own = 10000.0 ** (-np.arange(0, E, 2) / E)
    got = scaled(LLAMA3, 10000.0, E).frequencies
    wavelengths = 2 * np.pi / own
    np.testing.assert_array_equal(got[wavelengths < 16], own[wavelengths < 16])
    np.testing.assert_allclose(got[wavelengths > 64], own[wavelengths > 64] / 8)
    between = (wavelengths >= 16) & (wavelengths <= 64)
    assert between.any()
    assert (got[between] < own[between]).all()
    assert (got[between] > own[between] / 8).all()


@pytest.mark.parametrize(
    "scaling", [LLAMA3, LONG | {"factor": 4.0}, {"type": "dynamic", "factor": 2.0, "max_position_embeddings": 4}]
)
def test_positions_of_a_layer(scaling):
    """(batch, L) where batch == heads, a pair for cross-attention, packed sequences and a cache say the same."""
    rng = np.random.default_rng(0)
    layer = na.MultiHeadAttention(D, H, rotary={"scaling": scaling}, dtype=np.float64, rng=0)
    layer = pickle.loads(pickle.dumps(layer))
    x = rng.standard_normal((H, L, D))
    positions = rng.integers(0, 90, (H, L))
    each = np.stack([layer(one, positions=[*at[:-1], 90]) for one, at in zip(x, positions, strict=True)])
    positions[:, -1] = 90  # as far in every sequence, so that scaling by length is the same
    together = layer(x, positions=positions)
    np.testing.assert_allclose(together, each, atol=1e-12)
    np.testing.assert_allclose(layer(x, x.copy(), positions=(positions, positions)), each, atol=1e-12)
    packed = layer(x.reshape(-1, D), cu_seqlens=[0, L, 2 * L], positions=positions.reshape(-1))
    np.testing.assert_allclose(packed.reshape(x.shape), each, atol=1e-12)
    cache = na.KVCache(H, H, 32, D // H, dtype=np.float64)
    np.testing.assert_allclose(layer(x, cache=cache, positions=positions), each, atol=1e-12)
    np.testing.assert_array_equal(layer(x, positions=np.arange(L)), layer(x))


def test_gradients_at_positions():
    """Finite differences through a factor of attention, and through positions that the input broadcasts to."""
    rng = np.random.default_rng(0)
    scaling = CONFIGS["yarn, attention"]
    layer = na.MultiHeadAttention(8, 2, num_kv_heads=1, rotary={"scaling": scaling}, dtype=np.float64, rng=0)
    x = rng.standard_normal((1, 5, 8))
    memory = rng.standard_normal((4, 8))
    positions = rng.integers(0, 20, (3, 5)), rng.integers(0, 20, (3, 4))
    direction, of_x, of_memory = (rng.standard_normal(shape) for shape in ((3, 5, 8), x.shape, memory.shape))

    def loss(step):
        x_, memory_ = x + step * of_x, np.broadcast_to(memory + step * of_memory, (3, 4, 8))
        return (layer(np.broadcast_to(x_, (3, 5, 8)), memory_, positions=positions) * direction).sum()

    x3, memory3 = np.broadcast_to(x, (3, 5, 8)), np.broadcast_to(memory, (3, 4, 8))
    _, ctx = layer.forward(x3, memory3, positions=positions)
    grads = layer.backward(direction, ctx)
    expected = (loss(1e-5) - loss(-1e-5)) / 2e-5
    np.testing.assert_allclose((grads.query * of_x).sum() + (grads.key * of_memory).sum(), expected, rtol=1e-6)
    with pytest.raises(ValueError, match="positions"):  # more sequences than there are
        layer(x[0], positions=np.zeros((3, 7)))


@pytest.mark.parametrize(
    ("positions", "key", "error", "message"),
    [
        (np.zeros((3, L)), None, ValueError, r"positions of shape \(3, 6\) does not broadcast to \(2, 6\)"),
        (np.zeros(L, complex), None, TypeError, "positions must be integers or floating point"),
        (np.full(L, np.nan), None, ValueError, "positions must be finite"),
        (np.zeros(L), True, ValueError, "positions must be a pair"),
    ],
)
def test_bad_positions(positions, key, error, message):
    layer = na.MultiHeadAttention(D, H, rotary=True, rng=0)
    x = np.zeros((B, L, D), np.float32)
    with pytest.raises(error, match=message):
        layer(x, None if key is None else x.copy(), positions=positions)
    with pytest.raises(ValueError, match="positions must be None for a layer without rotary="):
        na.MultiHeadAttention(D, H, rng=0)(x, positions=np.arange(L))


@pytest.mark.parametrize(
    ("scaling", "message"),
    [
        ({"factor": 2.0}, "scaling must be of type 'default', 'linear'.*a mapping without a type"),
        ({"type": "yarm"}, "got 'yarm'"),
        ({"type": "linear", "rope_type": "ntk", "factor": 2}, "scaling must have one type, got linear and ntk"),
        (LLAMA3 | {"beta": 3}, "scaling must have the keys type, factor, high_freq_factor.*got beta"),
        (LLAMA3 | {"low_freq_factor": 5.0}, "low_freq_factor of scaling must be less"),
        (LONG | {"long_factor": [1.0]}, "long_factor of scaling must be 8 numbers"),
        (LONG | {"short_factor": [0.0] * 8, "factor": 2.0}, "finite frequency"),
        ({"type": "yarn", "original_max_position_embeddings": 64}, "the key factor, or max_position_embeddings"),
        ({"type": "mrope"}, "the key mrope_section"),
        ({"type": "default", "mrope_section": [3, 3, 3]}, "three numbers of pairs that add up to 8"),
        ({"frequencies": [1.0, 2.0]}, "frequencies of scaling must be 8 numbers"),
    ],
)
def test_bad_scaling(scaling, message):
    with pytest.raises(ValueError, match=message):
        na.apply_rotary(np.zeros((L, E)), np.arange(L), scaling=scaling)


def test_a_config_with_several_embeddings_is_refused():
    config = {"rope_parameters": {"full_attention": {"rope_type": "default"}, "sliding_attention": {}}}
    with pytest.raises(ValueError, match="pass one of full_attention, sliding_attention"):
        na.MultiHeadAttention(D, H, rotary=config)


def test_part_of_the_features():
    options = of_config({"rope_parameters": {"rope_theta": 500.0, "partial_rotary_factor": 0.5}}, E)
    assert options == {"base": 500.0, "dim": 8}
