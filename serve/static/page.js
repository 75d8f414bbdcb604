// The page for people. All text goes into the page with textContent; ids stay text, because numbers here hold 53 bits of
// an id's 64. What the endpoints give is described at /openapi.json.

const MOST_SCENARIOS = 6, MOST_ROWS = 100, NUM_EXAMPLES = 24, MOST_TIMES = 20;
const TOKEN_KEY = "llm4msr-token";
const PARTS = {
  user_level: "user-level knowledge", scenario_level: "scenario-level knowledge", match: "the match of user and item",
  item_knowledge: "item knowledge", all: "all of these",
};
const KINDS = { active: "Most active", middling: "Middling", "without knowledge": "Without knowledge" };

const at = (id) => document.getElementById(id);
const state = { model: null, examples: [], titles: new Map(), times: [], turn: 0, whyTurn: 0, asked: null, row: null, retry: null };

class Failure extends Error {
  constructor(status, message) { super(message); this.status = status; }
}

// ---------------------------------------------------------------- talking to the server

function token() { return sessionStorage.getItem(TOKEN_KEY) ?? ""; }

/** Returns JSON with raw ids as text: those behind "item" and "user" are numbers where the data has whole numbers. */
function parse(text) { return JSON.parse(text.replace(/("(?:item|user)":\s*)(-?\d+)/g, '$1"$2"')); }

async function call(path, body) {
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
function idJson(text, type) {
  return type === "int64" && /^-?\d{1,19}$/.test(text) ? BigInt(text).toString() : JSON.stringify(text);
}

// ---------------------------------------------------------------- making elements

function make(name, text, attributes = {}, ...children) {
  const element = document.createElement(name);
  if (text !== null && text !== undefined) element.textContent = text;
  for (const [key, value] of Object.entries(attributes)) {
    if (key === "onclick") element.addEventListener("click", value);
    else element.setAttribute(key, value);
  }
  element.append(...children);
  return element;
}

function fact(name, value) { return make("div", null, {}, make("dt", name), make("dd", value)); }

function quiet(text) { return make("p", text, { class: "quiet" }); }

function fold(title, ...children) { return make("details", null, {}, make("summary", title), ...children); }

const decimals = (value, num = 3) => value.toFixed(num).replace("-", "−");
const signed = (value) => (value > 0 ? "+" : "") + decimals(value);
const count = (number, one) => `${number.toLocaleString("en")} ${one}${number === 1 ? "" : "s"}`;

function move(rank, without) {
  const places = without - rank;
  if (!places) return make("span", null, {}, make("span", "=", { "aria-hidden": "true" }), make("span", "same place", { class: "unseen" }));
  const sign = places > 0 ? "▲" : "▼", way = places > 0 ? "up" : "down";
  const said = make("span", `${way} ${count(Math.abs(places), "place")}`, { class: "unseen" });
  return make("span", null, { class: way }, make("span", `${sign}${Math.abs(places)}`, { "aria-hidden": "true" }), said);
}

// ---------------------------------------------------------------- what went wrong

function fail(error, retry) {
  if (!(error instanceof Failure)) console.error(error);
  state.retry = retry;
  at("problem-text").textContent = error instanceof Failure ? error.message : "This page failed; the console says how.";
  at("problem").hidden = false;
  at("again").hidden = error.status === 401;
  at("problem").scrollIntoView({ block: "nearest" });
  if (!state.model) at("model").textContent = "Not connected.";
  at("status").textContent = at("why-status").textContent = "";
  if (error.status === 401) {
    sessionStorage.removeItem(TOKEN_KEY);
    at("token-form").hidden = false;
    at("token").value = "";
    at("token").focus();
  }
}

/** Runs something that asks the server; a failure is shown, with a way to try again. */
async function attempt(work) {
  at("problem").hidden = true;
  try {
    await work();
  } catch (error) {
    fail(error, () => attempt(work));
  }
}

// ---------------------------------------------------------------- the form

async function start() {
  const model = await call("v1/model");
  const items = await call(`v1/items?limit=${NUM_EXAMPLES}`);
  state.model = model;
  state.examples = items.items.map((found) => found.item);
  for (const found of items.items) state.titles.set(found.item, found);
  at("token-form").hidden = true;
  at("model").textContent = `${model.model_version} · ${model.backbone} · knowledge: ${model.knowledge} · ` +
    `${count(model.num_users, "user")}, ${count(model.num_items, "item")}`;
  at("scenario").replaceChildren(...model.scenarios.map((one) => make("option", one.name, { value: one.name })));
  at("scenario").value = model.example.scenario;
  at("items").value = state.examples.slice(0, 5).join("\n");
  const sets = Object.entries(model.candidate_sets);
  at("set-choice").hidden = !sets.length;
  at("set").replaceChildren(...sets.map(([name, size]) => make("option", `${name} (${count(size, "item")})`, { value: name })));
  at("user").value = model.example.user;
  await chooseScenario();
  at("main").hidden = false;
  await rank();
}

async function chooseScenario() {
  const name = at("scenario").value;
  at("scenario-text").textContent = state.model.scenarios.find((one) => one.name === name)?.description ?? "";
  const { users, counted } = await call(`v1/users?limit=12&scenario=${encodeURIComponent(name)}`);
  const groups = Object.entries(KINDS).map(([kind, label]) => {
    const options = users.filter((one) => one.kind === kind).map((one) =>
      make("option", `${one.user} (${one.num} ${counted})${one.text ? `: ${one.text}` : ""}`, { value: one.user }));
    return options.length ? make("optgroup", null, { label }, ...options) : "";
  });
  at("user-example").replaceChildren(make("option", "Choose …", { value: "" }), ...groups);
}

function chooseSource() {
  const source = document.querySelector("input[name=source]:checked").value;
  at("from-list").hidden = source !== "list";
  at("from-set").hidden = source !== "set";
}

/** Returns the body's part that names the candidates, or null if there are none. */
function candidates() {
  const source = document.querySelector("input[name=source]:checked").value;
  if (source === "set") return `"candidate_set": ${JSON.stringify(at("set").value)}`;
  const typed = source === "examples" ? state.examples : at("items").value.split(/[\n,]/).map((id) => id.trim());
  const distinct = [...new Set(typed.filter(Boolean))];
  return distinct.length ? `"items": [${distinct.map((id) => idJson(id, state.model.item_key_type)).join(", ")}]` : null;
}

// ---------------------------------------------------------------- ranking

async function rank() {
  const turn = ++state.turn, chosen = at("scenario").value, user = at("user").value.trim(), which = candidates();
  if (!user || !which) {
    at("empty").textContent = user ? "No candidates: type at least one item." : "No user: type an id, or choose an example.";
    clear();
    return;
  }
  const names = state.model.scenarios.map((one) => one.name);
  const scenarios = [chosen, ...names.filter((name) => name !== chosen)].slice(0, MOST_SCENARIOS);
  const common = `"user": ${idJson(user, state.model.user_key_type)}, ${which}`;
  const requests = scenarios.map((name) => `{${common}, "scenario": ${JSON.stringify(name)}}`);
  at("status").textContent = "Ranking …";
  at("results").setAttribute("aria-busy", "true");
  at("rank").disabled = true;
  try {
    const begin = performance.now();
    const { rankings } = await call("v1/rank:batch", `{"requests": [${requests.join(", ")}]}`);
    const clientMs = performance.now() - begin;
    const compared = await call("v1/compare", `{${common}, "scenarios": ${JSON.stringify(scenarios)}}`);
    const shown = rankings[0].results.slice(0, MOST_ROWS);
    const untitled = shown.filter((row) => !state.titles.has(row.item)).map((row) => `item=${encodeURIComponent(row.item)}`);
    if (untitled.length) {
      for (const found of (await call(`v1/items?${untitled.join("&")}`)).items) state.titles.set(found.item, found);
    }
    if (turn !== state.turn) return;
    state.asked = { user, scenario: chosen };
    showLatency(clientMs, rankings);
    showRanking(scenarios, rankings, compared.rankings, shown);
    clearWhy();
    await showUser(user, turn);
  } catch (error) {
    if (turn !== state.turn) return;
    at("empty").textContent = "No ranking.";
    clear();
    throw error;
  } finally {
    if (turn === state.turn) {
      at("results").removeAttribute("aria-busy");
      at("rank").disabled = false;
    }
  }
}

function clear() {
  at("empty").hidden = false;
  at("table").hidden = at("latency").hidden = true;
  at("summary").textContent = at("status").textContent = "";
  clearWhy();
}

function showLatency(clientMs, rankings) {
  state.times = [...state.times, clientMs].slice(-MOST_TIMES);
  const middle = state.times.toSorted((a, b) => a - b)[Math.floor(state.times.length / 2)];
  const sum = (name) => rankings.reduce((total, one) => total + one.timings_ms[name], 0);
  const milliseconds = (value) => `${value.toFixed(value < 10 ? 2 : 1)} ms`;
  at("latency").replaceChildren(
    fact("Browser", milliseconds(clientMs)),
    fact(`Median of ${state.times.length}`, milliseconds(middle)),
    fact("Server", milliseconds(sum("total"))),
    ...["encode", "knowledge", "model"].map((name) => fact(`– ${name}`, milliseconds(sum(name)))),
  );
  at("latency").hidden = false;
}

function showRanking(scenarios, rankings, compared, shown) {
  const knows = state.model.knowledge !== "none";
  const byItem = new Map(scenarios.map((name) => [name, new Map(compared[name].map((one) => [one.item, one]))]));
  const head = scenarios.map((name, i) => make("th", i ? name : `${name} ▾`, { scope: "col" }));
  at("head").replaceChildren(make("tr", null, {}, make("th", "#", { scope: "col" }), make("th", "Item", { scope: "col" }), ...head));
  at("rows").replaceChildren(...shown.map((row, place) => {
    const item = state.titles.get(row.item);
    const title = make("button", item?.text || row.item, { type: "button", class: "plain title" });
    const under = [item?.text ? row.item : "", row.known ? "" : "unknown item"].filter(Boolean).join(" · ");
    const cells = scenarios.map((name, i) => {
      const one = byItem.get(name).get(row.item), bar = make("i");
      bar.style.setProperty("--part", `${one.score * 100}%`);
      const change = knows ? [make("span", `without ${decimals(one.score_without)} `), move(one.rank, one.rank_without)] : [];
      const value = make("b", decimals(one.score)), rank = make("span", ` #${one.rank}`, { class: "quiet" });
      return make("td", null, { class: i ? "score" : "score asked", "data-scenario": name },
        value, rank, make("span", null, { class: "bar", "aria-hidden": "true" }, bar), make("span", null, { class: "quiet change" }, ...change));
    });
    const line = make("tr", null, { onclick: () => attempt(() => showWhy(row.item, line)) },
      make("td", place + 1, { class: "place" }), make("th", null, { scope: "row" }, title, make("div", under, { class: "quiet" })), ...cells);
    return line;
  }));
  const moved = compared[scenarios[0]].filter((one) => one.rank !== one.rank_without).length.toLocaleString("en"), all = compared[scenarios[0]].length;
  const first = rankings[0];
  at("summary").textContent = [
    first.user_known ? "" : "The model does not know this user.",
    !knows ? "This model is a backbone alone: nothing of a language model is in it."
      : first.knowledge_known ? `Knowledge moves ${moved} of ${count(all, "item")} in ${scenarios[0]}: ▲ up, ▼ down.`
        : `There is no knowledge of this user; that of scenarios and items moves ${moved} of ${count(all, "item")}.`,
    all > shown.length ? `The best ${shown.length} are shown.` : "",
  ].filter(Boolean).join(" ");
  at("status").textContent = `${count(all, "candidate")} ranked for ${state.asked.user} in ${scenarios[0]}.`;
  at("table").hidden = false;
  at("empty").hidden = true;
}

// ---------------------------------------------------------------- the user, and why

function words(found, title) {
  const parts = [];
  if (found.text !== null) parts.push(make("p", "The language model wrote:", { class: "quiet" }), make("pre", found.text));
  if (found.prompt !== null) parts.push(make("p", "It had read:", { class: "quiet" }), make("pre", found.prompt));
  if (found.reason) parts.push(quiet(`Absent: ${found.reason}.`));
  return fold(title, ...parts);
}

async function showUser(user, turn) {
  const found = await call(`v1/user?user=${encodeURIComponent(user)}`);
  if (turn !== state.turn) return;
  const liked = found.liked.map((log) => fold(
    `Liked in ${log.log}: ${log.num_likes.toLocaleString("en")}`,
    make("ul", null, {}, ...log.latest.map((one) => make("li", one.text ? `${one.text} (${one.item})` : one.item)))));
  const near = found.nearest.users.map((one) => make("li", null, {},
    ...one.users.flatMap((id) => [make("button", id, { type: "button", class: "plain", onclick: () => choose(id) }), " "]),
    make("span", `${one.num_users > one.users.length ? `of ${one.num_users}, ` : ""}${decimals(one.similarity, 2)}`, { class: "quiet" })));
  const sampled = found.nearest.num_compared < found.nearest.num_vectors
    ? [quiet(`Of ${found.nearest.num_compared.toLocaleString("en")} of ${found.nearest.num_vectors.toLocaleString("en")} vectors.`)] : [];
  at("about-title").textContent = `User ${found.user}`;
  at("about-body").className = "";
  at("about-body").replaceChildren(
    make("dl", null, { class: "facts" }, fact("Known", found.known ? "yes" : "no"), fact("Knowledge", found.knowledge_known ? "yes" : "no"),
      fact("Training rows", found.num_train_rows.toLocaleString("en"))),
    ...(found.text ? [make("p", found.text)] : []),
    ...(liked.length ? liked : [quiet(`Likes are absent: ${found.liked_reason}.`)]),
    words(found.words, "Language model"),
    ...(near.length ? [fold("Nearest users by knowledge", make("ul", null, {}, ...near), ...sampled)] : [quiet(`Near users are absent: ${found.nearest.reason}.`)]),
  );
}

function choose(user) {
  at("user").value = user;
  attempt(rank);
}

async function showWhy(item, line) {
  const { user, scenario } = state.asked, turn = ++state.whyTurn;
  state.row?.removeAttribute("aria-current");
  state.row = line;
  line.setAttribute("aria-current", "true");
  at("why-status").textContent = "Explaining …";
  const ask = new URLSearchParams({ user, scenario, item });
  const found = await call(`v1/explain?${ask}`);
  if (turn !== state.whyTurn) return;
  const measured = (name, part, say) => fact(name, part.value === null ? `absent: ${part.reason}` : say(part.value));
  const without = found.without.map((part) => make("tr", null, {}, make("th", PARTS[part.part], { scope: "row" }),
    ...(part.score === null ? [make("td", part.reason, { colspan: "2", class: "quiet" })] : [
      make("td", decimals(part.score), { class: "number", title: `logit ${decimals(part.logit)}` }),
      make("td", signed(part.score - found.score), { class: `number ${part.score > found.score ? "up" : "down"}` })])));
  const heading = ["Without", "Score", "Change"].map((name, i) => make("th", name, { scope: "col", ...(i ? { class: "number" } : {}) }));
  const scenarios = found.scenarios.map((one) => `${one.name} ${decimals(one.raw_similarity, 2)}`).join(", ");
  at("why-body").replaceChildren(
    make("p", null, {}, make("strong", found.item.text || found.item.item)),
    quiet([found.item.item, found.item.known ? count(found.item.num_train_rows, "training row") : "unknown item", `for ${user} in ${scenario}`].join(" · ")),
    make("dl", null, { class: "facts" }, fact("Score", decimals(found.score)), fact("Logit", decimals(found.logit))),
    make("table", null, {}, make("thead", null, {}, make("tr", null, {}, ...heading)), make("tbody", null, {}, ...without)),
    make("h3", "How knowledge acts"),
    make("dl", null, { class: "facts" },
      measured("The user's layers move the input by", found.user_level, (value) => `${(value * 100).toFixed(0)} % of its length`),
      measured("The scenario's layers add a logit of", found.scenario_level, signed),
      measured("Cosine of user and item", found.match, (value) => decimals(value)),
      fact("Cosine of the scenario with", scenarios || `absent: ${found.scenarios_reason}`)),
    make("h3", "What the language model read"),
    words(found.user.words, `User ${user}`),
    words(found.item_words, "This item"),
    words(found.scenario_words, `Scenario ${scenario}`),
    make("button", "Back to the ranking", { type: "button", onclick: back }),
  );
  at("why-status").textContent = "";
  at("why-title").focus({ preventScroll: true });
  if (!matchMedia("(min-width: 1151px)").matches) at("why").scrollIntoView();
}

function clearWhy() {
  state.whyTurn++;
  state.row = null;
  at("why-status").textContent = "";
  at("why-body").replaceChildren(make("p", "Choose a row of the ranking.", { class: "hollow" }));
}

function back() { (state.row?.querySelector("button") ?? at("results")).focus(); }

// ---------------------------------------------------------------- what people do

at("ask").addEventListener("submit", (event) => { event.preventDefault(); attempt(rank); });
at("scenario").addEventListener("change", () => attempt(async () => { await chooseScenario(); await rank(); }));
at("user-example").addEventListener("change", () => { if (at("user-example").value) choose(at("user-example").value); });
for (const radio of document.getElementsByName("source")) radio.addEventListener("change", chooseSource);
at("why").addEventListener("keydown", (event) => { if (event.key === "Escape") back(); });
at("again").addEventListener("click", () => state.retry?.());
at("token-form").addEventListener("submit", (event) => {
  event.preventDefault();
  sessionStorage.setItem(TOKEN_KEY, at("token").value.trim());
  attempt(start);
});
attempt(start);
