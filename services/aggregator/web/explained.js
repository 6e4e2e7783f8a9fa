// Tokens with where their probability comes from, as /v1/explain tells it: a shaded text, details, and documents.
import { el, number, percent, visible } from "./dom.js";
import { passageList } from "./passages.js";
import { legend, tokenStrip } from "./tokens.js";

export const probability = (logarithm) => (logarithm === null ? 0 : Math.exp(logarithm));

/** Fills `place` with the shaded tokens of `reply`; `detail` shows the one that is chosen. */
export function showExplained(place, detail, reply, label) {
  const strip = tokenStrip(label, (i) => showDetail(detail, reply.tokens[i]));
  for (const t of reply.tokens) strip.add({ text: t.token, p: probability(t.log_p), p_lm: probability(t.log_p_lm) });
  place.replaceChildren(legend(), strip.element, documentList(reply.documents));
  detail.hidden = true;
}

/** A token's components and the passages that gave it most, in `place`. */
export function showDetail(place, token) {
  const retrieved = token.components.flatMap((component) => component.passages);
  place.replaceChildren(
    el("h3", {}, "Token ", el("code", {}, visible(token.token)), `: ${percent(probability(token.log_p))}`),
    el("table", { class: "plain" },
      el("thead", {}, el("tr", {}, ["component", "weight", "its p", "gives"].map((name) => el("th", { scope: "col" }, name)))),
      el("tbody", {}, token.components.map((c) => component(c)))),
    ...(token.components.length > 1
      ? [el("h3", {}, "Passages that gave it"), passageList(retrieved.map((passage) => ({ ...passage, token: token.token })))]
      : []),
  );
  place.hidden = false;
}

function component({ name, weight, log_p }) {
  const p = probability(log_p);
  return el("tr", {}, el("th", { scope: "row" }, name), el("td", {}, number(weight)), el("td", {}, percent(p)), el("td", {}, percent(weight * p)));
}

/** The documents that a text leans on; null where nothing was retrieved. */
function documentList(documents) {
  if (!documents.length) return null;
  return el("details", {}, el("summary", {}, "Documents it leans on"),
    el("table", { class: "plain" },
      el("thead", {}, el("tr", {}, ["document", "domain", "share", "tokens"].map((name) => el("th", { scope: "col" }, name)))),
      el("tbody", {}, documents.slice(0, 20).map((d) =>
        el("tr", {}, el("th", { scope: "row" }, d.document), el("td", {}, d.domain), el("td", {}, percent(d.share)), el("td", {}, d.tokens))))));
}
