/* The search scores of Sphinx, except that recipes with the query in a heading come first. */
var Scorer = {
  score: ([docname, , , , score]) =>
    docname === "guide/recipes" && score >= Scorer.partialTitle ? score + 20 : score,
  objNameMatch: 11,
  objPartialMatch: 6,
  objPrio: { 0: 15, 1: 5, 2: -5 },
  objPrioDefault: 0,
  title: 15,
  partialTitle: 7,
  term: 5,
  partialTerm: 2,
};
