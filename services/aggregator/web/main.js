// The page: tabs, the model and its domains, and the key.
import * as api from "./api.js";
import { askForKey } from "./dialogs.js";
import { byId, forgetProblems, told } from "./dom.js";
import { domainsView } from "./domains.js";
import { generateView } from "./generate.js";
import { nextTokenView } from "./next_token.js";
import { scoreView } from "./score.js";
import * as state from "./state.js";

const views = { next: nextTokenView(), generate: generateView(), score: scoreView(), domains: domainsView(load) };
const tabs = Object.keys(views).map((name) => byId(`tab-${name}`));
const nameOf = (tab) => tab.id.slice("tab-".length);

/** All domains by name; every view is told of those that the model can be mixed with, and of memories. Where they cannot be had, the LM
 * alone is there, and views keep what they knew. */
async function load() {
  const { data: models } = await api.get("v1/models");
  byId("model").textContent = models[0].id;
  const { domains } = await api.get("v1/domains");
  const named = domains.map((info) => [info.domain, info]);
  const usable = new Set(models.map((model) => model.id));
  const mixed = new Map(named.filter(([name]) => usable.has(`${models[0].id}+${name}`)));
  const memories = [...usable].filter((id) => id.startsWith(`${models[0].id}~`)).map((id) => id.slice(models[0].id.length + 1));
  for (const view of Object.values(views)) view.update(mixed, memories);
  return new Map(named);
}

function showTab() {
  const wanted = tabs.find((tab) => nameOf(tab) === state.get("tab")) ?? tabs[0];
  for (const tab of tabs) {
    const selected = tab === wanted;
    tab.setAttribute("aria-selected", String(selected));
    tab.tabIndex = selected ? 0 : -1;
    byId(tab.getAttribute("aria-controls")).hidden = !selected;
  }
  views[nameOf(wanted)].show();
  return wanted;
}

function go(tab) {
  forgetProblems();
  state.set({ tab: tab === tabs[0] ? "" : nameOf(tab) }, { push: true });
  showTab().focus();
}

byId("tabs").addEventListener("click", (event) => tabs.includes(event.target) && go(event.target));
byId("tabs").addEventListener("keydown", (event) => {
  const at = tabs.indexOf(event.target);
  const to = { ArrowRight: at + 1, ArrowLeft: at - 1, Home: 0, End: tabs.length - 1 }[event.key];
  if (at < 0 || to === undefined) return;
  event.preventDefault();
  go(tabs[(to + tabs.length) % tabs.length]);
});
byId("skip").addEventListener("click", (event) => { event.preventDefault(); byId("main").focus(); });
byId("key").addEventListener("click", async () => { await api.changeKey(); await begin(); });
api.askWith(askForKey);
state.onRestored(showTab);

for (const view of Object.values(views)) view.update(new Map(), []);

async function begin() {
  await told("page", load);
  showTab();
}

begin();
