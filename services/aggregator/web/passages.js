// Passages that were retrieved: where each is from, how near, and what it says comes next.
import { el, number, percent, visible } from "./dom.js";

const LINES = 4;

/**
 * A list of passages. Each: domain, document, position, distance, share (of what retrieval says), token, before, after
 * (which begins with the token).
 */
export function passageList(passages) {
  if (!passages.length) return el("p", { class: "hint" }, "Nothing was retrieved here.");
  return el("ol", { class: "passages", role: "list" }, passages.map(passage));
}

function passage({ domain, document, position, distance, share, token, before, after }) {
  const [said, rest] = after.startsWith(token) ? [token, after.slice(token.length)] : ["", after];
  return el("li", {},
    el("p", { class: "source" },
      el("b", {}, document), ` · ${domain}, token ${position}`,
      el("span", { class: "figures" }, `says ${visible(token)} · distance ${number(distance)} · weighs ${percent(share)}`)),
    el("p", { class: "passage" }, end(before), said && el("mark", {}, said), rest));
}

/** The last lines of what stands before, so that what it says next is in sight. */
function end(text) {
  const lines = text.split("\n");
  return lines.length > LINES ? `…\n${lines.slice(-LINES).join("\n")}` : text;
}

/** From /v1/next_token's neighbors. */
export const fromNeighbors = (neighbors) => (neighbors ?? []).map(({ weight, ...n }) => ({ ...n, share: weight }));
