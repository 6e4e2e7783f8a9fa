// Passages that were retrieved: where each is from, how near, and what it says comes next.
import { el, number, percent, visible } from "./dom.js";

/**
 * A list of passages. Each: domain, document, position, distance, share (of what retrieval says), token, before, after
 * (which begins with the token). marked: the token that is looked at; passages that say another are paler.
 */
export function passageList(passages, marked = null) {
  if (!passages.length) return el("p", { class: "hint" }, "Nothing was retrieved here.");
  return el("ol", { class: "passages", role: "list" }, passages.map((one) => passage(one, marked)));
}

function passage({ domain, document, position, distance, share, token, before, after }, marked) {
  const [said, rest] = after.startsWith(token) ? [token, after.slice(token.length)] : ["", after];
  const other = marked !== null && token !== marked;
  return el("li", { class: other ? "other" : null },
    el("p", { class: "source" },
      el("b", {}, document), ` · ${domain}, token ${position}`,
      el("span", { class: "figures" }, `says ${visible(token)} · distance ${number(distance)} · ${percent(share)}`)),
    el("p", { class: "passage" }, before, said && el("mark", {}, said), rest));
}

/** From /v1/next_token's neighbors. */
export const fromNeighbors = (neighbors) => (neighbors ?? []).map(({ weight, ...n }) => ({ ...n, share: weight }));
