"""`python -m services.datastore`."""

import sys

from services.datastore.settings import DatastoreSettings
from services.runtime.settings import load_settings

if __name__ == "__main__":
    settings = load_settings(DatastoreSettings, sys.argv[1:], prog="python -m services.datastore")
    from services.datastore.app import service  # what takes a second to load: --help and bad settings are told before
    from services.runtime.lifecycle import main

    main(service(settings))
