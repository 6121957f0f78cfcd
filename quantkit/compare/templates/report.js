// Point at a candidate, or hold it, to see the reference in its place.
for (const candidate of document.querySelectorAll(".frame .candidate")) {
  const frame = candidate.parentElement;
  const role = frame.querySelector(".role");
  const reference = frame.parentElement.querySelector(".reference");
  const own = candidate.src;
  const show = (other) => {
    if (own) candidate.src = other ? reference.src : own;
    role.textContent = other ? "reference" : "candidate";
    frame.classList.toggle("swapped", other);
  };
  candidate.addEventListener("pointerenter", () => show(true));
  for (const end of ["pointerleave", "pointerup", "pointercancel"]) {
    candidate.addEventListener(end, () => show(false));
  }
  candidate.addEventListener("pointerdown", () => show(true));
  candidate.addEventListener("contextmenu", (event) => event.preventDefault());
}

// Films: the three players of a figure show the same frame, and only figures in view play.
const still = matchMedia("(prefers-reduced-motion: reduce)").matches;
const films = [];
const inView = new IntersectionObserver((entries) => {
  for (const entry of entries) films.find((film) => film.figure === entry.target).seen = entry.isIntersecting;
});
for (const figure of document.querySelectorAll(".film")) {
  const button = figure.querySelector(".controls button");
  if (!button) continue;
  const [slider, output, strip] = ["input", "output", ".strip"].map((name) => figure.querySelector(name));
  const numbers = strip.dataset.numbers.split(",");
  const film = { figure, seen: false, playing: !still, count: numbers.length, seconds: Number(figure.dataset.seconds) };
  film.show = (frame) => {
    if (film.frame === frame) return;
    film.frame = frame;
    slider.value = frame;
    output.textContent = `frame ${numbers[frame]}`;
    figure.querySelector(".images").style.setProperty("--frame", frame);
  };
  film.play = (playing) => {
    film.playing = playing;
    button.textContent = playing ? "\u275a\u275a" : "\u25b6\ufe0e";
    button.setAttribute("aria-label", playing ? "pause" : "play");
  };
  button.addEventListener("click", () => film.play(!film.playing));
  slider.addEventListener("input", () => { film.play(false); film.show(Number(slider.value)); });
  for (const cell of strip.children) {
    cell.addEventListener("click", () => { film.play(false); film.show(Number(cell.dataset.frame)); });
  }
  film.play(film.playing);
  films.push(film);
  inView.observe(figure);
}
const tick = (now) => {
  for (const film of films) {
    if (film.seen && film.playing) film.show(Math.floor((now / 1000 / film.seconds) * film.count) % film.count);
  }
  requestAnimationFrame(tick);
};
if (films.length) requestAnimationFrame(tick);
