// The domains: versions, sizes, replicas and tuning; switching one, adding and removing documents.
import * as api from "./api.js";
import { byId, bytes, el, number, told } from "./dom.js";

/** load(): asks which domains there are now, and resolves to them by name. */
export function domainsView(load) {
  const status = byId("domains-status");
  const cards = new Map(); // kept: what was typed and the focus stay where they are
  byId("domains-again").addEventListener("click", () => told("domains", show));

  async function show() {
    status.textContent = "Looking…";
    const names = [...(await load()).keys()];
    const found = await Promise.all(names.map((name) => api.get(path(name))));
    for (const info of found) {
      if (!cards.has(info.domain)) cards.set(info.domain, card(info.domain));
      cards.get(info.domain).show(info);
    }
    byId("domains").replaceChildren(...names.map((name) => cards.get(name).element));
    status.textContent = names.length ? "" : "There is no domain.";
  }

  function card(name) {
    const head = el("h2");
    const facts = el("div", { class: "stack" });
    const choice = versions(name);
    const element = el("section", { class: "card domain", "aria-label": `Domain ${name}` }, head, facts, choice.element, documents(name));
    return {
      element,
      show(info) {
        head.replaceChildren(name, " ", el("span", { class: "badge" }, info.version), info.state === "ready" ? "" : ` ${info.state}`);
        facts.replaceChildren(el("div", { class: "columns" }, sizes(info), tuning(info.tuning)), replicas(info));
        choice.show(info);
      },
    };
  }

  /** Does what a button asks for, says what came of it, and looks again. */
  async function act(button, doing, job) {
    button.disabled = true;
    status.textContent = doing;
    const done = await told("domains", job);
    if (done !== undefined) await told("domains", show);
    status.textContent = done ?? "";
    button.disabled = false;
    button.focus();
  }

  function versions(name) {
    const select = el("select", { "aria-label": `Version of ${name}` });
    const button = el("button", {
      type: "button",
      onclick: () => act(button, `Switching ${name} to ${select.value}…`, async () => {
        const now = await api.post(`${path(name)}:activate`, { version: select.value, wait: true }, { admin: true });
        return `${name} answers from ${now.version}.`;
      }),
    }, "Switch");
    return {
      element: el("p", { class: "row" }, el("span", {}, "Version"), select, button),
      show(info) {
        select.replaceChildren(...[...info.versions].reverse().map((version) => el("option", {}, version)));
        select.value = info.version;
      },
    };
  }

  function documents(name) {
    const id = el("input", { type: "text", "aria-label": "Id of the document", placeholder: "id", spellcheck: "false" });
    const text = el("textarea", { rows: 3, "aria-label": "Text of the document", placeholder: "text, for adding" });
    const replace = el("input", { type: "checkbox" });
    const change = (button, doing, call) => act(button, doing, async () => {
      const done = await call();
      return `${name} answers from ${done.version}: ${done.added_documents} added, ${done.removed_documents} removed.`;
    });
    const add = el("button", {
      type: "button",
      onclick: () => change(add, "Adding…", () => api.post(`${path(name)}/documents`,
        { documents: [{ id: id.value, text: text.value }], replace: replace.checked }, { admin: true })),
    }, "Add");
    const remove = el("button", {
      type: "button",
      onclick: () => change(remove, "Removing…", () => api.post(`${path(name)}/documents:remove`, { ids: [id.value] }, { admin: true })),
    }, "Remove");
    return el("details", {}, el("summary", {}, "Documents"),
      el("div", { class: "stack" }, id, text, el("label", {}, replace, " replace the document of this id"),
        el("p", { class: "row" }, add, remove)));
  }

  return { update: () => undefined, show: () => told("domains", show) };
}

const path = (name) => `v1/domains/${encodeURIComponent(name)}`;

function table(caption, rows, head = []) {
  return el("table", { class: "plain" }, el("caption", {}, caption),
    head.length ? el("thead", {}, el("tr", {}, head.map((name) => el("th", { scope: "col" }, name)))) : null,
    el("tbody", {}, rows.map(([first, ...others]) =>
      el("tr", {}, el("th", { scope: "row" }, first), others.map((value) => el("td", {}, value ?? "–"))))));
}

function sizes(info) {
  const rows = [
    ["entries", info.entries.toLocaleString("en")],
    ["documents", info.documents.toLocaleString("en")],
    ["index", info.index],
    ["keys", `${info.key_dim} × ${info.key_dtype}, ${info.key_function}`],
    ["model", info.model_id.split("/").pop()],
  ];
  if (info.memory) {
    rows.push(["index in memory", `${bytes(info.memory.index_bytes)}, ${info.memory.index}`]);
    rows.push(["keys in memory", `${bytes(info.memory.keys_bytes)}, ${info.memory.keys}`]);
  }
  return table("Size", rows);
}

function tuning(tuned) {
  if (!tuned) return el("p", { class: "hint" }, "Never tuned: requests must give λ and T.");
  const gained = tuned.knn_perplexity / tuned.lm_perplexity;
  const parameters = Object.entries(tuned.parameters ?? {}).map(([name, value]) => [name, [value].flat().map((x) => number(x)).join(", ")]);
  return el("div", {},
    table("Tuning", [
      ["λ", number(tuned.lambda)], ["T", number(tuned.temperature)], ["k", tuned.k], ["rule", tuned.rule], ...parameters,
      ["held-out tokens", tuned.tokens.toLocaleString("en")], ["held-out documents", tuned.documents],
    ]),
    el("div", { class: "pair", role: "img", "aria-label": `perplexity ${number(tuned.lm_perplexity)} of the LM, ${number(tuned.knn_perplexity)} with retrieval` },
      measure("LM", tuned.lm_perplexity, 1, "p_lm"), measure("with retrieval", tuned.knn_perplexity, gained, "p")),
    tuned.quality?.length ? quality(tuned.quality) : null);
}

function measure(name, value, share, kind) {
  return el("div", { class: "measure" }, el("span", {}, name),
    el("span", { class: `bar ${kind}`, vars: { share: Math.min(1, share) } }), el("span", { class: "value" }, number(value)));
}

/** Each way to search that was measured, to choose one. */
function quality(rows) {
  return el("details", {}, el("summary", {}, "Searches tried"),
    table("Perplexity and speed", rows.map((row) =>
      [row.chosen ? `${row.name}, chosen` : row.name, number(row.perplexity), number(row.queries_per_second)]),
    ["search", "perplexity", "queries/s"]));
}

function replicas(info) {
  const rows = info.replicas.map((r) => [r.address, r.version, r.problem ? `${r.state}: ${r.problem}` : r.state]);
  return table("Replicas", rows, ["address", "version", "state"]);
}
