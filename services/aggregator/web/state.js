// What a person has chosen, kept in the address's fragment: a link restores it.

const LONGEST = 8000; // characters of one value in a link
const listeners = new Set();
let values = read();
let timer = 0;

function read() {
  return new Map(new URLSearchParams(location.hash.slice(1)));
}

export const get = (name, otherwise = "") => values.get(name) ?? otherwise;

/** A number in [low, high], null where there is none. */
export function getNumber(name, low, high) {
  const value = Number(values.get(name) || NaN);
  return Number.isFinite(value) && value >= low && value <= high ? value : null;
}

/** Takes over new values; "" and null mean the default, which no link mentions. push: the former can be gone back to. */
export function set(changes, { push = false } = {}) {
  if (push) write();
  for (const [name, value] of Object.entries(changes)) {
    if (value === "" || value === null) values.delete(name);
    else values.set(name, String(value));
  }
  clearTimeout(timer);
  if (push) write("pushState");
  else timer = setTimeout(write, 200); // browsers refuse to be told too often
}

/** `tell` is called when the address was changed by a link, by hand, or by going back. */
export function onRestored(tell) {
  listeners.add(tell);
}

function write(how = "replaceState") {
  clearTimeout(timer);
  const short = [...values].filter(([, value]) => value.length <= LONGEST);
  history[how](null, "", `#${new URLSearchParams(short)}`);
}

addEventListener("hashchange", () => {
  clearTimeout(timer);
  values = read();
  for (const tell of listeners) tell();
});
