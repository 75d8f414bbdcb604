// Talks to the server. What the endpoints give is described at /openapi.json. Ids stay text, because numbers here hold
// 53 bits of an id's 64.

const TOKEN_KEY = "llm4msr-token";

export class Failure extends Error {
  constructor(status, message) { super(message); this.status = status; }
}

function token() { return sessionStorage.getItem(TOKEN_KEY) ?? ""; }

export function keepToken(given) { sessionStorage.setItem(TOKEN_KEY, given); }

export function forgetToken() { sessionStorage.removeItem(TOKEN_KEY); }

/** Returns JSON with raw ids as text: those behind "item" and "user" are numbers where the data has whole numbers. */
function parse(text) { return JSON.parse(text.replace(/("(?:item|user)":\s*)(-?\d+)/g, '$1"$2"')); }

export async function call(path, body) {
  const headers = { accept: "application/json" };
  if (token()) headers.authorization = `Bearer ${token()}`;
  if (body !== undefined) headers["content-type"] = "application/json";
  let answer, text;
  try {
    answer = await fetch(path, { method: body === undefined ? "GET" : "POST", headers, body, cache: "no-store" });
    text = await answer.text();
  } catch {
    throw new Failure(0, "The server cannot be reached. Is it running?");
  }
  if (answer.ok) return parse(text);
  throw new Failure(answer.status, explainFailure(answer, text));
}

function explainFailure(answer, text) {
  let said = "";
  try {
    const detail = JSON.parse(text).detail;
    said = Array.isArray(detail) ? detail.map((part) => part.msg).join("; ") : String(detail ?? "");
  } catch { /* not of the API: a proxy's own page */ }
  if (answer.status === 401) return token() ? "The server does not accept this token." : "The server asks for a token.";
  if (answer.status === 503) return `The server is busy: try again in ${answer.headers.get("retry-after") ?? "a few"} s.`;
  if (answer.status === 422) return said || "The server cannot answer this.";
  return `The server failed (${answer.status}). ${said}`;
}

/** Returns an id as JSON of the data's type; what cannot be one is left to the server to refuse. */
export function idJson(text, type) {
  return type === "int64" && /^-?\d{1,19}$/.test(text) ? BigInt(text).toString() : JSON.stringify(text);
}
