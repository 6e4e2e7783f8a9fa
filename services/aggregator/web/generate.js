// One prompt continued twice and streamed: by the LM alone, and with retrieval. Then every token of the second is
// explained: shaded by what retrieval gave it, with the passages it came from.
import * as api from "./api.js";
import { byId, el, latest, number, told } from "./dom.js";
import { showExplained } from "./explained.js";
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
    const options = Object.fromEntries(inputs.map((input) => [input.name, input.value]));
    status.textContent = "Generating…";
    stop.disabled = false;
    detail.hidden = true;
    for (const place of Object.values(places)) place.replaceChildren();
    const own = new AbortController(); // when one of the two fails, the other ends
    try {
      const { tokens: prompt } = await api.post("v1/tokenize", { prompt: field.value, parse_special: false }, { signal });
      const one = (place, knn) => continued({ place, prompt, knn, options, signal: AbortSignal.any([signal, own.signal]) });
      const [alone, mixed] = await Promise.all([
        one(places.lm, undefined),
        controls.knn ? one(places.knn, controls.knn) : null,
      ]);
      if (mixed?.ids.length) await explain(prompt, mixed, signal);
      ended([speed("LM", alone), mixed && speed("with retrieval", mixed)].filter(Boolean).join(" · "));
    } catch (problem) {
      if (!signal.aborted) ended("");
      throw problem;
    } finally {
      own.abort();
    }
  }

  async function explain(prompt, { ids, used }, signal) {
    status.textContent = "Looking up what each token came from…";
    const knn = { ...controls.knn, version: used?.version };
    const reply = await api.post("v1/explain", { prompt, completion: ids, knn, passages: PASSAGES }, { signal });
    controls.show(reply.domains[0]);
    showExplained(places.knn, detail, reply, "Continuation with retrieval");
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

/** One continuation, shown token by token. Resolves to its token ids, the domain that was used, and its seconds. */
async function continued({ place, prompt, knn, options, signal }) {
  const strip = el("div", { class: "strip" });
  place.append(strip);
  const body = { prompt, knn, ...options, stream: true, logprobs: 0, return_tokens_as_token_ids: true };
  const ids = [];
  let used = null;
  let began = null;
  for await (const chunk of api.streamed("v1/completions", body, { signal })) {
    began ??= performance.now();
    used ??= chunk.domains?.[0] ?? null;
    if (chunk.degraded) place.append(el("p", { class: "problem" }, chunk.degraded));
    for (const choice of chunk.choices) {
      ids.push(...(choice.logprobs?.tokens ?? []).map((name) => Number(name.slice("token_id:".length))));
      strip.append(choice.text);
      if (choice.finish_reason === "stop") place.append(el("p", { class: "hint" }, "It ended here."));
    }
  }
  return { ids, used, seconds: (performance.now() - began) / 1000 };
}

const speed = (name, { ids, seconds }) => `${name}: ${ids.length} tokens${seconds > 0 ? `, ${number(ids.length / seconds)} a second` : ""}`;

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
