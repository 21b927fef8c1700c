"""The process of one case: see `isolation`."""

import ctypes
import faulthandler
import importlib.util
import json
import os
import resource
import sys
from pathlib import Path

from isolation import INSIDE, find_tbb


def main(path, name, arguments):
    faulthandler.enable()
    if gigabytes := int(os.environ[INSIDE]):
        resource.setrlimit(resource.RLIMIT_AS, (gigabytes * 2**30, resource.RLIM_INFINITY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if os.environ.get("NUMBA_THREADING_LAYER") == "tbb":
        ctypes.CDLL(find_tbb(), ctypes.RTLD_GLOBAL)
    spec = importlib.util.spec_from_file_location(Path(path).stem, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    getattr(module, name)(**json.loads(arguments))


if __name__ == "__main__":  # multiprocessing imports this file again
    main(*sys.argv[1:])
