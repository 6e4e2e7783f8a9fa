"""`python -m services.aggregator`: start the public face of a kNN-LM."""

import sys

from services.aggregator.app import service
from services.aggregator.settings import AggregatorSettings
from services.runtime.lifecycle import main
from services.runtime.settings import load_settings

if __name__ == "__main__":
    main(service(load_settings(AggregatorSettings, sys.argv[1:], prog="python -m services.aggregator")))
