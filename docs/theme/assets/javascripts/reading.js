// What is wider than the page scrolls inside it; give the keyboard that too.
document.addEventListener("DOMContentLoaded", () => {
  for (const box of document.querySelectorAll(".md-typeset__scrollwrap, .md-typeset pre > code"))
    if (box.scrollWidth > box.clientWidth) box.tabIndex = 0
})

// Names that the theme leaves out, for screen readers.
document.querySelector("[data-md-component=search]")?.setAttribute("aria-label", "Search")
for (const [n, nav] of document.querySelectorAll("nav[aria-labelledby]").entries()) {
  const label = document.getElementById(nav.getAttribute("aria-labelledby"))
  nav.removeAttribute("aria-labelledby")
  nav.setAttribute("aria-label", `${label?.textContent.trim() || "Section"}, part ${n + 1}`)
}
for (const head of document.querySelectorAll("th")) {
  if (head.textContent.trim()) continue
  const cell = document.createElement("td") // a corner that names nothing is no heading
  head.replaceWith(cell)
}
let blocks = 0
const named = () => {
  for (const nav of document.querySelectorAll("nav.md-code__nav:not([aria-label])")) nav.setAttribute("aria-label", `Code block ${++blocks}`)
}
new MutationObserver(named).observe(document.body, { childList: true, subtree: true })
named()
