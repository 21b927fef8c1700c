"""Models of Hugging Face with random weights: this package's attention beside their own ``eager`` formulas."""

import importlib
import inspect
import tracemalloc

import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers", minversion="5.20")
bridge = importlib.import_module("numba_attention.transformers")
masks = importlib.import_module("numba_attention.transformers.masks")
calls = importlib.import_module("numba_attention.transformers.calls")

SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48, "vocab_size": 67}
SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None}
GROUPED = SMALL | SPECIAL | {"num_key_value_heads": 2, "head_dim": 8}
SEQ2SEQ = {
    "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4, "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "vocab_size": 67, "dropout": 0.0, "decoder_start_token_id": 1,
    **SPECIAL,
}  # fmt: skip

# Model, its sizes, and what is special about its attention. Windows are smaller than the sequences below.
FAMILIES = {
    "bert": ("BertForMaskedLM", SMALL),
    "gpt2": ("GPT2LMHeadModel", {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 67, **SPECIAL}),
    "llama": ("LlamaForCausalLM", GROUPED),
    "mistral": ("MistralForCausalLM", GROUPED | {"sliding_window": 5}),
    "gemma2": (
        "Gemma2ForCausalLM",
        GROUPED | {"sliding_window": 5, "attn_logit_softcapping": 0.5, "query_pre_attn_scalar": 3},
    ),
    "gpt_oss": (
        "GptOssForCausalLM",
        GROUPED | {"sliding_window": 5, "num_local_experts": 4, "num_experts_per_tok": 2},
    ),
    "qwen3": ("Qwen3ForCausalLM", GROUPED),
    "modernbert": (
        "ModernBertForMaskedLM",
        SMALL | {"local_attention": 6, "global_attn_every_n_layers": 2, "pad_token_id": 0, "cls_token_id": 1,
                 "sep_token_id": 2, "bos_token_id": 1, "eos_token_id": 2},
    ),
    "t5": (
        "T5ForConditionalGeneration",
        {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, "vocab_size": 67, "dropout_rate": 0.0,
         "decoder_start_token_id": 1, **SPECIAL},
    ),
    "whisper": (
        "WhisperForConditionalGeneration",
        SEQ2SEQ | {"num_mel_bins": 8, "max_source_positions": 12, "max_target_positions": 40, "suppress_tokens": None,
                   "begin_suppress_tokens": None},
    ),
    "vit": ("ViTModel", SMALL | {"image_size": 16, "patch_size": 4, "num_channels": 1}),
    "bart": ("BartForConditionalGeneration", SEQ2SEQ | {"max_position_embeddings": 64}),
    "esm": (
        "EsmForMaskedLM",
        SMALL | {"pad_token_id": 0, "mask_token_id": 3, "position_embedding_type": "rotary", "token_dropout": False},
    ),
    "deepseek_v3": (
        "DeepseekV3ForCausalLM",
        SMALL | SPECIAL | {"num_key_value_heads": 4, "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 4,
                           "qk_nope_head_dim": 8, "v_head_dim": 6, "n_routed_experts": 4, "num_experts_per_tok": 2,
                           "n_group": 1, "topk_group": 1, "moe_intermediate_size": 16, "first_k_dense_replace": 1},
    ),
}  # fmt: skip
ENCODERS = ("bert", "modernbert", "esm", "vit")
GENERATORS = [name for name in FAMILIES if name not in ENCODERS]
LENGTH = 14


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module", autouse=True)
def name():
    return bridge.register()


def model(family, implementation, **changes):
    """A model with the same random weights for every implementation."""
    kind, settings = FAMILIES[family]
    of_model = getattr(transformers, kind)
    config = of_model.config_class(**settings | changes)
    config._attn_implementation = implementation
    torch.manual_seed(0)
    built = of_model(config).eval()
    with torch.no_grad():
        for parameter in built.parameters():  # biases, sinks and norms too
            parameter.copy_(torch.randn_like(parameter) * 0.3 + (parameter.ndim == 1))
    return built


def inputs(family, padding, batch=2):
    """Inputs, the padding mask of what `logits` describe, by the side that is padded."""
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(4, 67, (batch, LENGTH), generator=generator)
    if family == "vit":
        return {"pixel_values": torch.randn(batch, 1, 16, 16, generator=generator)}, None
    if family == "whisper":
        return {
            "input_features": torch.randn(batch, 8, 24, generator=generator), "decoder_input_ids": tokens[:, :9]
        }, None  # fmt: skip
    given = {"input_ids": tokens}
    seen = torch.ones(batch, LENGTH, dtype=torch.long)
    if padding:
        for row, hidden in enumerate((4, 0, 7)[:batch]):
            seen[row, slice(0, hidden) if padding == "left" else slice(LENGTH - hidden, LENGTH)] = 0
        given["attention_mask"] = seen
    if family in ("t5", "bart"):
        return given | {"decoder_input_ids": tokens[:, :9]}, None
    return given, seen if padding else None


def result(output):
    return output.logits if "logits" in output else output.last_hidden_state


def close(actual, expected, tolerance=2e-5):
    scale = expected.abs().max().clamp(min=1e-30)
    assert ((actual - expected).abs().max() / scale).item() < tolerance


@pytest.mark.parametrize("padding", [None, "right", "left"])
@pytest.mark.parametrize("family", FAMILIES)
def test_outputs_and_gradients(family, padding, name):
    if padding and family in ("vit", "whisper"):
        pytest.skip("takes no padding mask")
    given, seen = inputs(family, padding)
    results, gradients = [], []
    for implementation in ("eager", name):
        own = model(family, implementation)
        assert own.config._attn_implementation == implementation
        out = result(own(**given))
        if seen is not None:
            out = out * seen[..., None]  # what stands at padding is nobody's result
        (out * torch.linspace(-1, 1, out.shape[-1])).square().mean().backward()
        results.append(out.detach())
        gradients.append({key: p.grad for key, p in own.named_parameters() if p.grad is not None})
    close(results[1], results[0])
    assert gradients[0].keys() == gradients[1].keys()
    largest = max(grad.abs().max() for grad in gradients[0].values())
    for key, grad in gradients[0].items():
        error = (gradients[1][key] - grad).abs().max() / max(grad.abs().max(), 1e-4 * largest)
        assert error < 5e-4, key  # of two float32 results: 2e-4 with AVX2


@pytest.mark.parametrize("cache", [None, "static"])
@pytest.mark.parametrize("family", GENERATORS)
def test_greedy_text(family, cache, name):
    given, _ = inputs(family, None if family == "whisper" else "left", batch=3)
    given.pop("decoder_input_ids", None)
    texts = []
    for implementation in ("eager", name):
        own = model(family, implementation)
        own.generation_config.disable_compile = True
        texts.append(
            own.generate(**given, max_new_tokens=10, min_new_tokens=10, do_sample=False, cache_implementation=cache)
        )
    assert torch.equal(*texts)


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma2", "gpt_oss"])
def test_positions_that_begin_anew_are_packed_sequences(family, name):
    """Two and three documents in a row, told by their positions: linear in memory, and equal to one at a time."""
    positions = torch.tensor([[*range(6), *range(8)], [*range(3), *range(7), *range(4)]])
    given = inputs(family, None)[0] | {"position_ids": positions, "use_cache": False}
    expected, actual = (result(model(family, kind)(**given)) for kind in ("eager", name))
    close(actual, expected)
    if family != "gpt_oss":  # whose experts do not say the same of a sequence in a batch and alone, with eager either
        alone = model(family, name)
        close(actual[1:, 3:10], result(alone(input_ids=given["input_ids"][1:, 3:10])))
    actual.square().mean().backward()


def test_chunks(name):
    """Llama 4 attends within chunks, which begin after the padding."""
    sizes = GROUPED | {"attention_chunk_size": 4, "num_local_experts": 2, "intermediate_size_mlp": 48}
    config = transformers.Llama4TextConfig(**sizes, no_rope_layer_interval=2)
    given, seen = inputs("llama", "left")
    outs, built = [], []
    for implementation in ("eager", name):
        config._attn_implementation = implementation
        torch.manual_seed(0)
        built.append(transformers.Llama4ForCausalLM(config).eval())
        outs.append(built[-1](**given).logits * seen[..., None])
    close(outs[1], outs[0])
    texts = [own.generate(**given, max_new_tokens=9, do_sample=False) for own in built]
    assert torch.equal(*texts)


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert"])
def test_masks_of_the_caller(family, name):
    """Truth values, numbers to be added, and numbers that only hide, of shape (batch, 1, L, L)."""
    given, _ = inputs(family, None)
    generator = torch.Generator().manual_seed(2)
    seen = (torch.rand(2, 1, LENGTH, LENGTH, generator=generator) < 0.6) | torch.eye(LENGTH, dtype=torch.bool)
    hiding = torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(torch.float32).min)
    added = hiding + torch.randn(seen.shape, generator=generator)
    for mask in (hiding, added):
        given["attention_mask"] = mask
        expected, actual = (result(model(family, kind)(**given)) for kind in ("eager", name))
        close(actual, expected)
    given["attention_mask"] = hiding
    expected = result(model(family, "eager")(**given))
    given["attention_mask"] = seen
    close(result(model(family, name)(**given)), expected)


@pytest.mark.parametrize("family", ["llama", "gemma2", "bert"])
def test_weights(family, name):
    given, seen = inputs(family, "right")
    ours, theirs = (model(family, kind)(**given, output_attentions=True).attentions for kind in (name, "eager"))
    assert len(ours) == len(theirs) == 2
    for actual, expected in zip(ours, theirs, strict=True):
        rows = seen[:, None, :, None]
        torch.testing.assert_close(actual * rows, expected * rows, atol=1e-5, rtol=5e-5)


def test_weights_of_a_config_are_refused_by_transformers(name):
    own = model("bert", name)
    with pytest.raises(ValueError, match="eager"):
        own.config.output_attentions = True


@pytest.mark.parametrize("family", ["llama", "gemma2", "bert", "gpt_oss"])
@pytest.mark.parametrize("padding", [None, "left"])
def test_compiled_without_graph_breaks(family, padding, name):
    if family == "gpt_oss" and transformers.__version__ < "5.24":
        pytest.skip("the experts of this release cannot be differentiated when compiled")
    given, seen = inputs(family, padding)
    own = model(family, name)
    torch.compiler.reset()
    compiled = torch.compile(own, fullgraph=True, backend="aot_eager")
    out = result(compiled(**given, use_cache=False) if family != "bert" else compiled(**given))
    expected = result(model(family, "eager")(**given))
    rows = 1 if seen is None else seen[..., None]
    close(out * rows, expected * rows)
    out.square().mean().backward()
    grads = {key: p.grad for key, p in own.named_parameters()}
    own.zero_grad()
    result(own(**given)).square().mean().backward()
    for key, p in own.named_parameters():
        close(grads[key], p.grad, 1e-3)


@pytest.mark.slow
def test_compiled_text(name):
    """A static cache lets Transformers compile each step of decoding."""
    given, _ = inputs("llama", "left")
    own = model("llama", name)
    step = torch.compile(own.forward, fullgraph=True, backend="aot_eager")
    expected = model("llama", "eager").generate(**given, max_new_tokens=6, do_sample=False)
    own.forward = step
    assert torch.equal(
        own.generate(**given, max_new_tokens=6, do_sample=False, cache_implementation="static"), expected
    )


def test_vmap(name):
    attend = bridge.attend
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(3, 2, 4, 5, 8, generator=generator)
    key, value = torch.randn(2, 2, 2, 6, 8, generator=generator)
    mask = torch.rand(2, 1, 5, 6, generator=generator) < 0.7
    arguments = (key, value, mask, None, None, None, None, None, False, 0.0)
    together = torch.vmap(lambda q: attend(q, *arguments)[0])(query)
    alone = torch.stack([attend(q, *arguments)[0] for q in query])
    torch.testing.assert_close(together, alone)
    together = torch.vmap(lambda k: attend(query[0], k, *arguments[1:])[0], in_dims=1)(torch.stack([key, key], 1))
    torch.testing.assert_close(together[1], alone[0])


def test_dropout_is_that_of_the_weights(name):
    """Output and gradients beside autograd of the formula, with the mask that the returned weights show."""
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(2, 4, 6, 8, generator=generator, requires_grad=True)
    key, value = (torch.randn(2, 2, 9, 8, generator=generator, requires_grad=True) for _ in range(2))
    mask = masks.attention_mask(2, 6, 9, 3, mask_function=OF_MASKS.sliding_window_causal_mask_function(4))
    module = torch.nn.Identity()

    def call(dropout):
        torch.manual_seed(5)
        return bridge.attention_forward(module, query, key, value, mask, dropout=dropout, output_attentions=True)

    (out, dropped), (_, weights) = call(0.4), call(0.0)
    kept = dropped > 0
    assert 0.4 < kept.sum() / (weights > 0).sum() < 0.8
    seen = torch.from_numpy(calls.dense(mask.numpy(), 6, 9))
    scores = (query @ key.repeat_interleave(2, 1).mT / 8**0.5).masked_fill(~seen, -torch.inf)
    expected = (scores.softmax(-1) * kept / 0.6 @ value.repeat_interleave(2, 1)).transpose(1, 2)
    torch.testing.assert_close(out, expected, atol=1e-4, rtol=1e-4)  # 0.4 is 26214 / 2**16
    direction = torch.randn(out.shape, generator=generator)
    ours, theirs = (torch.autograd.grad(x, (query, key, value), direction) for x in (out, expected))
    for actual, grad in zip(ours, theirs, strict=True):
        torch.testing.assert_close(actual, grad, atol=1e-4, rtol=1e-4)
    assert torch.equal(call(0.4)[0], out)
    assert not torch.equal(bridge.attention_forward(module, query, key, value, mask, dropout=0.4)[0], out)


@pytest.mark.parametrize("packed", [False, True])
def test_training_with_dropout_and_checkpointing(packed, name):
    given, _ = inputs("llama", None)
    if packed:
        given["position_ids"] = torch.tensor([[*range(6), *range(8)]] * 2)
    grads = []
    for checkpointing in (False, True):
        own = model("llama", name, attention_dropout=0.3).train()
        if checkpointing:
            own.gradient_checkpointing_enable()
        torch.manual_seed(3)
        own(**given, use_cache=False).logits.square().mean().backward()
        grads.append(own.model.layers[0].self_attn.q_proj.weight.grad)
    close(grads[1], grads[0], 1e-6)


def test_other_devices_are_refused(name):
    x = torch.empty(1, 2, 3, 4, device="meta")
    with pytest.raises(ValueError, match=r"device meta; move the model with model\.cpu"):
        bridge.attention_forward(torch.nn.Identity(), x, x, x, None)


def test_a_name_of_ones_own():
    assert bridge.register("mine") == "mine"
    assert model("bert", "mine").config._attn_implementation == "mine"
    with pytest.raises(TypeError, match="name must be a string"):
        bridge.register(1)


# What each kind of mask becomes.

OF_MASKS = transformers.masking_utils
SIZES = {"batch_size": 2, "q_length": 5, "kv_length": 9, "q_offset": 4}


def padded(*hidden, keys=9):
    seen = torch.ones(len(hidden), keys, dtype=torch.bool)
    for row, (first, stop) in enumerate(hidden):
        seen[row, first:stop] = False
    return seen


FUNCTIONS = {
    "causal": OF_MASKS.causal_mask_function,
    "all": OF_MASKS.bidirectional_mask_function,
    "window": OF_MASKS.sliding_window_causal_mask_function(3),
    "both sides": OF_MASKS.sliding_window_bidirectional_mask_function(2),
    "chunks": OF_MASKS.chunked_causal_mask_function(3, torch.tensor([0, 2])),
    "of somebody": lambda b, h, q, k: (k < q + 1) & (q - 4 <= k),
}
PADDINGS = {
    "none": None,
    "right": padded((6, 9), (9, 9)),
    "left": padded((0, 2), (0, 0)),
    "left of all": padded((0, 2), (0, 2)),
    "hole": padded((3, 5), (0, 0)),
    "all": padded((0, 9), (0, 0)),
}


@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("lengths", [(5, 9, 4), (1, 9, 8), (5, 5, 0), (1, 9, 3)], ids=str)
def test_numbers_mean_what_the_function_says(function, padding, lengths):
    """The options that the numbers become, applied by formula, against the truth values of Transformers."""
    L, S, offset = lengths
    seen = PADDINGS[padding]
    given = {"batch_size": 2, "q_length": L, "kv_length": S, "q_offset": offset, "mask_function": FUNCTIONS[function],
             "attention_mask": None if seen is None else seen[:, :S]}  # fmt: skip
    expected = OF_MASKS.sdpa_mask(**given, allow_is_causal_skip=False).expand(2, 1, L, S).numpy()
    numbers = masks.attention_mask(**given)
    assert numbers.dtype == torch.int32
    assert numbers.numel() <= 2 * (masks.HEADER + S)
    numbers = numbers.numpy()
    np.testing.assert_array_equal(np.broadcast_to(calls.dense(numbers, L, S), expected.shape), expected)
    call = calls.call_of(numbers, 2, L, S, causal=False, packable=True)
    np.testing.assert_array_equal(shown_by(call, L, S), expected)


def shown_by(call, L, S):
    """The truth values (2, 1, L, S) of options of `attention`, by their definitions."""
    shown = np.zeros((2, 1, L, S), bool)
    if call.starts is not None:
        lengths = np.broadcast_to(call.options.get("key_lengths", S), len(call.starts) - 1)
        left, right = call.options.get("window", (None, 0 if call.options.get("is_causal") else None))
        for start, stop, length in zip(call.starts[:-1], call.starts[1:], lengths, strict=True):
            b, first = divmod(int(start), S)
            for i in range(stop - start):
                for j in range(min(length, stop - start)):
                    inside = (left is None or i - left <= j) and (right is None or j <= i + right)
                    shown[b, 0, first + i, first + j] = inside
        return shown
    options = dict(call.options)
    n = len(range(S)[call.keys])
    mask = options.pop("mask", np.ones((1, 1, 1, n), bool))
    lengths = np.broadcast_to(options.pop("key_lengths", n), 2)
    offset = options.pop("query_offset", 0)
    left, right = options.pop("window", (None, 0 if options.pop("is_causal", False) else None))
    assert not options
    p, j = np.arange(L)[:, None] + offset, np.arange(n)
    inside = np.ones((L, n), bool)
    if left is not None:
        inside &= p - left <= j
    if right is not None:
        inside &= j <= p + right
    shown[..., call.keys] = inside & mask & (j < lengths[:, None, None, None])
    return shown


def test_simple_masks_become_simple_calls():
    def options(function, padding, L, S, offset):
        numbers = masks.attention_mask(2, L, S, offset, mask_function=FUNCTIONS[function], attention_mask=padding)
        call = calls.call_of(numbers.numpy(), 2, L, S, causal=False, packable=True)
        return call.keys, {key: np.asarray(x).tolist() for key, x in call.options.items()}

    assert options("causal", None, 5, 5, 0) == (slice(0, 5), {"is_causal": True})
    assert options("causal", None, 5, 9, 0) == (slice(0, 5), {"is_causal": True})  # a static cache, empty
    assert options("causal", None, 1, 9, 6) == (slice(0, 7), {})  # a step of decoding
    assert options("window", None, 1, 9, 6) == (slice(4, 7), {})
    assert options("causal", PADDINGS["left of all"], 5, 9, 4) == (
        slice(2, 9),
        {"window": [None, 0], "query_offset": 2},
    )
    assert options("all", PADDINGS["right"], 5, 9, 4) == (slice(0, 9), {"key_lengths": [6, 9]})
    assert masks.attention_mask(2, 5, 5, mask_function=FUNCTIONS["all"], allow_is_bidirectional_skip=True) is None


def test_unknown_functions_become_truth_values():
    blocks = OF_MASKS.or_masks(
        OF_MASKS.causal_mask_function, OF_MASKS.blockwise_overlay(torch.tensor([[0, 0, 1, 1, -1]]))
    )
    odd = [blocks, lambda b, h, q, k: (q + k) % 2 == 0, lambda b, h, q, k: k == q, lambda b, h, q, k: q != 3]
    for function in odd:
        mask = masks.attention_mask(1, 5, 5, mask_function=function, use_vmap=False)
        expected = OF_MASKS.sdpa_mask(1, 5, 5, mask_function=function, allow_is_causal_skip=False)
        assert mask.dtype == torch.bool
        assert torch.equal(mask, expected)


def test_long_windows_take_little_memory(name):
    """Gemma 2's masks at 16k tokens are 256 MiB of truth values for each kind of layer, and here some KiB."""
    L = 16384
    tracemalloc.start()
    numbers = masks.attention_mask(1, L, L, mask_function=OF_MASKS.sliding_window_causal_mask_function(4096))
    call = calls.call_of(numbers.numpy(), 1, L, L, causal=False, packable=True)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert numbers.numel() == masks.HEADER
    assert call.options == {"window": (4095, 0)}
    assert peak < 2**20


def test_every_operation_of_a_symbol_is_defined_or_unknown():
    """A symbol never falls back on the comparisons of `object`, which would be wrong instead of unknown."""
    for kind in (masks.Index("query"), masks.Band(), masks.Difference(None), masks.OfSequence(torch.ones(1))):
        for operation in ("__eq__", "__ne__", "__lt__", "__bool__", "__or__"):
            own = inspect.getattr_static(type(kind), operation)
            assert own is not inspect.getattr_static(object, operation, None)
            with pytest.raises(masks.Unknown):
                own(kind) if operation == "__bool__" else own(kind, 3)
