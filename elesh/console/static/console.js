// The console's two conveniences: a switch between dark and light, and pages that stay current.
// Without script everything else works.
"use strict";

(() => {
  const root = document.documentElement;
  const stored = () => { try { return localStorage.getItem("elesh-theme"); } catch { return null; } };
  const dark = () => (root.dataset.theme || (matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light")) === "dark";
  if (stored()) root.dataset.theme = stored();

  const PAUSE = 2000;
  let tag = null;

  const busy = (main) => {
    const focused = document.activeElement;
    return main.contains(focused) && ["INPUT", "SELECT", "TEXTAREA"].includes(focused.tagName);
  };

  // Replaces the main part, and keeps what the reader has opened, scrolled and focused.
  const replace = (main, text) => {
    const fresh = new DOMParser().parseFromString(text, "text/html").getElementById("main");
    if (!fresh) return;
    const open = [...main.querySelectorAll("details")].map((each) => each.open);
    const scrolled = [...main.querySelectorAll(".scroll")].map((each) => [each.scrollLeft, each.scrollTop]);
    const reachable = [...main.querySelectorAll("a, button, summary, [tabindex]")];
    const focused = reachable.indexOf(document.activeElement);
    main.replaceChildren(...fresh.childNodes);
    main.querySelectorAll("details").forEach((each, place) => { each.open = open[place] || each.open; });
    main.querySelectorAll(".scroll").forEach((each, place) => {
      if (scrolled[place]) [each.scrollLeft, each.scrollTop] = scrolled[place];
    });
    if (focused >= 0) {
      const again = [...main.querySelectorAll("a, button, summary, [tabindex]")][focused];
      if (again) again.focus({ preventScroll: true });
    }
  };

  const refresh = async (main, live) => {
    try {
      const headers = tag ? { "If-None-Match": tag } : {};
      const answer = await fetch(location.pathname, { headers, cache: "no-store" });
      if (answer.status === 200) {
        const text = await answer.text();
        if (tag && !busy(main)) replace(main, text);
        tag = answer.headers.get("ETag");
      }
      live.textContent = answer.ok || answer.status === 304 ? "live" : "not reached";
    } catch {
      live.textContent = "not reached";
    }
    live.classList.toggle("away", live.textContent !== "live");
  };

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
      const asked = event.submitter && event.submitter.dataset.confirm;
      if (asked && !confirm(asked)) event.preventDefault();
    });
    const live = document.getElementById("live"), main = document.getElementById("main");
    if (!live || location.pathname.endsWith("/replay")) return;
    live.hidden = false;
    const turn = async () => {
      if (!document.hidden) await refresh(main, live);
      setTimeout(turn, PAUSE);
    };
    turn();
  });
})();
