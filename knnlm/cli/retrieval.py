"""The options of retrieval that several commands have: declared once, given to a command as one KnnOptions."""

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from knnlm.errors import InvalidRequest
from knnlm.options import SEARCH_OPTIONS, DomainOptions, KnnOptions, SearchOptions

if TYPE_CHECKING:
    from knnlm.rules import Parameters
    from knnlm.sources import UsedDomain


SHOWN_NUMBERS = 8  # of one parameter of a rule


def retrieving(command: Callable[..., None]) -> Callable[..., None]:
    """The command with an option for each choice of retrieval in place of its parameter `knn`.

    It is called with a KnnOptions, or None without a domain; then the other options would be ignored, which is refused.
    A command with a --temperature of its own has this one as --knn-temperature.
    """
    signature = inspect.signature(command, eval_str=True)
    before = list(signature.parameters.values())
    own = "temperature" in signature.parameters
    options = {f"knn_{n}" if own and n == "temperature" else n: kind for n, kind in OPTIONS.items()}
    if own:
        options["knn_temperature"] = _option(float, "--knn-temperature", TEMPERATURE)

    def wrapped(**given: Any) -> None:  # Any: values of whatever options the command has
        chosen = {name: given.pop(asked) for asked, name in zip(options, OPTIONS, strict=True)}
        command(knn=_options(chosen, own), **given)

    place = [p.name for p in before].index("knn")
    ours = [before[place].replace(name=n, annotation=kind, default=None) for n, kind in options.items()]
    parameters = [*before[:place], *ours, *before[place + 1 :]]
    wrapped.__name__, wrapped.__doc__ = command.__name__, command.__doc__
    wrapped.__annotations__ = {p.name: p.annotation for p in parameters}  # typer reads both
    wrapped.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]  # known to inspect
    return wrapped


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
