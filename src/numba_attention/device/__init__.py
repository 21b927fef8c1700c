"""The host's side of a GPU: arrays of other libraries, the driver, machine code, calls that are repeated."""
