// Requests to the service that this page came from. Keys live in this module's memory and nowhere else.

const keys = { user: "", admin: "" };
const declined = { user: false, admin: false };
const asking = { user: null, admin: null };
let askPerson = async () => "";

/** What the service answered instead: its own sentence. */
export class ApiError extends Error {
  constructor(error, status) {
    super(error.message);
    this.code = error.code ?? "";
    this.param = error.param ?? null;
    this.status = status;
  }
}

/** ask(kind, why): resolves to the key that a person gave, "" for none. kind: "user" or "admin". */
export function askWith(ask) {
  askPerson = ask;
}

/** Ask for a key though none was missed: an empty one forgets what was known. */
export async function changeKey() {
  keys.user = await askPerson("user", "");
  keys.admin = "";
  declined.user = declined.admin = false;
}

export const get = (path, options = {}) => json(path, { ...options, method: "GET" });

/** options: signal; admin: the call needs an admin key. */
export const post = (path, body, options = {}) => json(path, { ...options, method: "POST", body });

/** The objects that a stream of server-sent events carries, until [DONE]. Throws the ApiError that one of them holds. */
export async function* streamed(path, body, options = {}) {
  const response = await answered(path, { ...options, method: "POST", body });
  try {
    for await (const data of eventData(response.body)) {
      if (data === "[DONE]") return;
      const message = JSON.parse(data);
      if (message.error) throw new ApiError(message.error, response.status);
      yield message;
    }
  } catch (problem) {
    if (problem instanceof ApiError || options.signal?.aborted) throw problem;
  }
  throw new ApiError({ message: "The stream ended early." }, response.status);
}

/** The `data` of each event in a stream of bytes. */
export async function* eventData(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  let lines = [];
  try {
    for (;;) {
      const { value, done } = await reader.read();
      if (done) return;
      const parts = (rest + value).split(/\r?\n/);
      rest = parts.pop();
      for (const line of parts) {
        if (line.startsWith("data:")) lines.push(line.slice(5).replace(/^ /, ""));
        if (line === "" && lines.length) {
          yield lines.join("\n");
          lines = [];
        }
      }
    }
  } finally {
    reader.cancel().catch(() => undefined); // the connection may be gone already
  }
}

async function json(path, options) {
  const response = await answered(path, options);
  return response.json();
}

async function answered(path, { method, body, signal, admin = false }) {
  for (;;) {
    const key = (admin && keys.admin) || keys.user;
    const response = await sent(path, { method, body, signal, key });
    if (response.ok) return response;
    const error = new ApiError(await problemOf(response), response.status);
    const kind = admin && [401, 403].includes(response.status) ? "admin" : response.status === 401 ? "user" : null;
    if (kind === null || !(await keyGiven(kind, key, error.message))) throw error;
  }
}

async function sent(path, { method, body, signal, key }) {
  const headers = { ...(key && { authorization: `Bearer ${key}` }), ...(body && { "content-type": "application/json" }) };
  try {
    return await fetch(path, { method, headers, signal, body: body && JSON.stringify(body), credentials: "omit" });
  } catch (problem) {
    if (problem.name === "AbortError") throw problem;
    throw new ApiError({ message: "The service cannot be reached.", code: "unreachable" }, 0);
  }
}

async function problemOf(response) {
  try {
    return (await response.json()).error ?? { message: `The service answered ${response.status}.` };
  } catch {
    return { message: `The service answered ${response.status}.` };
  }
}

/** Whether there is another key to try. Several calls that miss one at the same time ask a person once. */
async function keyGiven(kind, used, why) {
  if (((kind === "admin" && keys.admin) || keys.user) !== used) return true;
  if (declined[kind]) return false;
  asking[kind] ??= askPerson(kind, why).finally(() => (asking[kind] = null));
  const key = await asking[kind];
  keys[kind] = key || keys[kind];
  declined[kind] = !key && kind === "user"; // a button asks for the admin key: each press may ask again
  return key !== "";
}
