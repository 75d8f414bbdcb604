// What is known of the user, and why a candidate has its score.

import { at, count, decimals, fact, fold, make, quiet, signed, words } from "./elements.js";
import { call } from "./server.js";
import { state } from "./state.js";

const PARTS = {
  user_level: "user-level knowledge", scenario_level: "scenario-level knowledge", match: "the match of user and item",
  item_knowledge: "item knowledge", all: "all of these",
};

let turn = 0, row = null;

/** Shows a user, unless another one is asked for meanwhile; near ones can be chosen. */
export async function showUser(user, isAsked, choose) {
  const found = await call(`v1/user?user=${encodeURIComponent(user)}`);
  if (!isAsked()) return;
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

export async function showWhy(item, line) {
  const { user, scenario } = state.asked, own = ++turn;
  row?.removeAttribute("aria-current");
  row = line;
  line.setAttribute("aria-current", "true");
  at("why-status").textContent = "Explaining …";
  const ask = new URLSearchParams({ user, scenario, item });
  const found = await call(`v1/explain?${ask}`);
  if (own !== turn) return;
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

export function clearWhy() {
  turn++;
  row = null;
  at("why-status").textContent = "";
  at("why-body").replaceChildren(make("p", "Choose a row of the ranking.", { class: "hollow" }));
}

function back() { (row?.querySelector("button") ?? at("results")).focus(); }

at("why").addEventListener("keydown", (event) => { if (event.key === "Escape") back(); });
