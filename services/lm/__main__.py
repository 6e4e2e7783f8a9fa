"""`python -m services.lm`."""

import sys

from services.lm.app import service
from services.lm.settings import LmSettings
from services.runtime.lifecycle import main
from services.runtime.settings import load_settings

if __name__ == "__main__":
    main(service(load_settings(LmSettings, sys.argv[1:], prog="python -m services.lm")))
