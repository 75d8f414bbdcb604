// The page for people: its form, and what people do. Ranking and explanations are in modules of their own.

import { at, count, make } from "./elements.js";
import { choose, rank } from "./ranking.js";
import { call, keepToken } from "./server.js";
import { attempt, state } from "./state.js";

const NUM_EXAMPLES = 24;
const KINDS = { active: "Most active", middling: "Middling", "without knowledge": "Without knowledge" };

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

at("ask").addEventListener("submit", (event) => { event.preventDefault(); attempt(rank); });
at("scenario").addEventListener("change", () => attempt(async () => { await chooseScenario(); await rank(); }));
at("user-example").addEventListener("change", () => { if (at("user-example").value) choose(at("user-example").value); });
for (const radio of document.getElementsByName("source")) radio.addEventListener("change", chooseSource);
at("token-form").addEventListener("submit", (event) => {
  event.preventDefault();
  keepToken(at("token").value.trim());
  attempt(start);
});
attempt(start);
