"""The language model of examples/generate.py says what the package says that its weights are from."""

import sys
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("glassllm")
sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))

import generate
import glassllm

N = 40


@pytest.fixture(scope="module")
def model():
    return glassllm.load_pretrained("en")


@pytest.fixture(scope="module")
def want(model):
    prompt = model[1].encode("The old man looked at the sea and")
    return prompt, *generate.glassllm_greedy(model[0], prompt, N)


@pytest.mark.parametrize("way", ["no cache", "contiguous", "paged"])
def test_same_text(model, want, way):
    prompt, tokens, logits = want
    keep = {
        "no cache": generate.NoCache,
        "contiguous": lambda: generate.Contiguous(model[0].cfg, len(prompt) + N),
        "paged": lambda: generate.Paged(model[0].cfg, len(prompt) + N),
    }[way]()
    got, got_logits = generate.Decoder(model[0]).generate(prompt, N, keep)
    assert got == tokens
    np.testing.assert_allclose(got_logits, logits, atol=1e-4)


@pytest.mark.parametrize("make", [generate.Contiguous, generate.Paged])
def test_int8_is_close(model, want, make):
    prompt, _, logits = want
    keep = make(model[0].cfg, len(prompt) + N, "int8")
    _, got = generate.Decoder(model[0]).generate(prompt, 3, keep)
    assert 0 < np.abs(got - logits[:3]).max() < 0.3


def test_own_greedy_text_of_the_package(model, want):
    steps = model[0].generate(want[0], N, greedy=True)
    assert [step.token for step in steps] == want[1]


@pytest.mark.parametrize("make", [generate.Contiguous, generate.Paged])
def test_prompts_of_different_lengths(model, make):
    prompts = [model[1].encode(text) for text in ("She said that", "I", "In the middle of the night the wind")]
    keep = make(model[0].cfg, 40, batch=3)
    together = generate.Decoder(model[0]).generate_batch(prompts, 12, keep)
    assert together == [generate.glassllm_greedy(model[0], prompt, 12)[0] for prompt in prompts]


def test_run(model, monkeypatch, capsys):
    monkeypatch.setenv("OMP_WAIT_POLICY", "passive")  # what main sets in a process of its own
    monkeypatch.setattr(sys, "argv", ["generate.py", "The whale", "--tokens", "3"])
    generate.main()
    printed = capsys.readouterr().out
    prompt = model[1].encode("The whale")
    assert f"\nThe whale{model[1].decode(generate.glassllm_greedy(model[0], prompt, 3)[0])}\n" in printed
    for way in ("glassllm", "no cache", "KVCache", "PagedKVCache", "KVCache, int8"):
        assert f"\n{way:20} " in printed
    assert "goes on otherwise" not in printed


@pytest.mark.parametrize("arguments", [[""], ["the " * 200], ["the", "--tokens", "0"]])
def test_what_cannot_be_generated_is_refused(monkeypatch, capsys, arguments):
    monkeypatch.setattr(sys, "argv", ["generate.py", *arguments])
    with pytest.raises(SystemExit):
        generate.main()
    assert "prompt must have 1 to 127 tokens" in capsys.readouterr().err
