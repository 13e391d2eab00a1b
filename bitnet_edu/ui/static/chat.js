// The chat panel's page side. Everything a person or a model wrote is set with textContent.

import { element } from "./dom.js";

function button(label, title, onClick) {
  const node = element("button", { class: "bn-button", type: "button", title }, label);
  node.addEventListener("click", onClick);
  return node;
}

function field(label, input) {
  return element("label", { class: "bn-field" }, element("span", {}, label), input);
}

function bubble(role, text) {
  const who = element("div", { class: "bn-who" }, role === "user" ? "You" : "BitNet");
  const body = element("div", { class: "bn-text", dir: "auto" });
  body.textContent = text;
  const copy = button("Copy", "Copy this message", async () => {
    await navigator.clipboard.writeText(body.textContent);
    copy.textContent = "Copied";
    setTimeout(() => (copy.textContent = "Copy"), 1200);
  });
  return element("div", { class: `bn-message bn-${role}` }, element("div", { class: "bn-head" }, who, copy), body);
}

// lone surrogates, which a file or a keyboard may hold, are no text that can be sent
function wellFormed(value) {
  const clean = (_, v) => (typeof v === "string" ? v.replace(/\p{Surrogate}/gu, "\ufffd") : v);
  return JSON.parse(JSON.stringify(value), clean);
}

function saveFile(name, value) {
  const blob = new Blob([JSON.stringify(value, null, 1)], { type: "application/json" });
  const link = element("a", { href: URL.createObjectURL(blob), download: name });
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 1000);
}

function render({ model, el }) {
  let waiting; // a page without a kernel swallows messages, so somebody has to notice
  const command = (name, value = null) => {
    model.send({ do: name, value: wellFormed(value) });
    clearTimeout(waiting);
    waiting = setTimeout(() => {
      notice.textContent =
        "No kernel answers: it is busy with another cell, or this page has none. " +
        "Open the notebook, or run `bitnet-edu chat`, to go on with the conversation.";
    }, 4000);
  };
  const log = element("div", { class: "bn-log", role: "log", "aria-live": "polite", tabindex: "0", "aria-label": "Conversation" });
  const notice = element("div", { class: "bn-notice", role: "status" });
  const stats = element("div", { class: "bn-stats", role: "status", "aria-label": "Speed and context" });
  const input = element("textarea", { class: "bn-input", rows: "2", placeholder: "Write a message", "aria-label": "Message" });

  const forget = button(
    "Forget the oldest messages and send again",
    "Makes room in the context; Clear forgets everything",
    () => command("forget"),
  );

  // model picker
  const picker = element("select", { "aria-label": "Model" });
  const other = "Another folder, file or hub id ...";
  const drawSources = () => {
    picker.replaceChildren(
      ...[...model.get("sources"), other].map((name) => element("option", { value: name }, name)),
    );
    picker.value = model.get("source");
  };
  picker.addEventListener("change", () => {
    const chosen = picker.value === other ? window.prompt("Folder, .gguf file or hub id") : picker.value;
    drawSources();
    if (chosen) command("load", chosen);
  });

  // settings
  const system = element("textarea", { rows: "2", placeholder: "none" });
  system.value = model.get("system");
  system.addEventListener("change", () => {
    model.set("system", wellFormed(system.value));
    model.save_changes();
  });
  const numbers = {
    temperature: ["Temperature (0 = greedy)", { min: 0, max: 2, step: 0.1 }],
    top_p: ["top-p", { min: 0.05, max: 1, step: 0.05 }],
    top_k: ["top-k (0 = off)", { min: 0, max: 1000, step: 1 }],
    seed: ["Seed", { min: 0, max: 1e9, step: 1 }],
    max_new_tokens: ["Longest answer, tokens", { min: 1, max: 4096, step: 1 }],
  };
  const settings = Object.entries(numbers).map(([name, [label, limits]]) => {
    const box = element("input", { type: "number", ...limits });
    box.value = model.get("settings")[name];
    box.addEventListener("change", () => {
      if (!box.checkValidity() || box.value === "") box.value = model.get("settings")[name];
      model.set("settings", { ...model.get("settings"), [name]: Number(box.value) });
      model.save_changes();
    });
    return field(label, box);
  });
  const opener = element("input", { type: "file", accept: ".json,application/json", hidden: "" });
  opener.addEventListener("change", async () => {
    const text = await opener.files[0].text();
    opener.value = "";
    try {
      command("open", JSON.parse(text));
    } catch {
      command("open", null);
    }
  });
  const conversation = () => ({ system: model.get("system"), messages: model.get("messages") });
  const panel = element(
    "details",
    { class: "bn-settings" },
    element("summary", {}, "Settings"),
    field("System prompt", system),
    element("div", { class: "bn-grid" }, ...settings),
    element(
      "div",
      { class: "bn-row" },
      button("Save", "Save the conversation as a JSON file", () => saveFile("conversation.json", conversation())),
      button("Open", "Open a saved conversation", () => opener.click()),
      opener,
    ),
  );

  // actions
  const send = () => {
    if (!input.value.trim() || model.get("busy")) return;
    command("send", input.value);
    input.value = "";
  };
  const sendButton = button("Send", "Send (Enter)", send);
  const stopButton = button("Stop", "Stop the answer (Escape)", () => command("stop"));
  const againButton = button("Again", "Answer the last message again", () => command("again"));
  const clearButton = button("Clear", "Forget this conversation", () => command("clear"));
  input.addEventListener("keydown", (event) => {
    if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
      event.preventDefault();
      send();
    }
  });
  const root = element(
    "div",
    { class: "bn-chat" },
    element("div", { class: "bn-row bn-top" }, field("Model", picker), stats),
    panel,
    log,
    notice,
    element("div", { class: "bn-row" }, forget),
    input,
    element("div", { class: "bn-row" }, sendButton, stopButton, againButton, clearButton),
  );
  root.addEventListener("keydown", (event) => {
    event.stopPropagation(); // the notebook has shortcuts of its own
    if (event.key === "Escape" && model.get("busy")) command("stop");
  });

  // drawing
  let live = null;
  const atBottom = () => log.scrollHeight - log.scrollTop - log.clientHeight < 60;
  const drawMessages = () => {
    live = null;
    log.replaceChildren(...model.get("messages").map((m) => bubble(m.role, m.content)));
    log.scrollTop = log.scrollHeight;
  };
  const drawPartial = () => {
    const text = model.get("partial");
    if (!text) return;
    const follow = atBottom();
    if (!live) log.append((live = bubble("assistant", "")));
    live.querySelector(".bn-text").textContent = text;
    if (follow) log.scrollTop = log.scrollHeight;
  };
  const drawBusy = () => {
    const busy = model.get("busy");
    root.classList.toggle("bn-busy", busy);
    root.setAttribute("aria-busy", busy);
    stopButton.disabled = !busy;
    for (const node of [sendButton, againButton, clearButton, forget, picker]) node.disabled = busy;
    drawUnsent();
  };
  const drawNotice = () => (notice.textContent = model.get("notice"));
  const drawFull = () => (forget.hidden = !model.get("full"));
  const drawUnsent = () => {
    // what could not be answered goes back to where it was written
    if (!model.get("busy") && model.get("unsent") && !input.value) input.value = model.get("unsent");
  };
  const drawStats = () => {
    const s = model.get("stats");
    const parts = [];
    if (s.tokens_per_second) parts.push(`${s.tokens_per_second.toFixed(1)} tokens/s`);
    if (s.first_token_seconds) parts.push(`first token ${s.first_token_seconds.toFixed(2)} s`);
    if (s.context) parts.push(`context ${s.context_used} of ${s.context}`);
    stats.textContent = parts.join("  ·  ");
  };
  const watched = {
    messages: drawMessages,
    partial: drawPartial,
    busy: drawBusy,
    notice: drawNotice,
    stats: drawStats,
    sources: drawSources,
    source: drawSources,
    full: drawFull,
    heard: () => clearTimeout(waiting),
    system: () => (system.value = model.get("system")),
  };
  for (const [name, draw] of Object.entries(watched)) {
    model.on(`change:${name}`, draw);
    draw();
  }
  el.append(root);
  return () => {
    for (const [name, draw] of Object.entries(watched)) model.off(`change:${name}`, draw);
  };
}

export default { render };
