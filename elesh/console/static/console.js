// The console's conveniences: a switch between dark and light, times as ages, questions before what
// cannot be undone, and pages that stay current. Without script everything else works.
"use strict";

(() => {
  const root = document.documentElement;
  const stored = () => { try { return localStorage.getItem("elesh-theme"); } catch { return null; } };
  const dark = () => (root.dataset.theme || (matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light")) === "dark";
  if (stored()) root.dataset.theme = stored();

  const PAUSE = 2000;
  const QUIET = 120;

  // Times as ages; the exact time is in the title.
  const age = (seconds) => {
    for (const [unit, size] of [["d", 86400], ["h", 3600], ["min", 60]]) {
      if (seconds >= 2 * size) return `${Math.round(seconds / size)} ${unit} ago`;
    }
    return `${Math.max(0, Math.round(seconds))} s ago`;
  };
  // Times are the bus server's, and so is what they are counted from: this machine's clock may differ.
  let offset = 0;
  const setClock = (main) => { if (main.dataset.now) offset = Date.parse(main.dataset.now) - Date.now(); };
  const tellAges = () => document.querySelectorAll("main time[datetime]").forEach((each) => {
    const seconds = (Date.now() + offset - Date.parse(each.dateTime)) / 1000;
    each.title = each.title || `${each.textContent} UTC`;
    each.classList.toggle("quiet", seconds > QUIET);
    const text = age(seconds);
    if (each.textContent !== text) each.textContent = text;
  });

  // What a person is doing in a part: then it is not replaced under their hands.
  const changed = (field) => field.tagName === "SELECT"
    ? [...field.options].some((option) => option.selected !== option.defaultSelected && !(field.selectedIndex === 0 && !field.querySelector("[selected]")))
    : field.type !== "hidden" && field.value !== field.defaultValue;
  const busy = (part) => {
    const focused = document.activeElement;
    if (part.contains(focused) && ["INPUT", "SELECT", "TEXTAREA"].includes(focused.tagName)) return true;
    if ([...part.querySelectorAll("input, select, textarea")].some(changed)) return true;
    const selection = getSelection();
    return Boolean(selection && !selection.isCollapsed && selection.containsNode(part, true));
  };

  // Replaces a part, and keeps what the reader has opened, scrolled and focused in it.
  const name = (each) => each.id || each.getAttribute("href") || each.getAttribute("aria-label") || each.textContent;
  const replace = (part, html, hash) => {
    const open = new Map([...part.querySelectorAll("details[id]")].map((each) => [each.id, each.open]));
    const scrolled = new Map([...part.querySelectorAll(".scroll")].map((each) => [each.getAttribute("aria-label"), [each.scrollLeft, each.scrollTop]]));
    const focused = part.contains(document.activeElement) ? name(document.activeElement) : null;
    const fresh = new DOMParser().parseFromString(html, "text/html");
    part.replaceChildren(...fresh.body.childNodes);
    part.dataset.hash = hash;
    part.querySelectorAll("details[id]").forEach((each) => { if (open.has(each.id)) each.open = open.get(each.id); });
    part.querySelectorAll(".scroll").forEach((each) => {
      const place = scrolled.get(each.getAttribute("aria-label"));
      if (place) [each.scrollLeft, each.scrollTop] = place;
    });
    if (focused !== null) {
      const again = [...part.querySelectorAll("a, button, summary, [tabindex]")].find((each) => name(each) === focused);
      if (again) again.focus({ preventScroll: true });
    }
  };

  const waiting = new Map();  // parts that came while somebody was at work in them
  const parts = () => [...document.querySelectorAll("main .part")];
  const place = () => waiting.forEach(([html, hash], id) => {
    const part = document.getElementById(id);
    if (part && !busy(part)) { waiting.delete(id); replace(part, html, hash); }
  });
  const held = (part) => waiting.has(part.id) ? waiting.get(part.id)[1] : part.dataset.hash;

  const take = (main, told) => {
    const here = new Set(parts().map((part) => part.id));
    if (told.parts.some((id) => !here.has(id))) { location.reload(); return; }
    Object.entries(told.html).forEach(([id, [hash, html]]) => waiting.set(id, [html, hash]));
    place();
    main.dataset.live = told.version;
  };

  let heard = new Date();
  const say = (live, why) => {
    const stale = document.getElementById("stale");
    live.textContent = why ? "not live" : "live";
    live.classList.toggle("away", Boolean(why));
    document.body.classList.toggle("is-stale", Boolean(why));
    stale.hidden = !why;
    if (!why) { heard = new Date(); return; }
    const text = `${why}. What is shown is of ${heard.toISOString().slice(11, 19)} UTC; it renews itself as soon as that is over.`;
    if (stale.textContent !== text) stale.textContent = text;
  };

  const refresh = async (main, live) => {
    try {
      const known = parts().map((part) => `${part.id}=${held(part)}`).join(" ");
      const headers = { "Elesh-Live": main.dataset.live, "Elesh-Parts": known };
      const answer = await fetch(location.pathname + location.search, { headers, cache: "no-store", signal: AbortSignal.timeout(20000) });
      if (answer.status === 200) take(main, await answer.json());
      if (answer.status === 404 || answer.status === 400) return;
      say(live, answer.ok || answer.status === 304 ? "" : answer.status === 503 ? "The bus is away" : `The console answers ${answer.status}`);
    } catch {
      say(live, "The console is not reached");
    }
  };

  // A question before an act; {field} stands for what the form says.
  const question = (form, button) => (button.dataset.confirm || "").replace(/\{(\w+)\}/g, (_, field) => form.elements[field] ? form.elements[field].value : "");

  document.addEventListener("DOMContentLoaded", () => {
    const button = document.getElementById("theme");
    const label = () => { button.textContent = dark() ? "Light" : "Dark"; };
    button.hidden = false;
    label();
    button.addEventListener("click", () => {
      root.dataset.theme = dark() ? "light" : "dark";
      try { localStorage.setItem("elesh-theme", root.dataset.theme); } catch { /* not kept */ }
      label();
    });
    document.addEventListener("submit", (event) => {
      const asked = event.submitter ? question(event.target, event.submitter) : "";
      if (asked && !confirm(asked)) event.preventDefault();
    });
    const live = document.getElementById("live"), main = document.getElementById("main");
    setClock(main);
    tellAges();
    if (!live || !main.dataset.live) return;
    live.hidden = false;
    let turning = false;
    const turn = async () => {
      if (turning || document.hidden) return;
      turning = true;
      await refresh(main, live);
      place();
      tellAges();
      turning = false;
    };
    document.addEventListener("visibilitychange", turn);
    document.addEventListener("focusout", () => setTimeout(place));
    setInterval(turn, PAUSE);
  });
})();
