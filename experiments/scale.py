"""How large an experiment is: the same programs at any size, and the sizes written down as data."""

from dataclasses import dataclass

__all__ = ["SCALES", "Scale"]


@dataclass(frozen=True)
class Scale:
    """Sizes in tokens unless said otherwise.

    store_tokens, tune_tokens, report_tokens: at most, of each corpus; held-out ones are the beginnings of documents,
    spread over all. long_tokens: held-out ones where long stretches of each document are needed. context, min_context:
    windows of every model and store. k: neighbors; most_k: the most, where k is varied. index: recipe of the index
    that stands for the datastore; flat is exact search. epochs: of training on a corpus; memorising_epochs: of a model
    that is to know it by heart, on memorised_share of the documents. shares: of the store's documents, halved from all
    on; draws: random orders of the documents. batch_tokens, learning_rate: of training, at most pass_tokens in a
    pass. model: the language model, a folder or hub id; None is the bundled one.

    key_dim, layers, vocabulary, base_parameters: of that model, and rates that a plan reckons with: trained_rate and
    read_rate in tokens/s, search_rate in queries/s of search over all of store_tokens.
    """

    name: str
    store_tokens: int
    tune_tokens: int
    report_tokens: int
    long_tokens: int
    context: int
    min_context: int
    k: int
    most_k: int
    index: str
    epochs: float
    memorising_epochs: float
    memorised_share: float
    shares: tuple[float, ...]
    draws: int
    batch_tokens: int
    pass_tokens: int
    learning_rate: float
    model: str | None
    key_dim: int
    layers: int
    vocabulary: int
    base_parameters: int
    trained_rate: float
    read_rate: float
    search_rate: float
    machine: str


SCALES = {
    "toy": Scale(
        "toy", store_tokens=1500, tune_tokens=400, report_tokens=500, long_tokens=600, context=128, min_context=32,
        k=16, most_k=64, index="flat", epochs=0.5, memorising_epochs=1, memorised_share=0.5, shares=(0.25, 0.5, 1.0),
        draws=2, batch_tokens=512, pass_tokens=512, learning_rate=1e-3, model=None, key_dim=256, layers=4,
        vocabulary=4096, base_parameters=4_262_144, trained_rate=2500, read_rate=8000, search_rate=5000,
        machine="two cores",
    ),
    "small": Scale(
        "small", store_tokens=60_000, tune_tokens=4000, report_tokens=8000, long_tokens=12_000, context=512,
        min_context=64, k=256, most_k=1024, index="flat", epochs=1.5, memorising_epochs=12, memorised_share=0.125,
        shares=(0.0625, 0.125, 0.25, 0.5, 1.0), draws=3, batch_tokens=2048, pass_tokens=2048,
        learning_rate=1e-3, model=None, key_dim=256, layers=4, vocabulary=4096, base_parameters=4_262_144,
        trained_rate=2500, read_rate=8000, search_rate=1500, machine="two cores",
    ),
    "full": Scale(
        "full", store_tokens=103_227_021, tune_tokens=217_646, report_tokens=245_569, long_tokens=245_569,
        context=1024, min_context=512, k=1024, most_k=1024, index="auto", epochs=3, memorising_epochs=50,
        memorised_share=1.0, shares=(0.0625, 0.125, 0.25, 0.5, 1.0), draws=1, batch_tokens=65_536,
        pass_tokens=8192, learning_rate=5e-5, model="openai-community/gpt2-medium", key_dim=1024, layers=24,
        vocabulary=50_257, base_parameters=354_823_168, trained_rate=40_000, read_rate=60_000, search_rate=3000,
        machine="one GPU of 80 GB",
    ),
}  # fmt: skip
