// The page: loads the model, continues a text or holds a conversation, and shows the likely next tokens.

const NEXT_TOKENS = 10;
const SLICE_MS = 12; // the page reacts to clicks and keys at least this often, or after each chunk of tokens

const element = (id) => document.getElementById(id);
const header = JSON.parse(element("header").textContent);
const tokenizer = new Tokenizer(header.tokenizer);
let model;
let isChat = false;
let messages = []; // of the conversation, without the system prompt
let history = []; // earlier texts, for Undo
let job = 0; // the number of the newest computation; older ones end
let typing; // the timer that waits for the end of typing

function showError(error) {
  element("error").textContent = error.message;
  element("error").hidden = false;
}

// Lets the browser draw and react. A message is not delayed as a timer is, also in a hidden tab.
function turn() {
  return new Promise((resolve) => {
    const { port1, port2 } = new MessageChannel();
    port1.onmessage = () => {
      port1.close();
      resolve();
    };
    port2.postMessage(null);
  });
}

// Begins a computation and ends the one before. Returns the function to call between its steps: false means stop.
function beginJob() {
  clearTimeout(typing);
  const mine = ++job;
  let last = performance.now();
  return async () => {
    if (performance.now() - last > SLICE_MS) {
      await turn();
      last = performance.now();
    }
    return mine === job;
  };
}

// ---- loading ----

async function decodeBase64(text, target, onProgress) {
  const step = 1 << 20; // a multiple of 4 characters, which are 3 bytes
  let filled = 0;
  for (let start = 0; start < text.length; start += step) {
    const part = atob(text.slice(start, start + step));
    for (let i = 0; i < part.length; i++) target[filled++] = part.charCodeAt(i);
    onProgress(filled);
    await turn();
  }
  return filled;
}

async function download(address, target, onProgress) {
  if (location.protocol === "file:") {
    throw new Error("This page fetches its weights: serve its folder with `python -m http.server` and open it there.");
  }
  const response = await fetch(address);
  if (!response.ok) throw new Error(`${address}: the server answered ${response.status} ${response.statusText}`);
  const reader = response.body.getReader();
  let filled = 0;
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return filled;
    if (filled + value.length > target.length) throw new Error(`${address} is longer than ${target.length} bytes`);
    target.set(value, filled);
    filled += value.length;
    onProgress(filled);
  }
}

async function loadModel() {
  const kernelText = element("kernel").textContent;
  const memory = await createMemory(header, Uint8Array.from(atob(kernelText), (character) => character.charCodeAt(0)));
  const onProgress = (bytes) => {
    element("progress").value = bytes / header.bytes;
    element("loading-text").textContent = `Loading the model: ${megabytes(bytes)} of ${megabytes(header.bytes)} MB`;
  };
  const inline = element("weights");
  const filled = header.weights
    ? await download(header.weights, memory.weights, onProgress)
    : await decodeBase64(inline.textContent, memory.weights, onProgress);
  if (filled !== header.bytes) throw new Error(`The weights are incomplete: ${filled} of ${header.bytes} bytes.`);
  inline.remove();
  model = new Model(header, memory);
  return memory.isPlain;
}

function megabytes(bytes) {
  return (bytes / 1e6).toFixed(1);
}

// ---- generation ----

function numberOf(id, low, high) {
  const input = element(id);
  const value = input.value === "" ? Number(input.defaultValue) : Number(input.value);
  return Math.min(high, Math.max(low, value));
}

function options(room = Infinity) {
  const seed = element("seed").value;
  return {
    maxNewTokens: Math.min(room, numberOf("max-new-tokens", 1, 1e6)),
    sampling: {
      temperature: numberOf("temperature", 0, 2),
      topK: Math.floor(numberOf("top-k", 0, 1e9)),
      topP: numberOf("top-p", 1e-6, 1),
    },
    seed: seed === "" ? Math.floor(Math.random() * 2 ** 32) : Number(seed),
    endIds: header.endIds,
  };
}

// The ids that a text stands for; of one that fills the context, only the last half of the context.
function promptIds(text) {
  const ids = text === "" ? header.tokenizer.firstIds : tokenizer.encode(text);
  const { context } = header.config;
  return ids.length < context ? ids : ids.slice(-Math.max(1, context >> 1));
}

// Generates after `prompt` and calls `show` with the new text after each token.
async function stream(prompt, settings, show) {
  setRunning(true);
  const pause = beginJob();
  const begin = performance.now();
  const ids = [];
  let first = 0;
  let now = begin;
  for await (const id of generate(model, prompt, settings, pause)) {
    ids.push(id);
    now = performance.now();
    first ||= now;
    const rate = ids.length > 1 ? ` · ${format((1000 * (ids.length - 1)) / (now - first))} tokens/s` : "";
    setStatus(`first token after ${format(first - begin)} ms${rate} · ${count(ids.length, "token")}`);
    show(tokenizer.decode(ids, { skipSpecial: true }).replace(/\uFFFD+$/, ""));
  }
  show(tokenizer.decode(ids, { skipSpecial: true }));
  if (header.endIds.includes(ids[ids.length - 1])) setStatus(`${element("status").textContent} · end of text`);
  setRunning(false);
}

async function continueText() {
  const area = element("text");
  const before = area.value;
  const prompt = promptIds(before);
  history.push(before);
  await stream(prompt, options(), (text) => {
    area.value = before + text;
    area.scrollTop = area.scrollHeight;
  });
  await showNextTokens();
}

async function ask() {
  const content = element("question").value;
  if (!content.trim()) return;
  messages.push({ role: "user", content });
  let prompt;
  try {
    const system = element("system").value.trim();
    prompt = conversationPrompt(header, tokenizer, system, messages, options().maxNewTokens);
  } catch (error) {
    messages.pop();
    throw error;
  }
  element("question").value = "";
  const answer = { role: "assistant", content: "" };
  messages.push(answer);
  drawMessages();
  const shown = element("messages").lastElementChild.lastChild;
  const settings = options(header.config.context - prompt.ids.length);
  await stream(prompt.ids, settings, (text) => {
    answer.content = text.trim();
    shown.textContent = answer.content;
    element("messages").scrollTop = element("messages").scrollHeight;
  });
  if (prompt.droppedTurns) {
    setStatus(`${element("status").textContent} · ${count(prompt.droppedTurns, "older turn")} did not fit into the context`);
  }
}

async function showNextTokens() {
  if (isChat) return;
  const pause = beginJob();
  const logits = await model.logitsAfter(promptIds(element("text").value), pause);
  if (logits === null) return;
  const tokens = mostLikely(logits, NEXT_TOKENS);
  const items = tokens.map(({ id, probability }) => {
    const text = tokenizer.decode([id]);
    const button = make("button", { type: "button" });
    const share = `${(100 * probability).toFixed(1)} %`;
    button.setAttribute("aria-label", `Append ${visible(text)}, ${share}`);
    button.append(
      make("span", { className: "bar" }),
      make("span", { className: "token", textContent: visible(text) }),
      make("span", { className: "share", textContent: share }),
    );
    button.firstChild.style.width = `${(100 * probability) / tokens[0].probability}%`;
    button.onclick = () => setText(element("text").value + text);
    const item = make("li", {});
    item.append(button);
    return item;
  });
  element("next").replaceChildren(...items);
}

// ---- the page ----

function make(tag, properties) {
  return Object.assign(document.createElement(tag), properties);
}

function visible(text) {
  return text.replace(/ /g, "␣").replace(/\n/g, "⏎").replace(/\t/g, "⇥");
}

function format(number) {
  return number >= 10 ? String(Math.round(number)) : number.toFixed(1);
}

function count(number, noun) {
  return `${number} ${noun}${number === 1 ? "" : "s"}`;
}

function setStatus(text) {
  element("status").textContent = text;
}

function setRunning(isRunning) {
  element("run").disabled = isRunning;
  element("stop").disabled = !isRunning;
  element("clear").disabled = isRunning;
  element("undo").disabled = isRunning || (isChat ? messages.length : history.length) === 0;
  element("text").readOnly = isRunning;
  for (const id of ["modes", "examples", "next"]) element(id).inert = isRunning;
}

function drawMessages() {
  const items = messages.map(({ role, content }) => {
    const item = make("p", { className: `message ${role}` });
    item.append(make("b", { textContent: role === "user" ? "You" : "Model" }), document.createTextNode(content));
    return item;
  });
  element("messages").replaceChildren(...items);
  element("messages").scrollTop = element("messages").scrollHeight;
}

function setMode(chat) {
  job++;
  isChat = chat;
  element("chat-panel").hidden = !chat;
  element("text-panel").hidden = chat;
  element("next-panel").hidden = chat;
  element("chat-mode").setAttribute("aria-pressed", chat);
  element("text-mode").setAttribute("aria-pressed", !chat);
  document.querySelectorAll(".chat-only").forEach((part) => (part.hidden = !chat));
  element("run").textContent = chat ? "Send" : "Continue";
  setStatus("");
  setRunning(false);
  act(showNextTokens);
}

function undo() {
  if (isChat) {
    const question = messages.splice(-2)[0];
    element("question").value = question.content;
    drawMessages();
  } else {
    element("text").value = history.pop();
    act(showNextTokens);
  }
  setRunning(false);
}

function clear() {
  job++;
  if (isChat) {
    messages = [];
    drawMessages();
  } else {
    setText("");
  }
  setStatus("");
  setRunning(false);
}

// Replaces the text; Undo brings back the one before.
function setText(text) {
  history.push(element("text").value);
  element("text").value = text;
  setRunning(false);
  act(showNextTokens);
}

// Runs what a click or key asked for; an error is shown instead of the result.
async function act(action) {
  element("error").hidden = true;
  try {
    await action();
  } catch (error) {
    setRunning(false);
    showError(error);
  }
}

function runMode() {
  if (!element("run").disabled) act(isChat ? ask : continueText);
}

function connect() {
  element("run").onclick = runMode;
  element("stop").onclick = () => job++;
  element("undo").onclick = undo;
  element("clear").onclick = clear;
  element("chat-mode").onclick = () => setMode(true);
  element("text-mode").onclick = () => setMode(false);
  const showTemperature = () => (element("temperature-value").textContent = element("temperature").value);
  element("temperature").oninput = showTemperature;
  showTemperature();
  element("text").oninput = () => {
    job++; // what was computed for the old text ends
    clearTimeout(typing);
    typing = setTimeout(() => act(showNextTokens), 150);
  };
  document.addEventListener("keydown", (event) => {
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) {
      event.preventDefault();
      runMode();
    } else if (event.key === "Escape") job++;
  });
  for (const prompt of header.examples.filter((text) => text.trim())) {
    const button = make("button", { type: "button", textContent: prompt, title: prompt });
    button.onclick = () => (isChat ? (element("question").value = prompt) : setText(prompt));
    element("examples").append(button);
  }
}

async function start() {
  try {
    const isPlain = await loadModel();
    const { config } = header;
    const parameters = header.parameters >= 1e6 ? `${(header.parameters / 1e6).toFixed(1)} million` : header.parameters;
    element("facts").textContent =
      `${parameters} parameters, ${header.dtype === "int8" ? "8-bit" : "float32"} weights · ` +
      `context of ${config.context} tokens · computed in this browser${isPlain ? ", without WebAssembly" : ""}`;
    element("loading").hidden = true;
    element("app").hidden = false;
    element("modes").hidden = header.chat === null;
    connect();
    setMode(header.chat !== null);
  } catch (error) {
    element("loading").hidden = true;
    showError(error);
  }
}

start();
