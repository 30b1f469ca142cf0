(() => {
  const videos = [...document.querySelectorAll("video")];
  const calm = matchMedia("(prefers-reduced-motion: reduce)").matches;
  let playing = !calm;
  const button = document.querySelector("#play");
  const seen = new Set();
  // Controls cover much of a small video: show them only on hover or keyboard focus.
  for (const v of videos) {
    v.controls = false;
    v.tabIndex = 0;
    for (const e of ["pointerenter", "focus"]) v.addEventListener(e, () => { v.controls = true; });
    for (const e of ["pointerleave", "blur"]) v.addEventListener(e, () => { if (document.activeElement !== v) v.controls = false; });
  }
  const apply = () => {
    for (const v of videos) (playing && seen.has(v)) ? v.play().catch(() => {}) : v.pause();
    if (button) button.textContent = playing ? "Pause videos" : "Play videos";
  };
  if (button && videos.length) {
    button.hidden = false;
    button.addEventListener("click", () => { playing = !playing; apply(); });
  }
  // Play only visible videos; restart both videos of a pair together.
  const watch = new IntersectionObserver(entries => {
    for (const e of entries) e.isIntersecting ? seen.add(e.target) : seen.delete(e.target);
    apply();
  });
  videos.forEach(v => watch.observe(v));
  for (const pair of document.querySelectorAll(".pair")) {
    const [a, b] = pair.querySelectorAll("video");
    if (!a || !b) continue;
    a.loop = false;
    a.addEventListener("ended", () => { b.currentTime = a.currentTime = 0; if (playing) { a.play(); b.play(); } });
  }
  apply();
})();
