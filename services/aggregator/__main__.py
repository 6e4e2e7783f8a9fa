"""`python -m services.aggregator`: start the public face of a kNN-LM."""

import sys

from services.aggregator.settings import AggregatorSettings
from services.runtime.settings import load_settings

if __name__ == "__main__":
    settings = load_settings(AggregatorSettings, sys.argv[1:], prog="python -m services.aggregator")
    from services.aggregator.app import service  # what takes a second to load: --help and bad settings are told before
    from services.runtime.lifecycle import main

    main(service(settings))
