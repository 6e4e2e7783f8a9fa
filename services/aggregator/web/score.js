// A pasted text, scored: perplexities, every token shaded by what retrieval gave, passages on a click.
import * as api from "./api.js";
import { byId, el, latest, number, told } from "./dom.js";
import { documentList, explainedStrip } from "./explained.js";
import { retrievalControls } from "./retrieval.js";
import * as state from "./state.js";

const PASSAGES = 4; // of each token

export function scoreView() {
  const field = byId("score-text");
  const status = byId("score-status");
  const result = byId("score-result");
  const detail = byId("score-detail");
  const scoring = latest();
  const controls = retrievalControls(byId("score-controls"), {
    prefix: "a", legend: "Domain", none: "none: the LM alone", changed: () => undefined,
  });
  field.addEventListener("input", () => state.set({ scored: field.value }));
  byId("score-go").addEventListener("click", () => told("score", () => scoring(score)));

  async function score(signal) {
    status.textContent = "Scoring…";
    detail.hidden = true;
    try {
      const { reply, note } = await explained({ text: field.value, ...controls.sources }, signal);
      controls.show(reply.domains[0]);
      const strip = explainedStrip(detail, "The text's tokens");
      reply.tokens.forEach(strip.add);
      result.replaceChildren(...[figures(reply, controls.cache !== undefined), strip.element, documentList(reply.documents)].filter(Boolean));
      result.hidden = false;
      status.textContent = note;
    } catch (problem) {
      if (!signal.aborted) { status.textContent = ""; result.hidden = true; }
      throw problem;
    }
  }

  return {
    update: controls.update,
    show() {
      field.value = state.get("scored");
      controls.show();
    },
  };
}

/** The text explained; a text too long for passages is explained without. */
async function explained(body, signal) {
  try {
    return { reply: await api.post("v1/explain", { ...body, passages: PASSAGES }, { signal }), note: "Scored." };
  } catch (problem) {
    if (problem.param !== "passages") throw problem;
    const reply = await api.post("v1/explain", { ...body, passages: 0 }, { signal });
    return { reply, note: "The text is too long for passages." };
  }
}

function figures(reply, cached) {
  const rows = [["perplexity of the LM alone", number(reply.perplexity_lm)]];
  if (reply.domains.length || reply.memories.length || cached) {
    const names = [...reply.domains.map((d) => `${d.domain} ${d.version}`), ...reply.memories.map((m) => `memory ${m.name}`),
      ...(cached ? ["cache"] : [])].join(", ");
    const known = reply.perplexity !== null;
    rows.push([`with ${names}`, known ? number(reply.perplexity) : "infinite"]);
    rows.push(["ratio", known ? number(reply.perplexity / reply.perplexity_lm) : "–"]);
  }
  rows.push(["tokens", reply.tokens.length.toLocaleString("en")]);
  return el("dl", { class: "figures" },
    rows.map(([name, value]) => el("div", {}, el("dt", {}, name), el("dd", {}, value))),
    reply.degraded && el("p", { class: "problem" }, reply.degraded));
}
