for (const candidate of document.querySelectorAll("img.candidate")) {
  const images = candidate.closest(".images");
  const reference = images.querySelector("img.reference");
  const role = candidate.parentElement.querySelector(".role");
  const own = candidate.src;
  const show = (other) => {
    candidate.src = other ? reference.src : own;
    role.textContent = other ? "reference" : "candidate";
    candidate.parentElement.classList.toggle("swapped", other);
  };
  candidate.addEventListener("pointerenter", () => show(true));
  for (const end of ["pointerleave", "pointerup", "pointercancel"]) {
    candidate.addEventListener(end, () => show(false));
  }
  candidate.addEventListener("pointerdown", () => show(true));
  candidate.addEventListener("contextmenu", (event) => event.preventDefault());
}
