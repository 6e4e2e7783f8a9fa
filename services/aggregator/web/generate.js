// One prompt continued twice and streamed: by the LM alone, and with retrieval, where every token is shaded by what
// retrieval gave it and shows its passages.
import * as api from "./api.js";
import { byId, el, latest, number, told } from "./dom.js";
import { explainedStrip } from "./explained.js";
import { retrievalControls } from "./retrieval.js";
import * as state from "./state.js";

const EXAMPLE = "Examples::\n\n    >>> m = nn.Softplus()\n    >>> input =";
const PASSAGES = 6; // of each token
const OPTIONS = [
  { name: "max_tokens", label: "Tokens", low: 1, high: 1024, step: 1, otherwise: 64 },
  { name: "temperature", label: "Sampling temperature", low: 0, high: 2, step: 0.1, otherwise: 0.7 },
  { name: "seed", label: "Seed", low: 0, high: 2 ** 31, step: 1, otherwise: 0 },
];

export function generateView() {
  const field = byId("generate-text");
  const status = byId("generate-status");
  const stop = byId("generate-stop");
  const detail = byId("generate-detail");
  const places = { lm: byId("generate-lm"), knn: byId("generate-knn") };
  const running = latest();
  const controls = retrievalControls(byId("generate-controls"), {
    prefix: "a", legend: "Domain", none: "none: the LM alone", changed: () => undefined,
  });
  const inputs = OPTIONS.map((option) => numberField(option));
  byId("generate-options").append(...inputs.map((input) => input.element));
  field.addEventListener("input", () => state.set({ prompt: field.value }));
  byId("generate-go").addEventListener("click", () => told("generate", () => running(generate)));
  stop.addEventListener("click", () => { running.abort(); ended("Stopped."); });

  function ended(text) {
    status.textContent = text;
    stop.disabled = true;
  }

  async function generate(signal) {
    status.textContent = "Generating…";
    stop.disabled = false;
    detail.hidden = true;
    for (const place of Object.values(places)) place.replaceChildren();
    const own = new AbortController(); // when one of the two fails, the other ends
    try {
      const both = AbortSignal.any([signal, own.signal]);
      const plain = el("div", { class: "strip" });
      const strip = explainedStrip(detail, "Continuation with retrieval");
      places.lm.append(plain);
      if (controls.mixes) places.knn.append(strip.element);
      const [alone, mixed] = await Promise.all([
        continued(places.lm, { ...body(), knn: undefined, memory: undefined, cache: undefined }, both, ({ text }) => plain.append(text)),
        controls.mixes && continued(places.knn, body(), both, ({ explained }) => explained?.forEach(strip.add), controls.show),
      ]);
      ended([speed("LM", alone), mixed && speed("with retrieval", mixed)].filter(Boolean).join(" · "));
    } catch (problem) {
      if (!signal.aborted) ended("");
      throw problem;
    } finally {
      own.abort();
    }
  }

  function body() {
    const options = Object.fromEntries(inputs.map((input) => [input.name, input.value]));
    const knn = controls.mixes ? { ...controls.knn, explain: PASSAGES } : undefined;
    return { prompt: field.value, add_bos: true, knn, memory: controls.memory, cache: controls.cache, ...options };
  }

  return {
    update: controls.update,
    show() {
      field.value = state.get("prompt", EXAMPLE);
      for (const input of inputs) input.show();
      controls.show();
    },
  };
}

/** One continuation. show(choice): of each chunk. used(domain): once. Resolves to its number of tokens and seconds. */
async function continued(place, body, signal, show, used = () => undefined) {
  let began = null;
  let usage = null;
  let degraded = null;
  const stream = api.streamed("v1/completions", { ...body, stream: true, stream_options: { include_usage: true } }, { signal });
  for await (const chunk of stream) {
    began ??= performance.now();
    if (chunk.domains) used(chunk.domains[0]);
    if (chunk.degraded && !degraded) place.append(el("p", { class: "problem" }, (degraded = chunk.degraded)));
    chunk.choices.forEach(show);
    if (chunk.choices[0]?.finish_reason === "stop") place.append(el("p", { class: "hint" }, "It ended here."));
    usage = chunk.usage ?? usage;
  }
  return { tokens: usage.completion_tokens, seconds: (performance.now() - began) / 1000 };
}

const speed = (name, { tokens, seconds }) => `${name}: ${tokens} tokens${seconds > 0 ? `, ${number(tokens / seconds)} a second` : ""}`;

function numberField({ name, label, low, high, step, otherwise }) {
  const input = el("input", {
    type: "number", id: `generate-${name}`, min: low, max: high, step,
    onchange: () => state.set({ [name]: Number(input.value) === otherwise ? null : input.value }),
  });
  return {
    name,
    element: el("div", { class: "control" }, el("label", { for: input.id }, label), input),
    get value() {
      return input.value === "" ? otherwise : Number(input.value);
    },
    show() {
      input.value = state.getNumber(name, low, high) ?? otherwise;
    },
  };
}
