"""`python -m services.datastore`."""

import sys

from services.datastore.app import service
from services.datastore.settings import DatastoreSettings
from services.runtime.lifecycle import main
from services.runtime.settings import load_settings

if __name__ == "__main__":
    main(service(load_settings(DatastoreSettings, sys.argv[1:], prog="python -m services.datastore")))
