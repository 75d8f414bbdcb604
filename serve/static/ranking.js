// Ranks the candidates in all scenarios, with and without knowledge, and shows it.

import { at, count, decimals, fact, make } from "./elements.js";
import { clearWhy, showUser, showWhy } from "./explained.js";
import { call, idJson } from "./server.js";
import { attempt, state } from "./state.js";

const MOST_SCENARIOS = 6, MOST_ROWS = 100, MOST_TIMES = 20;

let turn = 0, times = [];

/** Returns the body's part that names the candidates, or null if there are none. */
function candidates() {
  const source = document.querySelector("input[name=source]:checked").value;
  if (source === "set") return `"candidate_set": ${JSON.stringify(at("set").value)}`;
  const typed = source === "examples" ? state.examples : at("items").value.split(/[\n,]/).map((id) => id.trim());
  const distinct = [...new Set(typed.filter(Boolean))];
  return distinct.length ? `"items": [${distinct.map((id) => idJson(id, state.model.item_key_type)).join(", ")}]` : null;
}

export async function rank() {
  const own = ++turn, chosen = at("scenario").value, user = at("user").value.trim(), which = candidates();
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
    if (own !== turn) return;
    state.asked = { user, scenario: chosen };
    showLatency(clientMs, rankings);
    showRanking(scenarios, rankings, compared.rankings, shown);
    clearWhy();
    await showUser(user, () => own === turn, choose);
  } catch (error) {
    if (own !== turn) return;
    at("empty").textContent = "No ranking.";
    clear();
    throw error;
  } finally {
    if (own === turn) {
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
  times = [...times, clientMs].slice(-MOST_TIMES);
  const middle = times.toSorted((a, b) => a - b)[Math.floor(times.length / 2)];
  const sum = (name) => rankings.reduce((total, one) => total + one.timings_ms[name], 0);
  const milliseconds = (value) => `${value.toFixed(value < 10 ? 2 : 1)} ms`;
  at("latency").replaceChildren(
    fact("Browser", milliseconds(clientMs)),
    fact(`Median of ${times.length}`, milliseconds(middle)),
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

function move(rank, without) {
  const places = without - rank;
  if (!places) return make("span", null, {}, make("span", "=", { "aria-hidden": "true" }), make("span", "same place", { class: "unseen" }));
  const sign = places > 0 ? "▲" : "▼", way = places > 0 ? "up" : "down";
  const said = make("span", `${way} ${count(Math.abs(places), "place")}`, { class: "unseen" });
  return make("span", null, { class: way }, make("span", `${sign}${Math.abs(places)}`, { "aria-hidden": "true" }), said);
}

export function choose(user) {
  at("user").value = user;
  attempt(rank);
}
