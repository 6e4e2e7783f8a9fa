// Next-token bars of the LM, of retrieval and of the two mixed, for one or two domains side by side.
import * as api from "./api.js";
import { byId, debounced, el, latest, number, percent, told, visible } from "./dom.js";
import { fromNeighbors, passageList } from "./passages.js";
import { retrievalControls } from "./retrieval.js";
import * as state from "./state.js";

const WAIT_MS = 120; // after the last change
const EXAMPLE = "Parameters\n----------\na : array_like\n    Input array.\naxis : int, optional\n    Axis";

export function nextTokenView() {
  const field = byId("next-text");
  const columns = [
    column(byId("next-a"), { prefix: "a", legend: "Domain", none: "none: the LM alone" }),
    column(byId("next-b"), { prefix: "b", legend: "Beside it", none: "nothing" }),
  ];
  const ask = () => columns.forEach((one) => one.ask());
  const later = debounced(ask, WAIT_MS);
  field.addEventListener("input", () => { state.set({ text: field.value }); later(); });

  return {
    update: (...found) => columns.forEach((one) => one.update(...found)),
    show() {
      field.value = state.get("text", EXAMPLE);
      columns.forEach((one) => one.refresh());
      ask();
    },
  };
}

function column(place, { prefix, legend, none }) {
  const run = latest();
  const second = prefix === "b";
  const ask = () => told(prefix, () => run(answer));
  const controls = retrievalControls(place, { prefix, legend, none, changed: debounced(ask, WAIT_MS) });
  const status = el("p", { class: "hint", role: "status" });
  const result = el("div");
  place.append(status, result);

  async function answer(signal) {
    const text = byId("next-text").value;
    if (text === "" || (second && !controls.mixes)) {
      status.textContent = text === "" ? "Type something." : "";
      result.replaceChildren();
      return;
    }
    const began = performance.now();
    place.setAttribute("aria-busy", "true");
    try {
      const body = { text, ...controls.sources, top_n: 12, neighbors: controls.knn ? 8 : 0, truncate: "left" };
      const reply = await api.post("v1/next_token", body, { signal });
      const [found] = reply.results;
      controls.show(reply.domains[0]);
      status.textContent = summary(reply, found, performance.now() - began);
      result.replaceChildren(bars(found), ...passages(found));
    } catch (problem) {
      if (!signal.aborted) { status.textContent = ""; result.replaceChildren(); }
      throw problem;
    } finally {
      if (!signal.aborted) place.removeAttribute("aria-busy");
    }
  }

  return { ask, update: controls.update, refresh: () => controls.show() };
}

function summary(reply, found, ms) {
  const weight = (kind) => number(found.components.filter((c) => c.kind === kind).reduce((sum, c) => sum + c.weight, 0));
  const used = reply.domains.map((d) => `${d.domain} ${d.version}, λ ${weight("knn")}, T ${number(d.temperature)}, k ${d.k}`);
  used.push(...reply.memories.map((m) => `memory ${m.name}, λ ${weight("memory")}`));
  if (found.components.some((c) => c.kind === "cache")) used.push(`cache, λ ${weight("cache")}`);
  return [reply.degraded ?? used.join("; "), `${found.context_tokens} tokens, ${ms.toFixed(0)} ms`].filter(Boolean).join(" · ");
}

function bars({ top: likeliest, components }) {
  const [memory, cache] = ["memory", "cache"].map((kind) => components.find((c) => c.kind === kind));
  const top = likeliest.map((row, i) => ({ ...row, p_memory: memory?.p?.[i] ?? null, p_cache: cache?.p?.[i] ?? null }));
  const has = (kind) => components.some((c) => c.kind === kind);
  const mixed = components.length > 1;
  const kinds = [["p", mixed ? "mixture" : "LM"], ...(mixed ? [["p_lm", "LM"]] : []),
    ...(has("knn") ? [["p_knn", "retrieval"]] : []), ...(memory ? [["p_memory", "memory"]] : []),
    ...(cache ? [["p_cache", "cache"]] : [])];
  const most = Math.max(...top.flatMap((row) => kinds.map(([kind]) => row[kind] ?? 0)), 1e-9);
  const cell = (kind, value) =>
    el("td", {}, el("div", {}, el("span", { class: "value" }, percent(value)),
      el("span", { class: `bar ${kind}`, vars: { share: (value ?? 0) / most } })));
  return el("table", { class: "bars" },
    el("caption", { class: "hidden" }, "Probabilities of the likeliest next tokens"),
    el("thead", {}, el("tr", {}, el("th", { scope: "col" }, "token"),
      kinds.map(([, name]) => el("th", { scope: "col" }, name)))),
    el("tbody", {}, top.map((row) =>
      el("tr", {}, el("th", { scope: "row", title: `token ${row.token_id}` }, visible(row.token)), kinds.map(([kind]) => cell(kind, row[kind]))))));
}

function passages({ neighbors }) {
  return neighbors === null ? [] : [el("h3", {}, "Nearest passages"), passageList(fromNeighbors(neighbors))];
}
