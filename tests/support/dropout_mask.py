"""Which weights dropout keeps, from the paper of the generator and the text of the option, not from the package."""

import numpy as np

# Known answers of Random123 (tests/kat_vectors, philox4x32 10): counter, key, result.
KNOWN_ANSWERS = [
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]


def words(text):
    return [int(word, 16) for word in text.split()]


def random123(counter, key):
    """Philox-4x32-10 of one counter, in Python's integers."""
    counter, key = list(counter), list(key)
    for _ in range(10):
        first, second = 0xD2511F53 * counter[0], 0xCD9E8D57 * counter[2]
        counter = [second >> 32 ^ counter[1] ^ key[0], second, first >> 32 ^ counter[3] ^ key[1], first]
        counter = [word & 0xFFFFFFFF for word in counter]
        key = [(key[0] + 0x9E3779B9) & 0xFFFFFFFF, (key[1] + 0xBB67AE85) & 0xFFFFFFFF]
    return counter


def kept(p, seed, sequence, heads, positions, S):
    """What weights are multiplied by, (heads, positions, S): 0 or the inverse of the probability of being kept."""
    threshold = min(round(p * 65536), 65535)
    result, made = np.zeros((len(heads), len(positions), S)), {}
    for x, h in enumerate(heads):
        for y, i in enumerate(positions):
            for j in range(S):
                counter = int(i) % 2**32, j // 32 * 4 + j // 2 % 4, int(h), int(sequence)
                if counter not in made:
                    made[counter] = random123(counter, (seed % 2**32, seed >> 32))
                bits = made[counter][j // 8 % 4] >> j % 2 * 16 & 0xFFFF
                result[x, y, j] = 65536 / (65536 - threshold) if bits >= threshold else 0
    return result
