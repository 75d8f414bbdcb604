// What the page knows at the moment, and what it says when something goes wrong.

import { at } from "./elements.js";
import { Failure, forgetToken } from "./server.js";

/** model: as of /v1/model. examples: items. titles: items by id. asked: user and scenario of the ranking that is shown. */
export const state = { model: null, examples: [], titles: new Map(), asked: null };

let retry = null;

function fail(error, again) {
  if (!(error instanceof Failure)) console.error(error);
  retry = again;
  at("problem-text").textContent = error instanceof Failure ? error.message : "This page failed; the console says how.";
  at("problem").hidden = false;
  at("again").hidden = error.status === 401;
  at("problem").scrollIntoView({ block: "nearest" });
  if (!state.model) at("model").textContent = "Not connected.";
  at("status").textContent = at("why-status").textContent = "";
  if (error.status === 401) {
    forgetToken();
    at("token-form").hidden = false;
    at("token").value = "";
    at("token").focus();
  }
}

/** Runs something that asks the server; a failure is shown, with a way to try again. */
export async function attempt(work) {
  at("problem").hidden = true;
  try {
    await work();
  } catch (error) {
    fail(error, () => attempt(work));
  }
}

at("again").addEventListener("click", () => retry?.());
