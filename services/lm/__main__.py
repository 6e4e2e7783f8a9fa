"""`python -m services.lm`."""

import sys

from services.lm.settings import LmSettings
from services.runtime.settings import load_settings

if __name__ == "__main__":
    settings = load_settings(LmSettings, sys.argv[1:], prog="python -m services.lm")
    from services.lm.app import service  # what takes a second to load: --help and bad settings are told before
    from services.runtime.lifecycle import main

    main(service(settings))
