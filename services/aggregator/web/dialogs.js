// The one dialog: it asks for a key.
import { byId } from "./dom.js";

const TITLES = { user: "API key", admin: "Admin key" };
const WHY = { user: "Used for every call from now on; an empty one forgets the former.", admin: "" };

/** Resolves to the key that was typed, "" when none was. */
export function askForKey(kind, why) {
  const dialog = byId("key-dialog");
  const field = byId("key-value");
  byId("key-title").textContent = TITLES[kind];
  byId("key-why").textContent = why || WHY[kind];
  field.value = "";
  dialog.showModal();
  field.focus();
  return new Promise((resolve) => {
    const ended = new AbortController();
    const { signal } = ended;
    byId("key-form").addEventListener("submit", (event) => { event.preventDefault(); dialog.close(field.value.trim()); }, { signal });
    byId("key-cancel").addEventListener("click", () => dialog.close(""), { signal });
    dialog.addEventListener("cancel", () => (dialog.returnValue = ""), { signal });
    dialog.addEventListener("close", () => { ended.abort(); field.value = ""; resolve(dialog.returnValue); }, { signal });
  });
}
