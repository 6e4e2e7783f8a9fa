"""The options of what is mixed that several commands have, declared once: retrieval, a memory and the cache."""

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from knnlm.errors import InvalidRequest
from knnlm.options import (
    SEARCH_OPTIONS,
    CacheOptions,
    DomainOptions,
    KnnOptions,
    MemoryOptions,
    SearchOptions,
    options_of,
)

if TYPE_CHECKING:
    from knnlm.mixer import Options
    from knnlm.rules import Parameters
    from knnlm.sources import UsedDomain


SHOWN_NUMBERS = 8  # numbers of one parameter of a rule that are shown, at most


def retrieving(command: Callable[..., None]) -> Callable[..., None]:
    """The command with an option for each choice of retrieval, of a memory and of the cache in place of its parameters
    `knn`, `memory` and `cache`.

    It is called with a KnnOptions, or None without a domain, a MemoryChoice or None, and CacheOptions or None; options
    that would be ignored are refused. A command with a --temperature of its own has this one as --knn-temperature.
    """
    signature = inspect.signature(command, eval_str=True)
    before = list(signature.parameters.values())
    own = "temperature" in signature.parameters
    options = {f"knn_{n}" if own and n == "temperature" else n: kind for n, kind in OPTIONS.items()}
    if own:
        options["knn_temperature"] = _option(float, "--knn-temperature", TEMPERATURE)

    def wrapped(**given: Any) -> None:  # Any: values of whatever options the command has
        chosen = {name: given.pop(asked) for asked, name in zip(options, OPTIONS, strict=True)}
        memory = _memory(*(given.pop(name) for name in MEMORY_OPTIONS))
        cache = _cache(given.pop("cache"), {name: given.pop(f"cache_{name}") for name in CACHE_OPTIONS})
        command(knn=_options(chosen, own), memory=memory, cache=cache, **given)

    place = [p.name for p in before].index("knn")
    cached = {f"cache_{name}": kind for name, kind in CACHE_OPTIONS.items()}
    kinds = {**options, **MEMORY_OPTIONS, "cache": CACHE, **cached}
    ours = [before[place].replace(name=n, annotation=kind, default=None) for n, kind in kinds.items()]
    parameters = [*before[:place], *ours, *(p for p in before[place + 1 :] if p.name not in ("memory", "cache"))]
    wrapped.__name__, wrapped.__doc__ = command.__name__, command.__doc__
    wrapped.__annotations__ = {p.name: p.annotation for p in parameters}  # typer reads both
    wrapped.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]  # known to inspect
    return wrapped


@dataclass(frozen=True)
class MemoryChoice:
    """A memory as it was asked for: of a service its name, else FOLDER, HOST:PORT, or one of them after NAME=."""

    given: str
    lmbda: float | None

    def asked(self) -> MemoryOptions:
        """The options for a service, which knows it by its name."""
        return MemoryOptions(self.given, self.lmbda)

    def here(self) -> tuple[MemoryOptions, dict[str, str]]:
        """The options, and where it is by the name in them."""
        name, named, where = self.given.partition("=")
        if not named:
            where = self.given
            name = self.given if ":" in self.given else Path(self.given).name
        return MemoryOptions(name, self.lmbda), {name: where}


def memory_here(memory: MemoryChoice | None) -> tuple[MemoryOptions | None, dict[str, str]]:
    """What a Pipeline is asked and loaded with."""
    return (None, {}) if memory is None else memory.here()


def mixed_with(knn: KnnOptions | None, cache: CacheOptions | None) -> "Options":
    """What a Pipeline is asked for."""
    return knn if cache is None else {**({} if knn is None else {"knn": knn}), "cache": cache}


def domain_names(knn: KnnOptions | None) -> list[str]:
    """The domains to open for it."""
    return [] if knn is None else [d.domain for d in knn.domains]


def weight_of(rule: str, parameters: "Parameters") -> str:
    """What retrieval weighs, in words: "lambda 0.300", or another rule with its parameters."""
    value = parameters.get("lambda")
    if rule == "fixed" and isinstance(value, int | float):
        return f"lambda {value:.3f}"
    return f"rule {rule} ({', '.join(f'{name} {_short(value)}' for name, value in parameters.items())})"


def _short(value: float | Sequence[float]) -> str:
    if isinstance(value, int | float):
        return f"{value:.4g}"
    return " ".join(f"{v:.4g}" for v in value) if len(value) <= SHOWN_NUMBERS else f"of {len(value)} numbers"


def described_memory(used: Mapping[str, Any]) -> str:  # Any: JSON
    """One line of a memory, as answers show it."""
    model = "" if used["model_id"] is None else f", {used['model_id']}"
    return f"{used['name']}: memory, lambda {used['lambda']:.3f}{model}"


def described(used: "UsedDomain") -> str:
    """One line of what a domain was asked with."""
    weight = weight_of(used.rule, used.weighing.parameters)
    return f"{used.domain} {used.version}: {weight}, temperature {used.temperature:.5g}, k {used.k}"


def _option(kind: Any, flag: str, description: str) -> Any:  # Any: a type, as typer reads it
    return Annotated[kind | None, typer.Option(flag, help=description)]


def _search_option(name: str) -> Any:  # Any: a type, as typer reads it
    option = SEARCH_OPTIONS[name]
    flag = _flag(name)
    if option.kind is bool:
        flag = f"{flag}/--no-{flag[2:]}"
    return _option(list[str] if option.kind is tuple else option.kind, flag, option.description)


def _flag(name: str) -> str:
    given = SEARCH_OPTIONS[name].flag if name in SEARCH_OPTIONS else None
    return given or "--" + name.replace("lmbda", "lambda").replace("_", "-")


def _memory(given: str | None, lmbda: float | None) -> MemoryChoice | None:
    if given is None and lmbda is not None:
        raise InvalidRequest("--memory-lambda means nothing without --memory", param="--memory-lambda")
    return None if given is None else MemoryChoice(given, lmbda)


def _cache(asked: bool | None, values: Mapping[str, Any]) -> CacheOptions | None:  # Any: as typer read them
    given = {name: value for name, value in values.items() if value is not None}
    return CacheOptions(**given) if asked or given else None


def _options(
    chosen: Mapping[str, Any],  # Any: as typer read them; None or empty = not given
    renamed: bool,
) -> KnnOptions | None:
    given = {name: value for name, value in chosen.items() if value is not None and value != []}
    if "domain" not in given:
        if given:
            name = next(iter(given))
            flag = "--knn-temperature" if renamed and name == "temperature" else _flag(name)
            raise InvalidRequest(f"{flag} means nothing without --domain", param=flag)
        return None
    parts = [DomainOptions(d, lmbda=given.get("lmbda"), temperature=given.get("temperature")) for d in given["domain"]]
    others = {name: given[name] for name in ("combine", "rule") if name in given}
    return KnnOptions(tuple(parts), search=SearchOptions.of(given), **others)


TEMPERATURE = "Divides squared distances; by default as tuned."
OPTIONS: Mapping[str, Any] = {
    "domain": _option(list[str], "--domain", "Retrieve from this domain; may be repeated. None: the LM alone."),
    "lmbda": _option(float, "--lambda", "Weight of what is retrieved, 0 to 1; by default as tuned."),
    "temperature": _option(float, "--temperature", TEMPERATURE),
    "rule": _option(str, "--rule", "Weigh what is retrieved by this lambda rule; by default as tuned."),
    "combine": _option(str, "--combine", "Several domains: mixture (a weight each, default) or union (one softmax)."),
    **{name: _search_option(name) for name, option in SEARCH_OPTIONS.items() if option.public},
}
MEMORY_OPTIONS: Mapping[str, Any] = {
    "memory": _option(
        str,
        "--memory",
        "Mix this Memory Decoder: its folder or the HOST:PORT of its lm service, with NAME= before it for another name;"
        " with --remote its name there.",
    ),
    "memory_lambda": _option(
        float, "--memory-lambda", "Weight of the memory, 0 to 1; by default as fitted when it was trained."
    ),
}
CACHE = Annotated[
    bool | None, typer.Option("--cache", help="Mix what the text itself said earlier (the continuous cache), as tuned.")
]
CACHE_OPTIONS: Mapping[str, Any] = {
    name: _option(option.kind, f"--cache-{name.replace('lmbda', 'lambda')}", option.description)
    for name, option in options_of(CacheOptions).items()
    if option.public
}
