// The view as a page: answers were asked beforehand.
const read = (id) => JSON.parse(document.getElementById(id).textContent);
const answers = read("answers");
mount(document.getElementById("explorer"), {
  Plotly: window.Plotly,
  state: read("state"),
  live: false,
  ask: async (question) => {
    const found = answers[JSON.stringify(question)];
    if (found === undefined) throw new Error(ABSENT[question[0]]);
    if (found.error) throw new Error(found.error);
    return found;
  },
});
