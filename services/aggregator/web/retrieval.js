// The controls of what is mixed: a domain with lambda, T, k and its rule, a memory with its weight, and the text's own
// past (the cache). All are as tuned until somebody moves them.
import { el, number } from "./dom.js";
import * as state from "./state.js";

const UNTUNED = { lambda: 0.25, temperature: 10 }; // a domain that was never tuned has none of its own
const SLIDERS = [
  { name: "lambda", letter: "λ", word: "weight", low: 0, high: 1, step: 0.01, toValue: (x) => x, toPlace: (v) => v },
  { name: "temperature", letter: "T", word: "temperature", low: -2, high: 4, step: 0.02,
    toValue: (x) => Number((10 ** x).toPrecision(3)), toPlace: Math.log10 },
  { name: "k", letter: "k", word: "neighbors", low: 0, high: 12, step: 1, toValue: (x) => 2 ** x, toPlace: Math.log2 },
];
const MEMORY_WEIGHT = { name: "memory_lambda", letter: "λ", word: "of the memory", low: 0, high: 1, step: 0.01,
  toValue: (x) => x, toPlace: (v) => v, unknown: "as" };
const CACHE_SLIDERS = [
  { name: "cache_lambda", letter: "λ", word: "of the cache", low: 0, high: 1, step: 0.01, toValue: (x) => x, toPlace: (v) => v },
  { name: "cache_theta", letter: "θ", word: "of the cache", low: -5, high: 3, step: 0.02,
    toValue: (x) => Number((10 ** x).toPrecision(3)), toPlace: Math.log10 },
];
const UNTUNED_CACHE = { cache_lambda: 0.1, cache_theta: 0.05 };
let uses = 0;

/**
 * Controls inside `place`. prefix: of their names in links. none: what the choice of no domain is called, null where a
 * domain must be chosen. changed: called after every change. Returns { knn, memory, cache, sources, mixes, show, update }.
 */
export function retrievalControls(place, { prefix, legend, none, changed }) {
  let domains = new Map();
  const id = `retrieval-${++uses}`;
  const select = el("select", { id: `${id}-domain`, onchange: () => choose({ domain: select.value }) });
  const sliders = SLIDERS.map((spec) => slider(spec));
  let memories = [];
  const memorySelect = el("select", { id: `${id}-memory`, onchange: () => choose({ memory: memorySelect.value }) });
  const memoryControl = el("div", { class: "control domain" }, el("label", { for: memorySelect.id }, "Memory"), memorySelect);
  const memoryWeight = slider(MEMORY_WEIGHT);
  const ruleSelect = el("select", { id: `${id}-rule`, onchange: () => choose({ rule: ruleSelect.value }) });
  const ruleControl = el("div", { class: "control domain" }, el("label", { for: ruleSelect.id }, "Rule"), ruleSelect);
  const cacheSelect = el("select", { id: `${id}-cache`, onchange: () => choose({ cache: cacheSelect.value }) },
    el("option", { value: "" }, "none"), el("option", { value: "on" }, "this text's own past"));
  const cacheControl = el("div", { class: "control domain" }, el("label", { for: cacheSelect.id }, "Cache"), cacheSelect);
  const cacheSliders = CACHE_SLIDERS.map((spec) => slider(spec));
  place.append(
    el("div", { class: "controls" },
      el("div", { class: "control domain" }, el("label", { for: select.id }, legend), select),
      sliders.map((one) => one.element), ruleControl, memoryControl, memoryWeight.element,
      cacheControl, cacheSliders.map((one) => one.element)),
  );

  const key = (name) => `${prefix}.${name}`;

  function choose(values) {
    state.set(Object.fromEntries(Object.entries(values).map(([name, value]) => [key(name), value])));
    refresh();
    changed();
  }

  function chosenDomain() {
    const wanted = state.get(key("domain"));
    if (domains.has(wanted)) return wanted;
    return wanted === "" && none === null ? ([...domains.keys()][0] ?? "") : "";
  }

  const chosenMemory = () => (memories.includes(state.get(key("memory"))) ? state.get(key("memory")) : "");
  const cached = () => state.get(key("cache")) === "on";
  const isOfCache = ({ name }) => name in UNTUNED_CACHE;
  const isOff = (spec) => (isOfCache(spec) ? !cached() : (spec.name === MEMORY_WEIGHT.name ? chosenMemory() : chosenDomain()) === "");
  /** The rule that the domain was tuned for, where it is another than "fixed". */
  const tunedRule = () => {
    const rule = domains.get(chosenDomain())?.tuning?.rule ?? "fixed";
    return rule === "fixed" ? null : rule;
  };
  const tunedValue = (name) => {
    const tuning = domains.get(chosenDomain())?.tuning;
    return name in UNTUNED_CACHE ? tuning?.cache?.[name.slice("cache_".length)] : tuning?.[name];
  };

  /** null: as tuned. A domain without tuning has what stands in for it. */
  function valueOf({ name, low, high, toValue }) {
    const given = state.getNumber(key(name), toValue(low), toValue(high));
    if (name === MEMORY_WEIGHT.name) return given;
    if (name in UNTUNED_CACHE) return given ?? (tunedValue(name) === undefined ? UNTUNED_CACHE[name] : null);
    const tuned = domains.get(chosenDomain())?.tuning;
    return given ?? (tuned ? null : (UNTUNED[name] ?? null));
  }

  function slider(spec) {
    const input = el("input", {
      type: "range", id: `${id}-${spec.name}`, min: spec.low, max: spec.high, step: spec.step,
      oninput: () => choose({ [spec.name]: spec.toValue(Number(input.value)) }),
    });
    const output = el("output", { for: input.id });
    const reset = el("button", {
      type: "button", class: "quiet", "aria-label": `${spec.letter} ${spec.word}: as tuned`, title: "as tuned",
      onclick: () => choose({ [spec.name]: null }),
    }, "↺");
    const element = el("div", { class: "control" },
      el("label", { for: input.id }, spec.letter, el("span", { class: "word" }, ` ${spec.word}`)), output, el("div", { class: "slider" }, input, reset));
    const show = (used) => {
      const value = valueOf(spec);
      const shown = value ?? used?.[spec.name] ?? tunedValue(spec.name) ?? null;
      if (shown !== null && document.activeElement !== input) input.value = spec.toPlace(shown);
      const text = shown === null ? spec.unknown ?? "by rule" : number(shown);
      output.textContent = value === null ? `${text} tuned` : text;
      input.setAttribute("aria-valuetext", output.textContent);
      input.disabled = reset.disabled = isOff(spec);
      reset.hidden = state.get(key(spec.name)) === "";
    };
    return { spec, element, show };
  }

  /** Shows what is chosen. used: what an answer says it was made with. */
  function refresh(used) {
    select.value = chosenDomain();
    for (const one of [...sliders, memoryWeight, ...cacheSliders]) one.show(used);
    const rule = tunedRule();
    ruleSelect.replaceChildren(el("option", { value: "" }, `${rule} (tuned)`), el("option", { value: "fixed" }, "fixed"));
    ruleSelect.value = state.get(key("rule")) === "fixed" ? "fixed" : "";
    ruleControl.hidden = rule === null;
    cacheSelect.value = cached() ? "on" : "";
    for (const one of cacheSliders) one.element.hidden = !cached();
    memorySelect.value = chosenMemory();
    memoryControl.hidden = memoryWeight.element.hidden = memories.length === 0;
  }

  return {
    /** Whether anything is mixed with the LM. */
    get mixes() {
      return chosenDomain() !== "" || chosenMemory() !== "" || cached();
    },
    /** The request's `memory`, undefined without one. */
    get memory() {
      if (chosenMemory() === "") return undefined;
      const weight = valueOf(MEMORY_WEIGHT);
      return { name: chosenMemory(), ...(weight === null ? {} : { lambda: weight }) };
    },
    /** The request's `cache`, undefined without it. */
    get cache() {
      if (!cached()) return undefined;
      const values = CACHE_SLIDERS.map((spec) => [spec.name.slice("cache_".length), valueOf(spec)]);
      return Object.fromEntries(values.filter(([, value]) => value !== null));
    },
    /** `knn`, `memory` and `cache` of the request. */
    get sources() {
      return { knn: this.knn, memory: this.memory, cache: this.cache };
    },
    /** The request's `knn`, undefined for the LM alone. */
    get knn() {
      if (chosenDomain() === "") return undefined;
      const options = { domain: chosenDomain() };
      for (const spec of SLIDERS) {
        const value = valueOf(spec);
        if (value !== null) options[spec.name] = value;
      }
      if (tunedRule() !== null && state.get(key("rule")) === "fixed") options.rule = "fixed";
      return options;
    },
    show: refresh,
    /** Takes over the domains that there are, Domain objects by name, and the names of memories. */
    update(found, names) {
      domains = found;
      memories = names;
      memorySelect.replaceChildren(el("option", { value: "" }, "none"), ...names.map((name) => el("option", { value: name }, name)));
      select.replaceChildren(
        ...(none === null && domains.size ? [] : [el("option", { value: "" }, none ?? "none")]),
        ...[...domains.keys()].map((name) => el("option", { value: name }, name)),
      );
      refresh();
    },
  };
}
