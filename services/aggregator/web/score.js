// A pasted text, scored: perplexities, every token shaded by what retrieval gave, passages on a click.
import * as api from "./api.js";
import { byId, el, latest, number, told } from "./dom.js";
import { fromNeighbors, passageList } from "./passages.js";
import { retrievalControls } from "./retrieval.js";
import * as state from "./state.js";
import { legend, tokenDetail, tokenStrip } from "./tokens.js";

const p = (logarithm) => (logarithm === null ? 0 : Math.exp(logarithm));

export function scoreView() {
  const field = byId("score-text");
  const status = byId("score-status");
  const result = byId("score-result");
  const detail = byId("score-detail");
  const scoring = latest();
  const looking = latest();
  const controls = retrievalControls(byId("score-controls"), {
    prefix: "a", legend: "Domain", none: "none: the LM alone", changed: () => undefined,
  });
  field.addEventListener("input", () => state.set({ scored: field.value }));
  byId("score-go").addEventListener("click", () => told(() => scoring(score)));

  async function score(signal) {
    status.textContent = "Scoring…";
    detail.hidden = true;
    try {
      const reply = await api.post("v1/score", { text: field.value, knn: controls.knn }, { signal });
      controls.show(reply.domains[0]);
      show(reply);
      status.textContent = "";
    } catch (problem) {
      if (!signal.aborted) { status.textContent = ""; result.hidden = true; }
      throw problem;
    }
  }

  function show(reply) {
    const strip = tokenStrip("The text's tokens", (i) => told(() => looking((signal) => look(reply, i, signal))));
    reply.tokens.forEach((t) => strip.add({ text: t.token, p: p(t.log_p), p_lm: p(t.log_p_lm) }));
    result.replaceChildren(figures(reply), legend(), strip.element);
    result.hidden = false;
  }

  async function look(reply, i, signal) {
    const token = reply.tokens[i];
    const tokens = [reply.first_token_id, ...reply.tokens.slice(0, i).map((t) => t.token_id)];
    const components = reply.components.map((c) => ({ name: c.name, weight: c.weight[i], p: c.log_p[i] === null ? null : p(c.log_p[i]) }));
    detail.replaceChildren(...tokenDetail({ text: token.token, p: p(token.log_p), components }));
    detail.hidden = false;
    const [used] = reply.domains;
    if (!used) return;
    const knn = { ...controls.knn, domain: used.domain, version: used.version };
    const body = { tokens, knn, neighbors: 12, top_n: 0, truncate: "left" };
    const found = await api.post("v1/next_token", body, { signal });
    detail.append(el("h3", {}, "Nearest passages"), passageList(fromNeighbors(found.results[0].neighbors), token.token));
  }

  return {
    update: controls.update,
    show() {
      field.value = state.get("scored");
      controls.show();
    },
  };
}

function figures(reply) {
  const ratio = reply.perplexity === null ? null : reply.perplexity / reply.perplexity_lm;
  const rows = [["perplexity of the LM alone", number(reply.perplexity_lm)]];
  if (reply.domains.length) {
    const names = reply.domains.map((d) => `${d.domain} ${d.version}`).join(", ");
    rows.push([`with ${names}`, reply.perplexity === null ? "infinite" : number(reply.perplexity)]);
    rows.push(["ratio", number(ratio)]);
  }
  return el("dl", { class: "figures" },
    [...rows, ["tokens", reply.tokens.length.toLocaleString("en")]].map(([name, value]) => el("div", {}, el("dt", {}, name), el("dd", {}, value))),
    reply.degraded && el("p", { class: "problem" }, reply.degraded));
}
