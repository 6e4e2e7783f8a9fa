"""`knnlm build`: a datastore from documents, its index, and making it the version that answers."""

from collections.abc import Sequence
from pathlib import Path

from knnlm.cli.common import (
    DEFAULT_STORE,
    ActivateOption,
    BatchTokensOption,
    BosOption,
    BuildContextOption,
    BuildMinContextOption,
    BuildVersionOption,
    DeviceOption,
    DomainArgument,
    DtypeOption,
    JsonOption,
    KeyDtypeOption,
    KeyFunctionOption,
    ModelOption,
    PartOption,
    RecipeOption,
    SourcesArgument,
    StoreOption,
    parse_part,
    print_json,
    remark,
    showing,
)
from knnlm.cli.index import make_index, print_index
from knnlm.errors import KnnlmError

NO_INDEX = "none"


def build(
    domain: DomainArgument,
    sources: SourcesArgument,
    model: ModelOption,
    store: StoreOption = DEFAULT_STORE,
    version: BuildVersionOption = None,
    part: PartOption = "all",
    context_length: BuildContextOption = None,
    min_context: BuildMinContextOption = None,
    bos: BosOption = "document",
    key_dtype: KeyDtypeOption = "float16",
    key_function: KeyFunctionOption = "ffn_input",
    batch_tokens: BatchTokensOption = 8192,
    index: RecipeOption = "auto",
    activate: ActivateOption = True,
    device: DeviceOption = "auto",
    dtype: DtypeOption = "auto",
    as_json: JsonOption = False,
) -> None:
    """Build a datastore from documents, index it and activate it. Stopped builds continue with the same command."""
    from knnlm.datastore.build import build as run
    from knnlm.datastore.build import require_documents
    from knnlm.datastore.catalog import Catalog
    from knnlm.datastore.text import read_documents
    from knnlm.evaluation.splits import select
    from knnlm.index.table import family
    from knnlm.lm.model import LanguageModel

    # what can be refused is refused before hours of work
    catalog = Catalog(store)
    catalog.folder(domain, catalog.next_version(domain) if version is None else version)
    if index not in ("auto", NO_INDEX):
        family(index)
    documents = require_documents(select(read_documents(sources), parse_part(part)))
    lm = LanguageModel.load(model, device=device, dtype=dtype, key_function=key_function)
    try:
        with showing() as on_progress:
            path = run(
                documents,
                lm,
                catalog,
                domain,
                version=version,
                context_length=context_length,
                min_context=min_context,
                bos=bos,
                key_dtype=key_dtype,
                batch_tokens=batch_tokens,
                on_progress=on_progress,
            )
    except KeyboardInterrupt:
        remark("stopped: the same command continues where it was")
        raise
    reasons = ["exact search, as asked"]
    if index != NO_INDEX:
        try:
            reasons = make_index(path, index)[1]
        except (KnnlmError, KeyboardInterrupt):
            remark(
                f"the keys of {path.name} are complete, its index is not: continue with `knnlm index build {domain} "
                f"--version {path.name}` and `knnlm domains activate {domain} {path.name}`"
            )
            raise
    if activate:
        catalog.activate(domain, path.name)
    print_built(path, reasons, active=activate, as_json=as_json)


def print_built(path: Path, reasons: Sequence[str], *, active: bool, as_json: bool) -> None:
    """What was built. reasons: for its index."""
    from knnlm.datastore.manifest import Manifest

    manifest = Manifest.load(path)
    if as_json:
        print_json(
            {
                "domain": manifest.domain, "version": path.name, "path": str(path), "active": active,
                "entries": manifest.entries, "documents": manifest.documents, "tokens": manifest.tokens,
                "index": manifest.index.recipe, "shards": len(manifest.shards), "index_reasons": reasons,
            }
        )  # fmt: skip
        return
    print(f"{path}: {manifest.entries:,} entries of {manifest.documents:,} documents")
    print_index(f"index {manifest.index.recipe}", reasons)
    if active:
        print(
            f"{path.name} is now the current version of {manifest.domain}; fit temperature and lambda with "
            f"`knnlm tune {manifest.domain}`"
        )
    else:
        print(f"not activated: `knnlm domains activate {manifest.domain} {path.name}`")
