"""The host's side of a GPU: arrays of other libraries, the driver, machine code on disk, repeated calls."""
