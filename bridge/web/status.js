// The status page's script: puts what /status.json has to show where the server has put it before.
"use strict";

const PERIOD = 1500; // ms between two looks
const PATIENCE = 5000; // ms for an answer
const TEXTS = ["user", "address", "doing", "file", "amount", "rate", "since"];
const body = document.getElementById("sessions");
const template = document.getElementById("row");
let timer = 0;

// Beside this page; without the user and password that its address may have, which fetch() refuses.
function here(name) {
  const url = new URL(name, location.href);
  url.username = url.password = "";
  return url;
}

function put(element, text) {
  if (element.textContent !== text) element.textContent = text;
}

function row(session) {
  let tr = document.getElementById("s-" + session.id);
  if (!tr) {
    tr = template.content.firstElementChild.cloneNode(true);
    tr.id = "s-" + session.id;
    const field = tr.querySelector("[name=session]");
    if (field) field.value = session.id;
  }
  for (const name of TEXTS) put(tr.querySelector("." + name), session.shown[name]);
  const progress = tr.querySelector("progress");
  progress.hidden = !session.transfer;
  if (session.shown.progress === null) progress.removeAttribute("value");
  else progress.value = session.shown.progress;
  return tr;
}

function show(status) {
  for (const element of document.querySelectorAll("[data-shown]")) {
    put(element, status.shown[element.dataset.shown]);
  }
  document.getElementById("down").setAttribute("points", status.chart.down);
  document.getElementById("up").setAttribute("points", status.chart.up);
  put(document.getElementById("top"), status.chart.top);
  const rows = status.listed.map(row);
  const known = new Set(rows);
  for (const old of [...body.children]) if (!known.has(old)) old.remove();
  rows.forEach((tr, index) => {
    if (body.children[index] !== tr) body.insertBefore(tr, body.children[index] || null);
  });
}

async function look() {
  clearTimeout(timer);
  if (document.hidden) return; // `visibilitychange` goes on
  let answered = false;
  try {
    const response = await fetch(here("status.json"), { signal: AbortSignal.timeout(PATIENCE) });
    answered = response.ok;
    if (answered) show(await response.json());
  } catch (error) {
    answered = false; // stopped, or unreachable
  }
  document.getElementById("lost").hidden = answered;
  clearTimeout(timer);
  timer = setTimeout(look, PERIOD);
}

body.addEventListener("submit", async (event) => {
  event.preventDefault();
  const form = event.target;
  const user = form.closest("tr").querySelector(".user").textContent;
  if (!confirm("Disconnect " + user + "?")) return;
  form.querySelector("button").disabled = true;
  try {
    const fields = new URLSearchParams(new FormData(form));
    await fetch(here("disconnect"), { method: "POST", body: fields, redirect: "manual" });
  } catch (error) {
    form.querySelector("button").disabled = false; // what is wrong, the next look shows
  }
  look();
});
document.addEventListener("visibilitychange", look);
timer = setTimeout(look, PERIOD);
