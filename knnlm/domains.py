"""Domains as sources of a mixture: what holds for each, asked for, else tuned, else refused; and what neighbors say.

The arrays' part is `knn_evidence`, pure and used for tuning too. The rest asks a datastore.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import NoReturn

import numpy as np
import numpy.typing as npt

from knnlm.attribution import Carrier, carriers
from knnlm.errors import DatastoreMismatch, InvalidRequest, Unavailable
from knnlm.evidence import Evidence, Step
from knnlm.messages import (
    Document,
    DomainInfo,
    ModelInfo,
    Passage,
    PassagesRequest,
    SearchRequest,
    SearchResult,
    differs,
    required,
)
from knnlm.neighbors import Neighbors, TokenMasses, neighbor_log_probs, target_log_probs
from knnlm.options import DEFAULT_K, DomainOptions, KnnOptions, SearchOptions
from knnlm.pointers import searched_by_pointers
from knnlm.protocols import DatastoreClient
from knnlm.rules import FIXED, GATE, KNN_GATE, Weighing, part_of, rule
from knnlm.sources import Plan, Services, UsedDomain, computed, together
from knnlm.tuned import tuned_weighing
from knnlm.tuning_records import Tuning


@dataclass(frozen=True)
class DomainSource:
    """One domain, or several in one softmax over all their neighbors, which then share temperature and weighing.

    tau: as in knnlm.options.ReuseOptions, of one domain.
    """

    datastore: DatastoreClient
    used: tuple[UsedDomain, ...]
    vocab_size: int
    optional: bool
    tau: int | None = None
    kind: str = "knn"
    needs_keys: bool = True
    in_order: bool = False
    whole: bool = False

    @property
    def name(self) -> str:
        return "+".join(u.domain for u in self.used)

    @property
    def weighing(self) -> Weighing:
        return self.used[0].weighing

    async def evidence(self, step: Step) -> Evidence:
        """See knnlm.sources.Source."""
        if step.keys is None:
            raise Unavailable("the language model service did not answer with the keys it was asked for")
        wanted = self.weighing.wanted(step.statistics)
        if wanted is None:
            wanted = np.ones(len(step.keys), np.bool_)
        skipped = ~wanted
        if self.tau is None or step.passages:
            found = await together([self._search(u, step, wanted) for u in self.used])
        else:
            request = self._request(self.used[0], step, step.keys)
            kept_under = f"{self.kind} {self.name}"  # no name of a source of another kind
            result, skipped = await searched_by_pointers(self.datastore, request, step, kept_under, self.tau)
            found = [result]
        numbers = sum(result.neighbors.values.size for result in found)
        evidence = await computed(numbers, self._evidence, found, step)
        evidence = replace(evidence, skipped=skipped)
        if step.targets is None or not step.carriers:
            return evidence
        return replace(evidence, carried=await self.carried(found, step.targets, step.carriers, step.passage_tokens))

    async def _search(self, used: UsedDomain, step: Step, wanted: npt.NDArray[np.bool_]) -> SearchResult:
        """What is found for the predictions that are wanted, (n,); for the others nothing, and nothing is asked."""
        keys = required(step.keys)
        if not wanted.any():
            ids = np.empty((0, 1), np.int64)
            nothing = Neighbors(ids.astype(np.float32), ids.astype(np.int32), ids)
            return SearchResult(used.domain, used.version, nothing).among(wanted)
        queries = keys if wanted.all() else keys[wanted]
        result = await self.datastore.search(self._request(used, step, queries))
        return result if wanted.all() else result.among(wanted)

    @staticmethod
    def _request(used: UsedDomain, step: Step, queries: npt.NDArray[np.floating]) -> SearchRequest:
        shown = (step.carriers > 0, step.passages, step.passage_tokens)
        return SearchRequest(used.domain, queries, used.search, used.version, *shown)

    async def carried(
        self, found: Sequence[SearchResult], targets: npt.NDArray[np.integer], count: int, passage_tokens: int
    ) -> list[list[Carrier]]:
        """See knnlm.sources.Carrying."""
        neighbors, temperature = [result.neighbors for result in found], self.used[0].temperature
        numbers = sum(each.values.size for each in neighbors)
        chosen = await computed(numbers, carriers, neighbors, targets, temperature, count)
        calls = [self._passages(u, chosen.entries[chosen.parts == i], passage_tokens) for i, u in enumerate(self.used)]
        passages = await together(calls)
        carried: list[list[Carrier]] = [[] for _ in targets]
        for row, part, entry, distance, share in zip(
            *(column.tolist() for column in vars(chosen).values()), strict=True
        ):
            carried[row].append(Carrier(self.used[part].domain, passages[part][entry], distance, share))
        return carried

    async def _passages(
        self, used: UsedDomain, entries: npt.NDArray[np.int64], passage_tokens: int
    ) -> dict[int, Passage]:
        """The passages by entry; each is looked up once."""
        distinct = np.unique(entries)
        if not len(distinct):
            return {}
        request = PassagesRequest(used.domain, used.version, distinct, passage_tokens)
        return dict(zip(distinct.tolist(), await self.datastore.passages(request), strict=True))

    def _evidence(self, found: Sequence[SearchResult], step: Step) -> Evidence:
        neighbors = _united([result.neighbors for result in found])
        if step.targets is not None:
            return knn_evidence(neighbors, self.used[0].temperature, step.targets, rule(self.weighing.rule).features)
        largest = neighbors.values.max(initial=-1)
        if largest >= self.vocab_size:
            raise InvalidRequest(f"domain {self.name} holds token {largest}, the vocabulary has {self.vocab_size}")
        evidence = knn_evidence(neighbors, self.used[0].temperature, None, rule(self.weighing.rule).features)
        return replace(evidence, found=tuple(found))


def knn_evidence(
    neighbors: Neighbors,
    temperature: float,
    targets: npt.NDArray[np.int32] | None = None,
    features: Sequence[str] = (),
) -> Evidence:
    """p_kNN of n queries: of targets (n,), or whole distributions without; and features by their names in FEATURES."""
    looked_at = _features(neighbors, temperature, features)
    if targets is None:
        return Evidence(neighbors.present, neighbor_log_probs(neighbors, temperature), looked_at)
    return Evidence(neighbors.present, target_log_probs(neighbors, targets, temperature), looked_at)


def used_domain(
    options: DomainOptions, knn: KnnOptions, info: DomainInfo, model: ModelInfo, *, beside_cache: bool = False
) -> UsedDomain:
    """The values that hold for a domain: asked for, else those of its tuning. beside_cache: whether the continuous
    cache is mixed, too.

    Raises DatastoreMismatch, with both values, for a domain that another model, configuration, tokenizer or key
    function made, and InvalidRequest for a value that is neither asked for nor tuned.
    """
    name = differs(vars(info), model)
    if name is not None:
        raise DatastoreMismatch(
            f"domain {info.domain} was made with {name} {getattr(info, name)} (model {info.model_id}), "
            f"the language model has {getattr(model, name)} (model {model.model_id})"
        )
    tuning = info.tuning
    temperature = options.temperature if options.temperature is not None or tuning is None else tuning.temperature
    if temperature is None:
        raise _untuned("temperature", info.domain)
    return UsedDomain(
        info.domain,
        options.version or info.version,
        temperature,
        knn.search.or_else(_tuned_search(tuning, knn.search, info.index)),
        _weighing(options, knn.rule, info, beside_cache=beside_cache),
    )


class Knn:
    """Retrieval from one or several domains, as a kind of source."""

    options = KnnOptions

    def optional(self, options: KnnOptions) -> bool:
        return options.on_datastore_error == "lm_only"

    async def resolve(self, options: KnnOptions, services: Services) -> Plan:
        """The version that each domain serves now and the values that hold for it; see knnlm.sources.SourceKind."""
        if options.rule is not None:
            rule(options.rule)
        infos = await together([services.datastore.get_domain(d.domain, d.version) for d in options.domains])
        used = tuple(
            used_domain(domain, options, info, services.info, beside_cache="cache" in services.asked)
            for domain, info in zip(options.domains, infos, strict=True)
        )
        union = options.combine == "union" and len(used) > 1
        if options.reuse.tau is not None:
            _check_followed(used, union=union)
        if union:
            _check_union(used)
        sources = tuple(
            DomainSource(services.datastore, part, services.info.vocab_size, self.optional(options), options.reuse.tau)
            for part in ([used] if union else [(u,) for u in used])
        )
        pinned = all(d.version is not None for d in options.domains)
        return Plan(sources, used, tuple(infos), pinned, ahead=options.reuse.ahead)


KNN = Knn()


class NoDatastore:
    """Stands where there is no datastore service: it lists no domain, and refuses the rest with Unavailable."""

    problem: str | None = None

    async def list_domains(self) -> Sequence[DomainInfo]:
        return []

    async def search(self, request: SearchRequest) -> NoReturn:
        self._refuse(request.domain)

    async def passages(self, request: PassagesRequest) -> NoReturn:
        self._refuse(request.domain)

    async def get_domain(self, domain: str, version: str | None = None) -> NoReturn:
        del version
        self._refuse(domain)

    async def activate(self, domain: str, version: str, *, wait: bool = False) -> NoReturn:
        del version, wait
        self._refuse(domain)

    async def replicas(self, domain: str) -> NoReturn:
        self._refuse(domain)

    async def add_documents(self, domain: str, documents: Sequence[Document], *, replace: bool = False) -> NoReturn:
        del documents, replace
        self._refuse(domain)

    async def remove_documents(self, domain: str, ids: Sequence[str]) -> NoReturn:
        del ids
        self._refuse(domain)

    @staticmethod
    def _refuse(domain: str) -> NoReturn:
        raise Unavailable(f"no datastore service is configured, so there is no domain {domain}")


class _Found:
    """What features are made of."""

    def __init__(self, neighbors: Neighbors, temperature: float) -> None:
        self.neighbors = neighbors
        self.temperature = temperature

    @cached_property
    def masses(self) -> TokenMasses:
        return neighbor_log_probs(self.neighbors, self.temperature)


def _nearest(found: _Found) -> npt.NDArray[np.float64]:
    """(n,) squared distance of the nearest neighbor, inf where there is none."""
    far = np.where(found.neighbors.values >= 0, found.neighbors.distances.astype(np.float64), np.inf)
    nearest: npt.NDArray[np.float64] = far.min(axis=1, initial=np.inf)
    return nearest


def _nearness(found: _Found) -> npt.NDArray[np.float64]:
    """(n,) the nearest distance as a share of the farthest one: 0 for an exact match, 1 where all are as far."""
    far = np.where(found.neighbors.values >= 0, found.neighbors.distances.astype(np.float64), 0.0)
    farthest, nearest = far.max(axis=1, initial=0.0), _nearest(found)
    share: npt.NDArray[np.float64] = np.divide(nearest, farthest, out=np.ones_like(farthest), where=farthest > 0)
    return share


def _count(found: _Found) -> npt.NDArray[np.float64]:
    """(n,) neighbors found."""
    count: npt.NDArray[np.float64] = (found.neighbors.values >= 0).sum(axis=1, dtype=np.float64)
    return count


def _agreement(found: _Found) -> npt.NDArray[np.float64]:
    """(n,) the largest p_kNN of any token, 0 where there is no neighbor."""
    largest = np.zeros(len(found.masses))
    np.maximum.at(largest, found.masses.rows, np.exp(found.masses.log_masses))
    return largest


def _distinct(found: _Found) -> npt.NDArray[np.float64]:
    """(n,) different tokens among the neighbors."""
    return np.diff(found.masses.offsets).astype(np.float64)


FEATURES: Mapping[str, Callable[[_Found], npt.NDArray[np.float64]]] = {
    "nearest": _nearest, "nearness": _nearness, "count": _count, "agreement": _agreement, "distinct": _distinct,
}  # fmt: skip


def _features(neighbors: Neighbors, temperature: float, names: Sequence[str]) -> dict[str, npt.NDArray[np.float64]]:
    for name in names:
        if name not in FEATURES:
            raise InvalidRequest(f"neighbors have no {name!r}; a rule can look at {', '.join(FEATURES)}", param="rule")
    found = _Found(neighbors, temperature)
    return {name: FEATURES[name](found) for name in names}


def _united(parts: Sequence[Neighbors]) -> Neighbors:
    """The neighbors of several domains beside each other; their softmax is that over all of them."""
    if len(parts) == 1:
        return parts[0]
    return Neighbors(
        np.concatenate([part.distances for part in parts], axis=1),
        np.concatenate([part.values for part in parts], axis=1),
    )


def _check_followed(used: Sequence[UsedDomain], *, union: bool) -> None:
    if union:
        raise InvalidRequest("tau follows the neighbors of one domain, not of a union", param="reuse.tau")
    early = next((u for u in used if u.weighing.early), None)
    if early is not None:
        raise InvalidRequest(
            f"tau follows from place to place, but the rule {early.rule} of {early.domain} leaves places out",
            param="reuse.tau",
        )


def _check_union(used: Sequence[UsedDomain]) -> None:
    first = used[0]
    for other in used[1:]:
        same = (other.temperature, other.weighing.rule, dict(other.weighing.parameters))
        if same != (first.temperature, first.weighing.rule, dict(first.weighing.parameters)):
            raise InvalidRequest(
                f"a union has one temperature, lambda and rule, got {_said(first)} and {_said(other)}: give them",
                param="combine",
            )


def _said(used: UsedDomain) -> str:
    parameters = ", ".join(f"{name} {value}" for name, value in used.weighing.parameters.items())
    return f"temperature {used.temperature:g}, rule {used.rule} ({parameters}) for {used.domain}"


def _weighing(options: DomainOptions, asked: str | None, info: DomainInfo, *, beside_cache: bool) -> Weighing:
    tuning = info.tuning
    if options.lmbda is not None:
        if asked not in (None, FIXED):
            raise InvalidRequest(f"lambda is the weight of the rule {FIXED}, but {asked} was asked for", param="lambda")
        return Weighing(FIXED, {"lambda": options.lmbda}, asked=True)
    if tuning is None:
        raise _untuned("lambda", info.domain)
    if beside_cache and asked in (None, GATE) and (gate := part_of(tuning.cache, KNN_GATE)):
        return tuned_weighing(info.domain, GATE, gate, info.key_dim)
    name = asked or tuning.rule
    if name == FIXED:
        lmbda = tuning.cache.get("knn_lambda", tuning.lmbda) if beside_cache else tuning.lmbda
        return tuned_weighing(info.domain, FIXED, {"lambda": lmbda}, info.key_dim)
    if name != tuning.rule:
        raise InvalidRequest(
            f"domain {info.domain} was tuned for the rule {tuning.rule}, it has no parameters for {name}: "
            f"run `knnlm tune {info.domain} --rule {name}`",
            param="rule",
        )
    return tuned_weighing(info.domain, name, tuning.parameters, info.key_dim)


def _tuned_search(tuning: Tuning | None, asked: SearchOptions, index: str) -> SearchOptions:
    """How to search by the tuning. What was fitted to another index than the one that answers does not hold."""
    if tuning is None:
        return SearchOptions(k=DEFAULT_K)
    if tuning.index != index:
        return SearchOptions(k=tuning.k)
    if asked.rescore is not None:  # the fitted candidates were for the other way of rescoring
        return replace(tuning.search, k=tuning.k, overfetch=None)
    if asked.overfetch is not None:  # candidates for rescoring, which may have been fitted without
        return replace(tuning.search, k=tuning.k, rescore=tuning.search.rescore or None)
    return replace(tuning.search, k=tuning.k)


def _untuned(name: str, domain: str) -> InvalidRequest:
    return InvalidRequest(f"domain {domain} has not been tuned: give {name}, or run `knnlm tune {domain}`", param=name)
