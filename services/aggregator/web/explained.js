// Tokens with where their probability comes from, as /v1/explain tells it: a shaded text, details, and documents.
import { el, number, percent, visible } from "./dom.js";
import { passageList } from "./passages.js";
import { legend, tokenStrip } from "./tokens.js";

const probability = (logarithm) => (logarithm === null ? 0 : Math.exp(logarithm));

/** A shaded text that grows: { element, add }; `detail` shows the token that is chosen. */
export function explainedStrip(detail, label) {
  const tokens = [];
  const strip = tokenStrip(label, (i) => showDetail(detail, tokens[i]));
  return {
    element: el("div", { class: "stack" }, legend(), strip.element),
    add(token) {
      tokens.push(token);
      strip.add({ text: token.token, p: probability(token.log_p), p_lm: probability(token.log_p_lm) });
    },
  };
}

/** A token's components and the passages that gave it most, in `place`. */
function showDetail(place, token) {
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

/** The documents that a text leans on; null where it leans on none. */
export function documentList(documents) {
  if (!documents.length) return null;
  return el("details", {}, el("summary", {}, "Documents it leans on"),
    el("table", { class: "plain" },
      el("thead", {}, el("tr", {}, ["document", "domain", "share", "tokens"].map((name) => el("th", { scope: "col" }, name)))),
      el("tbody", {}, documents.slice(0, 20).map((d) =>
        el("tr", {}, el("th", { scope: "row" }, d.document), el("td", {}, d.domain), el("td", {}, percent(d.share)), el("td", {}, d.tokens))))));
}
