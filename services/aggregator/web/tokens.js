// Tokens as a text, each shaded by what retrieval gave it; one can be chosen, by mouse or by arrow keys.
import { el, number, visible } from "./dom.js";

const FULL = Math.log(8); // a token eight times likelier or less likely with retrieval has the full shade

/** Natural logarithm of p / p_lm; 0 where the LM rules the token out. */
export function gain({ p, p_lm }) {
  if (p_lm === 0) return 0;
  return p === 0 ? -FULL : Math.log(p / p_lm);
}

/** An empty strip. chosen(index): called when a token is chosen. Returns { element, add }. */
export function tokenStrip(label, chosen) {
  const element = el("div", { class: "strip", role: "listbox", "aria-label": label, "aria-orientation": "horizontal" });
  let current = null;

  function focus(token) {
    if (!token) return;
    if (current) current.tabIndex = -1;
    current = token;
    current.tabIndex = 0;
    current.focus();
  }

  function choose(token) {
    element.querySelector("[aria-selected=true]")?.setAttribute("aria-selected", "false");
    token.setAttribute("aria-selected", "true");
    chosen([...element.children].indexOf(token));
  }

  element.addEventListener("click", (event) => {
    const token = event.target.closest("[role=option]");
    if (token) { focus(token); choose(token); }
  });
  element.addEventListener("keydown", (event) => {
    const token = event.target.closest("[role=option]");
    if (!token) return;
    const moves = {
      ArrowRight: token.nextElementSibling, ArrowDown: token.nextElementSibling, ArrowLeft: token.previousElementSibling,
      ArrowUp: token.previousElementSibling, Home: element.firstElementChild, End: element.lastElementChild,
    };
    if (event.key in moves) focus(moves[event.key]);
    else if (event.key === "Enter" || event.key === " ") choose(token);
    else return;
    event.preventDefault();
  });

  return {
    element,
    /** token: { text, p, p_lm }. */
    add(token) {
      const by = gain(token);
      const option = el("span", {
        role: "option", "aria-selected": "false", tabindex: element.children.length ? -1 : 0,
        class: by > 0 ? "token helped" : by < 0 ? "token hurt" : "token",
        vars: { shade: Math.min(1, Math.abs(by) / FULL).toFixed(3) },
        "aria-label": `${visible(token.text)}, ${times(by)}`, title: times(by),
      }, token.text.replaceAll("\n", "⏎\n") || "\u200b");
      current ??= option;
      element.append(option);
    },
  };
}

/** What retrieval did, in words. by: logarithm of the ratio. */
function times(by) {
  if (Math.abs(by) < 0.005) return "as likely as without retrieval";
  return by > 0 ? `${number(Math.exp(by))} times likelier` : `${number(Math.exp(-by))} times less likely`;
}

export const legend = () =>
  el("p", { class: "hint legend" },
    el("span", { class: "token helped", vars: { shade: 1 } }, "likelier"), " and ",
    el("span", { class: "token hurt", vars: { shade: 1 } }, "less likely"), " with retrieval; full shade at 8 times");
