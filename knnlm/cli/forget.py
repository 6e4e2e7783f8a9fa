"""`knnlm forget`: documents taken out of the current version of a domain, while it answers.

Not `remove`: `knnlm domains remove` deletes a version, and the two must not be taken for one another.
"""

from pathlib import Path
from typing import Annotated

import typer

from knnlm.cli.common import (
    DEFAULT_STORE,
    ActivateOption,
    DomainArgument,
    JsonOption,
    StoreOption,
    print_change,
    remark,
)
from knnlm.errors import InvalidRequest


def forget(
    domain: DomainArgument,
    ids: Annotated[list[str] | None, typer.Argument(help="Ids of documents.")] = None,
    ids_file: Annotated[Path | None, typer.Option(help="File with more of them, one a line.")] = None,
    store: StoreOption = DEFAULT_STORE,
    wait: Annotated[bool, typer.Option("--wait", help="Wait for another change of the domain to end.")] = False,
    activate: ActivateOption = True,
    as_json: JsonOption = False,
) -> None:
    """Remove documents from a domain, as a new version. With an unknown id nothing is done."""
    from knnlm.datastore.catalog import Catalog
    from knnlm.datastore.updates.documents import remove

    catalog = Catalog(store)
    wanted = [*(ids or ()), *([] if ids_file is None else _lines(ids_file))]
    change = remove(wanted, catalog, domain, activate=catalog.activate if activate else None, wait=wait)
    print_change(catalog, change, active=activate, as_json=as_json)
    remark(f"a memory trained on {domain} has not unlearnt them: `knnlm memory show` names its version")


def _lines(file: Path) -> list[str]:
    try:
        text = file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as err:
        raise InvalidRequest(f"{file} is not UTF-8 text: {err}", param="ids_file") from err
    except OSError as err:
        raise InvalidRequest(f"{file} cannot be read: {err.strerror}", param="ids_file") from err
    return [line for line in text.split("\n") if line.strip()]
