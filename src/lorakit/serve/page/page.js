// Chat with up to four models side by side. Text of models and of the server becomes text nodes only, never HTML.

const MOST_COLUMNS = 4;
const ALTERNATIVES = 5;
const MOST_COMPARED = 4e6; // words × words, beyond which the order of words is not compared
const SHADES = [0.1, 0.4, 0.8]; // probabilities below which tokens get the classes p0, p1 and p2

const at = (id) => document.getElementById(id);
const columns = new Map(); // model id -> column, in the order of the list
let key = "";
let running = null; // AbortController of the answers that are being generated
let planned = false; // whether the answers will be compared soon
let follows = true; // whether the window shows the end of the answers, unless the user has scrolled

function make(tag, className = "", text = "", ...children) {
  const element = document.createElement(tag);
  element.className = className;
  element.textContent = text;
  element.append(...children);
  return element;
}

const say = (text) => { at("status").textContent = text; };

// --- the server ---

async function ask(path, body, signal) {
  const headers = key ? { Authorization: `Bearer ${key}` } : {};
  const options = body === undefined ? {} : { method: "POST", body: JSON.stringify(body) };
  if (body !== undefined) headers["Content-Type"] = "application/json";
  const reply = await fetch(path, { ...options, headers, signal, cache: "no-store" });
  if (reply.ok) return reply;
  if (reply.status === 401) askForKey();
  const fault = await reply.json().catch(() => null);
  throw new Error(fault?.error?.message ?? `The server answers with status ${reply.status}.`);
}

function askForKey() {
  at("login").hidden = false;
  at("key").focus();
}

const problem = (error) => (error instanceof TypeError ? "The server cannot be reached." : error.message);

async function* events(reply) {
  const reader = reply.body.pipeThrough(new TextDecoderStream()).getReader();
  for (let waiting = ""; ;) {
    const { done, value } = await reader.read();
    if (done) throw new Error("The connection ended before the answer was complete.");
    const lines = (waiting + value).split("\n");
    waiting = lines.pop();
    for (const line of lines) {
      if (line === "data: [DONE]") return;
      if (!line.startsWith("data: ")) continue;
      const event = JSON.parse(line.slice(6));
      if (event.error) throw new Error(event.error.message);
      yield event;
    }
  }
}

// --- models ---

async function loadModels() {
  try {
    const found = await (await ask("v1/models")).json();
    const chosen = new Set([...document.querySelectorAll("#models :checked")].map((box) => box.value));
    if (!chosen.size) for (const one of found.data.slice(0, MOST_COLUMNS)) chosen.add(one.id);
    at("models").replaceChildren(...found.data.map((one) => card(one, chosen.has(one.id))));
    at("server").textContent = found.lorakit?.system_fingerprint ?? "";
    say("");
    arrange();
  } catch (error) {
    say(problem(error));
  }
}

function card(model, isChosen) {
  const box = make("input");
  Object.assign(box, { type: "checkbox", value: model.id, checked: isChosen });
  const list = make("dl");
  const facts = { id: model.id, base: model.parent, context: `${model.max_model_len} tokens`, ...flat(model.lorakit) };
  for (const [name, value] of Object.entries(facts)) {
    if (value !== null && value !== undefined) list.append(make("dt", "", name), make("dd", "", `${value}`));
  }
  const kind = model.parent === null ? "base" : "adapter";
  const label = make("label", "", "", box, make("span", "name", model.root), make("small", "", kind));
  return make("div", "card", "", label, make("details", "", "", make("summary", "", "Facts"), list));
}

function flat(facts, prefix = "") {
  const found = {};
  for (const [name, value] of Object.entries(facts ?? {})) {
    const isGroup = value !== null && typeof value === "object" && !Array.isArray(value);
    Object.assign(found, isGroup ? flat(value, `${prefix}${name}.`) : { [`${prefix}${name}`.replaceAll("_", " ")]: value });
  }
  return found;
}

function arrange() {
  const boxes = [...document.querySelectorAll("#models input")];
  const chosen = boxes.filter((box) => box.checked);
  for (const box of boxes) box.disabled = Boolean(running) || (!box.checked && chosen.length >= MOST_COLUMNS);
  const kept = new Map(columns);
  columns.clear();
  for (const { value: id } of chosen) columns.set(id, kept.get(id) ?? column(id));
  at("columns").replaceChildren(...[...columns.values()].map((one) => one.element));
  align();
  compare();
}

// The rows of all columns: the heading, then one for each turn.
function align() {
  const turns = Math.max(0, ...[...columns.values()].map((one) => one.answers.length));
  for (const one of columns.values()) {
    one.element.style.gridRow = `span ${1 + turns}`;
    one.answers.forEach((body, turn) => { body.parentElement.style.gridRow = `${2 + turn}`; });
  }
}

function column(id) {
  const heading = make("h2", "", id);
  const element = make("section", "column", "", heading);
  element.setAttribute("aria-label", id);
  return { id, element, messages: [], answers: [] };
}

// --- conversations ---

function settings() {
  const number = (id) => (at(id).value === "" ? undefined : at(id).valueAsNumber);
  const random = () => crypto.getRandomValues(new Uint32Array(1))[0];
  return {
    temperature: number("temperature"),
    max_tokens: number("limit"),
    seed: number("seed") ?? random(), // one seed for all columns
    stream: true,
    logprobs: true,
    top_logprobs: ALTERNATIVES,
  };
}

async function send(text) {
  const invalid = document.querySelector("#settings :invalid");
  if (invalid) {
    invalid.closest("details").open = true;
    invalid.reportValidity();
    return;
  }
  if (!columns.size) return say("Select a model.");
  running = new AbortController();
  follows = true;
  toggle();
  say("Answering …");
  const given = settings();
  const turn = Math.max(...[...columns.values()].map((one) => one.answers.length));
  const results = await Promise.all([...columns.values()].map((one) => answer(one, text, given, turn)));
  running = null;
  toggle();
  const cut = results.filter((made) => !made.isComplete).length;
  say(cut ? `${cut} of ${results.length} answers are not complete.` : `Complete; seed ${given.seed}.`);
  if (!at("prompt").value && !results.some((made) => made.text)) at("prompt").value = text;
}

async function answer(one, text, given, turn) {
  const body = make("p", "answer");
  body.dir = "auto";
  body.tabIndex = 0;
  body.setAttribute("role", "group");
  body.setAttribute("aria-label", `Answer of ${one.id}; arrow keys show the probabilities of its tokens`);
  body.setAttribute("aria-busy", "true");
  const asked = make("p", "user", text);
  asked.dir = "auto";
  const note = make("p", "note", `seed ${given.seed}`);
  const element = make("div", "turn", "", asked, body, note);
  one.element.append(element);
  one.answers[turn] = body;
  align();
  if (one === columns.values().next().value) element.scrollIntoView({ block: "nearest" });
  const system = at("system").value.trim();
  const messages = [...(system ? [{ role: "system", content: system }] : []), ...one.messages, { role: "user", content: text }];
  const made = { text: "", tokens: 0, reason: "", isComplete: false };
  try {
    const reply = await ask("v1/chat/completions", { model: one.id, messages, ...given }, running.signal);
    for await (const event of events(reply)) extend(body, event.choices[0], made);
    note.textContent = `${made.tokens} tokens, ended by ${made.reason || "the server"}, seed ${given.seed}`;
    made.isComplete = true;
  } catch (error) {
    if (error.name === "AbortError") note.textContent = `stopped after ${made.tokens} tokens, seed ${given.seed}`;
    else element.append(make("p", "error", problem(error)));
  }
  body.removeAttribute("aria-busy");
  if (made.text) one.messages.push({ role: "user", content: text }, { role: "assistant", content: made.text });
  plan();
  return made;
}

function extend(body, choice, made) {
  if (!choice) return;
  const text = choice.delta.content ?? "";
  const tokens = choice.logprobs?.content ?? [];
  made.text += text;
  made.tokens += tokens.length;
  made.reason = choice.finish_reason ?? made.reason;
  if (tokens.length && tokens.map((one) => one.token).join("") === text) {
    for (const one of tokens) body.append(span(one.token, [one]));
  } else if (text) { // parts of characters, or text that was held back
    body.append(span(text, tokens));
  } else if (tokens.length) { // the token that ends an answer
    body.append(span(` ${tokens.map((one) => one.token).join("")}`, tokens, "special"));
  }
  plan();
}

const details = new WeakMap(); // span -> its tokens

function span(text, tokens, kind = "") {
  const least = Math.min(1, ...tokens.map((one) => Math.exp(one.logprob)));
  const shade = SHADES.findIndex((limit) => least < limit);
  const found = make("span", `token ${kind} ${shade < 0 ? "" : `p${shade}`}`, text);
  details.set(found, tokens);
  return found;
}

// --- differences ---

function plan() {
  if (planned) return;
  planned = true;
  setTimeout(() => { planned = false; compare(); follow(); }, 100);
}

// Columns below each other, in a narrow window, grow at different places, so only the beginning of a turn is shown.
function follow() {
  if (!follows) return;
  const tops = new Set([...columns.values()].map((one) => one.element.offsetTop));
  if (tops.size === 1) window.scrollTo(0, document.documentElement.scrollHeight);
}

function compare() {
  const [first, ...others] = columns.values();
  if (!first) return;
  for (const body of first.answers) if (body) mark(body, []);
  for (const other of others) {
    other.answers.forEach((body, turn) => {
      const base = first.answers[turn];
      mark(body, base ? differing(wordsOf(base), wordsOf(body), base.hasAttribute("aria-busy")) : []);
    });
  }
}

function wordsOf(body) {
  const text = [...body.children].filter((one) => !one.classList.contains("special")).map((one) => one.textContent).join("");
  return [...text.matchAll(/\S+/gu)].map((one) => ({ text: one[0], start: one.index, end: one.index + one[0].length }));
}

// Words of `mine` outside a longest common subsequence with `base`; those beyond the end of an unfinished base are left out.
function differing(base, mine, isUnfinished) {
  let start = 0;
  while (start < base.length && start < mine.length && base[start].text === mine[start].text) start += 1;
  const [left, right] = [base.slice(start).map((one) => one.text), mine.slice(start)];
  if (isUnfinished && !left.length) return [];
  if (left.length * right.length > MOST_COMPARED) {
    const known = new Set(left);
    return right.filter((one) => !known.has(one.text));
  }
  const width = right.length + 1;
  const lengths = new Uint32Array((left.length + 1) * width);
  for (let i = left.length - 1; i >= 0; i -= 1) {
    for (let j = right.length - 1; j >= 0; j -= 1) {
      lengths[i * width + j] = left[i] === right[j].text
        ? lengths[(i + 1) * width + j + 1] + 1
        : Math.max(lengths[(i + 1) * width + j], lengths[i * width + j + 1]);
    }
  }
  const found = [];
  for (let i = 0, j = 0; j < right.length;) {
    if (i < left.length && left[i] === right[j].text) { i += 1; j += 1; }
    else if (i < left.length && lengths[(i + 1) * width + j] >= lengths[i * width + j + 1]) i += 1;
    else { found.push(right[j]); j += 1; }
  }
  return found;
}

function mark(body, words) {
  let end = 0;
  let next = 0;
  for (const one of body.children) {
    const start = end;
    const isSpecial = one.classList.contains("special");
    if (!isSpecial) end += one.textContent.length;
    while (next < words.length && words[next].end <= start) next += 1;
    one.classList.toggle("differs", !isSpecial && next < words.length && words[next].start < end);
  }
}

// --- probabilities ---

let current = null; // the token whose probabilities are shown

function show(token) {
  current?.classList.remove("current");
  current = token;
  at("tip").hidden = !token;
  if (!token) return;
  token.classList.add("current");
  const table = make("table");
  const percent = (value) => (Math.exp(value) < 0.001 ? "<0.1%" : `${(100 * Math.exp(value)).toFixed(1)}%`);
  const row = (one, kind) => table.append(make("tr", kind, "", make("td", "", JSON.stringify(one.token)), make("td", "", percent(one.logprob))));
  for (const one of details.get(token)) {
    row(one, "chosen");
    for (const other of one.top_logprobs) if (other.token !== one.token || other.logprob !== one.logprob) row(other, "");
  }
  at("tip").replaceChildren(details.get(token).length ? table : make("p", "note", "No probabilities."));
  const [place, tip] = [token.getClientRects()[0] ?? token.getBoundingClientRect(), at("tip").getBoundingClientRect()];
  const isBelow = place.bottom + tip.height + 8 < window.innerHeight;
  at("tip").style.top = `${Math.max(4, isBelow ? place.bottom + 6 : place.top - tip.height - 6)}px`;
  at("tip").style.left = `${Math.max(4, Math.min(place.left, window.innerWidth - tip.width - 8))}px`;
}

function move(body, name) {
  const inside = current?.parentElement === body;
  const steps = {
    ArrowRight: () => (inside ? current.nextElementSibling ?? current : body.firstElementChild),
    ArrowLeft: () => (inside ? current.previousElementSibling ?? current : body.lastElementChild),
    Home: () => body.firstElementChild,
    End: () => body.lastElementChild,
  };
  const found = steps[name]?.();
  if (!found) return false;
  found.scrollIntoView({ block: "nearest" });
  show(found);
  return true;
}

// --- controls ---

function toggle() {
  at("send").disabled = at("clear").disabled = at("refresh").disabled = Boolean(running);
  at("stop").disabled = !running;
  arrange();
}

function classes() {
  for (const name of ["differences", "shades"]) at("columns").classList.toggle(name, at(name).checked);
}

at("models").addEventListener("change", arrange);
at("settings").addEventListener("change", classes);
at("refresh").addEventListener("click", loadModels);
at("stop").addEventListener("click", () => running?.abort());
at("clear").addEventListener("click", () => { columns.clear(); show(null); say(""); arrange(); at("prompt").focus(); });
at("login").addEventListener("submit", (event) => {
  event.preventDefault();
  key = at("key").value;
  at("key").value = "";
  at("login").hidden = true;
  loadModels();
});
at("composer").addEventListener("submit", (event) => {
  event.preventDefault();
  const text = at("prompt").value;
  if (running || !text.trim()) return;
  at("prompt").value = "";
  send(text);
});
at("prompt").addEventListener("keydown", (event) => {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  at("composer").requestSubmit();
});
at("columns").addEventListener("pointerover", (event) => show(event.target.closest(".token")));
at("columns").addEventListener("pointerleave", () => show(null));
at("columns").addEventListener("focusout", () => show(null));
at("columns").addEventListener("focusin", (event) => { if (event.target.matches(".answer:focus-visible")) move(event.target, "Home"); });
at("columns").addEventListener("keydown", (event) => {
  if (event.target.matches(".answer") && move(event.target, event.key)) event.preventDefault();
});
document.addEventListener("keydown", (event) => { if (event.key === "Escape") show(null); });
document.addEventListener("scroll", () => {
  const page = document.documentElement;
  follows = page.scrollHeight - page.clientHeight - window.scrollY < 40;
  if (current && !document.activeElement.matches(".answer")) show(null);
}, { passive: true });

classes();
loadModels();
