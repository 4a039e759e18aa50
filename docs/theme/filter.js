// Menus above the table of methods, made of what its columns contain; methods.html#all_fail starts with that symptom.
const box = document.querySelector("#filters");
const table = box?.parentElement.querySelector("table");
if (table) {
  const rows = [...table.tBodies[0].rows].map((row) => ({
    row,
    hook: [...row.cells[2].querySelectorAll("code")].map((code) => [code.textContent, code.textContent]),
    symptom: [...row.cells[3].querySelectorAll("a")].map((link) => [link.hash.slice(1), link.textContent]),
  }));
  const menus = {};
  const show = () => {
    let left = 0;
    for (const entry of rows) {
      const fits = ["hook", "symptom"].every(
        (kind) => !menus[kind].value || entry[kind].some(([value]) => value === menus[kind].value),
      );
      entry.row.hidden = !fits;
      left += fits;
    }
    count.textContent = `${left} of ${rows.length} methods`;
  };
  for (const [kind, all] of [["symptom", "Any problem"], ["hook", "Any hook"]]) {
    const menu = (menus[kind] = box.appendChild(document.createElement("select")));
    menu.ariaLabel = kind;
    menu.add(new Option(all, ""));
    const options = new Map(rows.flatMap((entry) => entry[kind]));
    for (const [value, text] of [...options].sort((a, b) => a[1].localeCompare(b[1]))) menu.add(new Option(text, value));
    menu.addEventListener("change", show);
  }
  const count = box.appendChild(document.createElement("span"));
  const wanted = decodeURIComponent(location.hash.slice(1));
  for (const menu of Object.values(menus)) {
    if ([...menu.options].some((option) => option.value === wanted)) menu.value = wanted;
  }
  show();
}
