// Elements. Text goes into them as text: nothing on this page is ever parsed as HTML.

export const byId = (id) => document.getElementById(id);

/** An element with attributes and children. `on*`: listeners; `vars`: custom properties of its style; null: left out. */
export function el(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (value === null || value === undefined || value === false) continue;
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (name === "vars") for (const [key, v] of Object.entries(value)) element.style.setProperty(`--${key}`, v);
    else element.setAttribute(name, value === true ? "" : value);
  }
  element.append(...children.flat().filter((child) => child !== null && child !== undefined));
  return element;
}

/** Tokens begin with spaces and hold line ends: both are shown. */
export const visible = (text) => text.replace(/^ /, "␣").replaceAll("\n", "⏎").replaceAll("\t", "⇥") || "∅";

export function percent(p) {
  if (p === null || p === 0) return p === null ? "–" : "0 %";
  return p < 0.001 ? "<0.1 %" : `${(100 * p).toFixed(p >= 0.0995 ? 0 : 1)} %`;
}

/** Three digits of a number. */
export function number(x) {
  if (x === null || x === undefined) return "–";
  if (x !== 0 && Math.abs(x) < 1e-3) return x.toExponential(1);
  return x.toLocaleString("en", { maximumSignificantDigits: 3 });
}

export function bytes(n) {
  const power = n > 0 ? Math.min(4, Math.floor(Math.log2(n) / 10)) : 0;
  return `${number(n / 1024 ** power)} ${["bytes", "KiB", "MiB", "GiB", "TiB"][power]}`;
}

/** Calls `work` once no further call has come for `ms`. */
export function debounced(work, ms) {
  let timer = 0;
  return (...args) => {
    clearTimeout(timer);
    timer = setTimeout(work, ms, ...args);
  };
}

/** Runs one job at a time: a new one aborts the former. `job` gets a signal; an aborted one's end is not told. */
export function latest() {
  let controller = new AbortController();
  const run = async (job) => {
    controller.abort();
    const own = (controller = new AbortController());
    try {
      return await job(own.signal);
    } catch (problem) {
      if (own.signal.aborted) return undefined;
      throw problem;
    }
  };
  run.abort = () => controller.abort();
  return run;
}

const problems = new Map(); // the sentence of each job that failed, by what it was for

/** Shows what went wrong, all of it; screen readers say it at once. */
function showProblems() {
  const line = byId("problem");
  line.textContent = [...new Set(problems.values())].join(" ");
  line.hidden = problems.size === 0;
}

export function forgetProblems() {
  problems.clear();
  showProblems();
}

/** The outcome of a job that a person asked for: its problem is shown, and goes when the next job for the same is well. */
export async function told(purpose, job) {
  let value;
  try {
    value = await job();
    problems.delete(purpose);
  } catch (problem) {
    problems.set(purpose, problem.message);
  }
  showProblems();
  return value;
}
