"""`knnlm generate`: what follows a text, shown as it is made."""

import sys
from collections.abc import Iterable, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from knnlm.cli.common import (
    DEFAULT_STORE,
    DeviceOption,
    DtypeOption,
    JsonOption,
    StoreOption,
    TextArgument,
    print_json,
    read_text,
    remark,
)
from knnlm.cli.remote import (
    ModelNameOption,
    RemoteKeyOption,
    RemoteOption,
    TlsCaOption,
    TlsCertOption,
    TlsKeyOption,
    is_given,
    refuse_without,
    service,
)
from knnlm.cli.retrieval import MemoryChoice, described_memory, domain_names, memory_here, mixed_with, retrieving
from knnlm.errors import InvalidRequest
from knnlm.options import CacheOptions, KnnOptions, ReuseOptions, options_of

if TYPE_CHECKING:
    from knnlm.clients.completions import Completion
    from knnlm.generation import GenerationOptions, NewToken

REUSE_OPTIONS = options_of(ReuseOptions)


@retrieving
def generate(
    context: typer.Context,
    text: TextArgument,
    model: ModelNameOption = None,
    store: StoreOption = DEFAULT_STORE,
    knn: KnnOptions | None = None,
    memory: MemoryChoice | None = None,
    cache: CacheOptions | None = None,
    max_tokens: Annotated[int, typer.Option(help="Tokens to generate at most.")] = 64,
    temperature: Annotated[float, typer.Option(help="Of the draws; 0: the likeliest token.")] = 1.0,
    top_p: Annotated[float, typer.Option(help="Draw from the fewest likeliest tokens with this share.")] = 1.0,
    top_k: Annotated[int, typer.Option(help="Draw from this many likeliest tokens; 0: from all.")] = 0,
    min_p: Annotated[float, typer.Option(help="Leave out tokens less likely than this share of the likeliest.")] = 0.0,
    presence_penalty: Annotated[float, typer.Option(help="Subtracted once from tokens that were generated.")] = 0.0,
    frequency_penalty: Annotated[float, typer.Option(help="Subtracted for each time they were.")] = 0.0,
    stop: Annotated[list[str] | None, typer.Option(help="End before this text; may be repeated.")] = None,
    ignore_eos: Annotated[bool, typer.Option("--ignore-eos", help="Go on behind the EOS token.")] = False,
    seed: Annotated[int | None, typer.Option(help="Of the draws; by default another each time.")] = None,
    ahead: Annotated[int, typer.Option(help=REUSE_OPTIONS["ahead"].description)] = 0,
    remote: RemoteOption = None,
    api_key_file: RemoteKeyOption = None,
    tls_ca_file: TlsCaOption = None,
    tls_cert_file: TlsCertOption = None,
    tls_key_file: TlsKeyOption = None,
    device: DeviceOption = "auto",
    dtype: DtypeOption = "auto",
    as_json: JsonOption = False,
) -> None:
    """Go on with a text, by the mixture: shown token by token."""
    from knnlm.generation import GenerationOptions
    from knnlm.sampling import SamplingOptions

    options = GenerationOptions(
        max_tokens=max_tokens,
        sampling=SamplingOptions(temperature, top_k, top_p, min_p, presence_penalty, frequency_penalty),
        stop=tuple(stop or ()),
        ignore_eos=ignore_eos,
    )
    knn = _begun_ahead(knn, ahead)
    text = read_text(text)
    if remote is None:
        refuse_without("--remote", context, "api_key_file", "tls_ca_file", "tls_cert_file", "tls_key_file")
        answer = _here(text, model, store, (knn, memory, cache), options, seed, (device, dtype), quiet=as_json)
    else:
        asked = _asked(options, seed) | {"model": model if is_given(context, "model") else None}
        named = None if memory is None else memory.asked()
        with service(remote, api_key_file, (tls_ca_file, tls_cert_file, tls_key_file)) as client:
            answer = _there(
                client.stream(text, knn=knn, memory=named, cache=cache, add_bos=True, **asked), quiet=as_json
            )
    if as_json:
        print_json(answer)
        return
    print()
    for used in answer["domains"]:
        remark(_described(used))
    for used in answer["memories"]:
        remark(described_memory(used))
    if answer["degraded"] is not None:
        remark(f"the LM alone: {answer['degraded']}")


def _begun_ahead(knn: KnnOptions | None, steps: int) -> KnnOptions | None:
    if not steps:
        return knn
    if knn is None:
        raise InvalidRequest("--ahead means nothing without --domain", param="--ahead")
    return replace(knn, reuse=ReuseOptions(ahead=steps))


def _here(
    text: str,
    model: str | None,
    store: Path,
    mixed: tuple[KnnOptions | None, MemoryChoice | None, CacheOptions | None],
    options: "GenerationOptions",
    seed: int | None,
    how: tuple[str, str],
    *,
    quiet: bool,
) -> dict[str, Any]:  # Any: JSON
    """Generate in this process. how: device and dtype."""
    from knnlm.pipeline import Pipeline

    if model is None:
        raise InvalidRequest("--model is required, without --remote", param="model")

    def show(new: "NewToken") -> None:
        if not quiet:
            _write(new.text)

    knn, (asked, memories) = mixed[0], memory_here(mixed[1])
    with Pipeline.load(model, store, domain_names(knn), device=how[0], dtype=how[1], memories=memories) as pipeline:
        made = pipeline.generate(text, mixed_with(knn, mixed[2]), options, memory=asked, seed=seed, on_token=show)
        name = pipeline.lm.info.model_id
    return {
        "model": name,
        "text": made.text,
        "tokens": list(made.tokens),
        "finish_reason": made.finish,
        "stop_reason": made.stopped_at,
        "domains": [used.as_json() for used in made.domains],
        "memories": [used.as_json() for used in made.memories],
        "degraded": made.degraded,
    }


def _there(parts: "Iterable[Completion]", *, quiet: bool) -> dict[str, Any]:  # Any: JSON
    """Put together what the service streams."""
    from knnlm.wire.jsonable import to_json

    answer: dict[str, Any] = {"model": None, "text": "", "tokens": [], "domains": [], "memories": [], "degraded": None}
    for part in parts:
        answer["model"] = part.model
        answer["domains"] += map(to_json, part.domains)
        answer["memories"] += map(to_json, part.memories)
        answer["degraded"] = part.degraded or answer["degraded"]
        for choice in part.choices:
            answer["text"] += choice.text
            if choice.logprobs is not None:
                answer["tokens"] += [int(name.removeprefix("token_id:")) for name in choice.logprobs.tokens]
            answer |= {"finish_reason": choice.finish_reason, "stop_reason": choice.stop_reason}
            if not quiet:
                _write(choice.text)
    return answer


def _asked(options: "GenerationOptions", seed: int | None) -> dict[str, Any]:  # Any: JSON
    """The options as fields of a request, which also asks for token ids."""
    sampling = {name: value for name, value in asdict(options.sampling).items() if name != "logit_bias"}
    ends = {"max_tokens": options.max_tokens, "stop": list(options.stop), "ignore_eos": options.ignore_eos}
    return {**sampling, **ends, "seed": seed, "logprobs": 0, "return_tokens_as_token_ids": True}


def _described(used: Mapping[str, Any]) -> str:  # Any: JSON
    weight = used["lambda"]
    lmbda = "" if weight is None else f", lambda {weight:.3f}"
    return f"{used['domain']} {used['version']}: rule {used['rule']}{lmbda}, temperature {used['temperature']:.5g}"


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()
