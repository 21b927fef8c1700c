"""What a call asks for, checked and resolved: one `Problem` for dense arrays, packed sequences and caches."""
