// What a browser has to do by itself: stay at the end, copy, open links beside the page, remember dark.
let atEnd = true;
addEventListener("scroll", () => {
  atEnd = innerHeight + scrollY >= document.documentElement.scrollHeight - 100;
});
function follow() {
  atEnd = true;
  scrollTo(0, document.documentElement.scrollHeight);
}
addEventListener("load", () => {
  new MutationObserver(() => atEnd && follow()).observe(document.getElementById("app"), {
    childList: true,
    subtree: true,
    characterData: true,
  });
  const kept = localStorage.getItem("dark");
  if (kept) setDark(kept === "true");
});
function switchDark() {
  const dark = !document.body.classList.contains("body--dark");
  setDark(dark);
  localStorage.setItem("dark", dark);
}
async function copyText(text) {
  if (navigator.clipboard) return navigator.clipboard.writeText(text);
  const area = Object.assign(document.createElement("textarea"), { value: text });
  document.body.append(area);
  area.select();
  document.execCommand("copy"); // where the page is not served securely
  area.remove();
}
document.addEventListener("click", (event) => {
  const button = event.target.closest("button.copy");
  if (button) {
    copyText(button.closest(".code").querySelector("pre").innerText);
    button.textContent = "Copied";
    setTimeout(() => (button.textContent = "Copy"), 1500);
  }
  const link = event.target.closest(".markdown a");
  if (link) {
    event.preventDefault();
    if (/^(https?|mailto):/i.test(link.href) && link.getAttribute("href") !== "#")
      open(link.href, "_blank", "noopener,noreferrer");
  }
});
