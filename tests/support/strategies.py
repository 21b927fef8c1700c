"""What hypothesis draws calls from."""

import hypothesis.strategies as st

from cases import Case


@st.composite
def cases(draw, batches=((), (1,), (3,))):
    """Sizes of one call; half of them within one tile, half across its edges."""
    length = st.one_of(st.integers(1, 20), st.integers(20, 150))
    feature = st.sampled_from([1, 3, 8, 16, 17, 33, 64])
    Hkv = draw(st.sampled_from([1, 2]))
    return Case(
        L=draw(length),
        S=draw(length),
        E=draw(feature),
        Ev=draw(feature),
        H=Hkv * draw(st.sampled_from([1, 2, 3])),
        Hkv=Hkv,
        batch=draw(st.sampled_from(batches)),
        layout=draw(st.sampled_from(["C", "length-head-feature", "features reversed"])),
    )


dtypes = st.sampled_from(["float32", "float32", "float64", "float16", "bfloat16"])


seeds = st.integers(0, 2**32 - 1)
